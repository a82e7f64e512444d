"""Slow, gone, full and narrow outputs, and bytes that mean harm."""

import fcntl
import itertools
import os
import resource
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from unicodedata import category

import pexpect
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pika.adapters.blocking_connection import BlockingChannel
from scripts import (
    EMIT_LOG,
    RECEIVE_LOGS,
    WAITING,
    Pair,
    Script,
    eventually,
    full_pipe,
    user_environment,
)


def publish(channel: BlockingChannel, *bodies: bytes) -> None:
    """Publish from a client that is not aio-pika."""
    for body in bodies:
        channel.basic_publish("logs", "", body)


@pytest.fixture
def stalled(pair: Pair) -> Iterator[tuple[Script, int]]:
    """Return a receiver that writes to a pipe, and the end of it that nobody reads yet."""
    reading, writing = os.pipe()
    try:
        receiver = pair.receive("--url", pair.url + "?heartbeat=2", stdout=writing)
        os.close(writing)
        yield receiver, reading
    finally:
        os.close(reading)


def stall(channel: BlockingChannel, pipe: int) -> bytes:
    """Publish a message that the receiver's pipe cannot hold and wait until it stalls there.

    Return the line that it makes.
    """
    body = b"x" * 1_000_000
    publish(channel, body)

    def begun() -> int:
        return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)

    eventually(begun)
    return b" [x] %s\n" % body


def test_a_long_pause_of_stdout_loses_nothing(
    pair: Pair, stalled: tuple[Script, int], channel: BlockingChannel
) -> None:
    receiver, pipe = stalled
    environment = user_environment(AMQP_URL=pair.url + "?heartbeat=2")
    with pexpect.spawn(sys.executable, [str(RECEIVE_LOGS)], env=environment) as terminal:
        terminal.expect_exact(WAITING.rstrip() + "\r\n")
        terminal.sendcontrol("s")

        lines = [b" [x] %-100d" % number for number in range(20_000)]
        publish(channel, *[line.removeprefix(b" [x] ") for line in lines])
        # Five heartbeats: the broker gives up on a connection after two.
        assert terminal.expect([r"\d", pexpect.TIMEOUT], timeout=5 * 2) == 1

        with open(pipe, "rb", closefd=False) as out:
            expected = b"\n".join(lines) + b"\n"
            assert out.read(len(expected)) == expected
        assert receiver.err == WAITING
        assert receiver.peak_memory() < 64

        terminal.sendcontrol("q")
        terminal.expect_exact(lines[-1] + b"\r\n", searchwindowsize=1000)
        assert terminal.before == b"".join(line + b"\r\n" for line in lines[:-1])


def test_large_messages_wait_at_the_broker_while_stdout_is_paused(
    stalled: tuple[Script, int], channel: BlockingChannel
) -> None:
    receiver, pipe = stalled
    publish(channel, *[b"%-*d" % (2**20, number) for number in range(600)])
    with open(pipe, "rb", closefd=False) as out:
        for number in range(600):
            assert out.readline() == b" [x] %-*d\n" % (2**20, number)
    assert receiver.err == WAITING
    assert receiver.peak_memory() < 500


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_receiver_whose_stdout_is_stalled(
    stalled: tuple[Script, int], channel: BlockingChannel, number: signal.Signals
) -> None:
    receiver, pipe = stalled
    stall(channel, pipe)
    receiver.process.send_signal(number)
    assert receiver.ended() == 0
    assert receiver.err == WAITING


def test_a_signal_ends_a_receiver_whose_stderr_is_stalled(pair: Pair) -> None:
    command = f"exec '{sys.executable}' '{RECEIVE_LOGS}' 2>&{{}}"
    with (
        full_pipe() as pipe,
        subprocess.Popen(
            ["bash", "-c", command.format(pipe)],
            env=user_environment(AMQP_URL=pair.url),
            stdout=subprocess.DEVNULL,
            pass_fds=[pipe],
        ) as receiver,
    ):
        pair.emit_until_routed("waits for stderr, as in any pipeline")
        receiver.terminate()
        assert receiver.wait(60) == 0


@pytest.mark.parametrize("pattern", [b"\xff", b"\xe2\x80", b"random"], ids=str)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_receiver_in_the_middle_of_a_large_message(
    pair: Pair, channel: BlockingChannel, pattern: bytes, number: signal.Signals
) -> None:
    size = 100 * 2**20
    body = os.urandom(size) if pattern == b"random" else pattern * (size // len(pattern))
    receiver = pair.receive()
    publish(channel, body)
    eventually(lambda: receiver.out_path.stat().st_size > len(" [x] "))
    receiver.process.send_signal(number)
    assert receiver.ended() == 0
    assert receiver.err == WAITING
    # It did not wait for the end of the message. All of it, escaped, is nearly three times as long.
    assert receiver.out_path.stat().st_size < 2 * size


@pytest.mark.parametrize("mebibytes", [16, 50, 100])
@pytest.mark.parametrize("byte", [b"\xff", b"\0", b"\n"], ids=str)
def test_a_signal_ends_a_receiver_while_a_large_message_arrives(
    pair: Pair, channel: BlockingChannel, byte: bytes, mebibytes: int
) -> None:
    receiver = pair.receive()
    publish(channel, byte * (mebibytes * 2**20))
    receiver.process.terminate()
    # Decoded and escaped in one go, 16 MiB took 8 to 22 s, and 50 MiB more than 60 s.
    assert receiver.ended(30) == 0
    assert receiver.err == WAITING


def test_ctrl_c_ends_an_emitter_that_cannot_print(pair: Pair) -> None:
    receiver = pair.receive()
    with full_pipe() as pipe:
        emitter = pair.start(EMIT_LOG, "stuck", stdout=pipe)
        receiver.assert_prints(b" [x] stuck\n")
        stuck = psutil.Process(emitter.process.pid)
        eventually(lambda: stuck.status() == psutil.STATUS_SLEEPING and not stuck.net_connections())
        emitter.process.send_signal(signal.SIGINT)
        assert emitter.ended() == -signal.SIGINT
        assert emitter.err == ""


def test_ctrl_c_tears_no_line(stalled: tuple[Script, int], channel: BlockingChannel) -> None:
    receiver, pipe = stalled
    line = stall(channel, pipe)
    receiver.process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        receiver.ended(0.2)  # it waits for the line to be read
    with open(pipe, "rb", closefd=False) as out:
        assert out.read() == line
    assert receiver.ended() == 0


@pytest.fixture
def non_blocking() -> Iterator[tuple[int, int]]:
    """Return both ends of a pipe. What is written to it must not wait, says some other program."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    yield reading, writing
    os.close(reading)


def test_a_receiver_waits_for_a_stdout_that_another_program_has_made_non_blocking(
    pair: Pair, channel: BlockingChannel, non_blocking: tuple[int, int]
) -> None:
    reading, writing = non_blocking
    receiver = pair.receive(stdout=writing)
    for _ in range(2):
        line = stall(channel, reading)
        with open(reading, "rb", closefd=False) as out:
            assert out.read(len(line)) == line
        os.set_blocking(writing, False)  # and again, while the receiver runs
    os.close(writing)
    assert receiver.err == WAITING
    assert receiver.process.poll() is None


def test_an_emitter_waits_for_a_stdout_that_another_program_has_made_non_blocking(
    pair: Pair, non_blocking: tuple[int, int]
) -> None:
    reading, writing = non_blocking
    receiver = pair.receive()
    filler = os.write(writing, b" " * 2**20)
    emitter = pair.start(EMIT_LOG, "waits", stdout=writing)
    os.close(writing)
    receiver.assert_prints(b" [x] waits\n")
    with pytest.raises(subprocess.TimeoutExpired):
        emitter.ended(1)
    with open(reading, "rb", closefd=False) as out:
        assert out.read() == b" " * filler + b" [x] Sent waits\n"
    assert emitter.ended() == 0
    assert emitter.err == ""


def test_a_receiver_ends_quietly_once_nobody_reads_stdout(pair: Pair) -> None:
    command = f"'{sys.executable}' '{RECEIVE_LOGS}' | head -n 1; echo ${{PIPESTATUS[0]}}"
    with subprocess.Popen(
        ["bash", "-c", command],
        env=user_environment(AMQP_URL=pair.url),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as pipeline:
        assert pipeline.stderr
        assert pipeline.stdout
        assert pipeline.stderr.readline().decode() == WAITING
        pair.emit("first")
        assert pipeline.stdout.readline() == b" [x] first\n"
        eventually(lambda: pair.emit("next").err)  # that nobody listens any more
        assert pipeline.stdout.read() == b"0\n"
        assert pipeline.stderr.read() == b""


@pytest.fixture
def unread() -> Iterator[dict[str, int]]:
    """Return a pipe without a reader, and a terminal that was hung up."""
    reading, pipe = os.pipe()
    os.close(reading)
    master, terminal = os.openpty()
    os.close(master)
    yield {"pipe": pipe, "terminal": terminal}
    os.close(pipe)
    os.close(terminal)


@pytest.mark.parametrize("kind", ["pipe", "terminal"])
def test_both_scripts_end_quietly_if_nobody_reads_stdout(
    pair: Pair, unread: dict[str, int], kind: str
) -> None:
    receiver = pair.receive(stdout=unread[kind])
    emitter = pair.emit("unread", stdout=unread[kind])
    for script in receiver, emitter:
        assert script.ended() == 0
        assert script.err.removeprefix(WAITING) == ""


def test_a_file_that_gives_the_error_of_a_hung_up_terminal_is_a_broken_disk(
    pair: Pair, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "def set_blocking(fd, _):\n"
        "    if fd == 1:\n"
        "        raise OSError(5, os.strerror(5))\n"
        "os.set_blocking = set_blocking\n"
    )
    receiver = pair.start(RECEIVE_LOGS, PYTHONPATH=str(tmp_path))
    assert receiver.ended() == 1
    assert receiver.err == "receive_logs.py: cannot write to stdout: Input/output error\n"


def test_a_full_disk_is_told(pair: Pair) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    receiver = pair.receive(stdout=full)
    emitter = pair.emit("too much", stdout=full)
    os.close(full)
    for script in receiver, emitter:
        assert script.ended() == 1
        assert "No space left on device\n" in script.err
        assert script.err.removeprefix(WAITING).count("\n") == 1


def test_a_disk_that_takes_half_a_line_is_told(pair: Pair) -> None:
    receiver = pair.receive(PYTHONUNBUFFERED="1")
    resource.prlimit(receiver.process.pid, resource.RLIMIT_FSIZE, (1000, 1000))
    pair.emit("x" * 2000)
    assert receiver.ended() == 1
    assert receiver.err == WAITING + "receive_logs.py: cannot write to stdout: File too large\n"


def test_a_closed_stdout_is_told(pair: Pair) -> None:
    command = ["bash", "-c", f"exec '{sys.executable}' '{RECEIVE_LOGS}' >&-"]
    run = subprocess.run(
        command, env=user_environment(AMQP_URL=pair.url), stderr=subprocess.PIPE, check=False
    )
    assert run.returncode == 1
    assert run.stderr == b"receive_logs.py: stdout is closed\n"


def test_an_emitter_whose_stderr_is_full_succeeds(pair: Pair) -> None:
    eventually(lambda: pair.emit("is anybody left?").err)  # so that it has something to say
    command = f"exec '{sys.executable}' '{EMIT_LOG}' 2>/dev/full"
    run = subprocess.run(
        ["bash", "-c", command], env=user_environment(AMQP_URL=pair.url), check=False
    )
    assert run.returncode == 0


def test_a_closed_stderr_changes_nothing_on_stdout(pair: Pair, tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = f"exec '{sys.executable}' '{RECEIVE_LOGS}' >'{log}' 2>&-"
    with subprocess.Popen(
        ["bash", "-c", command], env=user_environment(AMQP_URL=pair.url)
    ) as receiver:
        pair.emit_until_routed("received")
        eventually(lambda: log.read_bytes() == b" [x] received\n")
        receiver.terminate()
        assert receiver.wait(60) == 0


@pytest.mark.parametrize("encoding", ["ascii", "cp437"])
def test_what_stdout_cannot_encode_is_escaped(pair: Pair, encoding: str) -> None:
    receiver = pair.receive(PYTHONIOENCODING=encoding)
    emitter = pair.emit("10 \u20ac", b"\xff", PYTHONIOENCODING=encoding)
    assert emitter.ended() == 0
    assert emitter.out == b" [x] Sent 10 \\u20ac \\xff\n"
    receiver.assert_prints(b" [x] 10 \\u20ac \\xff\n")


@pytest.mark.parametrize(
    ("body", "line"),
    [
        (b"", b" [x] \n"),
        (b"one newline at the end\n", b" [x] one newline at the end\n"),
        (b"two\n\n", b" [x] two\n     \n"),
        (b"Traceback:\n\tin f\n [x] forged", b" [x] Traceback:\n     \tin f\n      [x] forged\n"),
        (b"\x1b[2J\x1b]0;title\x07\r\x00\x7f", rb" [x] \x1b[2J\x1b]0;title\x07\r\x00\x7f" + b"\n"),
        (b"\xff\xfe\xc3", rb" [x] \xff\xfe\xc3" + b"\n"),
        (
            "\u202e\u200b\u2028\x85\U000e0041".encode(),
            rb" [x] \u202e\u200b\u2028\x85\U000e0041" + b"\n",
        ),
        (
            "caf\u00e9 \U0001f600 \u65e5\u672c".encode(),
            " [x] caf\u00e9 \U0001f600 \u65e5\u672c\n".encode(),
        ),
        (
            "20\u202f%\u00a0\u3000 \u0645\u06cc\u200c\u062e \U0001f469\u200d\U0001f52c".encode(),
            " [x] 20\u202f%\u00a0\u3000 \u0645\u06cc\u200c\u062e "
            "\U0001f469\u200d\U0001f52c\n".encode(),
        ),
        (b"8 MiB " * (2**23 // 6), b" [x] " + b"8 MiB " * (2**23 // 6) + b"\n"),
    ],
    ids=lambda value: str(value[:20]),
)
def test_a_body_becomes_harmless_lines(
    pair: Pair, channel: BlockingChannel, body: bytes, line: bytes
) -> None:
    receiver = pair.receive(PYTHONIOENCODING="utf-8")
    publish(channel, body)
    receiver.assert_prints(line)


@pytest.mark.parametrize("byte", [b"\0", b"\xff", b"\n", b"\xe2\x80\xae"])
def test_one_message_cannot_fill_the_memory(
    pair: Pair, channel: BlockingChannel, byte: bytes
) -> None:
    receiver = pair.receive()
    publish(channel, byte * (2**24 // len(byte)), b"after it")
    eventually(lambda: receiver.out[-15:].endswith(b" [x] after it\n"))
    assert receiver.peak_memory() < 400


@pytest.mark.parametrize(
    ("words", "echo"),
    [
        ("\x1b[2J\r", rb"\x1b[2J\r"),
        ("ok\n [x] Sent fine", rb"ok\n [x] Sent fine"),
        ("20\u202f%\u3000\u200c", "20\u202f%\u3000\u200c".encode()),
    ],
)
def test_the_echo_of_the_emitter_is_one_harmless_line(pair: Pair, words: str, echo: bytes) -> None:
    assert pair.emit(words, PYTHONIOENCODING="utf-8").out == b" [x] Sent " + echo + b"\n"


def test_random_bytes_are_printed_once_in_order_and_harmless(
    pair: Pair, channel: BlockingChannel
) -> None:
    receiver = pair.receive(PYTHONIOENCODING="utf-8")
    counted = itertools.count()
    seen = 0

    nasty = st.text(st.characters(codec="utf-8")).map(str.encode)

    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.binary() | nasty, min_size=20))
    def each_is_printed_once_in_order_and_harmless(bodies: list[bytes]) -> None:
        nonlocal seen
        numbered = [b"%d:%s" % (next(counted), body) for body in bodies]
        last = b"%d:" % next(counted)
        publish(channel, *numbered, last)
        eventually(lambda: receiver.out.endswith(b" [x] %s\n" % last))
        lines = receiver.out[seen:].decode().removesuffix("\n").split("\n")
        seen = len(receiver.out)

        shown = {c for line in lines for c in line if not c.isprintable()}
        assert shown - {"\t", "\u200c", "\u200d"} == {c for c in shown if category(c) == "Zs"}
        for body in [*numbered, last]:
            number = body.partition(b":")[0].decode()
            assert lines.pop(0).startswith(f" [x] {number}:")
            for _ in range(body.removesuffix(b"\n").count(b"\n")):
                assert lines.pop(0).startswith("     ")
        assert lines == []

    each_is_printed_once_in_order_and_harmless()
    assert next(counted) > 2000
    assert receiver.process.poll() is None
