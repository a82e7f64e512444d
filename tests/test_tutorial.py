"""What the tutorial promises, in its order; its other languages; and README's words on options."""

import re
import subprocess
import sys
from pathlib import Path

import kombu
import pytest
from pika.adapters.blocking_connection import BlockingChannel
from pytest_rabbitmq.factories.executor import RabbitMqExecutor
from scripts import EMIT_LOG, NOBODY, RECEIVE_LOGS, ROOT, SCRIPTS, WAITING, Pair, user_environment
from servers import Tls


def test_every_receiver_prints_the_message_from_a_queue_that_the_broker_names(
    pair: Pair, broker: RabbitMqExecutor
) -> None:
    receivers = [pair.receive(), pair.receive()]
    emitter = pair.emit("hello", "world")
    assert emitter.out == b" [x] Sent hello world\n"
    assert emitter.err == ""
    assert emitter.ended() == 0
    for receiver in receivers:
        receiver.assert_prints(b" [x] hello world\n")
        assert receiver.err == WAITING
    exchanges = broker.rabbitctl_output("-q", "list_exchanges", "name", "type", "durable")
    assert "logs\tfanout\tfalse" in exchanges
    bindings = broker.rabbitctl_output("-q", "list_bindings", "source_name", "destination_name")
    assert bindings.count("logs\tamq.gen-") == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], b"Hello World!"),
        ([""], b"Hello World!"),
        ([" "], b" "),
        (["--", "--url", "is an option"], b"--url is an option"),
        (["--- restart ---"], b"--- restart ---"),
        ([b"\xff\xfe", "\u00e9"], b"\xff\xfe \xc3\xa9"),
    ],
)
def test_other_clients_receive_the_bytes_as_typed(
    pair: Pair, channel: BlockingChannel, words: list[str | bytes], message: bytes
) -> None:
    channel.exchange_declare("logs", "fanout")
    queue = channel.queue_declare("", exclusive=True).method.queue
    assert queue
    channel.queue_bind(queue, "logs")

    assert pair.emit(*words).ended() == 0

    # The emitter ended after the confirm, and the broker confirms what is in the queue.
    assert channel.basic_get(queue, auto_ack=True)[2] == message


@pytest.mark.parametrize("first", ["kombu", "receiver"])
def test_kombu_is_shown_if_its_exchange_is_not_durable(
    pair: Pair, channel: BlockingChannel, first: str
) -> None:
    channel.exchange_delete("logs")
    exchange = kombu.Exchange("logs", type="fanout", durable=False)
    with kombu.Connection(pair.url) as connection:
        if first == "kombu":
            exchange(connection.default_channel).declare()
        receiver = pair.receive()
        connection.Producer().publish("from kombu", exchange=exchange, declare=[exchange])
    receiver.assert_prints(b" [x] from kombu\n")


def test_a_durable_exchange_is_told_and_can_be_joined_or_avoided_in_another_vhost(
    pair: Pair, broker: RabbitMqExecutor, channel: BlockingChannel
) -> None:
    channel.exchange_delete("logs")
    channel.exchange_declare("logs", "fanout", durable=True)
    try:
        for refused in pair.start(EMIT_LOG), pair.start(RECEIVE_LOGS):
            assert refused.ended() == 1
            assert refused.err.endswith("vhost '/': received 'false' but current is 'true'\n")
        declares = 'declare_exchange("logs", ExchangeType.FANOUT'
        for script in EMIT_LOG, RECEIVE_LOGS:
            text = script.read_text().replace(declares, f"{declares}, durable=True")
            (pair.folder / script.name).write_text(text)
        receiver = pair.start(pair.folder / RECEIVE_LOGS.name).waiting()
        assert pair.start(pair.folder / EMIT_LOG.name, "durable").ended() == 0
        receiver.assert_prints(b" [x] durable\n")
        broker.rabbitctl_output("add_vhost", "tutorial")
        broker.rabbitctl_output("set_permissions", "-p", "tutorial", "guest", ".*", ".*", ".*")
        receiver = pair.receive(AMQP_URL=pair.url + "tutorial")
        assert pair.emit("there", AMQP_URL=pair.url + "tutorial").err == ""
        receiver.assert_prints(b" [x] there\n")
    finally:
        channel.exchange_delete("logs")


def test_an_emitter_that_nobody_hears_says_so_and_succeeds(pair: Pair) -> None:
    pair.wait_for_silence()
    emitter = pair.emit("to nobody")
    assert emitter.out == b" [x] Sent to nobody\n"
    assert emitter.err == NOBODY
    assert emitter.ended() == 0


def test_tls_with_a_private_authority_works(pair: Pair, tls: Tls) -> None:
    receiver = pair.receive("--url", tls.url)
    assert pair.emit("in private", "--url", tls.url).ended() == 0
    receiver.assert_prints(b" [x] in private\n")


def test_the_rights_in_the_readme_are_enough(pair: Pair, broker: RabbitMqExecutor) -> None:
    pair.emit("the exchange is declared, whoever comes first")
    rights = re.findall(r"'(\^\S+)' '(\S+)' '(\S+)'", (ROOT / "README.md").read_text())
    users = ["both", "emits", "reads"]
    for user, patterns in zip(users, rights, strict=True):
        broker.rabbitctl_output("add_user", user, "secret")
        broker.rabbitctl_output("set_permissions", user, *patterns)
    both, emitter, receiver = (pair.url.replace("//", f"//{user}:secret@") for user in users)
    receivers = [pair.receive("--url", url) for url in (both, receiver)]
    for url in (both, emitter):
        assert pair.emit("with few rights", "--url", url).ended() == 0
    for reading in receivers:
        reading.assert_prints(b" [x] with few rights\n" * 2)


@SCRIPTS
def test_an_empty_variable_means_the_default(script: Path) -> None:
    command = [sys.executable, "-c", f"from {script.stem} import URL; print(URL)"]
    environment = user_environment(AMQP_URL="")
    url = subprocess.check_output(command, env=environment, cwd=ROOT, text=True)
    assert url == "amqp://guest:guest@localhost/\n"


def test_every_python_line_in_the_readme_is_a_line_of_the_scripts() -> None:
    code = (EMIT_LOG.read_text() + RECEIVE_LOGS.read_text()).splitlines()
    shown = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [line.strip() for block in shown for line in block.splitlines()]
    assert lines
    assert [line for line in lines if line not in map(str.strip, code)] == []
