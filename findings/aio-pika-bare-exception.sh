#!/usr/bin/env bash
# aio-pika raises a bare Exception if the server ends the connection just after it has opened it.
#
# A broker that is shutting down, or a balancer in front of it, can end a connection at any moment.
#
# Expected: an error of aio-pika's own, as one byte earlier, so that "except AMQPError", or the
# tuple CONNECTION_EXCEPTIONS that the library exports for this purpose, catches both.
# Seen with aio-pika 10.2.1, aiormq 7.2.4 and Python 3.11: what waits for its first answer on the
# new connection gets an instance of Exception itself, without a text, which neither catches.
#
# Output seen:
#     the end comes instead of the last answer: AMQPConnectionError
#     the end comes just behind the last answer: Exception()
#     in CONNECTION_EXCEPTIONS: False
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q aio-pika==10.2.1 aiormq==7.2.4 pika==1.4.4
"$folder/venv/bin/python" - <<'PYTHON'
import asyncio
import logging

import aio_pika
from aio_pika.exceptions import CONNECTION_EXCEPTIONS, AMQPError
from pika import frame, spec

logging.disable()
START = frame.Method(
    0, spec.Connection.Start(server_properties={"capabilities": {"publisher_confirms": True}})
).marshal()
TUNE = frame.Method(0, spec.Connection.Tune(2047, 131072, 60)).marshal()
OPEN_OK = frame.Method(0, spec.Connection.OpenOk()).marshal()


async def read_method(reader: asyncio.StreamReader) -> None:
    """Read a frame: seven bytes with the length of the rest, the rest, and an end."""
    head = await reader.readexactly(7)
    await reader.readexactly(int.from_bytes(head[3:], "big") + 1)


async def error_of(last_answer: bytes) -> BaseException:
    """Return what a client meets whose server ends the connection behind the last answer."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(8)  # the header
        writer.write(START)
        await read_method(reader)  # StartOk
        writer.write(TUNE)
        await read_method(reader)  # TuneOk
        await read_method(reader)  # Open
        writer.write(last_answer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        connection = await aio_pika.connect(f"amqp://guest:guest@127.0.0.1:{port}/")
        await connection.channel()
    except Exception as error:
        return error
    raise AssertionError("no error")


async def main() -> None:
    before = await error_of(b"")
    print("the end comes instead of the last answer:", type(before).__name__)
    assert isinstance(before, AMQPError)
    assert isinstance(before, CONNECTION_EXCEPTIONS)
    behind = await error_of(OPEN_OK)
    print(f"the end comes just behind the last answer: {behind!r}")
    print("in CONNECTION_EXCEPTIONS:", isinstance(behind, CONNECTION_EXCEPTIONS))
    assert type(behind) is Exception
    assert not str(behind)


asyncio.run(main())
PYTHON
