"""Emit a log message to every running copy of receive_logs.py.

  python emit_log.py "disk almost full"

Exit status: 0 confirmed by the broker, 1 error (one line on stderr), 2 usage.
"""

import signal  # first, so that CTRL+C prints no traceback even during the slow imports below

signal.signal(signal.SIGINT, signal.SIG_DFL)  # dying of the signal also ends a calling shell loop

import asyncio
import logging
import os
import re
import sys
from argparse import ArgumentParser, RawTextHelpFormatter
from contextlib import suppress
from errno import EIO, EPIPE
from typing import TextIO
from unicodedata import category

from aio_pika import ExchangeType, Message, connect, exceptions
from aiormq import spec

TIMEOUT = 10  # seconds, for the whole conversation with the broker
URL = os.getenv("AMQP_URL", "amqp://guest:guest@localhost/")
# No "@" in the path: there it would end a password whose "/" was not written as %2F.
URL_FORM = r"amqps?://([^/?#]*@)?(\[[^]]*]|[^/:@[]+)(:[0-9]+)?([/?#][^@]*)?"


async def emit_log(url: str, body: bytes, publishing: asyncio.Event) -> bool:
    """Publish one message, wait for the publisher confirm, and return whether a queue got it.

    Sets `publishing` before the message can leave. Raises aio-pika's exceptions.
    """
    # Not connect_robust: it would not publish again. The host's next address is tried after 0.25 s.
    async with await connect(url, happy_eyeballs_delay=0.25) as connection:
        channel = await connection.channel()
        logs_exchange = await channel.declare_exchange("logs", ExchangeType.FANOUT)
        message = Message(body)
        publishing.set()  # from here on, an error does not tell whether the message was sent
        confirm = await logs_exchange.publish(message, routing_key="")
        return isinstance(confirm, spec.Basic.Ack)  # if no queue got it, our message comes back


def explain(error: BaseException, doing: str) -> str:
    """Say what went wrong; add "while ..." unless that tells what became of the message."""
    words = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
    match error:
        case exceptions.DeliveryError():
            return "the broker rejected the message for at least one queue"
        case exceptions.AMQPChannelError():
            return str(error.args[-1])  # in the broker's words
        case exceptions.ProbableAuthenticationError() | exceptions.AuthenticationError():
            return f"login refused ({error.args[0]}). Is it the right URL? See --url and AMQP_URL"
        case exceptions.InvalidFrameError() if "OpenOk" in str(error):  # aiormq drops the reason
            return "no such vhost, or not for this user, or too many connections"
        case OSError() if refused := re.search(r"Errno (\d+)] Connect call failed", str(error)):
            return f"{os.strerror(int(refused[1]))}. Is RabbitMQ running there?"
        case TimeoutError():
            words = f"no answer within {TIMEOUT} s (a memory or disk alarm, or not RabbitMQ)"
        case exceptions.ConnectionClosed():
            words = str(error.args[-1])  # in the broker's words
        case ConnectionError(strerror=None) | asyncio.CancelledError() | Exception(args=()):
            words = "the server hung up"  # aiormq raises any of these for that
    return f"{words} while {doing}"


def write_line(stream: TextIO, line: str) -> None:
    """Write a line; escape what is not printable, but for spaces and joiners. Raises OSError."""
    shown = "".join(
        c if c.isprintable() or category(c) == "Zs" or c in "\t\u200c\u200d" else repr(c)[1:-1]
        for c in line
    )
    shown = shown.encode(stream.encoding, "backslashreplace").decode(stream.encoding)
    os.set_blocking(stream.fileno(), True)  # or else print fails, if a shared pipe is non-blocking
    print(shown, file=stream, flush=True)


async def main() -> tuple[int, str]:
    """Run the command line; return the exit status, and what to say on stderr."""
    usage = "%(prog)s [--url URL] [--] [message ...]"
    parser = ArgumentParser(usage=usage, description=__doc__, formatter_class=RawTextHelpFormatter)
    parser.add_argument("message", nargs="*", help="the words of the message (none: Hello World!)")
    parser.add_argument("--url", default=URL, help="the broker (default: AMQP_URL, else localhost)")
    args = parser.parse_args()
    body = os.fsencode(" ".join(args.message) if any(args.message) else "Hello World!")
    logging.disable()  # or else the libraries log, with tracebacks, what is told here
    sys.unraisablehook = lambda _: None  # or else Python complains of a connect that was given up
    if not re.fullmatch(URL_FORM, args.url):
        return 1, "the URL has to look like amqp://user:password@host:port/vhost"
    publishing = asyncio.Event()  # a flag that nobody waits for
    try:
        emitting = asyncio.shield(emit_log(args.url, body, publishing))  # TLS takes 30 s to cancel
        routed = await asyncio.wait_for(emitting, TIMEOUT)  # unshielded, it would wait for that
    except (Exception, asyncio.CancelledError) as error:
        unsure = "publishing; the message may or may not have been sent"
        words = explain(error, unsure if publishing.is_set() else "connecting")
        return 1, f"{re.sub('(?s)//.*@', '//', args.url)}: {words}"  # without the password
    try:
        if sys.stdout:  # not closed
            write_line(sys.stdout, " [x] Sent " + body.decode(errors="backslashreplace"))
    except OSError as error:
        if error.errno not in (EPIPE, EIO):  # these two: nobody reads the pipe or terminal any more
            return 1, f"sent, but cannot write to stdout: {error.strerror}"
    return 0, ("" if routed else "no receiver is listening: the broker discarded the message")


if __name__ == "__main__":
    status, complaint = asyncio.Runner().run(main())  # left unclosed on purpose: see the last line
    with suppress(OSError):
        if complaint and sys.stderr:
            write_line(sys.stderr, f"emit_log.py: {complaint}")
    os._exit(status)  # sys.exit and asyncio.run would wait for threads that are stuck in DNS
