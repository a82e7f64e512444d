"""Receive what emit_log.py emits and print it on stdout.

  python receive_logs.py                          see the logs on the screen
  python receive_logs.py > logs_from_rabbit.log   direct the logs to disk

Exit status: 0 after CTRL+C, SIGTERM or a closed pipe, 1 error (one line on stderr), 2 usage.
"""

import os
import signal

# Before the slow imports, so that a signal ends them quietly. If our parent ignores it, so do we.
SIGNALS = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) != signal.SIG_IGN]
for number in SIGNALS:
    signal.signal(number, lambda *_: os._exit(0))

import asyncio
import logging
import re
import sys
import time
from argparse import ArgumentParser, RawTextHelpFormatter
from contextlib import suppress
from functools import lru_cache
from unicodedata import category

from aio_pika import ExchangeType, abc, connect, exceptions
from aiormq.abc import DeliveredMessage

TIMEOUT = 10  # seconds, to connect (with TLS, up to 30 more), and again to subscribe
PREFETCH = 300  # messages that the broker sends before it waits for an acknowledgement
URL = os.getenv("AMQP_URL", "amqp://guest:guest@localhost/")
#                     user:password@  [IPv6] or host    :port    /vhost?options
URL_PATTERN = r"amqps?://([^/?#]*@)?(\[[^]]*]|[^/:@[]+)(:[0-9]+)?([/?#][^@]*)?"
URL_FORM = "the URL has to look like amqp://user:password@host:port/vhost"
LOST = "receive_logs.py: lost the queue and the logs in it; more are missed until the next Waiting"
Item = DeliveredMessage | str | None  # a message for stdout, a line for stderr, or the end
Backlog = asyncio.Queue[Item]


async def receive_logs(url: str, backlog: Backlog) -> None:
    """Subscribe, and fill the backlog until the subscription is lost. Raises aio-pika's errors."""
    # Not connect_robust: it subscribes again by itself, and nobody knows that logs are missing.
    connection = await connect(url, timeout=TIMEOUT)
    try:
        async with asyncio.timeout(TIMEOUT):
            channel = await connection.channel()
            await channel.set_qos(prefetch_count=PREFETCH)
            logs_exchange = await channel.declare_exchange("logs", ExchangeType.FANOUT)
            queue = await channel.declare_queue(exclusive=True)  # no name: the server chooses one
            await queue.bind(logs_exchange, routing_key="")
            lost = await consume(queue, backlog)  # starts the consumer; lost is set when it ends
        await backlog.put(" [*] Waiting for logs. To exit press CTRL+C")
        await lost.wait()
        await backlog.put(LOST)
    finally:  # not "async with": close() can hang or fail. wait() gives it 1 s, and hides errors.
        await asyncio.wait({asyncio.create_task(connection.close())}, timeout=1)


async def consume(queue: abc.AbstractQueue, backlog: Backlog) -> asyncio.Event:
    """Start a consumer that fills the backlog. Return an event: set when the consumer is lost."""
    lost = asyncio.Event()
    queue.channel.close_callbacks.add(lambda *_: lost.set())
    # Not queue.consume: aio-pika does not tell if the queue is deleted, and takes more CPU.
    amqp_channel = await queue.channel.get_underlay_channel()  # of aiormq, the library below it
    amqp_channel.on_consumer_cancel_callbacks.add(lambda _: lost.set())
    await amqp_channel.basic_consume(queue.name, backlog.put)
    return lost


async def stay_subscribed(url: str, backlog: Backlog) -> None:
    """Receive logs, and again whenever the subscription is lost. Return if the first try fails."""
    first_try, told = True, set[str]()  # told: the reasons in this outage, each said once
    while True:
        next_try = time.monotonic() + 1
        try:
            await receive_logs(url, backlog)  # until the subscription is lost
            first_try, told = False, set[str]()
        except (Exception, asyncio.CancelledError) as error:  # aiormq raises CancelledError, too
            if (task := asyncio.current_task()) and task.cancelling():
                raise  # main has cancelled us, not aiormq
            words = explain(error)
            kind = words.partition("'")[0]  # without the queue's name, which changes in each try
            if kind not in told:
                told.add(kind)
                where = re.sub("(?s)//.*@", "//", url)  # without the password
                await backlog.put(f"receive_logs.py: {where}: {words}")
            if first_try:
                return
        await asyncio.sleep(next_try - time.monotonic())  # at most one try a second
        while backlog.qsize() > PREFETCH:  # stdout is paused: each try could add PREFETCH more
            await asyncio.sleep(1)


async def print_logs(backlog: Backlog) -> None:
    """Print what comes, and acknowledge it, until None comes. Raises OSError."""
    while await print_batch(backlog):
        await asyncio.sleep(0.01)  # lets a burst become one batch


async def print_batch(backlog: Backlog) -> bool:
    """Print and acknowledge what is in the backlog. Return whether more can come."""
    batch = [await backlog.get()]
    batch += [backlog.get_nowait() for _ in range(backlog.qsize())]
    await asyncio.to_thread(write, batch)  # a paused terminal holds up this thread alone
    if messages := [item for item in batch if isinstance(item, DeliveredMessage)]:
        last = messages[-1]  # multiple=True acknowledges all before it, too
        with suppress(Exception):  # the channel may be lost. "or 0" is only for the type checker
            await last.channel.basic_ack(last.delivery_tag or 0, multiple=True, wait=False)
    return None not in batch


def write(batch: list[Item]) -> None:
    """Write messages to stdout, and lines of our own to stderr. Raises OSError."""
    # Not sys.stdout (1): with python -u, it hides that a full disk has cut off the end of a line.
    with open(1, "w", 2**16, sys.stdout.encoding, "backslashreplace", closefd=False) as stdout:
        for item in batch:
            if isinstance(item, DeliveredMessage):
                text = item.body.removesuffix(b"\n").decode(errors="surrogateescape")  # fast
                pieces = (text[start : start + 2**16] for start in range(0, len(text), 2**16))
                stdout.write(" [x] ")
                stdout.writelines(map(harmless, pieces))  # piece by piece, to save memory
                stdout.write("\n")
            elif item:
                stdout.flush()
                say(item)


def harmless(text: str) -> str:
    """Escape what could clear the screen or pass for a line of ours."""
    return text if text.isprintable() else "".join(shown(c) for c in text)


@lru_cache(1000)
def shown(c: str) -> str:
    """Return a character, or an escape for it."""
    if c.isprintable() or category(c) == "Zs" or c in "\t\u200c\u200d":  # spaces and joiners
        return c
    # Further lines are indented, so as not to pass for messages. U+DCFF stands for the byte 0xff.
    return "\n     " if c == "\n" else repr(c)[1:-1].replace(r"\udc", r"\x")


def say(words: str) -> None:
    """Print a line on stderr, if that is possible. (stdout is for logs only.)"""
    with suppress(OSError, AttributeError):  # sys.stderr is None if it is closed
        sys.stderr.write(harmless(words.replace("\n", " ")) + "\n")


def explain(error: BaseException) -> str:
    """Say in one line what went wrong, where possible in the broker's or the system's words."""
    match error:
        case TimeoutError():
            return f"no answer within {TIMEOUT} s while connecting. Is it RabbitMQ?"
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
            return "the server hung up while connecting"  # aiormq raises any of these for it
        case ValueError():
            return URL_FORM  # not the error's own words: they can show the password
    return f"{type(error).__name__}: {error}"


async def main(url: str) -> int:
    """Receive the logs until a signal or an error, and return the exit status."""
    backlog, loop, stop = Backlog(), asyncio.get_running_loop(), asyncio.Event()
    for number in SIGNALS:  # not loop.add_signal_handler, which fails on Windows
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop.set))
    subscribing = asyncio.create_task(stay_subscribed(url, backlog))
    subscribing.add_done_callback(lambda _: backlog.put_nowait(None))  # then print_logs ends, too
    printing = asyncio.create_task(print_logs(backlog))
    await asyncio.wait({printing, asyncio.create_task(stop.wait())}, return_when="FIRST_COMPLETED")
    gave_up = subscribing.done()  # stay_subscribed has ended by itself, and said why
    subscribing.cancel()
    await asyncio.wait({subscribing, printing}, timeout=1)  # for close() and the last lines
    error = printing.exception() if printing.done() else None
    if error and not isinstance(error, BrokenPipeError):  # if nobody reads it, that is no error
        say(f"receive_logs.py: cannot write to stdout: {getattr(error, 'strerror', repr(error))}")
        return 1
    return int(gave_up)


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter)
    parser.add_argument("--url", default=URL, help="the broker (default: AMQP_URL, else localhost)")
    args = parser.parse_args()
    if not re.fullmatch(URL_PATTERN, args.url):
        parser.error(URL_FORM)  # also for "//user:12/3@host": a "/" in a password has to be %2F
    if not sys.stdout:
        sys.exit("receive_logs.py: stdout is closed")
    with suppress(OSError, AttributeError):  # Windows mostly cannot, and need not
        os.set_blocking(1, True)  # if our parent made it non-blocking, a full pipe is an error
    logging.disable()  # otherwise the libraries log, with tracebacks, the errors that we explain
    logging.captureWarnings(True)  # hides warnings, too, such as those about lost connections
    # Not asyncio.run and sys.exit: they would wait for the thread of a paused stdout.
    os._exit(asyncio.Runner().run(main(args.url)))
