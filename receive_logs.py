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
from argparse import ArgumentParser, RawTextHelpFormatter
from contextlib import suppress
from io import TextIOWrapper

from aio_pika import ExchangeType, connect, exceptions
from aiormq.abc import DeliveredMessage

TIMEOUT = 10  # seconds, to connect and subscribe
PREFETCH = 110  # the most messages that the broker sends us before we acknowledge some
URL = os.getenv("AMQP_URL") or "amqp://guest:guest@localhost/"
LOST = "receive_logs.py: lost the queue and the logs in it; more are missed until the next Waiting"
CONTROLS = [*range(0x20), *range(0x7F, 0xA0)]
MARKS = [0x61C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A)]  # end or turn lines
NOT_UTF_8 = range(0xDC80, 0xDD00)  # "surrogateescape" makes U+DCFF of the byte 0xff
UNSAFE = map(chr, [*CONTROLS, *MARKS, *NOT_UTF_8])
# What is printed for a character. U+DCFF becomes \xff, as the byte was.
SHOWN = {c: repr(c)[1:-1].replace(r"\udc", r"\x") for c in UNSAFE} | {"\t": "\t", "\n": "\n     "}


class End(int):
    """The exit status, as an item of the backlog: print_logs ends there."""


Item = DeliveredMessage | str | End  # a message for stdout, a line for stderr, or the end
Backlog = asyncio.Queue[Item]


async def receive_logs(url: str, backlog: Backlog) -> None:
    """Subscribe, and fill the backlog until the subscription is lost. Raises aio-pika's errors."""
    lost = asyncio.Event()
    async with asyncio.timeout(TIMEOUT) as time_limit:
        # Not connect_robust: it subscribes again by itself, and nobody knows what is missing.
        connection = await connect(url)
        try:
            channel = await connection.channel()
            channel.close_callbacks.add(lambda *_: lost.set())  # also if the connection is lost
            await channel.set_qos(prefetch_count=PREFETCH)
            logs_exchange = await channel.declare_exchange("logs", ExchangeType.FANOUT)
            queue = await channel.declare_queue(exclusive=True)  # no name: the server chooses one
            await queue.bind(logs_exchange, routing_key="")
            # Not queue.consume: it takes more CPU, and does not tell us if the queue is deleted.
            amqp_channel = await channel.get_underlay_channel()  # of aiormq, the library below it
            amqp_channel.on_consumer_cancel_callbacks.add(lambda _: lost.set())
            await amqp_channel.basic_consume(queue.name, backlog.put)
            time_limit.reschedule(None)  # the subscription may last for ever
            await backlog.put(" [*] Waiting for logs. To exit press CTRL+C")
            await lost.wait()
            await backlog.put(LOST)
        finally:  # close() can hang or fail: wait() gives it a second, and raises nothing
            await asyncio.wait({asyncio.create_task(connection.close())}, timeout=1)


async def stay_subscribed(url: str, backlog: Backlog) -> None:
    """Receive logs, and again whenever the subscription is lost. End if the first try fails."""
    first_try, told = True, set[str]()  # told: what was said in this outage
    while True:
        a_second = asyncio.create_task(asyncio.sleep(1))
        # The error, or None. gather returns even a CancelledError that aiormq has raised for a lost
        # connection. It raises one here only if main cancels us.
        [error] = await asyncio.gather(receive_logs(url, backlog), return_exceptions=True)
        if not error:
            first_try, told = False, set()
        elif (words := explain(url, error)) not in told:
            told.add(words)
            await backlog.put(words)
        if first_try:
            return await backlog.put(End(1))
        await a_second  # at most one try in that time
        while backlog.qsize() > PREFETCH:  # stdout is paused: each queue could add PREFETCH more
            await asyncio.sleep(1)


async def print_logs(backlog: Backlog) -> int:
    """Print what comes until the End comes, and return the exit status. Raises OSError."""
    while (end := await print_batch(backlog)) is None:
        await asyncio.sleep(0.006)  # long enough to collect a burst, too short for all of PREFETCH
    return end


async def print_batch(backlog: Backlog) -> End | None:
    """Print and acknowledge what is in the backlog. Return the End, if it is there."""
    batch = [await backlog.get()]
    batch += [backlog.get_nowait() for _ in range(backlog.qsize())]
    await asyncio.to_thread(write, batch)  # a paused terminal holds up this thread alone
    if messages := [item for item in batch if isinstance(item, DeliveredMessage)]:
        last = messages[-1]  # multiple=True acknowledges all before it, too
        with suppress(Exception):  # its channel may be lost
            assert last.delivery_tag  # for the type checker
            await last.channel.basic_ack(last.delivery_tag, multiple=True, wait=False)
    return next((item for item in batch if isinstance(item, End)), None)


def write(batch: list[Item]) -> None:
    """Write messages to stdout, and lines of our own to stderr. Raises OSError."""
    for item in batch:
        if isinstance(item, DeliveredMessage):
            body = item.body.replace(b"\r\n", b"\n").removesuffix(b"\n")
            text = body.decode(errors="surrogateescape")
            sys.stdout.write(" [x] ")
            for start in range(0, len(text), 2**16):  # piece by piece, to save memory
                sys.stdout.write(harmless(text[start : start + 2**16]))
            sys.stdout.write("\n")
        elif isinstance(item, str):
            sys.stdout.flush()
            say(item)
    sys.stdout.flush()


def harmless(text: str) -> str:
    """Escape what is unsafe. Indent further lines, so that they cannot pass for messages."""
    return text if text.isprintable() else "".join(SHOWN.get(c, c) for c in text)


def say(words: str) -> None:
    """Print one line on stderr, if that is possible. (stdout is for logs only.)"""
    with suppress(OSError, AttributeError):  # sys.stderr is None if it is closed
        sys.stderr.write(harmless(words.replace("\n", " ")) + "\n")


def explain(url: str, error: BaseException) -> str:
    """Say what went wrong, and at which broker."""
    match error:
        case ValueError():  # its own words can show the password
            return "receive_logs.py: the URL has to look like amqp://user:password@host:port/vhost"
        case TimeoutError():
            words = f"no answer within {TIMEOUT} s"
        case OSError() if re.search("Connect call failed|WinError 1225", str(error)):
            words = "cannot connect. Is RabbitMQ running there?"
        case exceptions.InvalidFrameError() if "OpenOk" in str(error):  # aiormq drops the reason
            words = "no such vhost, or not for this user, or it is down, or too many connections"
        case BaseException() if not str(error) or "Server connection" in str(error):  # aiormq's
            words = "the server hung up"
        case _:  # without the name of the queue, which is new in each try
            words = re.sub("amq.gen-[^']*", "amq.gen-...", f"{type(error).__name__}: {error}")
    return f"receive_logs.py: {url.rpartition('@')[2]}: {words}"  # without user and password


async def main(url: str) -> int:
    """Receive and print the logs until a signal or an error, and return the exit status."""
    backlog, loop = Backlog(), asyncio.get_running_loop()

    def stop() -> None:
        backlog.put_nowait(End(0))
        loop.call_later(1, os._exit, 0)  # if stdout is paused, print_logs never comes to this End

    for number in SIGNALS:  # not loop.add_signal_handler, which fails on Windows
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop))
    subscribing = asyncio.create_task(stay_subscribed(url, backlog))
    try:
        return await print_logs(backlog)
    except BrokenPipeError:
        return 0  # nobody reads it
    except OSError as error:
        say(f"receive_logs.py: cannot write to stdout: {error}")
        return 1
    finally:
        subscribing.cancel()
        await asyncio.wait({subscribing}, timeout=1)  # for close()


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter)
    parser.add_argument("--url", default=URL, help="the broker (default: AMQP_URL, else localhost)")
    args = parser.parse_args()
    if not re.fullmatch("amqps?://([^/]*@)?[^/:@][^@]*", args.url):
        sys.exit(explain(args.url, ValueError()))  # aiormq would go to localhost without a host
    if not isinstance(sys.stdout, TextIOWrapper):
        sys.exit("receive_logs.py: stdout is closed")
    sys.stdout.reconfigure(errors="backslashreplace")  # for letters that it cannot encode
    with suppress(OSError, AttributeError):  # Windows mostly cannot, and need not
        os.set_blocking(1, True)  # if our parent made it non-blocking, a full pipe is an error
    logging.disable()  # otherwise the libraries log, with tracebacks, the errors that we explain
    logging.captureWarnings(True)  # hides warnings, too: of connections that were given up
    # Not asyncio.run and sys.exit: they would wait for the thread of a paused stdout.
    os._exit(asyncio.Runner().run(main(args.url)))
