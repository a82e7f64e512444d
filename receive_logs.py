"""Receive what emit_log.py emits and print it on stdout.

  python receive_logs.py                          see the logs on the screen
  python receive_logs.py > logs_from_rabbit.log   direct the logs to disk

If the subscription is lost, it subscribes again. What is emitted meanwhile is missed: a line on
stderr says so. (RabbitMQ before 4.3 ends a subscription if stdout is paused for half an hour.)
Exit status: 0 after CTRL+C, SIGTERM or a closed pipe; 1 if it cannot subscribe when it starts, or
cannot write; 2 usage. Needs Python 3.11 and aio-pika 10.2, or newer.
"""

import asyncio
import errno
import logging
import os
import signal
import sys
from argparse import ArgumentParser, ArgumentTypeError, RawTextHelpFormatter
from collections.abc import Awaitable
from contextlib import suppress
from io import TextIOWrapper
from urllib.parse import urlsplit

from aio_pika import ExchangeType, connect, exceptions
from aio_pika.abc import AbstractConnection
from aiormq.abc import DeliveredMessage

URL = os.getenv("AMQP_URL") or "amqp://guest:guest@localhost/"
TIMEOUT = 10  # seconds to connect, and again to subscribe
PREFETCH = 120  # the most messages that the broker sends us before we acknowledge some
PAUSE = 0.005  # seconds to wait after a batch, so that the next is larger: it saves CPU time
WAITING = " [*] Waiting for logs. To exit press CTRL+C"
LOST = "receive_logs.py: subscription lost: logs are missed from here to the next Waiting"

Item = DeliveredMessage | str | None  # a message, a line for stderr, or the end
Backlog = asyncio.Queue[Item]


async def receive_until_lost(url: str, backlog: Backlog) -> None:
    """Connect, subscribe, and wait until that is lost. Raises if it cannot subscribe."""
    # Not connect_robust: it subscribes again silently, so that nobody knows of the missing logs.
    connection = await asyncio.wait_for(connect(url), TIMEOUT)
    try:
        reasons = await asyncio.wait_for(subscribe(connection, backlog), TIMEOUT)
        await backlog.put(WAITING)
        reason = await reasons.get() or "the broker fell silent"  # CancelledError has no words
        await backlog.put(f"{LOST} ({reason})")
    finally:
        # close() can hang or fail: wait() gives it a second, and does not raise its error.
        await asyncio.wait({asyncio.create_task(connection.close())}, timeout=1)


async def subscribe(connection: AbstractConnection, backlog: Backlog) -> asyncio.Queue[str]:
    """Let the logs flow into the backlog. Return a queue that gets a reason when they stop."""
    reasons = asyncio.Queue[str]()
    channel = await connection.channel()
    channel.close_callbacks.add(lambda _, error: reasons.put_nowait(str(error)))
    await channel.set_qos(prefetch_count=PREFETCH)
    logs_exchange = await channel.declare_exchange("logs", ExchangeType.FANOUT)
    # No name: the server chooses one. Exclusive: it is ours alone, and goes when we disconnect.
    queue = await channel.declare_queue(exclusive=True)
    await queue.bind(logs_exchange, routing_key="")
    # Usually queue.consume(backlog.put). But only aiormq, the library below aio-pika, tells us if
    # somebody deletes the queue; and consuming there takes less CPU time.
    aiormq_channel = await channel.get_underlay_channel()
    aiormq_channel.on_consumer_cancel_callbacks.add(lambda _: reasons.put_nowait("queue deleted"))
    await aiormq_channel.basic_consume(queue.name, backlog.put)
    return reasons


async def error_of(attempt: Awaitable[None]) -> BaseException | None:
    """Wait for the end of the attempt. Return its error, or None."""
    # If the broker falls silent, aiormq raises CancelledError, although nobody has cancelled us.
    # gather returns that, like any other error. If main cancels us, gather raises it here.
    [error] = await asyncio.gather(attempt, return_exceptions=True)
    return error


async def receive_logs(url: str, backlog: Backlog) -> None:
    """Receive, again after each loss, until cancelled. End if the first try fails."""
    broker = url.rpartition("@")[2]  # without user and password
    if error := await error_of(receive_until_lost(url, backlog)):
        await backlog.put(f"receive_logs.py: {broker}: {explain(error)}")
        return
    reported = set[type]()  # the kinds of errors in this outage: each is reported once
    while True:
        await asyncio.sleep(1)
        error = await error_of(receive_until_lost(url, backlog))
        if error is None:  # it was subscribed: the next outage begins
            reported.clear()
        elif type(error) not in reported:
            reported.add(type(error))
            await backlog.put(f"receive_logs.py: {broker}: {explain(error)}")


async def print_logs(backlog: Backlog) -> None:
    """Print and acknowledge what comes until the end comes. Raises OSError."""
    while True:
        batch = [await backlog.get()]
        batch += [backlog.get_nowait() for _ in range(backlog.qsize())]
        await asyncio.to_thread(write, batch)  # while stdout is paused, only this thread waits
        if messages := [item for item in batch if isinstance(item, DeliveredMessage)]:
            await acknowledge(messages[-1])  # and with it those before it
        if None in batch:
            return
        del batch, messages  # they can be large: let go of them before more come
        await asyncio.sleep(PAUSE)


async def acknowledge(last: DeliveredMessage) -> None:
    """Let the broker send more. (That is all: no log is sent again, its queue dies with us.)"""
    assert last.delivery_tag  # for the type checker
    with suppress(Exception):  # the channel may be lost, and its messages with it
        await last.channel.basic_ack(last.delivery_tag, multiple=True, wait=False)


def write(batch: list[Item]) -> None:
    """Write messages to stdout, and lines of our own to stderr. Raises OSError."""
    with suppress(OSError, AttributeError):  # Windows often has no such call, and no need
        os.set_blocking(1, True)  # a program that shares our stdout may have made it non-blocking
    for item in batch:
        if isinstance(item, DeliveredMessage):
            start = " [x] "
            for line in item.body.splitlines() or [b""]:
                sys.stdout.write(start + escape(line.decode(errors="surrogateescape")) + "\n")
                start = "     "  # further lines are indented: none can pass for a message
        elif item:
            sys.stdout.flush()  # so that what came before is seen before
            print_on_stderr(item)
    sys.stdout.flush()


# Control characters, and marks that turn text around, are printed as \x1b, \u202e and so on.
CONTROLS = {*range(0x20), *range(0x7F, 0xA0)} - {ord("\t")}
MARKS = {0x61C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A)}
ESCAPES = {code: repr(chr(code))[1:-1] for code in CONTROLS | MARKS}
# Of a byte that is not UTF-8, such as 0xff, "surrogateescape" makes U+DCFF. It is printed as \xff.
# ("backslashreplace" would do both, but so slowly that one large message holds up everything.)
ESCAPES |= {0xDC00 + byte: f"\\x{byte:x}" for byte in range(0x80, 0x100)}


def escape(line: str) -> str:
    """Return the line as it can be printed. Nearly every line needs no change, but for its tabs."""
    return line if line.strip("\t").isprintable() else line.translate(ESCAPES)


def print_on_stderr(line: str) -> None:
    """Print a line of our own, if that is possible. (stdout is for logs only.)"""
    with suppress(OSError, AttributeError):  # sys.stderr is None if it is closed
        sys.stderr.write(f"{escape(line)}\n")


def explain(error: BaseException) -> str:
    """Say what went wrong. Many errors say it themselves."""
    match error:
        case TimeoutError():
            return f"no answer within {TIMEOUT} s"
        case asyncio.CancelledError():
            return "the broker fell silent"
        case exceptions.ProbableAuthenticationError():
            return f"{error} (guest can usually log in from the broker's own machine only)"
        case exceptions.InvalidFrameError() if "OpenOk" in str(error):  # aiormq drops the reason
            return "no such vhost, or not for this user, or it is down, or too many connections"
        case exceptions.ConnectionClosed():  # the broker says why
            return str(error)
        case ConnectionError():
            return f"{error}. Is RabbitMQ running there?"
        case _:
            logging.getLogger(__name__).error("The traceback:", exc_info=error)  # for python -X dev
            return f"{type(error).__name__}: {error}"


async def main(url: str) -> int:
    """Receive and print the logs until a signal or an error, and return the exit status."""
    loop = asyncio.get_running_loop()
    backlog = Backlog()
    receiving = asyncio.create_task(receive_logs(url, backlog))
    receiving.add_done_callback(lambda _: backlog.put_nowait(None))  # its end ends print_logs

    def stop() -> None:
        receiving.cancel()
        loop.call_later(1, os._exit, 0)  # even if stdout is paused, or the broker silent

    for number in signal.SIGINT, signal.SIGTERM:  # loop.add_signal_handler fails on Windows
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop))
    try:
        await print_logs(backlog)
    except OSError as error:
        receiving.cancel()
        await asyncio.wait({receiving}, timeout=1)  # it closes the connection
        if error.errno == errno.EPIPE or (os.name == "nt" and error.errno == errno.EINVAL):
            return 0  # nobody reads it
        line = f"receive_logs.py: cannot write to stdout: {error}"
        await asyncio.to_thread(print_on_stderr, line)  # stderr may be paused
        return 1
    if receiving.cancelled():  # by stop()
        return 0
    await receiving  # raises what receive_logs raised, by a mistake of ours
    return 1  # the first try has failed


def amqp_url(text: str) -> str:
    """Return the text, for argparse. Raises ArgumentTypeError if it is not a broker's URL."""
    with suppress(ValueError):  # the port is not a number, for example
        parts = urlsplit(text)
        if parts.scheme in {"amqp", "amqps"} and parts.hostname and parts.port != 0:
            return text
    raise ArgumentTypeError("it (or AMQP_URL) must look like amqp://user:password@host:port/vhost")


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter)
    parser.add_argument("--url", type=amqp_url, default=URL, help="the broker (default: AMQP_URL)")
    args = parser.parse_args()
    if sys.stdout is None:
        sys.exit("receive_logs.py: stdout is closed")
    if isinstance(sys.stdout, TextIOWrapper):  # not in IDLE, for example
        # Open it again (that truncates nothing), with a buffer: under python -u it has none, and
        # then the rest of an interrupted write is lost. Letters that it cannot encode are escaped.
        sys.stdout = open(1, "w", encoding=sys.stdout.encoding, errors="backslashreplace")
    if not sys.flags.dev_mode:
        logging.disable()  # the libraries log, with tracebacks, the errors that we explain
        logging.captureWarnings(True)  # silences warnings: they go to the log, too
    # Not asyncio.run and sys.exit: they would wait for the thread of a paused stdout.
    os._exit(asyncio.Runner().run(main(args.url)))
