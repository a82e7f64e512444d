"""Errors a user can meet: one plain line on stderr, exit status 1, nothing on stdout."""

import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import Tls
from pika.adapters.blocking_connection import BlockingChannel
from scripts import EMIT_LOG, RECEIVE_LOGS, Pair, Script

SCRIPTS = pytest.mark.parametrize("script", [EMIT_LOG, RECEIVE_LOGS], ids=lambda path: path.stem)


@pytest.fixture(scope="module", autouse=True)
def silenced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Script]]:
    """Return both scripts on a server that accepts and says nothing.

    They start first and are asked for last, for they take 10 s to give up.
    """
    with socket.create_server(("localhost", 0)) as server, ExitStack() as running:
        url = f"amqp://guest:secret@localhost:{server.getsockname()[1]}/"
        pair = Pair(url, tmp_path_factory.mktemp("silent"), running)
        yield [pair.start(path) for path in (EMIT_LOG, RECEIVE_LOGS)]


def failed(script: Script) -> str:
    """Check what all errors have in common and return the line."""
    assert script.ended() == 1
    assert script.out == b""
    line = script.err
    assert line.startswith(Path(str(script.process.args[1])).name + ": ")  # type: ignore[index]
    assert line.count("\n") == 1
    # Neither a traceback nor a Python repr, nor what the libraries log.
    assert not re.search(r"Traceback|Error\b|Exception|<|\('|b'|\[Errno", line), line
    assert "secret" not in line
    return line


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("amqp://guest:secret@localhost:1/", "localhost:1: Connection refused. Is RabbitMQ"),
        ("amqp://guest:secret@no-such-host.invalid/", "unknown host no-such-host.invalid"),
        ("amqp://guest:secret@localhost:{port}/", "refused"),
        ("amqp://guest:guest@localhost:{port}/no-such-vhost", "refused vhost no-such-vhost"),
        ("http://guest:secret@localhost/", "amqp://user:password@host:port/vhost"),
        ("amqp://guest:secret@localhost:port/", "amqp://user:password@host:port/vhost"),
        ("amqp://guest:secret", "amqp://user:password@host:port/vhost"),
        ("amqps://guest:secret@localhost:{port}/?cafile={folder}", "certificates"),
        ("amqps://guest:secret@localhost:{port}/?cafile={garbage}", "certificates"),
        ("amqp://[::1", "amqp://user:password@host:port/vhost"),
        ("amqp:///vhost", "amqp://user:password@host:port/vhost"),
        ("localhost", "amqp://user:password@host:port/vhost"),
        ("", "amqp://user:password@host:port/vhost"),
        ("amqps://guest:secret@localhost:{port}/", "TLS with localhost:{port} failed"),
        ("amqps://guest:secret@localhost:{port}/?cafile=/no/such/file", "certificates"),
        ("amqp://guest:secret@localhost:{tls_port}/", "localhost:{tls_port}"),
        ("amqps://guest:guest@localhost:{tls_port}/", "self-signed certificate"),
        ("amqps://guest:guest@127.0.0.1:{tls_port}/?cafile={cafile}", "IP address mismatch"),
    ],
)
def test_the_broker_cannot_be_used(pair: Pair, tls: Tls, address: str, told: str) -> None:
    known = {"port": pair.url.split(":")[-1][:-1], "tls_port": tls.port, "cafile": tls.cafile}
    known |= {"folder": tls.cafile.parent, "garbage": __file__}
    address = address.format(**known)
    for script in [pair.start(path, "--url", address) for path in (EMIT_LOG, RECEIVE_LOGS)]:
        assert told.format(**known) in failed(script)


def test_tls_with_a_private_authority(pair: Pair, tls: Tls) -> None:
    receiver = pair.receive("--url", tls.url)
    assert pair.emit("in private", "--url", tls.url).ended() == 0
    receiver.printed(b" [x] in private\n")


@SCRIPTS
def test_the_exchange_exists_with_another_type(
    pair: Pair, channel: BlockingChannel, script: Path
) -> None:
    channel.exchange_delete("logs")
    channel.exchange_declare("logs", "topic")
    try:
        assert "received 'fanout' but current is 'topic'" in failed(pair.start(script))
    finally:
        channel.exchange_delete("logs")


@SCRIPTS
def test_the_brokers_own_words_cannot_harm_the_terminal(
    pair: Pair, channel: BlockingChannel, script: Path
) -> None:
    hostile = "\x1b[2J\n [x] forged"
    channel.exchange_delete("logs")
    channel.exchange_declare("logs", "fanout", arguments={"alternate-exchange": hostile})
    try:
        assert r"\x1b[2J  [x] forged" in failed(pair.start(script))
    finally:
        channel.exchange_delete("logs")


@SCRIPTS
def test_wrong_usage(pair: Pair, script: Path) -> None:
    wrong = pair.start(script, "--no-such-option")
    assert wrong.ended() == 2
    assert wrong.out == b""
    assert wrong.err.startswith("usage: ")


@SCRIPTS
def test_a_server_that_hangs_up(pair: Pair, script: Path) -> None:
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
        hung_up = pair.start(script, "--url", f"amqp://guest:secret@localhost:{port}/")
        with server.accept()[0] as client:
            client.recv(100)
        assert f"the conversation with localhost:{port} broke off" in failed(hung_up)


def test_a_server_that_accepts_and_says_nothing(silenced: list[Script]) -> None:
    for script in silenced:
        assert "no answer from localhost:" in failed(script)
