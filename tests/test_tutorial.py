"""What the tutorial promises, and that the tutorial programs in other languages work with it."""

import re
import signal
import subprocess
import sys

import pexpect
import pytest
from pika.adapters.blocking_connection import BlockingChannel
from pytest_rabbitmq.factories.executor import RabbitMqExecutor
from scripts import EMIT_LOG, RECEIVE_LOGS, ROOT, WAITING, Pair, eventually, user_environment


def test_every_receiver_prints_the_message(pair: Pair, broker: RabbitMqExecutor) -> None:
    first, second = pair.receive(), pair.receive()
    bindings = broker.rabbitctl_output(
        "-q", "list_bindings", "source_name", "destination_name", "routing_key"
    )
    exchanges = broker.rabbitctl_output("-q", "list_exchanges", "name", "type", "durable")

    emitter = pair.emit("hello", "world")

    assert emitter.out == b" [x] Sent hello world\n"
    assert emitter.err == ""
    assert emitter.ended() == 0
    for receiver in first, second:
        receiver.printed(b" [x] hello world\n")
        assert receiver.err == WAITING
    assert bindings.count("logs\tamq.gen-") == 2
    assert "logs\tfanout\tfalse" in exchanges


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], b"Hello World!"),
        ([""], b"Hello World!"),
        (["", ""], b"Hello World!"),
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


def test_other_clients_are_printed(pair: Pair, channel: BlockingChannel) -> None:
    receiver = pair.receive()
    channel.exchange_declare("logs", "fanout")
    for word in b"one", b"two", b"three":
        channel.basic_publish("logs", "any routing key", word)
    receiver.printed(b" [x] one\n [x] two\n [x] three\n")


def test_no_receiver_is_told_and_is_no_error(pair: Pair) -> None:
    eventually(lambda: pair.emit("is anybody left?").err)  # of the receivers of other tests
    emitter = pair.emit("to nobody")
    assert emitter.out == b" [x] Sent to nobody\n"
    assert emitter.err.startswith("emit_log.py: no receiver is listening")
    assert emitter.err.count("\n") == 1
    assert emitter.ended() == 0


def test_nothing_emitted_after_waiting_is_missed(pair: Pair) -> None:
    receivers = [pair.receive() for _ in range(3)]
    for number in range(5):
        assert pair.emit(str(number)).ended() == 0
    for receiver in receivers:
        receiver.printed(b"".join(b" [x] %d\n" % number for number in range(5)))


def test_the_url_option_goes_before_the_variable(pair: Pair) -> None:
    receiver = pair.receive("--url", pair.url, AMQP_URL="amqp://localhost:1/")
    emitter = pair.emit("there", "--url", pair.url, AMQP_URL="amqp://localhost:1/")
    assert emitter.ended() == 0
    receiver.printed(b" [x] there\n")


def test_ctrl_c_in_a_terminal(pair: Pair, broker: RabbitMqExecutor) -> None:
    environment = user_environment(AMQP_URL=pair.url)
    with pexpect.spawn(sys.executable, [str(RECEIVE_LOGS)], env=environment) as terminal:
        terminal.expect_exact(WAITING.rstrip())
        pair.emit("on the screen")
        terminal.expect_exact(" [x] on the screen\r\n")
        assert "amq.gen-" in broker.rabbitctl_output("-q", "list_queues", "name")
        terminal.sendintr()
        terminal.expect(pexpect.EOF)
        assert terminal.before == b"^C"
        terminal.wait()
        assert terminal.exitstatus == 0
    assert "amq.gen-" not in broker.rabbitctl_output("-q", "list_queues", "name")


def test_sigterm(pair: Pair, broker: RabbitMqExecutor) -> None:
    receiver = pair.receive()
    receiver.process.terminate()
    assert receiver.ended() == -signal.SIGTERM
    assert receiver.err == WAITING
    eventually(lambda: "amq.gen-" not in broker.rabbitctl_output("-q", "list_queues", "name"))


@pytest.mark.parametrize("script", ["emit_log.py", "receive_logs.py"])
def test_help_fits_a_screen_and_has_an_example(script: str) -> None:
    command = [sys.executable, str(ROOT / script), "--help"]
    page = subprocess.check_output(command, env=user_environment(COLUMNS="80"), text=True)
    assert len(page.splitlines()) <= 24
    assert f"\n  python {script}" in page


def test_readme_shows_lines_of_the_scripts() -> None:
    code = EMIT_LOG.read_text() + RECEIVE_LOGS.read_text()
    shown = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [line for block in shown for line in block.splitlines()]
    assert lines
    assert [line for line in lines if line not in code] == []
