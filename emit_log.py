"""Emit a log message to every running copy of receive_logs.py.

  python emit_log.py "disk almost full"

Exit status: 0 confirmed by the broker, 1 error (one line on stderr), 2 usage.
"""

import signal

# Before the slow imports, so that CTRL+C prints no traceback. If our parent ignores it, so do we.
if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import asyncio
import logging
import os
import re
import sys
from argparse import ArgumentParser, RawTextHelpFormatter
from contextlib import suppress
from io import TextIOWrapper
from unicodedata import category

from aio_pika import ExchangeType, Message, connect, exceptions

TIMEOUT = 10  # seconds, from connecting to closing
URL = os.getenv("AMQP_URL", "amqp://guest:guest@localhost/")
#                     user:password@  [IPv6] or host    :port    /vhost?options
URL_PATTERN = r"amqps?://([^/?#]*@)?(\[[^]]*]|[^/:@[]+)(:[0-9]+)?([/?#][^@]*)?"
URL_FORM = "the URL has to look like amqp://user:password@host:port/vhost"


async def emit_log(url: str, body: bytes, maybe_sent: asyncio.Event) -> bool:
    """Publish one message, and return whether a queue has got it. Raises aio-pika's exceptions."""
    connection = await connect(url)
    try:
        channel = await connection.channel(on_return_raises=True)
        logs_exchange = await channel.declare_exchange("logs", ExchangeType.FANOUT)
        maybe_sent.set()  # from here on, an error does not tell whether the message was sent
        # Waits for the publisher confirm. PublishError: no queue got the (mandatory) message.
        await logs_exchange.publish(Message(body), routing_key="", mandatory=True)
        return True
    except exceptions.PublishError:
        return False
    finally:  # not "async with": close() can hang or fail. wait() gives it 1 s, and hides errors.
        await asyncio.wait({asyncio.create_task(connection.close())}, timeout=1)


def explain(error: BaseException) -> str:
    """Say in one line what went wrong, where possible in the broker's or the system's words."""
    match error:
        case TimeoutError():
            return f"no answer within {TIMEOUT} s (a memory or disk alarm, or not RabbitMQ)"
        case exceptions.DeliveryError():
            return "the broker rejected the message for at least one queue"
        case exceptions.ProbableAuthenticationError() | exceptions.AuthenticationError():
            return f"login refused ({error.args[0]}). Is it the right URL? See --url and AMQP_URL"
        case exceptions.InvalidFrameError() if "OpenOk" in str(error):  # aiormq drops the reason
            return "no such vhost, or not for this user, or too many connections"
        case exceptions.AMQPChannelError() | exceptions.ConnectionClosed() if error.args:
            return str(error.args[-1])
        case OSError() if found := re.search(r"Errno (\d+)] Connect call failed", str(error)):
            return f"{os.strerror(int(found[1]))}. Is RabbitMQ running there?"  # not in strerror
        case OSError(__cause__=ConnectionRefusedError(strerror=str(words))):  # on Windows
            return f"{words}. Is RabbitMQ running there?"
        case OSError(strerror=str(words)):
            return words
        case ConnectionError(strerror=None) | asyncio.CancelledError() | Exception(args=()):
            return "the server hung up"  # aiormq raises any of these for it
        case ValueError():
            return URL_FORM  # not the error's own words: they can show the password
    return f"{type(error).__name__}: {error}"


def harmless(text: str) -> str:
    """Escape what is not printable, since it could clear the screen or forge a line."""
    return "".join(  # spaces ("Zs") and what joins letters (U+200C, U+200D) may stay
        c if c.isprintable() or category(c) == "Zs" or c in "\t\u200c\u200d" else repr(c)[1:-1]
        for c in text
    )


def say(words: str) -> None:
    """Print a line on stderr, if that is possible."""
    with suppress(OSError, AttributeError):  # sys.stderr is None if it is closed
        sys.stderr.write(f"emit_log.py: {harmless(words)}\n")


async def main(url: str, body: bytes) -> int:
    """Emit the message, say what became of it, and return the exit status."""
    maybe_sent = asyncio.Event()  # a mere flag: nobody waits for it
    emitting = asyncio.create_task(emit_log(url, body, maybe_sent))
    # Not wait_for: at the timeout it cancels, and waits until that is done (with TLS, for 30 s).
    await asyncio.wait({emitting}, timeout=TIMEOUT)
    try:
        if not emitting.done():
            raise TimeoutError
        routed = emitting.result()
    except (Exception, asyncio.CancelledError) as error:  # aiormq raises CancelledError, too
        words = explain(error)
        rejected = isinstance(error, (exceptions.DeliveryError, exceptions.AMQPChannelError))
        if maybe_sent.is_set() and not rejected:  # the broker has not told what became of it
            words += " while publishing; the message may or may not have been sent"
        say(f"{re.sub('(?s)//.*@', '//', url)}: {words}")  # the URL without user and password
        return 1
    try:
        print(" [x] Sent", harmless(body.decode(errors="backslashreplace")), flush=True)
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # if nobody reads it, that is no error
            say(f"sent, but cannot write to stdout: {error.strerror}")
            return 1
    if not routed:
        say("no receiver is listening: the broker discarded the message")
    return 0


if __name__ == "__main__":
    usage = "%(prog)s [--url URL] [--] [message ...]"
    parser = ArgumentParser(usage=usage, description=__doc__, formatter_class=RawTextHelpFormatter)
    parser.add_argument("message", nargs="*", help="the words of the message (none: Hello World!)")
    parser.add_argument("--url", default=URL, help="the broker (default: AMQP_URL, else localhost)")
    args = parser.parse_args()
    if not re.fullmatch(URL_PATTERN, args.url):
        parser.error(URL_FORM)  # also for "//user:12/3@host": a "/" in a password has to be %2F
    logging.disable()  # otherwise the libraries log, with tracebacks, the errors that we explain
    if isinstance(sys.stdout, TextIOWrapper):  # it is None if stdout is closed
        sys.stdout.reconfigure(errors="backslashreplace")  # for letters that it cannot encode
    body = os.fsencode(" ".join(args.message) or "Hello World!")
    # Not asyncio.run and sys.exit: they would wait for a thread that is stuck in DNS.
    os._exit(asyncio.Runner().run(main(args.url, body)))
