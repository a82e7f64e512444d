"""The broker goes away, freezes, cancels or blocks: nobody hangs, and nothing is silent."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pexpect
import pika
import psutil
import pytest
from conftest import Tls
from mirakuru.exceptions import ProcessExitedWithError, ProcessFinishedWithError
from pika.adapters.blocking_connection import BlockingChannel
from pika.exceptions import NackError
from pytest_rabbitmq.factories.executor import RabbitMqExecutor
from relay import Relay, frame_ends
from scripts import (
    EMIT_LOG,
    LOST,
    RECEIVE_LOGS,
    WAITING,
    Pair,
    Script,
    eventually,
    user_environment,
)


@pytest.fixture(autouse=True)
def healthy(broker: RabbitMqExecutor) -> Iterator[None]:
    """Leave the node running, whatever a test does to it."""
    yield
    if broker.running():
        signal_broker(broker, signal.SIGCONT)
    else:
        broker.kill().start()


@pytest.fixture
def stalled(pair: Pair) -> Iterator[tuple[Script, int]]:
    """Return a receiver that writes to a pipe, and the end of the pipe that nobody reads yet."""
    reading, writing = os.pipe()
    receiver = pair.receive(stdout=writing)
    os.close(writing)
    yield receiver, reading
    os.close(reading)


def read(pipe: int, size: int) -> bytes:
    """Read as many bytes from a pipe."""
    with open(pipe, "rb", closefd=False) as file:
        return file.read(size)


def signal_broker(broker: RabbitMqExecutor, number: signal.Signals) -> None:
    """Send a signal to the whole node."""
    assert broker.process
    os.killpg(broker.process.pid, number)


def stop(broker: RabbitMqExecutor) -> None:
    """Stop the node as an administrator does."""
    with suppress(ProcessExitedWithError, ProcessFinishedWithError):
        broker.stop()


def the_only(broker: RabbitMqExecutor, *columns: str) -> list[str]:
    """Return these columns of the only queue, once those of earlier receivers are gone."""

    def one() -> list[str]:
        listing = broker.rabbitctl_output("-q", "list_queues", "--no-table-headers", *columns)
        rows = listing.splitlines()
        return rows[0].split("\t") if len(rows) == 1 else []

    return eventually(one)


def lose_the_queue(broker: RabbitMqExecutor) -> None:
    """Delete the only queue."""
    broker.rabbitctl_output("delete_queue", the_only(broker, "name")[0])


def publish(pair: Pair, *bodies: bytes, properties: pika.BasicProperties | None = None) -> None:
    """Publish messages from a client that is not aio-pika, each with a confirm."""
    with pika.BlockingConnection(pika.URLParameters(pair.url)) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        for body in bodies:
            channel.basic_publish("logs", "", body, properties)


def reasons(receiver: Script) -> list[str]:
    """Return why a receiver could not come back at once, after its only loss so far."""
    told = receiver.err.removeprefix(WAITING + LOST).removesuffix(WAITING)
    return [
        re.fullmatch(r"receive_logs.py: amqp://localhost:\d+/\S*: (.+)", line)[1]  # type: ignore[index]
        for line in told.splitlines()
    ]


def lost(receiver: Script) -> None:
    """Wait until a receiver has told of its first loss."""
    eventually(lambda: receiver.err.startswith(WAITING + LOST))


def assert_subscribed_again(pair: Pair, receiver: Script, before: bytes = b"") -> None:
    """Check that a receiver has told of one loss and each reason once, is back, and receives."""
    receiver.waiting(times=2)
    assert len(set(reasons(receiver))) == len(reasons(receiver))
    assert pair.emit("back again").err == ""
    receiver.assert_prints(before + b" [x] back again\n")


def test_a_receiver_survives_a_restart_of_the_broker(pair: Pair, broker: RabbitMqExecutor) -> None:
    receiver = pair.receive()
    pair.emit("before")
    stop(broker)
    lost(receiver)
    broker.start()
    assert_subscribed_again(pair, receiver, b" [x] before\n")


def test_a_receiver_survives_a_broker_that_is_killed(pair: Pair, broker: RabbitMqExecutor) -> None:
    receiver = pair.receive()
    pair.emit("before")
    receiver.assert_prints(b" [x] before\n")
    broker.kill(sig=signal.SIGKILL)
    lost(receiver)
    broker.start()
    assert_subscribed_again(pair, receiver, b" [x] before\n")


def test_a_receiver_survives_a_broker_that_freezes(pair: Pair, broker: RabbitMqExecutor) -> None:
    receiver = pair.receive("--url", pair.url + "?heartbeat=1")
    signal_broker(broker, signal.SIGSTOP)
    lost(receiver)
    signal_broker(broker, signal.SIGCONT)
    assert_subscribed_again(pair, receiver)


def test_a_receiver_survives_a_broker_that_freezes_while_it_subscribes_again(
    pair: Pair, broker: RabbitMqExecutor
) -> None:
    relay = Relay(broker.port, silent=True)
    receiver = pair.receive("--url", relay.url + "?heartbeat=1")
    opened = frame_ends(relay.said[0])[2]
    relay.cuts = [opened]  # from then on it beats, and hears nothing
    lose_the_queue(broker)
    assert_subscribed_again(pair, receiver)
    assert len(relay.said) == 3


def test_a_receiver_survives_every_moment_in_which_the_broker_hangs_up(
    pair: Pair, broker: RabbitMqExecutor
) -> None:
    relay = Relay(broker.port)
    receiver = pair.receive("--url", relay.url)
    relay.script = receiver.process
    relay.cuts = moments = frame_ends(relay.said[0])[:-1]
    tries = len(moments) + 2
    lose_the_queue(broker)
    assert_subscribed_again(pair, receiver)
    assert len(relay.said) == tries


def test_a_receiver_survives_a_broker_that_refuses_it_for_a_while(
    pair: Pair, broker: RabbitMqExecutor
) -> None:
    relay = Relay(broker.port)
    receiver = pair.receive("--url", relay.url)
    broker.rabbitctl_output("set_vhost_limits", '{"max-connections": 0}')
    try:
        lose_the_queue(broker)
        eventually(lambda: len(relay.said) >= 4)  # so two tries have failed
    finally:
        broker.rabbitctl_output("clear_vhost_limits")
    assert_subscribed_again(pair, receiver)
    assert reasons(receiver) == ["no such vhost, or not for this user, or too many connections"]


def test_a_receiver_whose_vhost_is_deleted_says_so_once_and_comes_back(
    pair: Pair, broker: RabbitMqExecutor
) -> None:
    broker.rabbitctl_output("add_vhost", "passing")
    broker.rabbitctl_output("set_permissions", "-p", "passing", "guest", ".*", ".*", ".*")
    relay = Relay(broker.port)
    receiver = pair.receive("--url", relay.url + "passing")
    broker.rabbitctl_output("delete_vhost", "passing")
    eventually(lambda: len(relay.said) >= 4)
    assert reasons(receiver) == ["no such vhost, or not for this user, or too many connections"]
    broker.rabbitctl_output("add_vhost", "passing")
    broker.rabbitctl_output("set_permissions", "-p", "passing", "guest", ".*", ".*", ".*")
    try:
        receiver.waiting(times=2)
    finally:
        broker.rabbitctl_output("delete_vhost", "passing")


def test_a_receiver_that_may_no_longer_read_says_so_once_and_comes_back(
    pair: Pair, broker: RabbitMqExecutor
) -> None:
    def permit(read: str) -> None:
        broker.rabbitctl_output("set_permissions", "temporary", ".*", ".*", read)

    broker.rabbitctl_output("add_user", "temporary", "secret")
    try:
        permit(".*")
        relay = Relay(broker.port)
        url = relay.url.replace("://", "://temporary:secret@")
        receiver = pair.receive("--url", url)
        permit("^$")
        lose_the_queue(broker)
        eventually(lambda: len(relay.said) >= 4)
        [reason] = reasons(receiver)
        assert re.fullmatch(r"ACCESS_REFUSED - .*'temporary'.*", reason)
        permit(".*")
        assert_subscribed_again(pair, receiver)
    finally:
        broker.rabbitctl_output("delete_user", "temporary")


def test_a_receiver_whose_queue_is_deleted_has_one_connection_again(
    pair: Pair, broker: RabbitMqExecutor
) -> None:
    receiver = pair.receive()
    lose_the_queue(broker)
    assert_subscribed_again(pair, receiver)
    assert len(psutil.Process(receiver.process.pid).net_connections()) == 1


def test_a_receiver_ends_if_the_exchange_has_another_type_on_return(
    pair: Pair, broker: RabbitMqExecutor, channel: BlockingChannel
) -> None:
    receiver = pair.receive()
    channel.exchange_delete("logs")
    channel.exchange_declare("logs", "topic")
    try:
        lose_the_queue(broker)
        assert receiver.ended() == 1
    finally:
        channel.exchange_delete("logs")
    told = receiver.err.removeprefix(WAITING + LOST)
    assert "received 'fanout' but current is 'topic'" in told
    assert told.count("\n") == 1


def test_a_receiver_ends_if_its_login_is_refused_on_return(
    pair: Pair, broker: RabbitMqExecutor
) -> None:
    broker.rabbitctl_output("add_user", "temporary", "secret")
    broker.rabbitctl_output("set_permissions", "temporary", ".*", ".*", ".*")
    receiver = pair.receive("--url", pair.url.replace("://", "://temporary:secret@"))
    broker.rabbitctl_output("delete_user", "temporary")  # this closes its connections
    assert receiver.ended() == 1
    told = receiver.err.removeprefix(WAITING + LOST)
    assert "ACCESS_REFUSED" in told
    assert told.count("\n") == 1


def test_what_had_arrived_is_printed_before_a_refused_receiver_ends(
    pair: Pair, broker: RabbitMqExecutor, channel: BlockingChannel
) -> None:
    relay = Relay(broker.port)
    reading, writing = os.pipe()
    receiver = pair.receive("--url", relay.url, stdout=writing)
    os.close(writing)
    line = b" [x] " + b"x" * 1_000_000 + b"\n"
    publish(pair, line[5:-1], b"the last one")
    eventually(lambda: the_only(broker, "messages_unacknowledged") == ["2"])
    channel.exchange_delete("logs")
    channel.exchange_declare("logs", "topic")
    try:
        lose_the_queue(broker)
        eventually(lambda: b"PRECONDITION_FAILED" in relay.said[-1])
    finally:
        channel.exchange_delete("logs")
    with pytest.raises(subprocess.TimeoutExpired):
        receiver.ended(3)  # it waits for the pause to end, however long that is
    with os.fdopen(reading, "rb") as pipe:
        assert pipe.read() == line + b" [x] the last one\n"
    assert receiver.ended() == 1


def test_a_receiver_hears_nothing_of_a_deleted_exchange(
    pair: Pair, channel: BlockingChannel
) -> None:
    receiver = pair.receive()
    channel.exchange_delete("logs")
    assert "no receiver is listening" in pair.emit("to nobody").err
    assert receiver.err == WAITING
    assert receiver.out == b""


def test_undecodable_messages_make_a_receiver_subscribe_again_once_a_second_at_most(
    pair: Pair, broker: RabbitMqExecutor
) -> None:
    relay = Relay(broker.port)
    begun = time.monotonic()
    receiver = pair.receive("--url", relay.url)
    year_10000 = pika.BasicProperties(timestamp=2**60)
    while len(relay.said) < 4:
        with suppress(NackError):  # of RabbitMQ 4.3, for a queue that is just going away
            publish(pair, b"undecodable", properties=year_10000)
    assert len(relay.said) <= 2 + time.monotonic() - begun
    assert set(receiver.err.splitlines(keepends=True)) == {WAITING, LOST}


def test_nothing_of_the_libraries_reaches_stderr_while_the_broker_is_away(
    pair: Pair, broker: RabbitMqExecutor, tmp_path: Path
) -> None:
    folder = tmp_path / "collecting"
    folder.mkdir()
    # Where aio-pika's old connections are collected in the thread that looks up the host's
    # name, Python warns that their close() was never awaited.
    (folder / "sitecustomize.py").write_text(
        "import gc, socket\n"
        "real = socket.getaddrinfo\n"
        "def getaddrinfo(*args, **kwargs):\n"
        "    gc.collect()\n"
        "    return real(*args, **kwargs)\n"
        "socket.getaddrinfo = getaddrinfo\n"
    )
    relay = Relay(broker.port)
    receiver = pair.receive("--url", relay.url, PYTHONPATH=str(folder))
    relay.script = receiver.process
    relay.cuts = [1, 1, 1]
    lose_the_queue(broker)
    assert_subscribed_again(pair, receiver)


@pytest.fixture
def short_consumer_timeout(broker: RabbitMqExecutor) -> Iterator[None]:
    """Let the broker wait a second for an acknowledgement, and not half an hour."""
    version = broker.rabbitctl_output("-q", "eval", "rabbit_misc:version().").strip('"\n')
    if tuple(map(int, version.split(".")[:2])) >= (4, 3):
        pytest.skip(f"RabbitMQ {version} has no consumer_timeout for such a queue")

    def set_milliseconds(timeout: int, tick: int) -> None:
        for name, value in ("consumer_timeout", timeout), ("channel_tick_interval", tick):
            broker.rabbitctl_output("eval", f"application:set_env(rabbit, {name}, {value}).")

    set_milliseconds(1_000, 500)
    yield
    set_milliseconds(1_800_000, 60_000)


def test_a_consumer_timeout_leaves_no_queue_without_its_consumer(
    pair: Pair,
    broker: RabbitMqExecutor,
    short_consumer_timeout: None,
    stalled: tuple[Script, int],
) -> None:
    receiver, pipe = stalled
    line = b" [x] " + b"x" * 1_000_000 + b"\n"
    first = the_only(broker, "name")
    publish(pair, line[5:-1])
    eventually(lambda: the_only(broker, "name") != first)
    pair.emit_until_routed("after the loss")
    line += b" [x] after the loss\n"
    assert read(pipe, len(line)) == line
    receiver.waiting(times=2)
    assert receiver.err == WAITING + LOST + WAITING
    assert the_only(broker, "consumers") == ["1"]


def test_a_receiver_that_is_paused_subscribes_again_at_once(
    pair: Pair, broker: RabbitMqExecutor, stalled: tuple[Script, int]
) -> None:
    receiver, pipe = stalled
    bodies = [b"%d %s" % (number, b"x" * 1000) for number in range(200)]
    publish(pair, *bodies)
    eventually(lambda: the_only(broker, "messages_ready") == ["0"])
    broker.kill(sig=signal.SIGKILL)
    eventually(lambda: "Connection refused" in pair.emit("nobody is there").err)
    broker.start()
    pair.emit_until_routed("during the pause")
    assert receiver.err == WAITING  # what it has to say waits, too, for its place in the order
    lines = b"".join(b" [x] %s\n" % body for body in [*bodies, b"during the pause"])
    assert read(pipe, len(lines)) == lines
    receiver.waiting(times=2)
    assert receiver.err.startswith(WAITING + LOST)


def test_the_line_of_a_loss_stands_where_the_gap_is(
    pair: Pair, broker: RabbitMqExecutor, tmp_path: Path
) -> None:
    log = tmp_path / "both.log"
    command = f"exec '{sys.executable}' '{RECEIVE_LOGS}' >'{log}' 2>&1"
    with subprocess.Popen(
        ["bash", "-c", command], env=user_environment(AMQP_URL=pair.url)
    ) as receiver:
        eventually(lambda: log.exists() and log.read_text() == WAITING)
        publish(pair, *[b"before"] * 1000)
        lose_the_queue(broker)
        pair.emit_until_routed("after")
        eventually(lambda: log.read_text().endswith(" [x] after\n"))
        receiver.terminate()
        assert receiver.wait(60) == 0
    before, after = log.read_text().removeprefix(WAITING).split(LOST)
    assert set(before.splitlines()) == {" [x] before"}
    assert after == WAITING + " [x] after\n"


def test_a_receiver_in_a_paused_terminal_subscribes_again_at_once(
    pair: Pair, broker: RabbitMqExecutor
) -> None:
    environment = user_environment(AMQP_URL=pair.url)
    with pexpect.spawn(sys.executable, [str(RECEIVE_LOGS)], env=environment) as terminal:
        terminal.expect_exact(WAITING.rstrip() + "\r\n")
        terminal.sendcontrol("s")
        lose_the_queue(broker)
        pair.emit_until_routed("during the pause")
        terminal.sendcontrol("q")
        terminal.expect_exact(" [x] during the pause\r\n")


def test_many_losses_in_one_pause_do_not_fill_the_memory(
    pair: Pair, broker: RabbitMqExecutor, stalled: tuple[Script, int]
) -> None:
    receiver, pipe = stalled
    bodies = [b"%03d %s" % (number, b"x" * 2**19) for number in range(300)]
    for _ in range(2):
        pair.emit_until_routed("begin")
        publish(pair, *bodies)
        eventually(lambda: the_only(broker, "messages_unacknowledged") == ["300"])
        lose_the_queue(broker)
    # The messages of one subscription are 150 MiB. With those of two, it does not come back,
    # although there is time for three tries.
    time.sleep(3)
    assert "no receiver is listening" in pair.emit("into the gap").err
    assert receiver.peak_memory() < 400
    with open(pipe, "rb", closefd=False) as out:
        printed = [out.readline()[5:10] for _ in range(601)]
        begins = [n for n, start in enumerate(printed) if start == b"begin"]
        receiver.waiting(times=3)
        pair.emit("the last one")
        assert out.readline() == b" [x] the last one\n"
    # The first "begin" was acknowledged before the pause, the second one counts among the 300.
    assert begins == [0, 301]
    assert printed[1:301] == [body[:5] for body in bodies]
    assert printed[302:] == [body[:5] for body in bodies[:299]]
    assert receiver.err == (WAITING + LOST) * 2 + WAITING


def test_ctrl_c_ends_both_kinds_of_connection_to_a_frozen_broker(
    pair: Pair, broker: RabbitMqExecutor, tls: Tls
) -> None:
    receivers = [pair.receive(), pair.receive("--url", tls.url)]
    signal_broker(broker, signal.SIGSTOP)
    for receiver in receivers:
        receiver.process.send_signal(signal.SIGINT)
        assert receiver.ended(20) == 0
        assert receiver.err == WAITING


def test_ctrl_c_ends_a_receiver_that_waits_for_the_broker(
    pair: Pair, broker: RabbitMqExecutor
) -> None:
    receiver = pair.receive()
    broker.kill(sig=signal.SIGKILL)
    lost(receiver)
    receiver.process.send_signal(signal.SIGINT)
    assert receiver.ended() == 0
    assert receiver.err.startswith(WAITING + LOST)


@contextmanager
def memory_alarm(broker: RabbitMqExecutor) -> Iterator[None]:
    """Make the node block publishers."""
    broker.rabbitctl_output("set_vm_memory_high_watermark", "0")
    try:
        yield
    finally:
        broker.rabbitctl_output("set_vm_memory_high_watermark", "0.4")


def test_an_emit_gives_up_on_a_broker_that_blocks_publishers(
    pair: Pair, broker: RabbitMqExecutor, tls: Tls
) -> None:
    with memory_alarm(broker):
        emitters = [
            pair.start(EMIT_LOG, "small"),
            pair.start(EMIT_LOG, *["x" * 100_000] * 15),
            pair.start(EMIT_LOG, "small", "--url", tls.url),
        ]
        for emitter in emitters:
            assert emitter.ended(20) == 1
            assert emitter.out == b""
            assert re.fullmatch(
                r"emit_log.py: .* no answer within 10 s \(.*memory or disk alarm.*\) "
                r"while publishing; the message may or may not have been sent\n",
                emitter.err,
            )


def test_an_emit_that_is_cut_short_is_either_confirmed_or_told_as_unsure(
    pair: Pair, broker: RabbitMqExecutor
) -> None:
    receiver = pair.receive()
    whole = Relay(broker.port)
    pair.emit("moment 0.", "--url", whole.url)
    ends = frame_ends(whole.said[0])
    emitters = []
    for cut in sorted([*ends, *(end - 5 for end in ends)]):
        relay = Relay(broker.port, cut)
        emitter = pair.start(EMIT_LOG, f"moment {cut}.", "--url", relay.url)
        relay.script = emitter.process
        emitters.append((cut, emitter))
    connecting = "the server hung up while connecting"
    publishing = "the server hung up while publishing; the message may or may not have been sent"
    for cut, emitter in emitters:
        if emitter.ended() == 0:
            assert emitter.out == b" [x] Sent moment %d.\n" % cut
            assert emitter.err == ""
        else:
            assert emitter.out == b""
            # The sixth frame says that the exchange is declared.
            told = connecting if cut < ends[5] else publishing
            assert re.fullmatch(f"emit_log.py: amqp://localhost:\\d+/: {told}\n", emitter.err)
    pair.emit("after them")  # what the broker confirmed has arrived before
    eventually(lambda: b" [x] after them\n" in receiver.out)
    sent = [emitter.out.replace(b"Sent ", b"") for _, emitter in emitters]
    assert [line for line in sent if line not in receiver.out] == []
    statuses = [emitter.process.returncode for _, emitter in emitters]
    assert statuses == sorted(statuses, reverse=True)  # told up to the confirm, then confirmed
    assert statuses[0] == 1
    assert statuses[-2:] == [0, 0]
