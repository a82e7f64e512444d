"""Measure the pair as whole processes, each figure beside its reference in the same run.

A receiver is stopped (SIGSTOP) while its backlog is published: the publisher is not the limit.
What is compared runs in turns. Figures are medians of the rounds.
"""

import argparse
import os
import platform
import signal
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path

import psutil
from port_for import get_port
from pytest_rabbitmq.factories.executor import RabbitMqExecutor
from scripts import EMIT_LOG, RECEIVE_LOGS, Pair
from servers import node_environment

SERVER = Path("/usr/lib/rabbitmq/bin")
OURS = "ours"
STACK_TRACE = b"java.lang.IllegalStateException: no\n" + b"\tat org.example.Log.write(Log)\n" * 60
# Receive as aio-pika's tutorial does: acknowledge one message after the other.
ONE_AT_A_TIME = """
import asyncio, os, sys, aio_pika

async def main():
    channel = await (await aio_pika.connect(os.environ["AMQP_URL"])).channel()
    await channel.set_qos(prefetch_count=1)
    exchange = await channel.declare_exchange("logs", aio_pika.ExchangeType.FANOUT)
    queue = await channel.declare_queue(exclusive=True)
    await queue.bind(exchange)

    async def on_message(message):
        async with message.process():
            print(" [x]", message.body.decode(), flush=True)

    await queue.consume(on_message)
    print(" [*] Waiting for logs. To exit press CTRL+C", file=sys.stderr)
    await asyncio.Future()

asyncio.run(main())
"""


def emitting(pair: Pair, rounds: int) -> dict[str, list[float]]:
    """Measure the emitter beside the import of its library, in seconds."""
    pair.receive()
    (bare := pair.folder / "bare.py").write_text("import aio_pika")
    times: dict[str, list[float]] = {OURS: [], "import aio_pika": []}
    for _ in range(rounds):
        for name, script in zip(times, (EMIT_LOG, bare), strict=True):
            begin = time.perf_counter()
            assert pair.start(script).ended() == 0
            times[name].append(time.perf_counter() - begin)
    return times


def receiving(pair: Pair, rounds: int, count: int, body: bytes) -> dict[str, list[float]]:
    """Measure CPU time and time of a message into a pipe, in microseconds."""
    (reference := pair.folder / "one_at_a_time.py").write_text(ONE_AT_A_TIME)
    figures: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, script in (OURS, RECEIVE_LOGS), ("one at a time", reference):
            reading, writing = os.pipe()
            receiver = pair.start(script, stdout=writing).waiting()
            os.close(writing)
            process = psutil.Process(receiver.process.pid)
            receiver.process.send_signal(signal.SIGSTOP)
            pair.publish(*[body] * count)
            before = process.cpu_times()
            begin = time.perf_counter()
            receiver.process.send_signal(signal.SIGCONT)
            lines = 0
            while lines < count * len(body.splitlines()):
                lines += os.read(reading, 2**20).count(b"\n")
            took = time.perf_counter() - begin
            cpu = sum(process.cpu_times()[:2]) - sum(before[:2])
            figures.setdefault(f"{name}, time", []).append(took / count * 1e6)
            figures.setdefault(f"{name}, CPU time", []).append(cpu / count * 1e6)
            receiver.process.kill()
            os.close(reading)
    return figures


@contextmanager
def private_node(folder: Path) -> Iterator[str]:
    """Run a RabbitMQ node as the tests do, and give its URL."""
    os.environ |= node_environment(folder)
    server, control = f"{SERVER}/rabbitmq-server", f"{SERVER}/rabbitmqctl"
    ports = get_port(None) or 0, get_port(None) or 0
    with RabbitMqExecutor(server, "127.0.0.1", *ports, control, folder, folder, folder) as node:
        yield f"amqp://localhost:{node.port}/"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=10_000, help="messages of a measurement")
    args = parser.parse_args()
    with ExitStack() as running:
        folder = Path(running.enter_context(tempfile.TemporaryDirectory()))
        (output := folder / "output").mkdir()
        pair = Pair(running.enter_context(private_node(folder)), output, running)
        measured = {
            "emit, s": emitting(pair, 4 * args.rounds),
            "20 bytes, us": receiving(pair, args.rounds, args.count, b"x" * 20),
            "1 KiB, us": receiving(pair, args.rounds, args.count, b"x" * 1024),
            "stack trace, us": receiving(pair, args.rounds, args.count, STACK_TRACE),
        }
        for what, figures in measured.items():
            medians = {name: statistics.median(values) for name, values in figures.items()}
            for number, (name, value) in enumerate(medians.items()):
                ours = list(medians.values())[number % (len(medians) // 2)]
                print(f"{what:16} {name:26} {value:10.3f} {value / ours:6.2f}")
    print("Python", platform.python_version(), "aio-pika", version("aio-pika"))


if __name__ == "__main__":
    main()
