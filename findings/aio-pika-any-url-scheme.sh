#!/usr/bin/env bash
# aio-pika takes a URL of any scheme, if the URL names a port.
#
# Expected: connect("rabbitmq://…") raises an error that names the right schemes, as pika does.
# Seen with aio-pika 10.2.1, aiormq 7.2.4 and Python 3.11: with a port it connects, and speaks AMQP
# as for "amqp". Without a port, the scheme is looked up in a table of ports: a bare KeyError. So a
# wrong scheme is found in some environments only.
#
# Output seen:
#     with a port: b'AMQP\x00\x00\t\x01'
#     without a port: KeyError('rabbitmq')
#     pika: ValueError
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q aio-pika==10.2.1 aiormq==7.2.4 pika==1.4.4
"$folder/venv/bin/python" - <<'PYTHON'
import asyncio
import logging

import aio_pika
import pika

logging.disable()


async def main() -> None:
    heard = asyncio.Queue()

    async def server(reader, writer):
        heard.put_nowait(await reader.readexactly(8))
        writer.close()

    listener = await asyncio.start_server(server, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    try:
        await aio_pika.connect(f"rabbitmq://127.0.0.1:{port}/")
    except aio_pika.exceptions.AMQPConnectionError:
        pass  # the server has closed the connection
    header = heard.get_nowait()
    print(f"with a port: {header}")
    assert header == b"AMQP\x00\x00\x09\x01"
    try:
        await aio_pika.connect("rabbitmq://127.0.0.1/")
    except KeyError as error:
        print(f"without a port: {error!r}")
        assert error.args == ("rabbitmq",)
    else:
        raise AssertionError("no KeyError")


asyncio.run(main())
try:
    pika.URLParameters("rabbitmq://127.0.0.1:5672/")
except ValueError as error:
    print("pika:", type(error).__name__)
else:
    raise AssertionError("pika takes it, too")
PYTHON
