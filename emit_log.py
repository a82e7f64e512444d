"""Emit a log message to every running copy of receive_logs.py.

  python emit_log.py "disk almost full"

An empty message becomes "Hello World!". Exit status: 0 if the broker has confirmed the message,
even if nobody was there to receive it; 1 if it has not, and a line on stderr says why (the message
may have been sent even so); 2 usage. CTRL+C ends it at once, without a word.
Needs Python 3.11 and aio-pika 10.2, or newer.
"""

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)  # CTRL+C: no traceback, not even in slow imports

import asyncio
import logging
import os
import sys
from argparse import ArgumentParser, ArgumentTypeError, RawTextHelpFormatter
from contextlib import suppress
from io import TextIOWrapper
from urllib.parse import urlsplit

from aio_pika import ExchangeType, Message, connect, exceptions
from aio_pika.abc import AbstractConnection

URL = os.getenv("AMQP_URL") or "amqp://guest:guest@localhost/"
TIMEOUT = 10  # seconds to connect, and again to publish
# Control characters could clear the screen, for example, so they are printed as \x1b and so on.
ESCAPES = {code: repr(chr(code))[1:-1] for code in [*range(0x20), *range(0x7F, 0xA0)]}


async def emit_log(url: str, body: bytes) -> bool:
    """Connect, publish a message, and return whether a queue was bound. Raises if it fails."""
    connection = await asyncio.wait_for(connect(url), TIMEOUT)
    try:
        return await asyncio.wait_for(publish(connection, body), TIMEOUT)
    finally:
        # close() can hang or fail: wait() gives it a second, and does not raise its error.
        await asyncio.wait({asyncio.create_task(connection.close())}, timeout=1)


async def publish(connection: AbstractConnection, body: bytes) -> bool:
    """Publish a message. Return whether a queue was bound. Raises if it is not confirmed."""
    channel = await connection.channel(publisher_confirms=True, on_return_raises=True)
    # Both scripts declare the exchange, so that either can start first.
    logs_exchange = await channel.declare_exchange("logs", ExchangeType.FANOUT)
    try:  # this waits for the broker's confirm
        await logs_exchange.publish(Message(body), routing_key="", mandatory=True)
    except exceptions.PublishError:  # it came back, as it is mandatory: no queue is bound
        return False
    return True


async def main(url: str, body: bytes) -> int:
    """Emit the message, say what became of it, and return the exit status."""
    try:
        routed = await emit_log(url, body)
    except (Exception, asyncio.CancelledError) as error:  # aiormq raises CancelledError, too
        broker = url.rpartition("@")[2]  # without user and password
        complain(f"not confirmed by {broker}: {explain(error)}")
        return 1
    text = body.decode(errors="backslashreplace")
    with suppress(OSError):  # stdout is closed or full: the message was sent all the same
        print(" [x] Sent", text.translate(ESCAPES), flush=True)
    if not routed:
        complain("no receiver is listening: the broker discarded the message")
    return 0


def explain(error: BaseException) -> str:
    """Say what went wrong. Many errors say it themselves."""
    match error:
        case TimeoutError():
            return f"no answer within {TIMEOUT} s (it may be down, or short of memory or disk)"
        case asyncio.CancelledError():
            return "the broker fell silent"
        case exceptions.ProbableAuthenticationError():
            return f"{error} (guest can usually log in from the broker's own machine only)"
        case exceptions.InvalidFrameError() if "OpenOk" in str(error):  # aiormq drops the reason
            return "no such vhost, or not for this user, or it is down, or too many connections"
        case exceptions.DeliveryError():
            return "the broker rejected the message for at least one queue"
        case exceptions.ConnectionClosed():  # the broker says why
            return str(error)
        case ConnectionError():
            return f"{error}. Is RabbitMQ running there?"
        case _:
            logging.getLogger(__name__).error("The traceback:", exc_info=error)  # for python -X dev
            return f"{type(error).__name__}: {error}"


def complain(words: str) -> None:
    """Print one line on stderr, if that is possible."""
    with suppress(OSError, AttributeError):  # sys.stderr is None if it is closed
        sys.stderr.write(f"emit_log.py: {words.translate(ESCAPES)}\n")


def amqp_url(text: str) -> str:
    """Return the text, for argparse. Raises ArgumentTypeError if it is not a broker's URL."""
    with suppress(ValueError):  # the port is not a number, for example
        parts = urlsplit(text)
        if parts.scheme in {"amqp", "amqps"} and parts.hostname and parts.port != 0:
            return text
    raise ArgumentTypeError("it (or AMQP_URL) must look like amqp://user:password@host:port/vhost")


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter)
    parser.add_argument("message", nargs="*", help="its words, after -- if one begins with a dash")
    parser.add_argument("--url", type=amqp_url, default=URL, help="the broker (default: AMQP_URL)")
    args = parser.parse_args()
    body = os.fsencode(" ".join(args.message) or "Hello World!")
    if not sys.flags.dev_mode:
        logging.disable()  # the libraries log, with tracebacks, the errors that we explain
    if isinstance(sys.stdout, TextIOWrapper):  # it is None if stdout is closed
        sys.stdout.reconfigure(errors="backslashreplace")  # for letters that it cannot encode
    # Not asyncio.run and sys.exit: they would wait for a thread that is stuck in DNS.
    os._exit(asyncio.Runner().run(main(args.url, body)))
