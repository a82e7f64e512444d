"""The start: what cannot work ends at once, with one plain line on stderr and status 1."""

import re
from contextlib import ExitStack
from pathlib import Path

import pytest
from pika.adapters.blocking_connection import BlockingChannel
from pika.frame import Method
from pika.spec import Connection
from pytest_rabbitmq.factories.executor import RabbitMqExecutor
from scripts import EMIT_LOG, IMPATIENCE, RECEIVE_LOGS, SCRIPTS, Pair, Script
from servers import Tls, fake_server

FORM = "--url: it (or AMQP_URL) must look like amqp://user:password@host:port/vhost\n"
HUNG_UP = "Server connection "
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
    return line


@SCRIPTS
@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("amqp://guest:secret@localhost:1/", r" localhost:1/: .*\. Is RabbitMQ running there\?\n"),
        ("amqp://guest:secret@no-such-host.invalid/", r" no-such-host.invalid/: \[Errno -?\d+\]"),
        ("amqp://guest:secret@localhost:{port}/", "{port}/: ACCESS_REFUSED - .* .guest can usual"),
        ("amqp://guest:guest@localhost:{port}/no-such-vhost", "/no-such-vhost: no such vhost, or "),
        ("amqps://guest:secret@localhost/?cafile=/no/file", r"FileNotFoundError: \[Errno 2\] "),
        ("amqps://guest:guest@127.0.0.1:{tls_port}/?cafile={cafile}", "IP address mismatch"),
        ("amqp://guest:secret@localhost:{tls_port}/", " localhost:{tls_port}/: " + HUNG_UP),
    ],
    ids=["no broker", "no host", "login", "vhost", "cafile", "certificate", "TLS"],
)
def test_a_broker_that_cannot_be_used_is_told_with_its_address(
    pair: Pair, tls: Tls, script: Path, address: str, told: str
) -> None:
    known = {"port": pair.url.split(":")[-1][:-1], "tls_port": tls.port, "cafile": tls.cafile}
    line = plain_line(pair.start(script, "--url", address.format(**known)))
    assert re.search(told.format(**known), line)


@SCRIPTS
def test_a_url_of_another_form_is_told_without_a_word_of_it(pair: Pair, script: Path) -> None:
    wrong = [
        "http://guest:secret@localhost:5672/",
        "guest:secret@localhost",  # for a parser of URLs, "guest" is the scheme
        "amqp://guest:secret@/x",  # aiormq would go to localhost
        "amqp://?x=secret",
        "amqp://guest:pa/secret@localhost/",
        "amqp://guest:secret@localhost:99999/",
        "amqp://guest:secret\u2100@localhost/",  # for Python's URL parser, a "/"
    ]
    started = [pair.start(script, "--url", address) for address in wrong]
    for refused in [*started, pair.start(script, AMQP_URL="amqp://guest:secret@")]:
        assert refused.ended() == 2
        assert refused.err.endswith(f"\n{script.name}: error: argument {FORM}")
        assert "secret" not in refused.err


@SCRIPTS
@pytest.mark.parametrize(
    ("answers", "told"),
    [
        ([b"HTTP/1.1 400 Bad Request\r\n\r\n"], HUNG_UP),
        ([START, TUNE], HUNG_UP),
        ([START, CLOSE], r": [Errno 320] \x1b[2J\ngone\r" + "\n"),
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
    path = pair.python_path(sitecustomize=IMPATIENCE)
    with ExitStack() as servers:
        started = [
            pair.start(script, "--url", servers.enter_context(server), PYTHONPATH=path)
            for script in (EMIT_LOG, RECEIVE_LOGS)
            for answers in ([], opened, [*opened[:2], OPEN_OK + BLOCKED])
            for server in [fake_server(*answers, b"")]
        ]
        for script in started:
            assert ": no answer within 10 s" in plain_line(script)


@SCRIPTS
def test_the_development_mode_shows_where_an_error_that_nobody_foresaw_was_raised(
    pair: Pair, script: Path
) -> None:
    with fake_server(START, TUNE, OPEN_OK) as address:
        started = pair.start(script, "--url", address, PYTHONDEVMODE="1")
        assert started.ended() == 1
    assert "Traceback" in started.err
    assert started.err.endswith("KeyError: 'capabilities'\n")


def test_a_mistake_in_the_receiver_ends_it_with_a_traceback(pair: Pair) -> None:
    path = pair.python_path(sitecustomize="import asyncio\nasyncio.gather = None")
    receiver = pair.start(RECEIVE_LOGS, PYTHONPATH=path)
    assert receiver.ended() == 1
    assert "Traceback" in receiver.err
    assert "\nTypeError: 'NoneType' object is not callable\n" in receiver.err


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
