"""Emit a log message to every running copy of receive_logs.py.

  python emit_log.py "disk almost full"

Exit status: 0 confirmed by the broker, even if nobody received it, 1 error (one line on stderr),
2 usage.
"""

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)  # CTRL+C: no traceback, not even in slow imports

import asyncio
import logging
import os
import re
import sys
from argparse import ArgumentParser, RawTextHelpFormatter
from contextlib import suppress
from io import TextIOWrapper

from aio_pika import ExchangeType, Message, connect, exceptions
from aiormq.abc import DeliveredMessage

TIMEOUT = 10  # seconds, from connecting to the confirm
URL = os.getenv("AMQP_URL") or "amqp://guest:guest@localhost/"


async def emit_log(url: str, body: bytes) -> int:
    """Publish one message, say what became of it, and return the exit status."""
    connection = None
    publishing = False
    try:
        async with asyncio.timeout(TIMEOUT):
            connection = await connect(url)
            channel = await connection.channel()
            # Both scripts declare it, so that either can start first.
            logs_exchange = await channel.declare_exchange("logs", ExchangeType.FANOUT)
            publishing = True
            # Waits for the publisher confirm. A mandatory message comes back if no queue is bound.
            answer = await logs_exchange.publish(Message(body), routing_key="", mandatory=True)
    except (exceptions.AMQPChannelError, exceptions.DeliveryError) as error:
        say(explain(url, error))  # the broker has refused the exchange or the message
        return 1
    except (Exception, asyncio.CancelledError) as error:  # aiormq raises CancelledError, too
        unsure = "; the message may or may not have been sent" if publishing else ""
        say(explain(url, error) + unsure)
        return 1
    finally:  # close() can hang or fail: wait() gives it a second, and raises nothing
        if connection:
            await asyncio.wait({asyncio.create_task(connection.close())}, timeout=1)
    with suppress(OSError):  # nobody has to read it
        print(" [x] Sent", body.decode(errors="backslashreplace"), flush=True)
    if isinstance(answer, DeliveredMessage):  # the message itself, not a confirm
        say("emit_log.py: no receiver is listening: the broker discarded the message")
    return 0


def explain(url: str, error: BaseException) -> str:
    """Say what went wrong, and at which broker."""
    match error:
        case ValueError():  # its own words can show the password
            return "emit_log.py: the URL has to look like amqp://user:password@host:port/vhost"
        case TimeoutError():
            words = f"no answer within {TIMEOUT} s"
        case OSError() if re.search("Connect call failed|WinError 1225", str(error)):
            words = "cannot connect. Is RabbitMQ running there?"
        case exceptions.InvalidFrameError() if "OpenOk" in str(error):  # aiormq drops the reason
            words = "no such vhost, or not for this user, or it is down, or too many connections"
        case exceptions.DeliveryError():
            words = "the broker rejected the message for at least one queue"
        case BaseException() if not str(error) or "Server connection" in str(error):  # aiormq's
            words = "the server hung up"
        case _:
            words = f"{type(error).__name__}: {error}"
    return f"emit_log.py: {url.rpartition('@')[2]}: {words}"  # without user and password


def say(words: str) -> None:
    """Print one line on stderr, if possible. Escape what is unsafe: the broker may have said it."""
    harmless = "".join(c if c.isprintable() else repr(c)[1:-1] for c in words)
    with suppress(OSError, AttributeError):  # sys.stderr is None if it is closed
        sys.stderr.write(harmless + "\n")


if __name__ == "__main__":
    usage = "%(prog)s [--url URL] [--] [message ...]"
    parser = ArgumentParser(usage=usage, description=__doc__, formatter_class=RawTextHelpFormatter)
    parser.add_argument("message", nargs="*", help="the words of the message (none: Hello World!)")
    parser.add_argument("--url", default=URL, help="the broker (default: AMQP_URL, else localhost)")
    args = parser.parse_args()
    if not re.fullmatch("amqps?://([^/]*@)?[^/:@][^@]*", args.url):
        sys.exit(explain(args.url, ValueError()))  # aiormq would go to localhost without a host
    logging.disable()  # otherwise the libraries log, with tracebacks, the errors that we explain
    if isinstance(sys.stdout, TextIOWrapper):  # it is None if stdout is closed
        sys.stdout.reconfigure(errors="backslashreplace")  # for letters that it cannot encode
    body = os.fsencode(" ".join(args.message) or "Hello World!")
    # Not asyncio.run and sys.exit: they would wait for a thread that is stuck in DNS.
    os._exit(asyncio.Runner().run(emit_log(args.url, body)))
