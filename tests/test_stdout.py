"""stdout that is paused, gone, full or narrow; and signals, at any moment."""

import fcntl
import os
import signal
import sys
import termios
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import pexpect
import psutil
import pytest
from pika.frame import Method
from pika.spec import Connection
from pytest_rabbitmq.factories.executor import RabbitMqExecutor
from scripts import EMIT_LOG, RECEIVE_LOGS, WAITING, Pair, Script, eventually
from servers import Relay, Tls, signal_node

# For a script that waits not a second, but a minute: a busy machine may need more than a second.
PATIENCE = """
from asyncio import BaseEventLoop
real = BaseEventLoop.call_later
BaseEventLoop.call_later = lambda loop, s, *a, **k: real(loop, 60 * s if s == 1 else s, *a, **k)
"""
CLOSE_OK = Method(0, Connection.CloseOk()).marshal()
SIGNALS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


def unread(pipe: int) -> int:
    """Return how many bytes wait in the pipe."""
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)


def fill(pipe: int) -> None:
    """Write to the pipe until it is full."""
    filler = os.open(f"/proc/self/fd/{pipe}", os.O_WRONLY | os.O_NONBLOCK)
    with suppress(BlockingIOError):
        while True:
            os.write(filler, b" ")
    os.close(filler)


def stall(pair: Pair, pipe: int) -> bytes:
    """Publish a message that the receiver's pipe cannot hold and wait until it stalls there.

    Return the line that it makes.
    """
    body = b"x" * 1_000_000
    pair.publish(body)
    eventually(lambda: unread(pipe))
    return b" [x] %s\n" % body


def test_a_long_pause_of_stdout_loses_nothing(pair: Pair, stalled: tuple[Script, BinaryIO]) -> None:
    receiver, out = stalled
    idle = receiver.peak_memory()
    terminal = pair.terminal(pair.url + "?heartbeat=2")
    terminal.sendcontrol("s")

    lines = [b" [x] %-100d" % number for number in range(4_000)]
    pair.publish(*[line.removeprefix(b" [x] ") for line in lines])
    # Three heartbeats: the broker gives up on a connection after two.
    assert terminal.expect([r"\d", pexpect.TIMEOUT], timeout=3 * 2) == 1

    expected = b"\n".join(lines) + b"\n"
    assert out.read(len(expected)) == expected
    assert receiver.err == WAITING
    assert receiver.peak_memory() < idle + 16

    terminal.sendcontrol("q")
    terminal.expect_exact(lines[-1] + b"\r\n", searchwindowsize=1000)
    assert terminal.before == b"".join(line + b"\r\n" for line in lines[:-1])


def test_large_messages_wait_at_the_broker_while_stdout_is_paused(
    pair: Pair, stalled: tuple[Script, BinaryIO]
) -> None:
    receiver, out = stalled
    idle = receiver.peak_memory()
    pair.publish(*[b"%-*d" % (2**20, number) for number in range(250)])
    for number in range(250):
        assert out.readline() == b" [x] %-*d\n" % (2**20, number)
    assert receiver.err == WAITING
    assert receiver.peak_memory() < idle + 160  # at most 120 of them, and what one needs


def test_a_receiver_waits_for_a_stdout_that_others_make_non_blocking(pair: Pair) -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    receiver = pair.receive(stdout=writing)
    bodies = [b"%06d" % number * 1000 for number in range(60)]
    with open(reading, "rb") as out:
        for _ in range(2):
            pair.publish(*bodies)
            for body in bodies:
                assert out.readline() == b" [x] %s\n" % body
            os.set_blocking(writing, False)
    os.close(writing)
    assert receiver.err == WAITING
    assert receiver.process.poll() is None


def test_an_interrupted_write_drops_nothing_even_if_python_is_told_not_to_buffer(
    pair: Pair,
) -> None:
    reading, writing = os.pipe()
    receiver = pair.receive(stdout=writing, PYTHONUNBUFFERED="1")
    os.close(writing)
    lines = [b" [x] %s\n" % (b"%06d" % number * 3000) for number in range(60)]
    pair.publish(*[line[5:-1] for line in lines])
    process = psutil.Process(receiver.process.pid)
    received = b""
    while len(received) < sum(map(len, lines)):
        process.suspend()
        eventually(lambda: process.status() == psutil.STATUS_STOPPED)
        process.resume()
        received += os.read(reading, 2**14)
    os.close(reading)
    assert received == b"".join(lines)


def test_a_stdout_that_is_no_file_is_printed_on(pair: Pair) -> None:
    # As in IDLE, or in a notebook.
    shell = (
        "import io, os, sys\n"
        "class Shell(io.TextIOBase):\n"
        "    def write(self, text):\n"
        "        return os.write(2, text.replace('x', 'shell').encode())\n"
        "sys.stdout = Shell()\n"
    )
    path = pair.python_path(sitecustomize=shell)
    receiver = pair.receive(PYTHONPATH=path)
    assert pair.emit("hello", PYTHONPATH=path).err == " [shell] Sent hello\n"
    eventually(lambda: receiver.err == WAITING + " [shell] hello\n")
    assert receiver.out == b""


def test_a_receiver_ends_quietly_once_nobody_reads_stdout(
    pair: Pair, broker: RabbitMqExecutor
) -> None:
    relay = Relay(broker.port)
    pipeline = pair.shell(f"receive_logs.py --url {relay.url} | head -n 1; echo ${{PIPESTATUS[0]}}")
    assert pipeline.stdout
    assert pipeline.stderr
    assert pipeline.stderr.readline().decode() == WAITING
    pair.emit("first")
    assert pipeline.stdout.readline() == b" [x] first\n"
    pair.wait_for_silence()
    assert pipeline.stdout.read() == b"0\n"
    assert pipeline.stderr.read() == b""
    eventually(lambda: relay.said[0].endswith(CLOSE_OK))


def test_a_full_disk_ends_a_receiver_but_a_confirmed_emit_is_a_success(
    pair: Pair, broker: RabbitMqExecutor
) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    relay = Relay(broker.port)
    receiver = pair.receive("--url", relay.url, stdout=full)
    emitter = pair.emit("too much", stdout=full)
    os.close(full)
    assert emitter.ended() == 0
    assert emitter.err == ""
    assert receiver.ended() == 1
    told = "receive_logs.py: cannot write to stdout: [Errno 28] No space left on device\n"
    assert receiver.err == WAITING + told
    eventually(lambda: relay.said[0].endswith(CLOSE_OK))


@pytest.mark.parametrize("cannot", ["connect", "write"])
def test_ctrl_c_ends_a_receiver_that_cannot_even_tell_its_error(pair: Pair, cannot: str) -> None:
    reading, writing = os.pipe()
    full = os.open("/dev/full", os.O_WRONLY)
    if cannot == "connect":
        fill(writing)
        receiver = pair.start(RECEIVE_LOGS, "--url", "amqp://localhost:1/", stderr=writing)
    else:
        receiver = pair.start(RECEIVE_LOGS, stdout=full, stderr=writing)
        assert os.read(reading, 100) == WAITING.encode()
        fill(writing)
        pair.emit("it cannot be written")
    tasks = Path(f"/proc/{receiver.process.pid}/task")
    eventually(lambda: any("pipe_write" in path.read_text() for path in tasks.glob("*/wchan")))
    receiver.process.send_signal(signal.SIGINT)
    assert receiver.ended() == 0
    for end in reading, writing, full:
        os.close(end)


def test_a_closed_stdout_is_told_by_the_receiver_and_ignored_by_the_emitter(pair: Pair) -> None:
    receiver = pair.shell("receive_logs.py >&-")
    assert receiver.communicate() == (b"", b"receive_logs.py: stdout is closed\n")
    assert receiver.returncode == 1
    pair.receive()
    emitter = pair.shell("emit_log.py >&-")
    assert emitter.communicate() == (b"", b"")
    assert emitter.returncode == 0


def test_ctrl_c_in_a_terminal_ends_the_receiver_and_its_queue(
    pair: Pair, broker: RabbitMqExecutor
) -> None:
    terminal = pair.terminal()
    pair.emit("on the screen")
    terminal.expect_exact(" [x] on the screen\r\n")
    assert "amq.gen-" in broker.rabbitctl_output("-q", "list_queues", "name")
    terminal.sendintr()
    terminal.expect(pexpect.EOF)
    assert terminal.before == b"^C"
    terminal.wait()
    assert terminal.exitstatus == 0
    eventually(lambda: "amq.gen-" not in broker.rabbitctl_output("-q", "list_queues", "name"))


@SIGNALS
def test_both_scripts_end_with_a_goodbye_to_the_broker(
    pair: Pair, broker: RabbitMqExecutor, number: signal.Signals
) -> None:
    relays = [Relay(broker.port), Relay(broker.port)]
    path = pair.python_path(sitecustomize=PATIENCE)
    receiver = pair.receive("--url", relays[0].url, PYTHONPATH=path)
    assert pair.emit("--url", relays[1].url, PYTHONPATH=path).ended() == 0
    receiver.process.send_signal(number)
    assert receiver.ended() == 0
    assert receiver.err == WAITING
    eventually(lambda: all(relay.said[0].endswith(CLOSE_OK) for relay in relays))


@SIGNALS
def test_a_signal_ends_a_receiver_whose_stdout_is_stalled(
    pair: Pair, stalled: tuple[Script, BinaryIO], number: signal.Signals
) -> None:
    receiver, out = stalled
    stall(pair, out.fileno())
    receiver.process.send_signal(number)
    assert receiver.ended() == 0
    assert receiver.err == WAITING


def test_ctrl_c_tears_no_line_and_loses_none_that_has_come(pair: Pair) -> None:
    reading, writing = os.pipe()
    receiver = pair.receive(stdout=writing, PYTHONPATH=pair.python_path(sitecustomize=PATIENCE))
    os.close(writing)
    line = stall(pair, reading)
    pair.publish(b"behind it")
    receiver.process.send_signal(signal.SIGINT)
    with open(reading, "rb") as out:
        assert out.read() in (line, line + b" [x] behind it\n")
    assert receiver.ended() == 0


@pytest.mark.usefixtures("healthy")
def test_ctrl_c_ends_both_kinds_of_connection_to_a_frozen_broker(
    pair: Pair, broker: RabbitMqExecutor, tls: Tls
) -> None:
    receivers = [pair.receive(), pair.receive("--url", tls.url)]
    signal_node(broker, signal.SIGSTOP)
    for receiver in receivers:
        receiver.process.send_signal(signal.SIGINT)
        assert receiver.ended(20) == 0
        assert receiver.err == WAITING


def test_ctrl_c_ends_a_receiver_that_waits_for_the_broker(
    pair: Pair, broker: RabbitMqExecutor
) -> None:
    relay = Relay(broker.port)
    receiver = pair.receive("--url", relay.url)
    relay.go_away()
    eventually(lambda: "Connect call failed" in receiver.err)
    receiver.process.send_signal(signal.SIGINT)
    assert receiver.ended() == 0
    assert "Traceback" not in receiver.err


def test_ctrl_c_ends_the_imports_of_the_emitter_without_a_traceback(pair: Pair) -> None:
    slow = "import sys, time; print('importing', file=sys.stderr, flush=True); time.sleep(600)"
    importing = pair.start(EMIT_LOG, PYTHONPATH=pair.python_path(aio_pika=slow))
    eventually(lambda: importing.err == "importing\n")
    importing.process.send_signal(signal.SIGINT)
    assert importing.ended() == -signal.SIGINT  # which also ends a loop of a shell's
    assert importing.err == "importing\n"
