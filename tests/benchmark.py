"""Measure the pair as whole processes, each figure beside its reference in the same run.

A receiver is stopped (SIGSTOP) while its backlog is published: the publisher is not the limit.
What is compared runs in turns. Figures are medians of the rounds. Linux only: it reads /proc.
"""

import argparse
import asyncio
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path

import aio_pika
import pika
from aio_pika.abc import AbstractIncomingMessage
from port_for import get_port
from pytest_rabbitmq.factories.executor import RabbitMqExecutor
from scripts import EMIT_LOG, RECEIVE_LOGS, WAITING, Pair, Script, eventually

SERVER = Path("/usr/lib/rabbitmq/bin")
ONE, CEILING = "one at a time", "ceiling"
Figures = dict[str, float]


async def aio_pika_reference(url: str, count: int, one: bool) -> None:
    """Receive with aio-pika: acknowledge one at a time as its tutorial does, or only count."""
    channel = await (await aio_pika.connect(url)).channel()
    await channel.set_qos(prefetch_count=1)
    exchange = await channel.declare_exchange("logs", aio_pika.ExchangeType.FANOUT)
    queue = await channel.declare_queue(exclusive=True)
    await queue.bind(exchange)
    received = 0

    async def print_and_acknowledge(message: AbstractIncomingMessage) -> None:
        print(" [x]", message.body.decode(), flush=True)
        await message.ack()

    async def only_count(_: AbstractIncomingMessage) -> None:
        nonlocal received
        received += 1
        if received == count:
            print("\n" * (count - 1), flush=True)

    await queue.consume(print_and_acknowledge if one else only_count, no_ack=not one)
    print(WAITING, end="", file=sys.stderr)
    await asyncio.Future()


def backlog(url: str, receiver: Script, size: int, count: int) -> float:
    """Publish messages while the receiver is stopped; let it go, and return the time."""
    receiver.process.send_signal(signal.SIGSTOP)
    with pika.BlockingConnection(pika.URLParameters(url)) as connection:
        channel = connection.channel()
        for number in range(count):
            channel.basic_publish("logs", "", b"%0*d" % (size, number))
    receiver.process.send_signal(signal.SIGCONT)
    return time.perf_counter()


def emitting(pair: Pair, rounds: int) -> Figures:
    """Measure the emitter beside the import of its library, in seconds."""
    pair.receive()
    (bare := pair.folder / "bare.py").write_text("import aio_pika")
    times: dict[str, list[float]] = {"ours": [], "import aio_pika": []}
    for _ in range(rounds):
        for name, script in zip(times, (EMIT_LOG, bare), strict=True):
            begin = time.perf_counter()
            assert pair.start(script, AMQP_URL=pair.url).process.wait() == 0
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in times.items()}


def receiving(pair: Pair, rounds: int, count: int, size: int) -> Figures:
    """Measure messages a second into a pipe, ours and the references."""
    rates: dict[str, list[float]] = {"ours": [], ONE: [], CEILING: []}
    for _ in range(rounds):
        for name, values in rates.items():
            script, options = RECEIVE_LOGS, ["--url", pair.url]
            if name != "ours":
                script, options = Path(__file__), [*options, f"--count={count}", f"--be={name}"]
            reading, writing = os.pipe()
            receiver = pair.start(script, *options, stdout=writing).waiting()
            os.close(writing)
            begin = backlog(pair.url, receiver, size, count)
            lines = 0
            while lines < count:
                lines += os.read(reading, 2**20).count(b"\n")
            values.append(count / (time.perf_counter() - begin))
            receiver.process.kill()
            os.close(reading)
    return {name: statistics.median(values) for name, values in rates.items()}


def memory(pair: Pair, count: int) -> Figures:
    """Measure the peak of the receiver's memory in MiB: idle, and after a backlog."""
    receiver = pair.receive()
    idle = receiver.peak_memory()
    backlog(pair.url, receiver, 1024, count)
    eventually(lambda: receiver.out.count(b"\n") == count)
    return {"idle": idle, "after a backlog": receiver.peak_memory()}


@contextmanager
def private_node(folder: Path) -> Iterator[str]:
    """Run a RabbitMQ node as the tests do, and give its URL."""
    os.environ |= {"HOME": str(folder), "ERL_EPMD_PORT": str(get_port(None))}
    server, control = f"{SERVER}/rabbitmq-server", f"{SERVER}/rabbitmqctl"
    ports = get_port(None) or 0, get_port(None) or 0
    with RabbitMqExecutor(server, "127.0.0.1", *ports, control, folder, folder, folder) as node:
        yield f"amqp://localhost:{node.port}/"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", help="a broker to use (default: a private node)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=10_000, help="messages of a measurement")
    parser.add_argument("--be", choices=[ONE, CEILING], help="be a reference (internal)")
    args = parser.parse_args()
    if args.be:
        return asyncio.run(aio_pika_reference(args.url, args.count, args.be == ONE))
    measurements: dict[str, Callable[[Pair], Figures]] = {
        "emit": lambda pair: emitting(pair, 4 * args.rounds),
        "receive, 20 bytes": lambda pair: receiving(pair, args.rounds, args.count, 20),
        "receive, 1 KiB": lambda pair: receiving(pair, args.rounds, args.count, 1024),
        "memory": lambda pair: memory(pair, args.count),
    }
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (output := folder / "output").mkdir()
        url = args.url or stack.enter_context(private_node(folder))
        for name, measure in measurements.items():
            with ExitStack() as running:
                values = measure(Pair(url, output, running))
            for what, value in values.items():
                print(f"{name:18} {what:26}{value:12,.3f}{values.get('ours', value) / value:8.2f}")
    return print("Python", platform.python_version(), "aio-pika", version("aio-pika"))


if __name__ == "__main__":
    main()
