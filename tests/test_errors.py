"""Errors a user can meet: one plain line on stderr, exit status 1, nothing on stdout."""

import re
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from conftest import Tls
from pika.adapters.blocking_connection import BlockingChannel
from pika.frame import Method
from pika.spec import Connection
from pytest_rabbitmq.factories.executor import RabbitMqExecutor
from scripts import EMIT_LOG, RECEIVE_LOGS, Pair, Script

SCRIPTS = pytest.mark.parametrize("script", [EMIT_LOG, RECEIVE_LOGS], ids=lambda path: path.stem)
FORM = "the URL has to look like amqp://user:password@host:port/vhost"
REFUSED = "Connection refused. Is RabbitMQ running there?"
UNSURE = "; the message may or may not have been sent\n"


def error_line(script: Script) -> str:
    """Wait for the end, check what all errors have in common, and return the line."""
    assert script.ended() == 1
    assert script.out == b""
    line = script.err
    assert line.startswith(Path(str(script.process.args[1])).name + ": ")  # type: ignore[index]
    assert line.count("\n") == 1
    # Neither a traceback nor a Python repr, nor what the libraries log.
    assert not re.search(r"Traceback|Error\b|Exception|<|\('|b'|\[Errno|None", line), line
    assert "secret" not in line
    return line


@SCRIPTS
@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("amqp://guest:secret@localhost:1/", f"amqp://localhost:1/: {REFUSED}"),
        ("amqp://guest:secret@no-such-host.invalid/", "amqp://no-such-host.invalid/: "),
        ("amqp://guest:secret@localhost:{port}/", "{port}/: ACCESS_REFUSED"),
        ("amqp://guest:guest@localhost:{port}/no-such-vhost", "/no-such-vhost: no such vhost"),
        ("amqps://guest:secret@localhost:{port}/", "localhost:{port}/: [SSL: "),
        ("amqps://guest:secret@localhost:{port}/?cafile=/no/file", "cafile=/no/file: No such file"),
        ("amqps://guest:secret@localhost:{port}/?cafile={folder}", "cafile={folder}: Is a direc"),
        ("amqps://guest:secret@localhost:{port}/?cafile={garbage}", "cafile={garbage}: [X509: "),
        ("amqps://guest:secret@localhost:{port}/?certfile={garbage}", "certfile={garbage}: [SSL"),
        ("amqp://guest:secret@localhost:{tls_port}/", "localhost:{tls_port}/: "),
        ("amqps://guest:guest@localhost:{tls_port}/", "self-signed certificate"),
        ("amqps://guest:guest@127.0.0.1:{tls_port}/?cafile={cafile}", "IP address mismatch"),
    ],
)
def test_a_broker_that_cannot_be_used_is_told_with_its_address(
    pair: Pair, tls: Tls, script: Path, address: str, told: str
) -> None:
    known = {"port": pair.url.split(":")[-1][:-1], "tls_port": tls.port, "cafile": tls.cafile}
    known |= {"folder": tls.cafile.parent, "garbage": __file__}
    line = error_line(pair.start(script, "--url", address.format(**known)))
    assert told.format(**known) in line


@SCRIPTS
@pytest.mark.parametrize(
    "address",
    [
        "http://guest:secret@localhost/",
        "http://guest:secret@localhost:5672/",
        "amqp://guest:secret@localhost:port/",
        "amqp://guest:secret@localhost:99999/",
        "amqp://guest:12/secret@localhost/",
        "amqp://guest:12?secret@localhost/",
        "amqp://guest:secret\nsecret@localhost:99999/",
        "amqp://guest:secret",
        "amqp://[::1",
        "amqp:///vhost",
        "amqp://two..dots/",
        "localhost",
        "",
    ],
)
def test_an_odd_url_is_told_without_its_parts(pair: Pair, script: Path, address: str) -> None:
    assert FORM in error_line(pair.start(script, "--url", address))


@SCRIPTS
@pytest.mark.parametrize("port", ["+1", " 1", "1_1", "\u0661"])
def test_an_odd_port_gives_one_plain_line(pair: Pair, script: Path, port: str) -> None:
    line = error_line(pair.start(script, "--url", f"amqp://guest:secret@localhost:{port}/"))
    assert FORM in line or REFUSED in line


@SCRIPTS
def test_a_host_that_refuses_at_all_its_addresses_is_told_like_any_other(
    pair: Pair, tmp_path: Path, script: Path
) -> None:
    folder = tmp_path / "two_addresses"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import socket\n"
        "real = socket.getaddrinfo\n"
        "def getaddrinfo(host, port, *args, **kwargs):\n"
        "    answers = [real(f'127.0.0.{n}', port, *args, **kwargs) for n in (1, 2)]\n"
        "    return answers[0] + answers[1]\n"
        "socket.getaddrinfo = getaddrinfo\n"
    )
    refused = pair.start(script, "--url", "amqp://host:1/", PYTHONPATH=str(folder))
    assert error_line(refused) == f"{script.name}: amqp://host:1/: {REFUSED}\n"


@SCRIPTS
def test_a_vhost_without_a_free_connection_is_told_with_what_it_can_be(
    pair: Pair, broker: RabbitMqExecutor, script: Path
) -> None:
    broker.rabbitctl_output("set_vhost_limits", '{"max-connections": 0}')
    try:
        line = error_line(pair.start(script))
    finally:
        broker.rabbitctl_output("clear_vhost_limits")
    assert "no such vhost, or not for this user, or too many connections\n" in line


def test_tls_with_a_private_authority_works(pair: Pair, tls: Tls) -> None:
    receiver = pair.receive("--url", tls.url)
    assert pair.emit("in private", "--url", tls.url).ended() == 0
    receiver.assert_prints(b" [x] in private\n")


@SCRIPTS
def test_an_exchange_of_another_type_is_told(
    pair: Pair, channel: BlockingChannel, script: Path
) -> None:
    channel.exchange_delete("logs")
    channel.exchange_declare("logs", "topic")
    try:
        line = error_line(pair.start(script))
    finally:
        channel.exchange_delete("logs")
    assert "received 'fanout' but current is 'topic'" in line
    assert "may or may not" not in line


@SCRIPTS
def test_the_words_of_the_broker_cannot_harm_the_terminal(
    pair: Pair, channel: BlockingChannel, script: Path
) -> None:
    hostile = "\x1b[2J\n [x] forged"
    channel.exchange_delete("logs")
    channel.exchange_declare("logs", "fanout", arguments={"alternate-exchange": hostile})
    try:
        line = error_line(pair.start(script))
    finally:
        channel.exchange_delete("logs")
    assert re.search(r"\\x1b\[2J(\\n)? +\[x\] forged", line)


@SCRIPTS
def test_wrong_usage_gives_a_hint_and_status_2(pair: Pair, script: Path) -> None:
    wrong = pair.start(script, "-x")
    assert wrong.ended() == 2
    assert wrong.out == b""
    assert wrong.err.startswith("usage: ")
    if script == EMIT_LOG:
        assert "[--] [message ...]" in wrong.err


def test_a_message_that_a_queue_rejects_is_told(
    pair: Pair, broker: RabbitMqExecutor, channel: BlockingChannel
) -> None:
    policy = '{"max-length": 1, "overflow": "reject-publish"}'
    broker.rabbitctl_output("set_policy", "full", "^full$", policy, "--apply-to", "queues")
    try:
        channel.exchange_declare("logs", "fanout")
        channel.queue_declare("full", exclusive=True)
        channel.queue_bind("full", "logs")
        assert pair.emit("fills it").ended() == 0
        line = error_line(pair.emit("one too many"))
    finally:
        broker.rabbitctl_output("clear_policy", "full")
    assert "the broker rejected the message for at least one queue\n" in line


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


@SCRIPTS
@pytest.mark.parametrize(
    ("answers", "told"),
    [
        ([], "the connection broke off"),
        ([b"HTTP/1.1 400 Bad Request\r\n\r\n"], ""),
        ([Method(0, Connection.Tune()).marshal()], "the connection broke off"),
        (
            [
                Method(0, Connection.Start(server_properties={}, mechanisms="PLAIN")).marshal(),
                Method(0, Connection.Tune(2047, 131072, 0)).marshal(),
                Method(0, Connection.OpenOk()).marshal(),
            ],
            "the connection broke off",
        ),
    ],
    ids=["hangs up", "speaks HTTP", "garbles a frame", "lacks capabilities"],
)
def test_a_server_that_is_not_rabbitmq_gives_one_plain_line(
    pair: Pair, script: Path, answers: list[bytes], told: str
) -> None:
    with fake_server(*answers) as address:
        line = error_line(pair.start(script, "--url", address))
    assert told in line
    assert line.endswith(UNSURE) == (script == EMIT_LOG)


def test_a_server_that_is_silent_behind_tls_is_given_up(pair: Pair, tls: Tls) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tls.cafile.with_name("cert.pem"), tls.cafile.with_name("key.pem"))
    with (
        socket.create_server(("localhost", 0)) as plain,
        context.wrap_socket(plain, server_side=True) as listener,
    ):
        address = tls.url.replace(str(tls.port), str(plain_port := listener.getsockname()[1]))
        scripts = [pair.start(script, "--url", address) for script in (EMIT_LOG, RECEIVE_LOGS)]
        silent = [listener.accept()[0] for _ in scripts]
        for script in scripts:
            assert script.ended(25) == 1  # asyncio alone would wait for 30 s more
            assert f":{plain_port}/" in error_line(script)
        for connection in silent:
            connection.close()


def test_a_server_that_is_silent_is_given_up(pair: Pair) -> None:
    with fake_server(b"") as to_emitter, fake_server(b"") as to_receiver:
        emitter = pair.start(EMIT_LOG, "--url", to_emitter)
        receiver = pair.start(RECEIVE_LOGS, "--url", to_receiver)
        assert "no answer within 10 s" in error_line(emitter)
        assert "no answer within 10 s" in error_line(receiver)
