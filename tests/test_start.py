"""The start: what cannot work ends at once, with one plain line on stderr and status 1."""

import re
from contextlib import ExitStack
from pathlib import Path

import pytest
from pika.adapters.blocking_connection import BlockingChannel
from pika.frame import Method
from pika.spec import Connection
from pytest_rabbitmq.factories.executor import RabbitMqExecutor
from scripts import EMIT_LOG, RECEIVE_LOGS, SCRIPTS, Pair, Script
from servers import Tls, fake_server

FORM = ": the URL has to look like amqp://user:password@host:port/vhost\n"
NO_BROKER = ": cannot connect. Is RabbitMQ running there?\n"
HUNG_UP = ": the server hung up\n"
START = Method(0, Connection.Start(server_properties={}, mechanisms="PLAIN")).marshal()
CAPABILITIES = {"capabilities": {"publisher_confirms": True}}
START_AS_RABBITMQ = Method(0, Connection.Start(server_properties=CAPABILITIES)).marshal()
TUNE = Method(0, Connection.Tune(2047, 131072, 0)).marshal()
OPEN_OK = Method(0, Connection.OpenOk()).marshal()
BLOCKED = Method(0, Connection.Blocked("no memory")).marshal()
CLOSE = Method(0, Connection.Close(320, "\x1b[2J\ngone\r", 0, 0)).marshal()


def plain_line(script: Script) -> str:
    """Wait for the end, check what all error lines have in common, and return the line."""
    assert script.ended() == 1
    assert script.out == b""
    line = script.err
    assert line.startswith(Path(str(script.process.args[1])).name + ": ")  # type: ignore[index]
    assert line.count("\n") == 1
    assert line.removesuffix("\n").isprintable()
    # Neither the password nor a traceback, nor an object of Python's.
    assert not re.search(r"secret|Traceback|<|None", line), line
    assert "may or may not" not in line  # in none of these tests, the publish has begun
    return line


@SCRIPTS
@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("amqp://guest:secret@localhost:1/", ": localhost:1/" + NO_BROKER),
        ("amqp://guest:secret@no-such-host.invalid/", ": no-such-host.invalid/: AMQPConnectionErr"),
        (
            "amqp://guest:secret@localhost:{port}/",
            "{port}/: ProbableAuthenticationError: ACCESS_RE",
        ),
        ("amqp://guest:guest@localhost:{port}/no-such-vhost", "/no-such-vhost: no such vhost, or "),
        ("amqps://guest:secret@localhost:{port}/?cafile=/no/file", "FileNotFoundError: [Errno 2] "),
        ("amqps://guest:guest@127.0.0.1:{tls_port}/?cafile={cafile}", "IP address mismatch"),
        ("amqp://guest:secret@localhost:{tls_port}/", ": localhost:{tls_port}/" + HUNG_UP),
    ],
)
def test_a_broker_that_cannot_be_used_is_told_with_its_address(
    pair: Pair, tls: Tls, script: Path, address: str, told: str
) -> None:
    known = {"port": pair.url.split(":")[-1][:-1], "tls_port": tls.port, "cafile": tls.cafile}
    line = plain_line(pair.start(script, "--url", address.format(**known)))
    assert told.format(**known) in line


@SCRIPTS
def test_a_url_of_another_form_is_told_without_a_word_of_it(pair: Pair, script: Path) -> None:
    wrong = [
        "http://guest:secret@localhost:5672/",
        "guest:secret@localhost",  # for a parser of URLs, "guest" is the scheme
        "amqp://guest:secret@/",  # aiormq would go to localhost
        "amqp://guest:12/secret@localhost/",
        "amqp://guest:secret@localhost:99999/",
        "amqp://guest:secret\u2100@localhost/",  # for Python's URL parser, a "/"
    ]
    for started in [pair.start(script, "--url", address) for address in wrong]:
        assert plain_line(started) == script.name + FORM


@SCRIPTS
def test_a_key_log_that_cannot_be_written_is_told_by_its_name(
    pair: Pair, tls: Tls, script: Path
) -> None:
    started = pair.start(script, "--url", tls.url, SSLKEYLOGFILE="/no/key.log")
    assert plain_line(started).endswith("No such file or directory: '/no/key.log'\n")


@SCRIPTS
@pytest.mark.parametrize(
    ("answers", "told"),
    [
        ([b"HTTP/1.1 400 Bad Request\r\n\r\n"], HUNG_UP),
        ([START, TUNE], HUNG_UP),
        ([START, CLOSE], r": ConnectionClosed: [Errno 320] \x1b[2J"),
        ([START, TUNE, OPEN_OK], ": KeyError: 'capabilities'\n"),  # as any that nobody foresaw
    ],
    ids=["speaks HTTP", "tunes", "closes", "is incapable"],
)
def test_a_server_that_is_not_rabbitmq_gives_one_line(
    pair: Pair, script: Path, answers: list[bytes], told: str
) -> None:
    with fake_server(*answers) as address:
        assert told in plain_line(pair.start(script, "--url", address))


def test_a_server_that_is_silent_at_any_moment_is_given_up(pair: Pair) -> None:
    opened = [START_AS_RABBITMQ, TUNE, OPEN_OK]
    path = pair.python_path(  # for scripts whose limit is a second
        sitecustomize="import asyncio\n"
        "real = asyncio.timeout\n"
        "asyncio.timeout = lambda seconds: real(seconds / 10)\n"
    )
    with ExitStack() as servers:
        started = [
            pair.start(script, "--url", servers.enter_context(server), PYTHONPATH=path)
            for script in (EMIT_LOG, RECEIVE_LOGS)
            for answers in ([], opened, [*opened[:2], OPEN_OK + BLOCKED])
            for server in [fake_server(*answers, b"")]
        ]
        for script in started:
            assert plain_line(script).endswith(": no answer within 10 s\n")


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
