"""Both scripts on Windows' own Python under Wine, which .ci/windows installs and names."""

import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pexpect
import pytest
from mirakuru.exceptions import ProcessExitedWithError, ProcessFinishedWithError
from pytest_rabbitmq.factories.executor import RabbitMqExecutor
from scripts import EMIT_LOG, LOST, RECEIVE_LOGS, ROOT, SCRIPTS, WAITING, Pair, Script, eventually

PYTHON = ["wine", os.environ["WINDOWS_PYTHON"]]
LETTERS = "h\u00e9 \u65e5\u672c \u20ac"


def start(pair: Pair, script: Path, *arguments: str) -> Script:
    """Start a script with pipes as stdout and stderr, and write to files what comes out of them."""
    number = len(list(pair.folder.iterdir()))
    paths = [pair.folder / f"{number}.{name}" for name in ("out", "err")]
    cats = []
    for path in paths:
        with path.open("wb") as file:
            cats.append(
                subprocess.Popen(["sed", "-u", "s/\\r$//"], stdin=subprocess.PIPE, stdout=file)
            )
    environment = os.environ | {"AMQP_URL": pair.url}
    command = [*PYTHON, script.name, *arguments]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=cats[0].stdin, stderr=cats[1].stdin
    )
    for cat in cats:
        assert cat.stdin
        cat.stdin.close()
        pair.running.enter_context(cat)
    pair.running.enter_context(process)
    pair.running.callback(process.kill)
    return Script(process, *paths)


def assert_says(script: Script, status: int, err: str) -> None:
    """Check that a script ends with this status, and that its stderr ends with these words."""
    assert script.ended() == status
    eventually(lambda: script.err.endswith(err))
    assert "Traceback" not in script.err


def test_messages_arrive_in_a_pipe_with_any_letter_and_ctrl_c_is_quiet(pair: Pair) -> None:
    linux = pair.receive(PYTHONIOENCODING="utf-8")
    windows = start(pair, RECEIVE_LOGS).waiting()
    emitter = start(pair, EMIT_LOG, LETTERS, "\x1b[2J")
    assert_says(emitter, 0, "")
    shown = rb"h%s \u65e5\u672c %s " % ("\u00e9".encode("cp1252"), "\u20ac".encode("cp1252"))
    emitter.assert_prints(b" [x] Sent " + shown + rb"\x1b[2J" + b"\n")
    windows.assert_prints(b" [x] " + shown + rb"\x1b[2J" + b"\n")
    linux.assert_prints(b" [x] " + LETTERS.encode() + rb" \x1b[2J" + b"\n")
    windows.process.send_signal(signal.SIGINT)
    assert_says(windows, 0, WAITING)


def test_a_terminal_shows_any_letter_and_ctrl_c_ends_it_quietly(pair: Pair) -> None:
    environment = os.environ | {"AMQP_URL": pair.url, "TERM": "xterm"}
    arguments = [*PYTHON[1:], str(RECEIVE_LOGS)]
    terminal = pexpect.spawn(PYTHON[0], arguments, env=environment, encoding="utf-8", timeout=60)
    with terminal:
        terminal.expect_exact(WAITING.strip())
        assert pair.emit(LETTERS).ended() == 0
        terminal.expect_exact(LETTERS)
        assert pair.emit("x" * 40_000 + "the end").ended() == 0
        terminal.expect_exact("the end")
        terminal.sendintr()
        terminal.expect(pexpect.EOF)
        terminal.wait()
        assert terminal.exitstatus == 0
        # A traceback of ours would name the script. Wine now and then has one of Python's own:
        # it lets a signal's wake-up byte collide with the event loop's.
        assert RECEIVE_LOGS.name not in str(terminal.before)


def test_a_receiver_survives_a_restart_of_the_broker(pair: Pair, broker: RabbitMqExecutor) -> None:
    receiver = start(pair, RECEIVE_LOGS).waiting()
    with suppress(ProcessExitedWithError, ProcessFinishedWithError):
        broker.stop()
    eventually(lambda: ". Is RabbitMQ running there?\n" in receiver.err)
    broker.start()
    receiver.waiting(times=2)
    assert receiver.err.startswith(WAITING + LOST)
    assert pair.emit("back again").err == ""
    receiver.assert_prints(b" [x] back again\n")


@SCRIPTS
@pytest.mark.parametrize(
    ("url", "status", "told"),
    [
        ("amqp://localhost:1/", 1, ". Is RabbitMQ running there?"),
        ("amqp://guest:wrong@localhost:{port}/", 1, "from the broker's own machine only)"),
        ("localhost", 2, "it (or AMQP_URL) must look like amqp://user:password@host:port/vhost"),
    ],
    ids=["no broker", "wrong password", "wrong form"],
)
def test_what_cannot_work_is_told_in_a_line(
    pair: Pair, broker: RabbitMqExecutor, script: Path, url: str, status: int, told: str
) -> None:
    refused = start(pair, script, "--url", url.format(port=broker.port))
    assert_says(refused, status, f"{told}\n")
    assert len(refused.err.splitlines()) == status  # the usage is a line, too
    assert refused.out == b""


def test_a_receiver_whose_pipe_is_closed_ends_quietly(pair: Pair) -> None:
    command = f"wine '{PYTHON[1]}' receive_*.py | true; exit ${{PIPESTATUS[0]}}"
    environment = os.environ | {"AMQP_URL": pair.url}
    with subprocess.Popen(
        ["bash", "-c", command], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    ) as receiver:
        assert receiver.stderr
        assert receiver.stderr.readline() == WAITING
        pair.emit("nobody reads it")
        assert receiver.stderr.read() == ""
    assert receiver.returncode == 0
