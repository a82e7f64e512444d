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
from typing import NoReturn
from urllib.parse import urlsplit

from aio_pika import ExchangeType, connect, exceptions
from aio_pika.abc import AbstractIncomingMessage

TIMEOUT = 10  # seconds, from the connection to the consumer
PREFETCH = 300  # messages that the broker may send ahead of our acknowledgements

Messages = asyncio.Queue[AbstractIncomingMessage | None]


async def subscribe(url: str) -> None:
    """Print the logs, from now until the connection, the channel or the queue is lost.

    Raises TimeoutError or another of aio-pika's CONNECTION_EXCEPTIONS if it does
    not get as far as that, and SystemExit if stdout fails.
    """
    messages: Messages = asyncio.Queue()

    async def end(*_: object) -> None:
        await messages.put(None)

    async with asyncio.timeout(TIMEOUT) as deadline, await connect(url) as connection:
        channel = await connection.channel()
        channel.close_callbacks.add(end)
        (await channel.get_underlay_channel()).on_consumer_cancel_callbacks.add(end)

        # While stdout is stalled, the backlog stays at the broker.
        await channel.set_qos(prefetch_count=PREFETCH)

        logs_exchange = await channel.declare_exchange("logs", ExchangeType.FANOUT)

        # With no name the server chooses one; exclusive, it dies with the connection.
        queue = await channel.declare_queue(exclusive=True)

        await queue.bind(logs_exchange, routing_key="")

        await queue.consume(messages.put)

        deadline.reschedule(None)
        print(" [*] Waiting for logs. To exit press CTRL+C", file=sys.stderr)
        await print_messages(messages)


async def print_messages(messages: Messages) -> None:
    """Print and acknowledge all that is put into `messages`, until None is."""
    lost = False
    while not lost:
        batch = [await messages.get()]
        while not messages.empty():
            batch.append(messages.get_nowait())
        received = [message for message in batch if message is not None]
        lost = len(received) < len(batch)

        # In a thread: a stalled stdout must not stop the heartbeats.
        await asyncio.to_thread(print_bodies, [message.body for message in received])
        if not lost:
            # It fails only together with the channel, and then None is on its way.
            await asyncio.wait({asyncio.create_task(received[-1].ack(multiple=True))})
            # Under load a moment's rest makes batches, several times as fast as lines.
            await asyncio.sleep(0.01)


def print_bodies(bodies: list[bytes]) -> None:
    """Print messages and flush, or raise SystemExit with the status to end with."""
    try:
        for body in bodies:
            print(" [x]", printable(body.removesuffix(b"\n")).replace("\n", "\n     "))
        sys.stdout.flush()
    except BrokenPipeError:
        raise SystemExit(0) from None
    except OSError as error:
        raise SystemExit(fail(f"cannot write to stdout: {error.strerror}")) from None


def printable(body: bytes) -> str:
    """Decode UTF-8; escape all else, and what does more to a terminal than show."""
    return re.sub(
        r"[^\t\n -~]",
        lambda c: c[0] if c[0].isprintable() else c[0].encode("unicode_escape").decode(),
        body.decode(errors="backslashreplace"),
    )


async def receive_logs(url: str) -> NoReturn:
    """Subscribe, and do so again whenever the subscription is lost.

    Raises what the first subscribe() raises, and later only what another try
    cannot mend: that the broker refuses.
    """
    lost = False
    while True:
        try:
            await subscribe(url)
            lost = True
            fail("lost the broker or the queue; trying again, and missing the logs meanwhile")
        except exceptions.CONNECTION_EXCEPTIONS as error:
            if not lost or isinstance(error, REFUSALS):
                raise
            await asyncio.sleep(1)


REFUSALS = (
    exceptions.AuthenticationError,
    exceptions.ProbableAuthenticationError,
    exceptions.InvalidFrameError,
    exceptions.ChannelClosed,
)


def explain(error: BaseException, url: str) -> str:
    """Say in one plain line, without the password, what went wrong with the broker."""
    parts = urlsplit(url)
    broker = f"{parts.hostname}:{parts.port or (5671 if parts.scheme == 'amqps' else 5672)}"
    match error:
        case TimeoutError():
            return f"no answer from {broker} within {TIMEOUT} s. Is that RabbitMQ?"
        case exceptions.InvalidFrameError():  # aiormq's word for a refused vhost
            return f"{broker} has no vhost {parts.path[1:] or '/'}, or not for this user"
        case exceptions.AMQPConnectionError(__cause__=socket.gaierror()):
            return f"unknown host {parts.hostname}"
        case exceptions.AMQPConnectionError(__cause__=ssl.SSLError() as tls):
            return f"TLS with {broker} failed: {getattr(tls, 'verify_message', tls.reason)}"
        case exceptions.AMQPConnectionError(__cause__=OSError(errno=number)):
            reason = os.strerror(number) if number else "no answer at any of its addresses"
            return f"cannot connect to {broker}: {reason}. Is RabbitMQ running there?"
        case exceptions.AMQPError(args=[*_, str(reason)]):  # in the broker's own words
            return f"{broker}: {reason}"
        case OSError():  # aio-pika wraps all the others
            return f"cannot use the certificates that the URL names: {error.args[-1]}"
    return f"lost the connection to {broker}"


def fail(reason: str) -> int:
    """Tell the user on stderr and return the exit status for it."""
    print(f"receive_logs.py: {reason}", file=sys.stderr)
    return 1


def main() -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default=os.getenv("AMQP_URL", "amqp://guest:guest@localhost/"))
    args = parser.parse_args()

    logging.disable()  # aio-pika also logs what is told here, with tracebacks
    if not sys.stdout:
        return fail("stdout is closed")
    # PYTHONUNBUFFERED would lose, silently, what a nearly full disk does not take at once.
    sys.stdout = os.fdopen(
        sys.stdout.fileno(), "w", encoding=sys.stdout.encoding, errors="backslashreplace"
    )

    try:
        if urlsplit(args.url).scheme not in ("amqp", "amqps") or not urlsplit(args.url).hostname:
            raise ValueError
        asyncio.Runner().run(receive_logs(args.url))
    except ValueError:
        return fail("the URL has to look like amqp://user:password@host:port/vhost")
    except KeyboardInterrupt:
        return 0
    except SystemExit as end:
        return int(end.code or 0)
    except (*exceptions.CONNECTION_EXCEPTIONS, asyncio.CancelledError) as error:
        return fail(explain(error, args.url))


if __name__ == "__main__":
    # Not sys.exit, which waits for whatever a paused terminal or a full disk holds up.
    os._exit(main())
