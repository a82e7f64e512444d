"""Receive what emit_log.py emits and print it on stdout.

  python receive_logs.py                          see the logs on the screen
  python receive_logs.py > logs_from_rabbit.log   direct the logs to disk

Exit status: 0 after CTRL+C, SIGTERM or a closed pipe, 1 error (one line on stderr), 2 usage.
"""

import os
import signal

# Before the slow imports: a signal ends them quietly, also as process 1. If ignored, it stays so.
SIGNALS = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) != signal.SIG_IGN]
for number in SIGNALS:
    signal.signal(number, lambda *_: os._exit(0))

import asyncio
import codecs
import logging
import re
import sys
import time
from argparse import ArgumentParser, RawTextHelpFormatter
from collections.abc import Iterator
from contextlib import suppress
from errno import EIO, EPIPE
from functools import cache, partial
from io import BytesIO
from queue import Queue
from unicodedata import category

from aio_pika import ExchangeType, abc, connect, exceptions
from aiormq.abc import DeliveredMessage

TIMEOUT = 10  # seconds, to connect and subscribe
PREFETCH = 300  # messages that are received but not yet printed; the others wait at the broker
URL = os.getenv("AMQP_URL", "amqp://guest:guest@localhost/")
# No "@" in the path: there it would end a password whose "/" was not written as %2F.
URL_FORM = r"amqps?://([^/?#]*@)?(\[[^]]*]|[^/:@[]+)(:[0-9]+)?([/?#][^@]*)?"
LOST = "receive_logs.py: lost the queue and the logs in it; more are missed until the next Waiting"
REFUSALS = exceptions.ProbableAuthenticationError, exceptions.ChannelPreconditionFailed
Backlog = Queue[DeliveredMessage | str | None]  # messages; str: a line for stderr; None: the end


async def receive_logs(connection: abc.AbstractConnection, backlog: Backlog) -> asyncio.Event:
    """Send the logs into the backlog. Return an event, set when the subscription is lost."""
    channel = await connection.channel()
    await channel.set_qos(prefetch_count=PREFETCH)
    logs_exchange = await channel.declare_exchange("logs", ExchangeType.FANOUT)
    queue = await channel.declare_queue(exclusive=True)  # no name: the server chooses one
    await queue.bind(logs_exchange, routing_key="")
    return await consume(queue, backlog)


async def consume(queue: abc.AbstractQueue, backlog: Backlog) -> asyncio.Event:
    """Start a consumer, and return an event that is set when the consumer is lost."""

    async def on_message(message: DeliveredMessage) -> None:
        backlog.put(message)

    lost = asyncio.Event()
    queue.channel.close_callbacks.add(lambda *_: lost.set())
    # Through aiormq: aio-pika tells of no cancel, and takes 92 µs of CPU a message, this takes 66.
    amqp_channel = await queue.channel.get_underlay_channel()
    amqp_channel.on_consumer_cancel_callbacks.add(lambda _: lost.set())
    await amqp_channel.basic_consume(queue.name, on_message)
    return lost


async def stay_subscribed(url: str, backlog: Backlog, stop: asyncio.Event) -> None:
    """Subscribe, and again whenever that is lost. Return if the first try fails or on a refusal."""
    subscribed, told = False, set[str]()  # told: the reasons in this outage, each said once
    while True:
        next_try = time.monotonic() + 1
        try:
            # Not connect_robust: it comes back in silence, with a gap. The host's next address is
            # tried after 0.25 s. Shielded, so as not to wait for a cancel: with TLS, it takes 30 s.
            connecting = asyncio.shield(connect(url, timeout=TIMEOUT, happy_eyeballs_delay=0.25))
            async with asyncio.timeout(TIMEOUT) as limit, await connecting as connection:
                lost = await receive_logs(connection, backlog)
                limit.reschedule(None)  # subscribed: from here on, as long as it takes
                subscribed, told = True, set[str]()
                backlog.put(" [*] Waiting for logs. To exit press CTRL+C")
                await lost.wait()
                backlog.put(LOST)
        except (Exception, asyncio.CancelledError) as error:
            if stop.is_set():
                raise  # main sets stop, then cancels us; else a CancelledError is aiormq's error
            if (reason := explain(error, url)) not in told:
                told.add(reason)
                backlog.put(f"receive_logs.py: {reason}")
            if not subscribed or isinstance(error, REFUSALS):
                return
        # At most one try a second, and none while more than PREFETCH lines wait for stdout.
        while time.monotonic() < next_try or backlog.qsize() > PREFETCH:
            await asyncio.sleep(0.05)


def print_logs(backlog: Backlog) -> None:
    """Print and acknowledge what comes, until None comes or nobody reads it. Raises OSError."""
    try:
        # Not sys.stdout: with PYTHONUNBUFFERED, it loses what a nearly full disk does not take.
        with open(1, "w", 2**16, sys.stdout.encoding, "backslashreplace", closefd=False) as stdout:
            last = None  # the message up to which all can be acknowledged
            while item := backlog.get():
                if not last:  # so it is the first of a batch
                    os.set_blocking(1, True)  # another program on the terminal may have changed it
                if isinstance(item, DeliveredMessage):
                    stdout.writelines(line_in_pieces(item.body))  # it adds no newlines
                    last = item
                else:
                    stdout.flush()
                    say(item)
                if last and backlog.empty():  # soon true: the broker stops at PREFETCH
                    stdout.flush()
                    ack = last.channel.basic_ack(last.delivery_tag or 0, multiple=True, wait=False)
                    asyncio.run_coroutine_threadsafe(asyncio.wait_for(ack, 1), last.channel.loop)
                    last = None
                    time.sleep(0.01)  # lets a burst become a batch: without it, 17 to 42 % more CPU
    except OSError as error:
        if error.errno not in (EPIPE, EIO) or os.path.isfile(1):  # EIO: terminal gone, or bad disk
            raise


def line_in_pieces(body: bytes) -> Iterator[str]:
    """Yield the one line of a message, with escapes for what could harm a terminal."""
    yield " [x] "
    body = body.removesuffix(b"\n")
    small = [body.decode("utf-8", "surrogateescape")] if len(body) < 2**16 else None
    read = partial(BytesIO(body).read, 2**16)  # a signal waits for each: 10 ms; 100 MiB: 12 s
    for text in small or codecs.iterdecode(iter(read, b""), "utf-8", "surrogateescape"):
        yield text if text.isprintable() else "".join(map(shown, text))
    yield "\n"


@cache
def shown(c: str) -> str:
    """Return a character, or an escape. Spaces and joiners (U+200C, U+200D) are harmless."""
    if c.isprintable() or category(c) == "Zs" or c in "\t\u200c\u200d":
        return c
    # Further lines are indented, so as not to pass for messages. U+DCFF stands for the byte 0xff.
    return "\n     " if c == "\n" else repr(c)[1:-1].replace(r"\udc", r"\x")


def say(words: str) -> None:
    """Print one harmless line on stderr, if that is possible."""
    with suppress(OSError, AttributeError):  # sys.stderr is None if it is closed
        os.set_blocking(sys.stderr.fileno(), True)
        print("".join(map(shown, words.replace("\n", " "))), file=sys.stderr)


def explain(error: BaseException, url: str) -> str:
    """Say in plain words what went wrong. (As in emit_log.py: each file can be copied alone.)"""
    words = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
    match error:
        case exceptions.ProbableAuthenticationError() | exceptions.AuthenticationError():
            words = f"login refused ({error.args[0]}). Is it the right URL? See --url and AMQP_URL"
        case exceptions.InvalidFrameError() if "OpenOk" in str(error):  # aiormq drops the reason
            words = "no such vhost, or not for this user, or too many connections"
        case OSError() if refused := re.search(r"Errno (\d+)] Connect call failed", str(error)):
            words = f"{os.strerror(int(refused[1]))}. Is RabbitMQ running there?"
        case TimeoutError():
            words = f"no answer within {TIMEOUT} s while connecting. Is it RabbitMQ?"
        case exceptions.AMQPChannelError() | exceptions.ConnectionClosed():
            words = str(error.args[-1])  # the broker's own
        case ConnectionError(strerror=None) | asyncio.CancelledError() | Exception(args=()):
            words = "the server hung up while connecting"  # aiormq raises any of these for that
    return f"{re.sub('(?s)//.*@', '//', url)}: {words}"  # without user and password


async def main(url: str) -> int:
    """Receive the logs until a signal or an error, and return the exit status."""
    backlog, stop = Backlog(), asyncio.Event()
    for number in SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    subscribing = asyncio.create_task(stay_subscribed(url, backlog, stop))
    subscribing.add_done_callback(lambda _: backlog.put(None))  # ends printing, and so the wait
    printing = asyncio.create_task(asyncio.to_thread(print_logs, backlog))
    await asyncio.wait({printing, asyncio.create_task(stop.wait())}, return_when="FIRST_COMPLETED")
    gave_up = subscribing.done() and not stop.is_set()  # it has told why
    stop.set()  # before cancel(), so that stay_subscribed knows that it was us
    subscribing.cancel()
    await asyncio.wait({subscribing, printing}, timeout=1)  # for the goodbye and the last lines
    if printing.done() and (error := printing.exception()):
        say(f"receive_logs.py: cannot write to stdout: {getattr(error, 'strerror', repr(error))}")
        return 1
    return int(gave_up)


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter)
    parser.add_argument("--url", default=URL, help="the broker (default: AMQP_URL, else localhost)")
    args = parser.parse_args()
    logging.disable()  # or else the libraries log, with tracebacks, what is told here
    logging.captureWarnings(True)  # those of failed connections go to logging, which is off
    if not sys.stdout:
        sys.exit("receive_logs.py: stdout is closed")
    if not re.fullmatch(URL_FORM, args.url):
        sys.exit("receive_logs.py: the URL has to look like amqp://user:password@host:port/vhost")
    os._exit(asyncio.Runner().run(main(args.url)))  # else a paused stdout would hold up the exit
