"""Emit a log message to every running copy of receive_logs.py.

  python emit_log.py "disk almost full"

The broker is --url, else the environment variable AMQP_URL, else
amqp://guest:guest@localhost/ (amqp or amqps://user:password@host:port/vhost).
Exit status: 0 confirmed by the broker, 1 error (one line on stderr), 2 usage.
"""

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)  # CTRL+C ends the imports and a shell loop as well

import asyncio
import logging
import os
import re
import sys
from argparse import ArgumentParser, RawTextHelpFormatter
from contextlib import suppress
from typing import TextIO
from unicodedata import category

from aio_pika import ExchangeType, Message, connect, exceptions
from aiormq.abc import DeliveredMessage

TIMEOUT = 10  # seconds, for the whole conversation with the broker


async def emit_log(url: str, body: bytes) -> bool:
    """Publish one message; return, after the publisher confirm, whether it was routed to a queue.

    Raises aio-pika's exceptions, and aiormq's bare Exception if the broker hangs up on us.
    """
    # Not connect_robust: it would connect again in silence, but not publish again.
    connection = await asyncio.shield(connect(url))  # behind TLS, cancelling it takes 30 s
    try:
        channel = await connection.channel()
        logs_exchange = await channel.declare_exchange("logs", ExchangeType.FANOUT)
        message = Message(body)
        confirm = await logs_exchange.publish(message, routing_key="")
        return not isinstance(confirm, DeliveredMessage)  # it comes back if no queue is bound
    finally:
        # If a broker behind TLS is silent, a goodbye without a limit takes 30 s.
        await asyncio.wait({asyncio.create_task(connection.close())}, timeout=1)


def explain(error: BaseException, where: str) -> str:
    """Say in plain words what went wrong, without the user and password of the URL."""
    words, unsure = "the connection broke off", "; the message may or may not have been sent"
    match error:
        case ValueError():
            return "the URL has to look like amqp://user:password@host:port/vhost"
        case TimeoutError():
            words = f"no answer within {TIMEOUT} s (a memory or disk alarm, or not RabbitMQ)"
        case exceptions.DeliveryError():
            words, unsure = "the broker rejected the message for at least one queue", ""
        case exceptions.InvalidFrameError() if "OpenOk" in str(error):
            words, unsure = "no such vhost, or not for this user, or too many connections", ""
        case OSError() if failed := re.search(r"Errno (\d+)] Connect call failed", str(error)):
            words, unsure = f"{os.strerror(int(failed[1]))}. Is RabbitMQ running there?", ""
        case exceptions.AMQPChannelError() | exceptions.ProbableAuthenticationError():
            words, unsure = str(error.args[-1]), ""
        case OSError(strerror=str(words)) if not isinstance(error, exceptions.ConnectionClosed):
            unsure = ""
    return f"{re.sub('(?s)//.*@', '//', where)}: {words}{unsure}"


def say(line: str, stream: TextIO) -> None:
    """Print one harmless line. A stream that is closed (None) or that nobody reads is no error."""
    shown = "".join(
        c if c.isprintable() or category(c) == "Zs" or c in "\t\u200c\u200d" else repr(c)[1:-1]
        for c in line
    )
    with suppress(AttributeError, OSError if stream is sys.stderr else BrokenPipeError):
        shown = shown.encode(stream.encoding, "backslashreplace").decode(stream.encoding)
        print(shown, file=stream, flush=True)


def main() -> int:
    """Run the command line and return the exit status."""
    usage = "%(prog)s [--url URL] [--] [message ...]"
    parser = ArgumentParser(usage=usage, description=__doc__, formatter_class=RawTextHelpFormatter)
    parser.add_argument("message", nargs="*", help="the words of it; none: Hello World!")
    parser.add_argument("--url", default=os.getenv("AMQP_URL", "amqp://guest:guest@localhost/"))
    args = parser.parse_args()
    body = os.fsencode(" ".join(args.message) if any(args.message) else "Hello World!")
    logging.disable()  # the libraries also log, with tracebacks, what is told here
    where = args.url
    try:
        if not re.fullmatch("amqps?://([^/?#]*@)?[^/:@][^@]*", args.url):
            raise ValueError
        routed = asyncio.Runner().run(asyncio.wait_for(emit_log(args.url, body), TIMEOUT))
        where = "sent, but cannot write to stdout"
        say(" [x] Sent " + body.decode(errors="backslashreplace"), sys.stdout)
    except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001
        say(f"emit_log.py: {explain(error, where)}", sys.stderr)
        return 1
    if not routed:
        say("emit_log.py: no receiver is listening: the broker discarded the message", sys.stderr)
    return 0


if __name__ == "__main__":
    os._exit(main())  # sys.exit, like asyncio.run above, would wait for threads that DNS holds up
