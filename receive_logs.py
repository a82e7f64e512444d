"""Receive what emit_log.py emits and print it on stdout.

examples:
  python receive_logs.py                          see the logs on the screen
  python receive_logs.py > logs_from_rabbit.log   direct the logs to disk

The broker is --url, else the environment variable AMQP_URL, else
amqp://guest:guest@localhost/ (amqp://user:password@host:port/vhost).
TLS: amqps://host/vhost, with ?cafile=ca.pem for a private authority.

exit status: 0 after CTRL+C or once nobody reads stdout, 1 after an error
(told in one line on stderr), 2 wrong usage
"""

import argparse
import asyncio
import logging
import os
import re
import socket
import ssl
import sys
from contextlib import suppress
from typing import NoReturn
from urllib.parse import urlsplit

from aio_pika import ExchangeType, connect, exceptions
from aiormq.abc import DeliveredMessage

TIMEOUT = 10  # seconds, from the connection to the consumer
PREFETCH = 300  # messages that the broker sends ahead of what is printed

REFUSALS = (  # by the broker: another try would not mend them
    exceptions.AuthenticationError,
    exceptions.ProbableAuthenticationError,
    exceptions.InvalidFrameError,
    exceptions.ChannelClosed,
)

Messages = asyncio.Queue[DeliveredMessage | None]


async def subscribe(url: str) -> None:
    """Print the logs from now on; return when the connection or the queue is lost.

    Raises one of aio-pika's CONNECTION_EXCEPTIONS if the broker does not let it come
    to that within TIMEOUT, and SystemExit if stdout fails.
    """
    messages: Messages = asyncio.Queue()

    async def end(*_: object) -> None:
        await messages.put(None)

    async with asyncio.timeout(TIMEOUT) as deadline:
        connection = await connect(url)
        try:
            channel = await connection.channel()
            channel.close_callbacks.add(end)
            # aio-pika wraps this one, which alone tells when the broker cancels the consumer,
            # and consumes half again as fast for not wrapping every message as well.
            amqp_channel = await channel.get_underlay_channel()
            amqp_channel.on_consumer_cancel_callbacks.add(end)

            # While stdout is stalled, the backlog is to stay at the broker.
            await channel.set_qos(prefetch_count=PREFETCH)

            logs_exchange = await channel.declare_exchange("logs", ExchangeType.FANOUT)

            # Without a name the server chooses one; exclusive, it dies with the connection.
            queue = await channel.declare_queue(exclusive=True)

            await queue.bind(logs_exchange, routing_key="")

            await amqp_channel.basic_consume(queue.name, messages.put)

            deadline.reschedule(None)
            tell(" [*] Waiting for logs. To exit press CTRL+C")
            await print_messages(messages)
        finally:
            # A broker that fell silent would hold this up for half a minute, over TLS.
            await asyncio.wait({asyncio.create_task(connection.close())}, timeout=1)


async def print_messages(messages: Messages) -> None:
    """Print and acknowledge what is put into `messages`, until that is None."""
    lost = False
    while not lost:
        batch = [await messages.get()]
        while not messages.empty():
            batch.append(messages.get_nowait())
        received = [message for message in batch if message]
        lost = len(received) < len(batch)

        # In a thread, because a stalled stdout must not stop the heartbeats.
        printing = asyncio.get_running_loop().run_in_executor(
            None, print_bodies, [message.body for message in received]
        )
        try:
            await asyncio.shield(printing)
        finally:  # CTRL+C does not tear a line, unless stdout is stalled
            await asyncio.wait({printing}, timeout=1)

        if not lost:
            # This fails only with the channel, and then the None is on its way.
            ack = received[-1].channel.basic_ack(received[-1].delivery_tag or 0, multiple=True)
            await asyncio.wait({asyncio.ensure_future(ack)})
            # A short rest lets a burst become a batch: a flush for each is what costs.
            await asyncio.sleep(0.01)


def print_bodies(bodies: list[bytes]) -> None:
    """Print messages and flush; raise SystemExit, with the exit status, if that fails."""
    try:
        for body in bodies:
            text = printable(body.removesuffix(b"\n"))
            # Indented, further lines cannot pass for messages.
            sys.stdout.write(" [x] " + text.replace("\n", "\n     ") + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        raise SystemExit(0) from None
    except OSError as error:
        tell(f"receive_logs.py: cannot write to stdout: {error.strerror}")
        raise SystemExit(1) from None


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


async def receive_logs(url: str) -> NoReturn:
    """Subscribe, and subscribe again whenever the subscription is lost.

    Raises what subscribe() raises; once it has been subscribed, only for REFUSALS.
    """
    subscribed = False
    while True:
        try:
            await subscribe(url)
            subscribed = True
            tell(
                "receive_logs.py: lost the broker or the queue: logs emitted until it waits again are missed"
            )
        except exceptions.CONNECTION_EXCEPTIONS as error:
            if not subscribed or isinstance(error, REFUSALS):
                raise
            await asyncio.sleep(1)


def explain(error: BaseException, url: str) -> str:
    """Say in one plain line, without the password, what went wrong with the broker."""
    parts = urlsplit(url)
    broker = f"{parts.hostname}:{parts.port or (5671 if parts.scheme == 'amqps' else 5672)}"
    match error:
        case TimeoutError():
            return f"no answer from {broker} within {TIMEOUT} s. Is that RabbitMQ?"
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
    return f"the conversation with {broker} broke off"


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
    parser.add_argument("--url", default=os.getenv("AMQP_URL", "amqp://guest:guest@localhost/"))
    args = parser.parse_args()

    if not sys.stdout:
        tell("receive_logs.py: stdout is closed")
        return 1
    # With PYTHONUNBUFFERED, stdout loses in silence what a nearly full disk does not take.
    sys.stdout = os.fdopen(
        sys.stdout.fileno(), "w", 2**16, encoding=sys.stdout.encoding, errors="backslashreplace"
    )
    logging.disable()  # aio-pika also logs, with tracebacks, what is told here

    try:
        if not (urlsplit(args.url).hostname and args.url.startswith(("amqp://", "amqps://"))):
            raise ValueError
        # Not asyncio.run: it ends by waiting for threads, and stdout may hold one up.
        asyncio.Runner().run(receive_logs(args.url))
    except KeyboardInterrupt:
        return 0
    except SystemExit as end:
        return int(end.code or 0)
    except ValueError:
        tell("receive_logs.py: the URL has to look like amqp://user:password@host:port/vhost")
    except (*exceptions.CONNECTION_EXCEPTIONS, asyncio.CancelledError) as error:
        tell(f"receive_logs.py: {explain(error, args.url)}")
    return 1


if __name__ == "__main__":
    os._exit(main())  # not sys.exit, which waits for them too, and flushes a full disk again
