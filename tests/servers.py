"""Other ways to the broker: by TLS, and by one that can be cut at an exact byte; and no broker."""

import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from port_for import get_port
from pytest_rabbitmq.factories.executor import RabbitMqExecutor


class Tls(NamedTuple):
    """The node's TLS listener, whose certificate is for localhost only."""

    port: int
    cafile: Path
    url: str


class Relay(threading.Thread):
    """Passes on what a script and the broker say, one connection after the other.

    The nth of `cuts` is the number of bytes that the broker may say on the nth connection.
    Then the relay hangs up, so that the script sees the last byte and the end at once.
    """

    def __init__(self, port: int, *cuts: int) -> None:
        super().__init__(daemon=True)
        self.port = port
        self.cuts = list(cuts)
        self.said: list[bytes] = []
        self.script: subprocess.Popen[bytes] | None = None
        self.gone = False
        self.listener = socket.create_server(("localhost", 0))
        self.url = f"amqp://localhost:{self.listener.getsockname()[1]}/"
        self.start()

    def run(self) -> None:
        """Serve one connection after the other."""
        while not self.gone:
            client, _ = self.listener.accept()
            cut = self.cuts.pop(0) if self.cuts else sys.maxsize
            self.broker = socket.create_connection(("localhost", self.port))
            with self.broker, client, suppress(OSError):
                self.serve(client, self.broker, cut)
        self.listener.close()

    def hang_up(self) -> None:
        """End the connection."""
        self.broker.shutdown(socket.SHUT_RDWR)

    def go_away(self) -> None:
        """End the connection, and refuse others."""
        self.gone = True
        self.hang_up()

    def serve(self, client: socket.socket, broker: socket.socket, cut: int) -> None:
        """Pass on what both say, until one goes away or the cut comes."""
        self.said.append(b"")
        while len(self.said[-1]) < cut:
            for speaks in select.select([broker, client], [], [])[0]:
                words = speaks.recv(4096)
                if not words:
                    return
                if speaks is client:
                    broker.sendall(words)
                    continue
                words = words[: cut - len(self.said[-1])]
                self.said[-1] += words
                if len(self.said[-1]) == cut:
                    self.say_and_hang_up(client, words)
                else:
                    client.sendall(words)
        while client.recv(4096):
            pass

    def say_and_hang_up(self, client: socket.socket, words: bytes) -> None:
        """Let the script find the words and the end of the connection at once."""
        assert self.script
        os.kill(self.script.pid, signal.SIGSTOP)
        client.sendall(words)
        client.shutdown(socket.SHUT_WR)
        os.kill(self.script.pid, signal.SIGCONT)


def frame_ends(talk: bytes) -> list[int]:
    """Return at which byte each of the AMQP frames in it ends."""
    ends = []
    end = 0
    while end < len(talk):
        # A type, a channel and a length come before the payload, and a mark after it.
        end += 7 + int.from_bytes(talk[end + 3 : end + 7], "big") + 1
        ends.append(end)
    return ends


def node_environment(folder: Path) -> dict[str, str]:
    """Return what a node of our own needs so that it shares nothing with other nodes."""
    return {
        "HOME": str(folder),  # for Erlang's cookie
        # A stopped node takes the epmd that it has started with it. Nodes that share one
        # would lose their registration, and then rabbitmqctl does not find them.
        "ERL_EPMD_PORT": str(get_port(None)),
        # An installed broker's files, in /etc/rabbitmq, are not for this node.
        "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
        "RABBITMQ_CONFIG_FILES": str(folder / "conf.d"),
        "RABBITMQ_ADVANCED_CONFIG_FILE": str(folder / "advanced.config"),
    }


def signal_node(broker: RabbitMqExecutor, number: signal.Signals) -> None:
    """Send a signal to all processes of the node."""
    assert broker.process
    os.killpg(broker.process.pid, number)


@contextmanager
def fake_server(*answers: bytes) -> Iterator[str]:
    """Give the URL of a server that answers the nth words of a client with the nth answer.

    After the last answer it hangs up; if that is empty, it stays and is silent.
    """
    with socket.create_server(("localhost", 0)) as listener:

        def serve() -> None:
            with suppress(OSError), listener.accept()[0] as client:
                for answer in answers:
                    client.recv(4096)
                    client.sendall(answer)
                if not answers or answers[-1]:
                    client.shutdown(socket.SHUT_WR)
                while client.recv(4096):
                    pass

        threading.Thread(target=serve, daemon=True).start()
        yield f"amqp://guest:secret@localhost:{listener.getsockname()[1]}/"
