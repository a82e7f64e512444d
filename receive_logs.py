"""Receive what emit_log.py emits and print it on stdout.

  python receive_logs.py                          see the logs on the screen
  python receive_logs.py > logs_from_rabbit.log   direct the logs to disk

The broker is --url, else the environment variable AMQP_URL, else
amqp://guest:guest@localhost/ (amqp or amqps://user:password@host:port/vhost).
Exit status: 0 after CTRL+C or SIGTERM, 1 error (one line on stderr), 2 usage.
"""

import os
import signal

# CTRL+C ends the imports without a traceback, and SIGTERM also process 1 of a container.
SIGNALS = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) != signal.SIG_IGN]
for number in SIGNALS:
    signal.signal(number, lambda *_: os._exit(0))

import asyncio
import logging
import re
import sys
import time
import warnings
from argparse import ArgumentParser, RawTextHelpFormatter
from concurrent import futures
from queue import Queue
from unicodedata import category

from aio_pika import ExchangeType, connect, exceptions
from aiormq.abc import ConsumerCallback, DeliveredMessage

TIMEOUT = 10  # seconds, to connect and subscribe
PREFETCH = 300  # messages ahead of what is printed; what is more waits at the broker
REFUSALS = exceptions.ProbableAuthenticationError, exceptions.ChannelPreconditionFailed
STDERR = futures.ThreadPoolExecutor(1)  # a paused terminal must not stop the event loop


async def subscribe_once(url: str, on_message: ConsumerCallback, limit: asyncio.Timeout) -> None:
    """Subscribe to the logs, lift the time limit, and return when the subscription is lost.

    Raises aio-pika's exceptions, and aiormq's bare Exception if the broker hangs up on us.
    """
    # Not connect_robust: it names the queue itself, and subscribes again in silence, with a gap.
    connection = await asyncio.shield(connect(url, timeout=TIMEOUT))  # TLS takes 30 s to cancel
    try:
        channel = await connection.channel()
        await channel.set_qos(prefetch_count=PREFETCH)
        logs_exchange = await channel.declare_exchange("logs", ExchangeType.FANOUT)
        # No name: the server chooses one. Exclusive: it is deleted with the connection.
        queue = await channel.declare_queue(exclusive=True)
        await queue.bind(logs_exchange, routing_key="")
        # The channel of aiormq, below aio-pika's: a message costs 66 µs of CPU there, 92 with
        # queue.consume, and it alone tells when the broker cancels the consumer.
        amqp_channel = await channel.get_underlay_channel()
        lost = amqp_channel.closing
        amqp_channel.on_consumer_cancel_callbacks.add(lambda _: lost.cancel())
        await amqp_channel.basic_consume(queue.name, on_message)
        limit.reschedule(None)
        tell(" [*] Waiting for logs. To exit press CTRL+C")
        await asyncio.wait({lost})
        tell("receive_logs.py: lost the broker or the queue: logs are missed until it waits again")
    finally:
        # If a broker behind TLS is silent, a goodbye without a limit takes 30 s.
        await asyncio.wait({asyncio.create_task(connection.close())}, timeout=1)


async def subscribe_for_ever(url: str, backlog: Queue[DeliveredMessage | None]) -> str:
    """Subscribe, and again whenever that is lost; return in words why it cannot go on."""

    async def on_message(message: DeliveredMessage) -> None:
        backlog.put(message)

    if not re.fullmatch("amqps?://([^/?#]*@)?[^/:@][^@]*", url):
        return explain(ValueError(), url)
    subscribed = False
    while True:
        pause = asyncio.create_task(asyncio.sleep(1))
        try:
            async with asyncio.timeout(TIMEOUT) as limit:
                await subscribe_once(url, on_message, limit)
            subscribed = True
        except (Exception, asyncio.CancelledError) as error:
            if (task := asyncio.current_task()) and task.cancelling():
                raise  # main() cancels us; else it is aiormq, after a lost heartbeat
            if not subscribed or isinstance(error, REFUSALS):
                return explain(error, url)
        # While stdout is paused, drop the newest beyond these, so that memory stays bounded.
        with backlog.mutex:
            while len(backlog.queue) > PREFETCH:
                backlog.queue.pop()
        await pause  # at most one try a second


def print_logs(backlog: Queue[DeliveredMessage | None]) -> str:
    """Print and acknowledge until None comes; return in words what is wrong with stdout."""
    if not sys.stdout:
        return "stdout is closed"
    # With PYTHONUNBUFFERED, it would lose in silence what a nearly full disk does not take.
    sys.stdout = os.fdopen(1, "w", 2**16, sys.stdout.encoding, "backslashreplace")
    try:
        while message := backlog.get():
            text = message.body.decode(errors="backslashreplace").removesuffix("\n")
            print(" [x]", text if text.isprintable() else text.translate(ESCAPES))
            if backlog.empty():
                sys.stdout.flush()
                ack = message.channel.basic_ack(message.delivery_tag or 0, multiple=True)
                message.channel.loop.call_soon_threadsafe(asyncio.ensure_future, ack)
                time.sleep(0.01)  # lets a burst become a batch: without it, 50 % more CPU
        sys.stdout.flush()
    except BrokenPipeError:
        pass  # nobody reads it any more
    except OSError as error:
        return f"cannot write to stdout: {error.strerror}"
    return ""


class Escapes(dict[int, str]):
    """For str.translate: what to show for a character (re.sub took 1.3 GiB for 16 MiB)."""

    def __missing__(self, code: int) -> str:
        c = chr(code)
        shows = c.isprintable() or category(c) == "Zs" or c in "\t\u200c\u200d"
        return self.setdefault(code, c if shows else repr(c)[1:-1])


ESCAPES = Escapes({ord("\n"): "\n     "})  # indented, further lines cannot pass for messages


def tell(line: str) -> futures.Future[None]:
    """Print one harmless line on stderr, in the background."""
    return STDERR.submit(print, line.replace("\n", " ").translate(ESCAPES), file=sys.stderr)


def explain(error: BaseException, url: str) -> str:
    """Say in plain words what went wrong, without the user and password of the URL."""
    words = "the connection broke off"
    match error:
        case ValueError():
            return "the URL has to look like amqp://user:password@host:port/vhost"
        case TimeoutError():
            words = f"no answer within {TIMEOUT} s. Is it RabbitMQ?"
        case exceptions.InvalidFrameError() if "OpenOk" in str(error):
            words = "no such vhost, or not for this user, or too many connections"
        case OSError() if failed := re.search(r"Errno (\d+)] Connect call failed", str(error)):
            words = f"{os.strerror(int(failed[1]))}. Is RabbitMQ running there?"
        case exceptions.AMQPChannelError() | exceptions.ProbableAuthenticationError():
            words = str(error.args[-1])
        case OSError(strerror=str(words)):  # of the system, TLS or the broker
            pass
    return f"{re.sub('(?s)//.*@', '//', url)}: {words}"


async def main() -> int:
    """Receive the logs until a signal or an error, and return the exit status."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter)
    parser.add_argument("--url", default=os.getenv("AMQP_URL", "amqp://guest:guest@localhost/"))
    args = parser.parse_args()
    logging.disable()  # the libraries also log, with tracebacks, what is told here
    warnings.simplefilter("ignore")
    sys.stderr = sys.stderr or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    loop = asyncio.get_running_loop()
    backlog: Queue[DeliveredMessage | None] = Queue()  # what waits to be printed; None: the end
    stop: asyncio.Future[str] = loop.create_future()
    for number in SIGNALS:
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop.cancel))
    subscribing = asyncio.create_task(subscribe_for_ever(args.url, backlog))
    subscribing.add_done_callback(lambda _: backlog.put(None))
    printing = loop.run_in_executor(None, print_logs, backlog)
    await asyncio.wait({printing, stop}, return_when=asyncio.FIRST_COMPLETED)
    subscribing.cancel()
    # This is the time for the goodbye, and for a slow stdout to take the last lines.
    ended, _ = await asyncio.wait({subscribing, printing}, timeout=1)
    if told := " ".join(task.result() for task in ended if not task.cancelled()).strip():
        futures.wait([tell(f"receive_logs.py: {told}")], timeout=1)
    return 1 if told else 0


if __name__ == "__main__":
    os._exit(asyncio.Runner().run(main()))  # asyncio.run and sys.exit wait for a paused stdout
