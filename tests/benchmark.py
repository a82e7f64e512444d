"""Measure the pair as whole processes, each figure beside its reference in the same run.

The backlog that receivers print is published while they are stopped (SIGSTOP), so the
feeder is over before the clock starts and cannot be the limit. What is compared runs in
turns, and the figures are medians of the rounds. Linux only: it reads /proc.
"""

import argparse
import asyncio
import json
import os
import platform
import selectors
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path

import aio_pika
import pika
from aio_pika.abc import AbstractIncomingMessage
from pika.adapters.blocking_connection import BlockingChannel
from pika.spec import Basic, BasicProperties
from port_for import get_port
from pytest_rabbitmq.factories.executor import RabbitMqExecutor
from scripts import EMIT_LOG, RECEIVE_LOGS, Pair, Script, eventually, full_pipe, user_environment

SERVER = Path("/usr/lib/rabbitmq/bin")
Figures = dict[str, float]


async def aio_pika_reference(url: str, count: int, reference: str) -> None:
    """Receive with aio-pika as its tutorial does, or only acknowledge, or only count."""
    connection = await aio_pika.connect(url)
    channel = await connection.channel()
    await channel.set_qos(prefetch_count=1 if reference == "one" else 300)
    exchange = await channel.declare_exchange("logs", aio_pika.ExchangeType.FANOUT)
    queue = await channel.declare_queue(exclusive=True)
    await queue.bind(exchange)
    received = 0

    async def print_and_acknowledge(message: AbstractIncomingMessage) -> None:
        print(" [x]", message.body.decode(), flush=True)
        await message.ack()

    async def only_count(message: AbstractIncomingMessage) -> None:
        nonlocal received
        received += 1
        if reference == "acknowledge" and received % 150 == 0:
            await message.ack(multiple=True)
        if received == count:
            print("\n" * (count - 1), flush=True)

    if reference == "one":
        await queue.consume(print_and_acknowledge)
    else:
        await queue.consume(only_count, no_ack=reference == "ceiling")
    print(" [*] Waiting for logs. To exit press CTRL+C", file=sys.stderr)
    await asyncio.Future()


def pika_reference(url: str) -> None:
    """Receive with pika and automatic acknowledgement, as its tutorial does, and flush."""
    channel = pika.BlockingConnection(pika.URLParameters(url)).channel()
    channel.exchange_declare("logs", "fanout")
    queue = channel.queue_declare("", exclusive=True).method.queue or ""
    channel.queue_bind(queue, "logs")

    def print_line(
        _channel: BlockingChannel, _: Basic.Deliver, __: BasicProperties, body: bytes
    ) -> None:
        print(" [x]", body.decode(), flush=True)

    channel.basic_consume(queue, print_line, auto_ack=True)
    print(" [*] Waiting for logs. To exit press CTRL+C", file=sys.stderr)
    channel.start_consuming()


def progress(line: str) -> None:
    """Say on stderr what is being measured."""
    print(line, file=sys.stderr, flush=True)


def backlog(url: str, receivers: list[Script], body: bytes, count: int) -> None:
    """Publish messages while the receivers are stopped, and let these go."""
    for receiver in receivers:
        receiver.process.send_signal(signal.SIGSTOP)
    with pika.BlockingConnection(pika.URLParameters(url)) as connection:
        channel = connection.channel()
        for number in range(count):
            channel.basic_publish("logs", "", b"%06d" % number + body[6:])
    for receiver in receivers:
        receiver.process.send_signal(signal.SIGCONT)


def emitting(pair: Pair, rounds: int) -> Figures:
    """Measure the emitter beside the import of its library, in seconds."""
    receiver = pair.receive()
    commands = {
        "ours": [sys.executable, str(EMIT_LOG), "hi"],
        "floor": [sys.executable, "-c", "import aio_pika"],
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            begin = time.perf_counter()
            subprocess.run(
                command,
                env=user_environment(AMQP_URL=pair.url),
                stdout=subprocess.DEVNULL,
                check=True,
            )
            times[name].append(time.perf_counter() - begin)
    receiver.process.kill()
    return {name: statistics.median(values) for name, values in times.items()}


def receiving(pair: Pair, rounds: int, count: int, size: int) -> Figures:
    """Measure messages a second into a pipe, ours and the references."""
    reference = ["--url", pair.url, "--count", str(count), "--reference"]
    programs: dict[str, tuple[Path, list[str]]] = {
        "ours": (RECEIVE_LOGS, []),
        "one at a time": (Path(__file__), [*reference, "one"]),
        "ceiling": (Path(__file__), [*reference, "ceiling"]),
        "acknowledge": (Path(__file__), [*reference, "acknowledge"]),
        "pika": (Path(__file__), [*reference, "pika"]),
    }
    rates: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, (script, arguments) in programs.items():
            reading, writing = os.pipe()
            receiver = pair.start(script, *arguments, stdout=writing).waiting()
            os.close(writing)
            backlog(pair.url, [receiver], b"x" * size, count)
            lines = 0
            begin = time.perf_counter()
            while lines < count:
                lines += os.read(reading, 2**20).count(b"\n")
            rates[name].append(count / (time.perf_counter() - begin))
            receiver.process.kill()
            os.close(reading)
    return {name: statistics.median(values) for name, values in rates.items()}


def fan_out(pair: Pair, receivers: int, count: int) -> float:
    """Return deliveries a second to that many receivers, all complete and in order."""
    scripts = [pair.start(RECEIVE_LOGS) for _ in range(receivers)]
    for script in scripts:
        script.waiting()
    expected = b"".join(b" [x] %06d%s\n" % (number, b"x" * 14) for number in range(count))
    backlog(pair.url, scripts, b"x" * 20, count)
    begin = time.perf_counter()
    eventually(lambda: all(s.out_path.stat().st_size >= len(expected) for s in scripts), 600)
    took = time.perf_counter() - begin
    assert all(script.out == expected for script in scripts)
    for script in scripts:
        script.process.kill()
    return receivers * count / took


def latency(pair: Pair, times: int) -> Figures:
    """Measure from the start of an emit to its "Sent", and from there to the receiver's line."""
    reading, writing = os.pipe()
    receiver = pair.receive(stdout=writing)
    to_sent, to_line = [], []
    for _ in range(times):
        begin = time.perf_counter()
        with (
            subprocess.Popen(
                [sys.executable, EMIT_LOG, "hi"],
                env=user_environment(AMQP_URL=pair.url),
                stdout=subprocess.PIPE,
            ) as emitter,
            selectors.DefaultSelector() as selector,
        ):
            assert emitter.stdout
            selector.register(emitter.stdout, selectors.EVENT_READ)
            selector.register(reading, selectors.EVENT_READ)
            at: dict[int, float] = {}
            while len(at) < 2:
                for key, _events in selector.select():
                    at[key.fd] = time.perf_counter()
                    selector.unregister(key.fileobj)
            to_sent.append(at[emitter.stdout.fileno()] - begin)
            to_line.append(at[reading] - at[emitter.stdout.fileno()])
            os.read(reading, 2**20)
    os.close(reading)
    receiver.process.kill()
    return {
        "sent": statistics.median(to_sent),
        "sent, worst": max(to_sent),
        "line": statistics.median(to_line),
        "line, worst": max(to_line),
    }


def memory(pair: Pair, count: int) -> Figures:
    """Measure the peaks: the receiver idle and after a backlog, the emitter at its end."""
    receiver = pair.receive()
    figures: Figures = {"receiver, idle": receiver.peak_memory()}
    with full_pipe() as pipe:  # which holds the emitter up at its last step
        emitter = pair.start(EMIT_LOG, "hi", stdout=pipe)
        receiver.printed(b" [x] hi\n")
        figures["emitter"] = emitter.peak_memory()
        emitter.process.kill()
    backlog(pair.url, [receiver], b"x" * 1024, count)
    eventually(lambda: receiver.out.count(b"\n") == count + 1)
    figures["receiver, under load"] = receiver.peak_memory()
    receiver.process.kill()
    return figures


@contextmanager
def private_node(folder: Path) -> Iterator[str]:
    """Run a RabbitMQ node as the tests do, and give its URL."""
    port, distribution_port = get_port(None), get_port(None)
    assert port
    assert distribution_port
    node = RabbitMqExecutor(
        str(SERVER / "rabbitmq-server"),
        "127.0.0.1",
        port,
        distribution_port,
        str(SERVER / "rabbitmqctl"),
        logpath=folder,
        path=folder,
        plugin_path=folder,
    )
    node.start()
    try:
        yield f"amqp://localhost:{port}/"
    finally:
        node.kill()


def measure(pair: Pair, rounds: int, count: int, many: int) -> dict[str, Figures]:
    """Take all measurements."""
    figures: dict[str, Figures] = {}
    progress("emit")
    figures["emit"] = emitting(pair, 4 * rounds)
    for size in 20, 1024:
        progress(f"receive, {size} bytes")
        figures[f"receive, {size} bytes"] = receiving(pair, rounds, count, size)
    figures["fan-out"] = {}
    for receivers in 1, 2, 4, 8, 16:
        progress(f"fan-out to {receivers}")
        rates = [fan_out(pair, receivers, count // 4) for _ in range(rounds)]
        figures["fan-out"][str(receivers)] = statistics.median(rates)
    progress(f"fan-out to {many}")
    figures["fan-out"][str(many)] = fan_out(pair, many, count // 5)
    progress("latency")
    figures["latency"] = latency(pair, 10 * rounds)
    progress("memory")
    figures["memory"] = memory(pair, count)
    return figures


def table(figures: dict[str, Figures]) -> Iterator[str]:
    """Write the figures for a person."""
    emit = figures["emit"]
    yield (
        f"emit: {emit['ours'] * 1000:.0f} ms, import aio_pika alone {emit['floor'] * 1000:.0f} ms: "
        f"{emit['ours'] / emit['floor']:.2f} of it (target: at most 1.15)"
    )
    yield f"{'receive':24}{'messages/s':>12}{'ours/it':>9}  target"
    for name, rates in figures.items():
        if name.startswith("receive, "):
            for program, rate in rates.items():
                target = {"one at a time": ">= 4", "ceiling": ">= 0.85"}.get(program, "")
                yield (
                    f"  {name[9:]:12}{program:13}{rate:9.0f}{rates['ours'] / rate:9.2f}  {target}"
                )
    yield f"{'fan-out to receivers':24}{'deliveries/s':>12}{'us each':>9}"
    most = max(figures["fan-out"].values())
    for receivers, rate in figures["fan-out"].items():
        yield f"  {receivers:22}{rate:12.0f}{1e6 / rate:9.0f}  {'#' * round(30 * rate / most)}"
    yield "latency in ms"
    for name, value in figures["latency"].items():
        yield f"  {name:22}{value * 1000:12.1f}"
    yield "peak memory in MiB"
    for name, value in figures["memory"].items():
        yield f"  {name:22}{value:12.0f}"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", help="a broker to use (default: a private node)")
    parser.add_argument("--json", action="store_true", help="print figures for a program")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=10_000, help="messages of a measurement")
    parser.add_argument("--many", type=int, default=50, help="receivers of the largest fan-out")
    parser.add_argument(
        "--reference",
        choices=["one", "ceiling", "acknowledge", "pika"],
        help="be that program (internal)",
    )
    args = parser.parse_args()
    if args.reference == "pika":
        pika_reference(args.url)
    elif args.reference:
        asyncio.run(aio_pika_reference(args.url, args.count, args.reference))
    else:
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            (output := folder / "output").mkdir()
            url = args.url or stack.enter_context(private_node(folder))
            pair = Pair(url, output, stack.enter_context(ExitStack()))
            figures = measure(pair, args.rounds, args.count, args.many)
        print(
            json.dumps(figures, indent=1) if args.json else "\n".join(table(figures)),
            f"Python {platform.python_version()}, aio-pika {version('aio-pika')}, "
            f"{os.cpu_count()} cores",
            sep="\n",
        )


if __name__ == "__main__":
    main()
