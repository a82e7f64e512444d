#!/usr/bin/env bash
# aio-pika does not tell why a broker refuses a vhost.
#
# A broker refuses a vhost with Connection.Close, in which a code and a sentence say why: there is no
# such vhost, this user has no right to it, or it has too many connections.
#
# Expected: the exception carries the code and the sentence, as pika's does.
# Seen with aio-pika 10.2.1, aiormq 7.2.4 and Python 3.11: InvalidFrameError, whose text names the
# frames that were expected, and of the one that came only its class.
#
# Output seen:
#     pika: ConnectionClosedByBroker: (530) 'NOT_ALLOWED - vhost nowhere not found'
#     aio-pika: InvalidFrameError
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q aio-pika==10.2.1 aiormq==7.2.4 pika==1.4.4
"$folder/venv/bin/python" - <<'PYTHON'
import asyncio
import logging
import socket
import threading

import aio_pika
import pika
from pika import frame, spec

logging.disable()
REASON = "NOT_ALLOWED - vhost nowhere not found"  # RabbitMQ's words
START = spec.Connection.Start(server_properties={"capabilities": {}})
TUNE = spec.Connection.Tune(2047, 131072, 60)
CLOSE = spec.Connection.Close(530, REASON, 10, 40)
listener = socket.create_server(("127.0.0.1", 0))
url = f"amqp://guest:guest@127.0.0.1:{listener.getsockname()[1]}/nowhere"


def read_method(client: socket.socket) -> None:
    """Read a frame: seven bytes with the length of the rest, the rest, and an end."""
    head = client.recv(7, socket.MSG_WAITALL)
    client.recv(int.from_bytes(head[3:], "big") + 1, socket.MSG_WAITALL)


def serve() -> None:
    for _ in "pika", "aio-pika":
        client = listener.accept()[0]
        client.recv(8, socket.MSG_WAITALL)  # the header
        client.sendall(frame.Method(0, START).marshal())
        read_method(client)  # StartOk
        client.sendall(frame.Method(0, TUNE).marshal())
        read_method(client)  # TuneOk
        read_method(client)  # Open
        client.sendall(frame.Method(0, CLOSE).marshal())
        while client.recv(4096):
            pass
        client.close()


threading.Thread(target=serve, daemon=True).start()
try:
    pika.BlockingConnection(pika.URLParameters(url))
except pika.exceptions.ProbableAccessDeniedError as error:
    print("pika:", error)
    assert "530" in str(error)
    assert REASON in str(error)
else:
    raise AssertionError("no error")
try:
    asyncio.run(aio_pika.connect(url))
except aio_pika.exceptions.AMQPError as error:
    print("aio-pika:", type(error).__name__)
    assert type(error).__name__ == "InvalidFrameError"
    assert "530" not in str(error)
    assert REASON not in str(error)
else:
    raise AssertionError("no error")
PYTHON
