"""Emit a log message to every running copy of receive_logs.py.

example:
  python emit_log.py "disk almost full"

The broker is --url, else the environment variable AMQP_URL, else
amqp://guest:guest@localhost/ (amqp://user:password@host:port/vhost).
TLS: amqps://host/vhost, with ?cafile=ca.pem for a private authority.
Put -- before a message that begins with a dash.

exit status: 0 sent and confirmed by the broker, 1 an error (told in one line
on stderr), 2 wrong usage
"""

import argparse
import asyncio
import io
import logging
import os
import re
import socket
import ssl
import sys
from contextlib import suppress
from urllib.parse import urlsplit

from aio_pika import ExchangeType, Message, connect, exceptions

TIMEOUT = 10  # seconds, for the whole conversation with the broker


async def emit_log(url: str, body: bytes) -> bool:
    """Publish one message and return whether a queue was there to receive it.

    Returns only after RabbitMQ's publisher confirm, which aio-pika waits for.
    Raises one of aio-pika's CONNECTION_EXCEPTIONS if that does not come within TIMEOUT.
    """
    async with asyncio.timeout(TIMEOUT):
        connection = await connect(url)
        try:
            channel = await connection.channel(on_return_raises=True)

            logs_exchange = await channel.declare_exchange("logs", ExchangeType.FANOUT)

            message = Message(body)

            await logs_exchange.publish(message, routing_key="")
            return True
        except exceptions.PublishError:  # returned: aio-pika publishes as mandatory
            return False
        finally:
            # A broker that fell silent would hold this up for half a minute, over TLS.
            await asyncio.wait({asyncio.create_task(connection.close())}, timeout=1)


def explain(error: BaseException, url: str) -> str:
    """Say in one plain line, without the password, what went wrong with the broker."""
    parts = urlsplit(url)
    broker = f"{parts.hostname}:{parts.port or (5671 if parts.scheme == 'amqps' else 5672)}"
    match error:
        case TimeoutError():
            return (
                f"no answer from {broker} within {TIMEOUT} s: it is not RabbitMQ, "
                "or it blocks publishers (memory or disk alarm)"
            )
        case exceptions.InvalidFrameError() if "OpenOk" in str(error):
            return f"{broker} refused vhost {parts.path[1:] or '/'}: is there one, for this user?"
        case exceptions.AMQPConnectionError(__cause__=socket.gaierror()):
            return f"unknown host {parts.hostname}"
        case exceptions.AMQPConnectionError(__cause__=ssl.SSLError() as tls):
            return f"TLS with {broker} failed: {getattr(tls, 'verify_message', tls.reason)}"
        case exceptions.AMQPConnectionError(__cause__=OSError(errno=number)):
            reason = os.strerror(number) if number else "no answer at any of its addresses"
            return f"no connection to {broker}: {reason}. Is RabbitMQ running there?"
        case exceptions.AMQPConnectionError(__cause__=asyncio.IncompleteReadError()):
            pass  # the library's own words only count bytes
        case exceptions.AMQPError(args=[*_, str(reason)]):  # in the broker's own words
            return f"{broker}: {reason}"
        case OSError() if not isinstance(error, ConnectionError):
            why = getattr(error, "reason", error.strerror)
            return f"cannot use the certificates that the URL names: {why}"
    return f"the conversation with {broker} broke off before it confirmed the message"


def printable(body: bytes) -> str:
    """Decode UTF-8; escape all else, and what does more to a terminal than show."""
    text = body.decode(errors="backslashreplace")
    if text.isprintable():
        return text
    return re.sub(
        r"[^\t\n -~]",
        lambda c: c[0] if c[0].isprintable() else c[0].encode("unicode_escape").decode(),
        text,
    )


def tell(line: str) -> None:
    """Print one harmless line on stderr, if there is one to print on."""
    with suppress(OSError):
        if sys.stderr:
            print(
                printable(line.encode(errors="backslashreplace")).replace("\n", " "),
                file=sys.stderr,
            )


def main() -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("message", nargs="*", help="the words of it; none: Hello World!")
    parser.add_argument("--url", default=os.getenv("AMQP_URL", "amqp://guest:guest@localhost/"))
    args = parser.parse_args()
    body = os.fsencode(" ".join(args.message) if any(args.message) else "Hello World!")

    logging.disable()  # aio-pika also logs what is told here, with tracebacks
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")

    try:
        if not (urlsplit(args.url).hostname and args.url.startswith(("amqp://", "amqps://"))):
            raise ValueError
        # Not asyncio.run: it would wait for what a broker that fell silent holds up.
        received = asyncio.Runner().run(emit_log(args.url, body))
    except ValueError:
        tell("emit_log.py: the URL has to look like amqp://user:password@host:port/vhost")
        return 1
    except (*exceptions.CONNECTION_EXCEPTIONS, asyncio.CancelledError) as error:
        tell(f"emit_log.py: {explain(error, args.url)}")
        return 1

    try:
        print(f" [x] Sent {printable(body)}", flush=True)
    except BrokenPipeError:
        pass  # it is sent, even if nobody wants to know
    except OSError as error:
        tell(f"emit_log.py: sent, but cannot write to stdout: {error.strerror}")
        return 1
    if not received:
        tell("emit_log.py: no receiver is listening, so the broker discarded the message")
    return 0


if __name__ == "__main__":
    try:
        status = main()
    except KeyboardInterrupt:
        status = 130
    # Not sys.exit: it would wait for the same, and flush once more to a full disk.
    os._exit(status)
