"""The two scripts, started as a user starts them, and conditions to wait for."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import pexpect
import pika
import pytest

ROOT = Path(__file__).parent.parent
EMIT_LOG = ROOT / "emit_log.py"
RECEIVE_LOGS = ROOT / "receive_logs.py"
SCRIPTS = pytest.mark.parametrize("script", [EMIT_LOG, RECEIVE_LOGS], ids=lambda path: path.stem)
WAITING = " [*] Waiting for logs. To exit press CTRL+C\n"
LOST = "receive_logs.py: subscription lost: logs are missed from here to the next Waiting"
NOBODY = "emit_log.py: no receiver is listening: the broker discarded the message\n"
# For a script that gives up after a quarter of the time.
IMPATIENCE = """
import asyncio
real = asyncio.wait_for
asyncio.wait_for = lambda fut, timeout: real(fut, timeout and timeout / 4)
"""

T = TypeVar("T")


def eventually(condition: Callable[[], T], seconds: float = 60) -> T:
    """Return what `condition` returns as soon as that is true. The bound ends a hopeless wait."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.02)
    return value


def user_environment(**variables: str) -> dict[str, str]:
    """Return the environment without what changes how the scripts behave."""
    ours = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "AMQP"))}
    return ours | variables


@dataclass
class Script:
    """A running script, and the files to which its stdout and stderr go."""

    process: subprocess.Popen[bytes]
    out_path: Path
    err_path: Path

    @property
    def out(self) -> bytes:
        """Return what the script has printed on stdout so far."""
        return self.out_path.read_bytes()

    @property
    def err(self) -> str:
        """Return what the script has printed on stderr so far."""
        return self.err_path.read_text()

    def ended(self, seconds: float = 60) -> int:
        """Wait for the end and return the exit status."""
        return self.process.wait(seconds)

    def waiting(self, times: int = 1) -> Self:
        """Wait until a receiver has subscribed that many times, and return it."""

        def subscribed() -> bool:
            assert self.process.poll() is None, f"ended: {self.err}"
            return self.err.count(WAITING) == times

        eventually(subscribed)
        return self

    def assert_prints(self, out: bytes) -> None:
        """Wait until stdout is long enough, and check that it holds exactly `out`."""
        try:
            eventually(lambda: len(self.out) >= len(out))
        finally:
            assert self.out == out

    def peak_memory(self) -> int:
        """Return the most memory that the running script has had so far, in MiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) // 1024


@dataclass
class Pair:
    """Both scripts on one broker, with their output in one folder."""

    url: str
    folder: Path
    running: ExitStack

    def start(
        self,
        script: Path,
        *arguments: str | bytes,
        stdout: int | None = None,
        stderr: int | None = None,
        **variables: str,
    ) -> Script:
        """Start a script. It is killed with the ExitStack."""
        number = len(list(self.folder.iterdir()))
        out_path, err_path = self.folder / f"{number}.out", self.folder / f"{number}.err"
        with out_path.open("wb") as out, err_path.open("wb") as err:
            process = subprocess.Popen(
                [sys.executable, script, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out if stdout is None else stdout,
                stderr=err if stderr is None else stderr,
                env=user_environment(**{"AMQP_URL": self.url} | variables),
            )
        self.running.enter_context(process)
        self.running.callback(process.kill)
        return Script(process, out_path, err_path)

    def receive(self, *arguments: str | bytes, **options: Any) -> Script:
        """Start a receiver and wait until it is subscribed."""
        return self.start(RECEIVE_LOGS, *arguments, **options).waiting()

    def emit(self, *arguments: str | bytes, **options: Any) -> Script:
        """Run the emitter to its end."""
        script = self.start(EMIT_LOG, *arguments, **options)
        script.ended()
        return script

    def emit_until_routed(self, message: str) -> None:
        """Emit a message again and again until somebody receives it."""
        eventually(lambda: self.emit(message).err == "")

    def wait_for_silence(self) -> None:
        """Wait until nobody listens any more, not even the receivers of other tests."""
        eventually(lambda: self.emit("is anybody left?").err == NOBODY)

    def publish(self, *bodies: bytes, properties: pika.BasicProperties | None = None) -> None:
        """Publish messages from a client that is not aio-pika, until the broker has them all."""
        with pika.BlockingConnection(pika.URLParameters(self.url)) as connection:
            channel = connection.channel()
            for body in bodies:
                channel.basic_publish("logs", "", body, properties)
            channel.close()  # the broker answers this after all that came before

    def shell(self, command: str, **variables: str) -> subprocess.Popen[bytes]:
        """Start a command of bash's in which both scripts are called by their names alone."""
        for script in EMIT_LOG, RECEIVE_LOGS:
            command = command.replace(script.name, f"'{sys.executable}' '{script}'")
        process = self.running.enter_context(
            subprocess.Popen(
                ["bash", "-c", command],
                env=user_environment(AMQP_URL=self.url, **variables),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        )
        self.running.callback(process.kill)
        return process

    def terminal(self, url: str = "") -> "pexpect.spawn[Any]":
        """Start a receiver in a terminal and wait until it is subscribed."""
        environment = user_environment(AMQP_URL=url or self.url)
        terminal = pexpect.spawn(sys.executable, [str(RECEIVE_LOGS)], env=environment)
        self.running.callback(terminal.close, force=True)
        terminal.expect_exact(WAITING.rstrip() + "\r\n")
        return terminal

    def python_path(self, **modules: str) -> str:
        """Return a PYTHONPATH with these modules, with which a test changes what a script meets."""
        folder = self.folder / "modules"
        folder.mkdir()
        for name, text in modules.items():
            (folder / f"{name}.py").write_text(text)
        return str(folder)
