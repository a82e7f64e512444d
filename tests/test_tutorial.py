"""What the tutorial promises, and that the tutorial programs in other languages work with it."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pexpect
import psutil
import pytest
from pika.adapters.blocking_connection import BlockingChannel
from pika.frame import Method
from pika.spec import Connection
from pytest_rabbitmq.factories.executor import RabbitMqExecutor
from relay import Relay
from scripts import EMIT_LOG, RECEIVE_LOGS, ROOT, WAITING, Pair, eventually, user_environment

SCRIPTS = pytest.mark.parametrize("script", [EMIT_LOG, RECEIVE_LOGS], ids=lambda path: path.stem)
SIGNALS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


def test_every_receiver_prints_the_message(pair: Pair) -> None:
    receivers = [pair.receive(), pair.receive()]
    emitter = pair.emit("hello", "world")
    assert emitter.out == b" [x] Sent hello world\n"
    assert emitter.err == ""
    assert emitter.ended() == 0
    for receiver in receivers:
        receiver.assert_prints(b" [x] hello world\n")
        assert receiver.err == WAITING


def test_every_receiver_has_a_queue_that_the_server_names(
    pair: Pair, broker: RabbitMqExecutor
) -> None:
    pair.receive()
    pair.receive()
    bindings = broker.rabbitctl_output("-q", "list_bindings", "source_name", "destination_name")
    assert bindings.count("logs\tamq.gen-") == 2


def test_the_exchange_is_the_one_of_the_other_tutorials(
    pair: Pair, broker: RabbitMqExecutor
) -> None:
    pair.emit()
    exchanges = broker.rabbitctl_output("-q", "list_exchanges", "name", "type", "durable")
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


def test_messages_of_other_clients_are_printed(pair: Pair, channel: BlockingChannel) -> None:
    receiver = pair.receive()
    channel.exchange_declare("logs", "fanout")
    for word in b"one", b"two", b"three":
        channel.basic_publish("logs", "any routing key", word)
    receiver.assert_prints(b" [x] one\n [x] two\n [x] three\n")


def test_an_emitter_that_nobody_hears_says_so_and_succeeds(pair: Pair) -> None:
    eventually(lambda: pair.emit("is anybody left?").err)  # of the receivers of other tests
    emitter = pair.emit("to nobody")
    assert emitter.out == b" [x] Sent to nobody\n"
    assert emitter.err == (
        "emit_log.py: no receiver is listening: the broker discarded the message\n"
    )
    assert emitter.ended() == 0


def test_nothing_emitted_after_waiting_is_missed(pair: Pair) -> None:
    receivers = [pair.receive() for _ in range(3)]
    for number in range(5):
        assert pair.emit(str(number)).ended() == 0
    for receiver in receivers:
        receiver.assert_prints(b"".join(b" [x] %d\n" % number for number in range(5)))


def test_the_url_option_goes_before_the_variable(pair: Pair) -> None:
    receiver = pair.receive("--url", pair.url, AMQP_URL="amqp://localhost:1/")
    emitter = pair.emit("there", "--url", pair.url, AMQP_URL="amqp://localhost:1/")
    assert emitter.ended() == 0
    receiver.assert_prints(b" [x] there\n")


def test_ctrl_c_in_a_terminal_ends_the_receiver_and_its_queue(
    pair: Pair, broker: RabbitMqExecutor
) -> None:
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


@SIGNALS
def test_a_signal_ends_the_receiver_with_a_goodbye_to_the_broker(
    pair: Pair, broker: RabbitMqExecutor, number: signal.Signals
) -> None:
    relay = Relay(broker.port)
    receiver = pair.receive("--url", relay.url)
    receiver.process.send_signal(number)
    assert receiver.ended() == 0
    assert receiver.err == WAITING
    eventually(lambda: relay.said[0].endswith(Method(0, Connection.CloseOk()).marshal()))


def test_an_emit_ends_with_a_goodbye_to_the_broker(pair: Pair, broker: RabbitMqExecutor) -> None:
    relay = Relay(broker.port)
    assert pair.emit("--url", relay.url).ended() == 0
    eventually(lambda: relay.said[0].endswith(Method(0, Connection.CloseOk()).marshal()))


def test_sigterm_ends_the_receiver_as_process_1_of_a_container(pair: Pair) -> None:
    unshare = ["unshare", "--pid", "--fork", "--kill-child"]
    if os.getuid():
        unshare += ["--user", "--map-root-user"]
    with subprocess.Popen(
        [*unshare, sys.executable, RECEIVE_LOGS],
        env=user_environment(AMQP_URL=pair.url),
        stderr=subprocess.PIPE,
    ) as container:
        assert container.stderr
        assert container.stderr.readline().decode() == WAITING
        [process_1] = psutil.Process(container.pid).children()
        process_1.terminate()
        try:
            assert container.wait(30) == 0
        finally:
            container.kill()


@pytest.fixture
def slow_import(tmp_path: Path) -> str:
    """Return a PYTHONPATH with which the scripts stop in the import of aio-pika, and say so."""
    folder = tmp_path / "slow"
    folder.mkdir()
    stub = "import sys, time\nprint('importing', file=sys.stderr, flush=True)\ntime.sleep(600)\n"
    (folder / "aio_pika.py").write_text(stub)
    return str(folder)


@pytest.mark.parametrize(
    ("script", "number", "status"),
    [
        (EMIT_LOG, signal.SIGINT, -signal.SIGINT),
        (RECEIVE_LOGS, signal.SIGINT, 0),
        (RECEIVE_LOGS, signal.SIGTERM, 0),
    ],
    ids=["emit_log-SIGINT", "receive_logs-SIGINT", "receive_logs-SIGTERM"],
)
def test_a_signal_ends_the_imports_without_a_traceback(
    pair: Pair, slow_import: str, script: Path, number: signal.Signals, status: int
) -> None:
    importing = pair.start(script, PYTHONPATH=slow_import)
    eventually(lambda: importing.err == "importing\n")
    importing.process.send_signal(number)
    assert importing.ended() == status
    assert importing.err == "importing\n"


def test_ctrl_c_ends_a_shell_loop_of_emits(slow_import: str) -> None:
    loop = f"for i in 1 2 3; do '{sys.executable}' '{EMIT_LOG}'; done"
    with pexpect.spawn(
        "bash", ["-c", loop], env=user_environment(PYTHONPATH=slow_import)
    ) as terminal:
        terminal.expect_exact("importing\r\n")
        terminal.sendintr()
        terminal.expect(pexpect.EOF)
        assert terminal.before == b"^C"


def test_a_receiver_in_the_background_of_a_script_outlives_ctrl_c(pair: Pair) -> None:
    # Such a shell starts it with SIGINT ignored.
    command = f"'{sys.executable}' '{RECEIVE_LOGS}' & echo $!; wait"
    with subprocess.Popen(
        ["sh", "-c", command],
        env=user_environment(AMQP_URL=pair.url),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as shell:
        assert shell.stdout
        assert shell.stderr
        receiver = psutil.Process(int(shell.stdout.readline()))
        assert shell.stderr.readline().decode() == WAITING
        receiver.send_signal(signal.SIGINT)
        pair.emit("still there")
        assert shell.stdout.readline() == b" [x] still there\n"
        receiver.terminate()
        assert shell.wait(60) == 0


@SCRIPTS
def test_the_help_fits_a_screen_and_has_an_example(script: Path) -> None:
    command = [sys.executable, str(script), "--help"]
    page = subprocess.check_output(command, env=user_environment(COLUMNS="80"), text=True)
    assert len(page.splitlines()) <= 24
    assert f"\n  python {script.name}" in page


def test_every_python_line_in_the_readme_is_a_line_of_the_scripts() -> None:
    code = EMIT_LOG.read_text() + RECEIVE_LOGS.read_text()
    shown = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [line for block in shown for line in block.splitlines()]
    assert lines
    assert [line for line in lines if line not in code] == []
