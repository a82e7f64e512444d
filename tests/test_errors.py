"""Errors a user can meet: one plain line on stderr, exit status 1, nothing on stdout."""

import re
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from conftest import Tls
from pika.adapters.blocking_connection import BlockingChannel
from pika.frame import Method
from pika.spec import Connection
from pytest_rabbitmq.factories.executor import RabbitMqExecutor
from relay import Relay
from scripts import EMIT_LOG, LOST, RECEIVE_LOGS, WAITING, Pair, Script

SCRIPTS = pytest.mark.parametrize("script", [EMIT_LOG, RECEIVE_LOGS], ids=lambda path: path.stem)
FORM = "the URL has to look like amqp://user:password@host:port/vhost"
REFUSED = "Connection refused. Is RabbitMQ running there?"
HUNG_UP = "the server hung up while connecting\n"


def error_line(script: Script) -> str:
    """Wait for the end, check what all error lines have in common, and return the line."""
    assert script.ended() == 1
    assert script.out == b""
    line = script.err
    assert line.startswith(Path(str(script.process.args[1])).name + ": ")  # type: ignore[index]
    assert line.count("\n") == 1
    assert "secret" not in line
    assert "may or may not" not in line  # in none of these tests, the publish has begun
    return line


def plain_line(script: Script) -> str:
    """Do the same for an error that is foreseen, and so has a line in plain words."""
    line = error_line(script)
    # Neither a traceback nor a Python repr, nor what the libraries log.
    assert not re.search(r"Traceback|Error\b|Exception|<|\('|b'|\[Errno|None", line), line
    return line


@SCRIPTS
@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("amqp://guest:secret@localhost:1/", f"amqp://localhost:1/: {REFUSED}"),
        ("amqp://guest:secret@no-such-host.invalid/", "amqp://no-such-host.invalid/: "),
        ("amqp://guest:secret@localhost:{port}/", "{port}/: login refused (ACCESS_REFUSED"),
        ("amqp://guest:secret@localhost:{port}/", "See --url and AMQP_URL\n"),
        ("amqp://guest:guest@localhost:{port}/no-such-vhost", "/no-such-vhost: no such vhost"),
        ("amqps://guest:secret@localhost:{port}/", "localhost:{port}/: [SSL: "),
        ("amqps://guest:secret@localhost:{port}/?cafile=/no/file", "cafile=/no/file: No such file"),
        ("amqps://guest:secret@localhost:{port}/?cafile={folder}", "cafile={folder}: Is a direc"),
        ("amqps://guest:secret@localhost:{port}/?cafile={garbage}", "cafile={garbage}: [X509: "),
        ("amqps://guest:secret@localhost:{port}/?certfile={garbage}", "certfile={garbage}: [SSL"),
        ("amqp://guest:secret@localhost:{tls_port}/", "localhost:{tls_port}/: " + HUNG_UP),
        ("amqps://guest:guest@localhost:{tls_port}/", "self-signed certificate"),
        ("amqps://guest:guest@127.0.0.1:{tls_port}/?cafile={cafile}", "IP address mismatch"),
    ],
)
def test_a_broker_that_cannot_be_used_is_told_with_its_address(
    pair: Pair, tls: Tls, script: Path, address: str, told: str
) -> None:
    known = {"port": pair.url.split(":")[-1][:-1], "tls_port": tls.port, "cafile": tls.cafile}
    known |= {"folder": tls.cafile.parent, "garbage": __file__}
    line = plain_line(pair.start(script, "--url", address.format(**known)))
    assert told.format(**known) in line


@SCRIPTS
@pytest.mark.parametrize(
    "address",
    [
        "http://guest:secret@localhost/",
        "http://guest:secret@localhost:5672/",
        "amqp://guest:secret@localhost:port/",
        "amqp://guest:12/secret@localhost/",
        "amqp://guest:12?secret@localhost/",
        "amqp://guest:secret",
        "amqp://[::1",
        "amqp:///vhost",
        "localhost",
        "",
    ],
)
def test_an_odd_url_is_told_without_its_parts(pair: Pair, script: Path, address: str) -> None:
    assert FORM in plain_line(pair.start(script, "--url", address))


@SCRIPTS
@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("amqp://guest:secret@localhost:99999/", "ValueError: Port out of range"),
        ("amqp://guest:secret\nsecret@localhost:99999/", "ValueError: Port out of range"),
        ("amqp://guest:secret@two..dots/", "label empty"),
        ("amqp://guest:secret@localhost/?cadata=x", "Error: Invalid base64"),
    ],
)
def test_a_url_that_python_refuses_is_told_in_its_words(
    pair: Pair, script: Path, address: str, told: str
) -> None:
    assert told in error_line(pair.start(script, "--url", address))


@SCRIPTS
@pytest.mark.parametrize("port", ["+1", " 1", "1_1", "\u0661"])
def test_an_odd_port_gives_one_plain_line(pair: Pair, script: Path, port: str) -> None:
    line = plain_line(pair.start(script, "--url", f"amqp://guest:secret@localhost:{port}/"))
    assert FORM in line or REFUSED in line


@pytest.fixture
def host(tmp_path: Path, broker: RabbitMqExecutor) -> Iterator[Callable[..., tuple[str, str]]]:
    """Return a function that gives a host its addresses; it returns a URL and a PYTHONPATH.

    The host is called `many`. Each address is a broker, or refuses, or is silent (its queue of
    new connections is full), or frozen (the kernel accepts, and nobody speaks).
    """
    relay = Relay(broker.port)
    names = ["broker", "silent", "refusing", "frozen"]
    kinds = {name: f"127.0.0.{number}" for number, name in enumerate(names, 1)}
    with ExitStack() as stack:
        port = relay.listener.getsockname()[1]
        stack.enter_context(socket.create_server((kinds["frozen"], port)))
        full = stack.enter_context(socket.create_server((kinds["silent"], port), backlog=0))
        for _ in range(2):
            caller = stack.enter_context(socket.socket())
            caller.setblocking(False)
            caller.connect_ex(full.getsockname())

        def host_of(*addresses: str) -> tuple[str, str]:
            (tmp_path / "sitecustomize.py").write_text(
                "import gc, re, socket\n"
                "search = re.search\n"
                "def search_after_collecting(*args):\n"
                "    gc.collect()\n"
                "    return search(*args)\n"
                "re.search = search_after_collecting\n"
                "real = socket.getaddrinfo\n"
                "def getaddrinfo(host, port, *args, **kwargs):\n"
                f"    found = {[kinds[kind] for kind in addresses]} if host == 'many' else [host]\n"
                "    return [x for host in found for x in real(host, port, *args, **kwargs)]\n"
                "socket.getaddrinfo = getaddrinfo\n"
            )
            return f"amqp://many:{port}/", str(tmp_path)

        yield host_of


@pytest.mark.parametrize(
    "addresses",
    [
        ["silent", "broker"],
        ["silent", "silent", "broker"],
        ["refusing", "broker"],
        ["refusing", "silent", "broker"],
        ["broker", "silent"],
        ["broker", "refusing"],
    ],
    ids="-".join,
)
def test_an_address_that_does_not_answer_is_passed_over(
    pair: Pair,
    broker: RabbitMqExecutor,
    host: Callable[..., tuple[str, str]],
    addresses: list[str],
) -> None:
    url, path = host(*addresses)
    assert pair.emit("passed over", "--url", url, PYTHONPATH=path).ended() == 0
    receiver = pair.receive("--url", url, PYTHONPATH=path)
    pair.emit("arrived")
    receiver.assert_prints(b" [x] arrived\n")
    # On its way back, it meets the same addresses.
    [queue] = re.findall("amq.gen-\\S+", broker.rabbitctl_output("-q", "list_queues", "name"))
    broker.rabbitctl_output("delete_queue", queue)
    receiver.waiting(times=2)
    assert receiver.err == WAITING + LOST + WAITING


@SCRIPTS
@pytest.mark.parametrize(
    ("addresses", "told"),
    [
        (["refusing", "refusing"], REFUSED),
        (["silent", "silent"], "no answer within 10 s"),
        (["refusing", "silent"], "no answer within 10 s"),
        (["frozen", "broker"], "no answer within 10 s"),
    ],
    ids=str,
)
def test_a_host_whose_addresses_all_fail_is_told_like_any_other(
    pair: Pair,
    host: Callable[..., tuple[str, str]],
    script: Path,
    addresses: list[str],
    told: str,
) -> None:
    url, path = host(*addresses)
    line = plain_line(pair.start(script, "--url", url, PYTHONPATH=path))
    assert line.startswith(f"{script.name}: {url}: {told}")


@SCRIPTS
def test_a_user_who_may_open_no_channel_is_told_in_the_words_of_the_broker(
    pair: Pair, broker: RabbitMqExecutor, script: Path
) -> None:
    broker.rabbitctl_output("set_user_limits", "guest", '{"max-channels": 0}')
    try:
        line = plain_line(pair.start(script))
    finally:
        broker.rabbitctl_output("clear_user_limits", "guest", "all")
    assert "NOT_ALLOWED - number of channels" in line


@SCRIPTS
def test_a_broker_that_wants_a_client_certificate_hangs_up_while_connecting(
    pair: Pair, tls: Tls, script: Path
) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tls.cafile.with_name("cert.pem"), tls.cafile.with_name("key.pem"))
    context.load_verify_locations(tls.cafile)
    context.verify_mode = ssl.CERT_REQUIRED
    with socket.create_server(("localhost", 0)) as listener:

        def serve() -> None:
            with suppress(OSError), context.wrap_socket(listener.accept()[0], server_side=True):
                pass

        threading.Thread(target=serve, daemon=True).start()
        address = tls.url.replace(str(tls.port), str(listener.getsockname()[1]))
        assert plain_line(pair.start(script, "--url", address)).endswith(HUNG_UP)


@SCRIPTS
def test_a_broker_with_another_kind_of_login_is_told(pair: Pair, script: Path) -> None:
    start = Method(0, Connection.Start(server_properties={}, mechanisms="EXTERNAL")).marshal()
    with fake_server(start) as address:
        line = plain_line(pair.start(script, "--url", address))
    assert "login refused (EXTERNAL)" in line


@SCRIPTS
def test_what_nobody_foresaw_is_told_with_its_type_and_words(
    pair: Pair, tmp_path: Path, script: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import threading\n"
        "def start(self):\n"
        '    raise RuntimeError("can\'t start new thread")\n'
        "threading.Thread.start = start\n"
    )
    line = error_line(pair.start(script, PYTHONPATH=str(tmp_path)))
    assert "RuntimeError" in line
    assert "can't start new thread" in line


@SCRIPTS
def test_a_vhost_without_a_free_connection_is_told_with_what_it_can_be(
    pair: Pair, broker: RabbitMqExecutor, script: Path
) -> None:
    broker.rabbitctl_output("set_vhost_limits", '{"max-connections": 0}')
    try:
        line = plain_line(pair.start(script))
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
        line = plain_line(pair.start(script))
    finally:
        channel.exchange_delete("logs")
    assert "received 'fanout' but current is 'topic'" in line


@SCRIPTS
def test_the_words_of_the_broker_cannot_harm_the_terminal(
    pair: Pair, channel: BlockingChannel, script: Path
) -> None:
    hostile = "\x1b[2J\n [x] forged"
    channel.exchange_delete("logs")
    channel.exchange_declare("logs", "fanout", arguments={"alternate-exchange": hostile})
    try:
        line = plain_line(pair.start(script))
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
        line = plain_line(pair.emit("one too many"))
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


START = Method(0, Connection.Start(server_properties={}, mechanisms="PLAIN")).marshal()
TUNE = Method(0, Connection.Tune(2047, 131072, 0)).marshal()


@SCRIPTS
@pytest.mark.parametrize(
    ("answers", "told"),
    [
        ([], HUNG_UP),
        ([b"HTTP/1.1 400 Bad Request\r\n\r\n"], HUNG_UP),
        ([START], HUNG_UP),
        ([START, TUNE], HUNG_UP),
        ([TUNE], "InvalidFrameError: Expected Connection.Start"),
        ([START, TUNE, Method(0, Connection.OpenOk()).marshal()], "KeyError: 'capabilities'"),
    ],
    ids=["hangs up", "speaks HTTP", "starts", "tunes", "garbles a frame", "lacks capabilities"],
)
def test_a_server_that_is_not_rabbitmq_gives_one_line(
    pair: Pair, script: Path, answers: list[bytes], told: str
) -> None:
    with fake_server(*answers) as address:
        assert told in error_line(pair.start(script, "--url", address))


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
            assert f":{plain_port}/" in plain_line(script)
        for connection in silent:
            connection.close()


def test_a_server_that_is_silent_is_given_up(pair: Pair) -> None:
    with fake_server(b"") as to_emitter, fake_server(b"") as to_receiver:
        emitter = pair.start(EMIT_LOG, "--url", to_emitter)
        receiver = pair.start(RECEIVE_LOGS, "--url", to_receiver)
        assert "no answer within 10 s" in plain_line(emitter)
        assert "no answer within 10 s" in plain_line(receiver)
