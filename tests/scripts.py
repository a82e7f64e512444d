"""The two scripts, started as a user starts them, and conditions to wait for."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

ROOT = Path(__file__).parent.parent
EMIT_LOG = ROOT / "emit_log.py"
RECEIVE_LOGS = ROOT / "receive_logs.py"
WAITING = " [*] Waiting for logs. To exit press CTRL+C\n"
LOST = (
    "receive_logs.py: lost the queue and the logs in it; more are missed until the next Waiting\n"
)


T = TypeVar("T")


def eventually(condition: Callable[[], T], seconds: float = 60) -> T:
    """Return what `condition` returns as soon as that is true.

    Raises AssertionError if it never is. The bound only ends a hopeless wait. It is far
    beyond what a busy machine needs.
    """
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.02)
    return value


def user_environment(**variables: str) -> dict[str, str]:
    """Return the environment without what changes how the scripts behave."""
    ours = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "AMQP"))}
    return ours | variables


@contextmanager
def full_pipe() -> Iterator[int]:
    """Give the writing end of a pipe that nobody reads and that takes no byte more."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writing, b" " * 4096)
    os.set_blocking(writing, True)
    try:
        yield writing
    finally:
        os.close(reading)
        os.close(writing)


class Script:
    """A running script whose stdout and stderr go to files, unless told otherwise.

    A context manager: at the end it kills the script if that still runs.
    """

    def __init__(
        self,
        script: Path,
        folder: Path,
        *arguments: str | bytes,
        stdout: int | None = None,
        **variables: str,
    ) -> None:
        number = len(list(folder.iterdir()))
        self.out_path = folder / f"{number}.out"
        self.err_path = folder / f"{number}.err"
        with self.out_path.open("wb") as out, self.err_path.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, script, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out if stdout is None else stdout,
                stderr=err,
                env=user_environment(**variables),
            )

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

    def waiting(self, times: int = 1) -> "Script":
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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


@dataclass
class Pair:
    """Both scripts on one broker, with their output in one folder."""

    url: str
    folder: Path
    running: ExitStack

    def start(
        self, script: Path, *arguments: str | bytes, stdout: int | None = None, **variables: str
    ) -> Script:
        """Start a script. It is killed with the ExitStack."""
        variables = {"AMQP_URL": self.url} | variables
        return self.running.enter_context(
            Script(script, self.folder, *arguments, stdout=stdout, **variables)
        )

    def receive(
        self, *arguments: str | bytes, stdout: int | None = None, **variables: str
    ) -> Script:
        """Start a receiver and wait until it is subscribed."""
        return self.start(RECEIVE_LOGS, *arguments, stdout=stdout, **variables).waiting()

    def emit(self, *arguments: str | bytes, stdout: int | None = None, **variables: str) -> Script:
        """Run the emitter to its end."""
        script = self.start(EMIT_LOG, *arguments, stdout=stdout, **variables)
        script.ended()
        return script

    def emit_until_routed(self, message: str) -> None:
        """Emit a message again and again until somebody receives it."""
        eventually(lambda: self.emit(message).err == "")
