"""The broker goes away, freezes, cancels or blocks: nobody hangs, and nothing is silent."""

import os
import re
import select
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress

import psutil
import pytest
from conftest import Tls
from mirakuru.exceptions import ProcessExitedWithError, ProcessFinishedWithError
from pika.adapters.blocking_connection import BlockingChannel
from pika.frame import Method
from pika.spec import Connection
from pytest_rabbitmq.factories.executor import RabbitMqExecutor
from scripts import EMIT_LOG, WAITING, Pair, Script, eventually

LOST = (
    "receive_logs.py: lost the broker or the queue: logs emitted until it waits again are missed\n"
)


@pytest.fixture(autouse=True)
def healthy(broker: RabbitMqExecutor) -> Iterator[None]:
    """Leave the node running, whatever a test does to it."""
    yield
    if broker.running():
        signal_broker(broker, signal.SIGCONT)
    else:
        broker.kill().start()


def signal_broker(broker: RabbitMqExecutor, number: signal.Signals) -> None:
    """Send a signal to the whole node."""
    assert broker.process
    os.killpg(broker.process.pid, number)


def queue_of(broker: RabbitMqExecutor) -> str:
    """Return the name of the only queue."""
    listing = "-q", "list_queues", "--no-table-headers", "name"

    def the_only_one() -> list[str]:  # once those of earlier receivers are gone
        names = broker.rabbitctl_output(*listing).split()
        return names if len(names) == 1 else []

    return eventually(the_only_one)[0]


def subscribed_again(pair: Pair, receiver: Script, before: bytes = b"") -> None:
    """Check that a receiver has told of one loss, is back, and receives."""
    receiver.waiting(times=2)
    assert receiver.err == WAITING + LOST + WAITING
    assert pair.emit("back again").err == ""
    receiver.printed(before + b" [x] back again\n")


def test_broker_restarts(pair: Pair, broker: RabbitMqExecutor) -> None:
    receiver = pair.receive()
    pair.emit("before")
    with suppress(ProcessExitedWithError, ProcessFinishedWithError):
        broker.stop()
    eventually(lambda: receiver.err == WAITING + LOST)
    broker.start()
    subscribed_again(pair, receiver, b" [x] before\n")


def test_broker_freezes(pair: Pair, broker: RabbitMqExecutor, tls: Tls) -> None:
    receiver = pair.receive("--url", pair.url + "?heartbeat=1")
    impatient = [pair.receive(), pair.receive("--url", tls.url)]
    signal_broker(broker, signal.SIGSTOP)
    for other in impatient:
        other.process.send_signal(signal.SIGINT)
        assert other.ended(20) == 0
        assert other.err == WAITING
    eventually(lambda: receiver.err == WAITING + LOST)
    signal_broker(broker, signal.SIGCONT)
    subscribed_again(pair, receiver)


def test_queue_is_deleted(pair: Pair, broker: RabbitMqExecutor) -> None:
    receiver = pair.receive()
    broker.rabbitctl_output("delete_queue", queue_of(broker))
    subscribed_again(pair, receiver)
    assert len(psutil.Process(receiver.process.pid).net_connections()) == 1


def test_exchange_has_another_type_on_return(
    pair: Pair, broker: RabbitMqExecutor, channel: BlockingChannel
) -> None:
    receiver = pair.receive()
    channel.exchange_delete("logs")
    channel.exchange_declare("logs", "topic")
    try:
        broker.rabbitctl_output("delete_queue", queue_of(broker))
        assert receiver.ended() == 1
    finally:
        channel.exchange_delete("logs")
    told = receiver.err.removeprefix(WAITING + LOST)
    assert "received 'fanout' but current is 'topic'" in told
    assert told.count("\n") == 1


def test_access_is_refused_on_return(pair: Pair, broker: RabbitMqExecutor) -> None:
    broker.rabbitctl_output("add_user", "temporary", "secret")
    broker.rabbitctl_output("set_permissions", "temporary", ".*", ".*", ".*")
    receiver = pair.receive("--url", pair.url.replace("://", "://temporary:secret@"))
    broker.rabbitctl_output("delete_user", "temporary")  # this closes its connections
    assert receiver.ended() == 1
    told = receiver.err.removeprefix(WAITING + LOST)
    assert "ACCESS_REFUSED" in told
    assert told.count("\n") == 1


def test_broker_blocks_publishers(pair: Pair, broker: RabbitMqExecutor, tls: Tls) -> None:
    receiver = pair.receive()
    broker.rabbitctl_output("set_vm_memory_high_watermark", "0")
    try:
        small = pair.start(EMIT_LOG, "small")
        large = pair.start(EMIT_LOG, *["x" * 100_000] * 15)
        private = pair.start(EMIT_LOG, "small", "--url", tls.url)
        for emitter in private, small, large:
            assert emitter.ended(20) == 1
            assert emitter.out == b""
            assert "memory or disk alarm" in emitter.err
            assert emitter.err.count("\n") == 1
    finally:
        broker.rabbitctl_output("set_vm_memory_high_watermark", "0.4")
    assert receiver.err == WAITING


class Relay(threading.Thread):
    """A way to the broker for one connection, on which all it says after `limit` bytes is lost."""

    def __init__(self, broker: RabbitMqExecutor, limit: int = sys.maxsize) -> None:
        super().__init__(daemon=True)
        self.limit = limit
        self.passed = b""
        self.port = broker.port
        self.listener = socket.create_server(("localhost", 0))
        self.url = f"amqp://localhost:{self.listener.getsockname()[1]}/"
        self.start()

    def is_cut(self) -> bool:
        """Return whether all that may pass has passed."""
        return len(self.passed) == self.limit

    def run(self) -> None:
        """Pass on what both say, until one goes away."""
        client, _ = self.listener.accept()
        broker = socket.create_connection(("localhost", self.port))
        with self.listener, broker, client, suppress(OSError):
            while True:
                for speaks in select.select([broker, client], [], [])[0]:
                    said = speaks.recv(4096)
                    if not said:
                        return
                    if speaks is client:
                        broker.sendall(said)
                    else:
                        may_pass = said[: self.limit - len(self.passed)]
                        client.sendall(may_pass)
                        self.passed += may_pass


def test_both_say_goodbye(pair: Pair, broker: RabbitMqExecutor) -> None:
    goodbye = Method(0, Connection.CloseOk()).marshal()
    to_receiver, to_emitter = Relay(broker), Relay(broker)
    receiver = pair.receive("--url", to_receiver.url)
    assert pair.emit("--url", to_emitter.url).ended() == 0
    eventually(lambda: to_emitter.passed.endswith(goodbye))
    receiver.process.send_signal(signal.SIGINT)
    assert receiver.ended() == 0
    eventually(lambda: to_receiver.passed.endswith(goodbye))


def emitters_at_twenty_moments(pair: Pair, broker: RabbitMqExecutor) -> list[Script]:
    """Start emitters, each of which waits at another moment of its talk with the broker.

    The first one has only been greeted, the last one has heard all.
    """
    whole = Relay(broker)
    pair.emit("how much the broker says", "--url", whole.url)
    relays = [Relay(broker, limit=len(whole.passed) - 6 * (19 - moment)) for moment in range(20)]
    emitters = [
        pair.start(EMIT_LOG, f"moment {moment}.", "--url", relay.url)
        for moment, relay in enumerate(relays)
    ]
    for relay in relays:
        eventually(relay.is_cut)
    return emitters


def test_broker_is_killed(pair: Pair, broker: RabbitMqExecutor, channel: BlockingChannel) -> None:
    reading, writing = os.pipe()
    stalled = pair.receive(stdout=writing)
    os.close(writing)
    channel.confirm_delivery()  # so that what is published is in the queue
    bodies = [b"%d %s" % (number, b"x" * 1000) for number in range(200)]
    for body in bodies:
        channel.basic_publish("logs", "", body)
    arrived = b"".join(b" [x] %s\n" % body for body in bodies)
    listing = "-q", "list_queues", "--no-table-headers", "messages_ready"
    eventually(lambda: broker.rabbitctl_output(*listing).split() == ["0"])

    receiver, other = pair.receive(), pair.receive()
    emitters = emitters_at_twenty_moments(pair, broker)
    for emitter in emitters[-3:]:  # confirmed, whether the goodbye is heard or not
        assert emitter.ended() == 0
    pair.emit("after them")  # so that all that the broker confirmed has arrived before
    eventually(lambda: b" [x] after them\n" in receiver.out)
    broker.kill(sig=signal.SIGKILL)

    # The emitters: promise kept or error, at whatever moment.
    for moment, emitter in enumerate(emitters):
        status = emitter.ended(20)
        told = emitter.out + emitter.err.encode()
        assert told.count(b"\n") == 1
        if status == 0:
            assert told == b" [x] Sent moment %d.\n" % moment
            assert b" [x] moment %d.\n" % moment in receiver.out
        else:
            assert status == 1
            # The other is for machines so busy that the time was up before the kill.
            assert re.match(b"emit_log.py: .*( broke off before |no answer )", told)
    assert emitters[-4].ended() == 1

    # CTRL+C while a receiver waits for the broker.
    eventually(lambda: other.err == WAITING + LOST)
    other.process.send_signal(signal.SIGINT)
    assert other.ended() == 0
    assert other.err == WAITING + LOST

    # What had arrived before is printed when stdout goes on.
    with os.fdopen(reading, "rb") as pipe:
        assert pipe.read(len(arrived)) == arrived
        eventually(lambda: stalled.err == WAITING + LOST)

    before = receiver.out
    broker.start()
    subscribed_again(pair, receiver, before)
