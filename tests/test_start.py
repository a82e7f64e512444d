"""The start: what cannot work ends at once with one plain line on stderr and status 1 or 2."""

import re
import socket
import ssl
from pathlib import Path

import pytest
from pika.adapters.blocking_connection import BlockingChannel
from pika.frame import Method
from pika.spec import Connection
from pytest_rabbitmq.factories.executor import RabbitMqExecutor
from scripts import EMIT_LOG, SCRIPTS, Pair, Script
from servers import Tls, fake_server

FORM = "the URL has to look like amqp://user:password@host:port/vhost\n"
HUNG_UP = ": the server hung up"
START = Method(0, Connection.Start(server_properties={}, mechanisms="PLAIN")).marshal()
TUNE = Method(0, Connection.Tune(2047, 131072, 0)).marshal()
OPEN_OK = Method(0, Connection.OpenOk()).marshal()


def plain_line(script: Script) -> str:
    """Wait for the end, check what all error lines have in common, and return the line."""
    assert script.ended() == 1
    assert script.out == b""
    line = script.err
    assert line.startswith(Path(str(script.process.args[1])).name + ": ")  # type: ignore[index]
    assert line.count("\n") == 1
    # Neither the password nor a traceback, a Python repr, or what the libraries log.
    assert not re.search(r"secret|Traceback|Exception|<|\('|b'|\[Errno|None", line), line
    assert "may or may not" not in line  # in none of these tests, the publish has begun
    return line


@SCRIPTS
@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("amqp://guest:secret@localhost:1/", "//localhost:1/: Connection refused. Is RabbitMQ run"),
        ("amqp://guest:secret@no-such-host.invalid/", "amqp://no-such-host.invalid/: "),
        ("amqp://guest:secret@localhost:{port}/", "{port}/: login refused (ACCESS_REFUSED"),
        ("amqp://guest:secret@localhost:{port}/", "See --url and AMQP_URL\n"),
        ("amqp://guest:guest@localhost:{port}/no-such-vhost", "/no-such-vhost: no such vhost"),
        ("amqps://guest:secret@localhost:{port}/", "localhost:{port}/: [SSL: "),
        ("amqps://guest:secret@localhost:{port}/?cafile=/no/file", "cafile=/no/file: No such file"),
        ("amqps://guest:guest@127.0.0.1:{tls_port}/?cafile={cafile}", "IP address mismatch"),
        ("amqp://guest:secret@localhost:{tls_port}/", "localhost:{tls_port}/" + HUNG_UP),
        ("amqp://guest:secret@localhost:99999/", FORM),
        ("amqp://guest:secret\u2100@localhost/", FORM),  # for Python's URL parser, a "/"
    ],
)
def test_a_broker_that_cannot_be_used_is_told_with_its_address(
    pair: Pair, tls: Tls, script: Path, address: str, told: str
) -> None:
    known = {"port": pair.url.split(":")[-1][:-1], "tls_port": tls.port, "cafile": tls.cafile}
    line = plain_line(pair.start(script, "--url", address.format(**known)))
    assert told.format(**known) in line


@SCRIPTS
@pytest.mark.parametrize(
    "address",
    [
        "http://guest:secret@localhost:5672/",
        "amqp://guest:12/secret@localhost/",
        "amqp://guest:secret",
        "localhost",
        "",
    ],
)
def test_wrong_usage_is_told_with_a_hint(pair: Pair, script: Path, address: str) -> None:
    wrong = pair.start(script, "--url", address)
    assert wrong.ended() == 2
    assert wrong.out == b""
    assert wrong.err.endswith(f"{script.name}: error: {FORM}")
    assert "secret" not in wrong.err
    assert ("[--] [message ...]" in wrong.err) == (script == EMIT_LOG)


@SCRIPTS
def test_another_exchange_of_that_name_is_told_in_harmless_words_of_the_broker(
    pair: Pair, channel: BlockingChannel, script: Path
) -> None:
    hostile = {"alternate-exchange": "\x1b[2J\n [x] forged"}
    for kind, told in ("topic", "received 'fanout' but current is 'topic'"), ("fanout", r"\x1b[2J"):
        channel.exchange_delete("logs")
        channel.exchange_declare("logs", kind, arguments=hostile)
        try:
            assert told in plain_line(pair.start(script))
        finally:
            channel.exchange_delete("logs")


@SCRIPTS
@pytest.mark.parametrize(
    ("answers", "told"),
    [
        ([], HUNG_UP),
        ([b"HTTP/1.1 400 Bad Request\r\n\r\n"], HUNG_UP),
        ([START, TUNE], HUNG_UP),
        ([b""], ": no answer within 10 s"),
        ([START.replace(b"\x05PLAIN", b"\x05OTHER")], ": login refused (OTHER)"),
        ([START, TUNE, OPEN_OK], ": KeyError: 'capabilities'"),  # as any that nobody foresaw
    ],
    ids=["hangs up", "speaks HTTP", "tunes", "is silent", "wants another login", "is incapable"],
)
def test_a_server_that_is_not_rabbitmq_gives_one_line(
    pair: Pair, script: Path, answers: list[bytes], told: str
) -> None:
    with fake_server(*answers) as address:
        assert told in plain_line(pair.start(script, "--url", address))


def test_an_emitter_gives_up_on_a_server_that_is_silent_behind_tls(pair: Pair, tls: Tls) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tls.cafile.with_name("node.pem"))
    with (
        socket.create_server(("localhost", 0)) as plain,
        context.wrap_socket(plain, server_side=True) as listener,
    ):
        port = listener.getsockname()[1]
        emitter = pair.start(EMIT_LOG, "--url", tls.url.replace(str(tls.port), str(port)))
        with listener.accept()[0]:
            assert emitter.ended(25) == 1  # asyncio alone would wait for 30 s more
    assert "no answer within 10 s" in plain_line(emitter)


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
        line = plain_line(pair.emit("one too many"))
    finally:
        broker.rabbitctl_output("clear_policy", "full")
    assert "the broker rejected the message for at least one queue\n" in line
