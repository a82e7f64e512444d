"""Outages: the broker goes away, freezes, refuses or blocks, or the queue is lost."""

import re
import signal
import sys
import time

import pika
import psutil
import pytest
from pika.adapters.blocking_connection import BlockingChannel
from pytest_rabbitmq.factories.executor import RabbitMqExecutor
from scripts import EMIT_LOG, IMPATIENCE, LOST, NOBODY, WAITING, Pair, Script, eventually
from servers import Relay, Tls, frame_ends, signal_node

pytestmark = pytest.mark.usefixtures("healthy")
HUNG_UP = "Server connection (unexpectedly closed[.] Read .* bytes expected|reset: .*)"
HASTE = """
import asyncio
real = asyncio.sleep
asyncio.sleep = lambda seconds: real(seconds / 10)
"""  # for a script that tries again every tenth of a second


def the_only(broker: RabbitMqExecutor, column: str) -> str:
    """Return this column of the only queue, once those of earlier receivers are gone."""

    def rows() -> list[str]:
        return broker.rabbitctl_output("-q", "list_queues", "--no-table-headers", column).split()

    eventually(lambda: len(rows()) == 1)
    return rows()[0]


def assert_subscribed_again(
    pair: Pair, receiver: Script, loss: str, before: bytes = b""
) -> list[str]:
    """Check that a receiver is back after one loss, for this reason, and receives.

    Return why it could not come back at once. `loss` is a regular expression.
    """
    receiver.waiting(times=2)
    assert pair.emit("back again").err == ""
    receiver.assert_prints(before + b" [x] back again\n")
    waiting, lost, *others, again = receiver.err.splitlines(keepends=True)
    assert waiting == again == WAITING
    assert re.fullmatch(re.escape(LOST) + rf" \({loss}\)\n", lost), lost
    address = r"receive_logs.py: (?:amqp://)?localhost:\d+/\S*: (.+)\n"
    return [re.fullmatch(address, line)[1] for line in others]  # type: ignore[index]


def test_a_receiver_survives_a_restart_of_the_broker(pair: Pair, broker: RabbitMqExecutor) -> None:
    receiver = pair.receive()
    pair.emit("before")
    receiver.assert_prints(b" [x] before\n")
    broker.kill(sig=signal.SIGKILL)
    eventually(lambda: receiver.err.endswith("Is RabbitMQ running there?\n"))
    broker.start()
    reasons = assert_subscribed_again(pair, receiver, HUNG_UP, b" [x] before\n")
    assert "Connect call failed" in reasons[0]


def test_a_receiver_survives_a_broker_that_freezes(pair: Pair, broker: RabbitMqExecutor) -> None:
    receiver = pair.receive("--url", pair.url + "?heartbeat=1")
    signal_node(broker, signal.SIGSTOP)
    eventually(lambda: LOST in receiver.err)
    signal_node(broker, signal.SIGCONT)
    assert_subscribed_again(pair, receiver, "the broker fell silent")


def test_a_receiver_survives_every_moment_in_which_the_broker_hangs_up(
    pair: Pair, broker: RabbitMqExecutor
) -> None:
    relay = Relay(broker.port)
    receiver = pair.receive("--url", relay.url, PYTHONPATH=pair.python_path(sitecustomize=HASTE))
    relay.script = receiver.process
    relay.cuts = moments = frame_ends(relay.said[0])[:-1]
    tries = len(moments) + 2
    relay.hang_up()
    reasons = assert_subscribed_again(pair, receiver, HUNG_UP)
    assert len(relay.said) == tries
    assert len(reasons) == 2  # of two types, though nearly each try has other words
    assert re.fullmatch(HUNG_UP + "[.] Is RabbitMQ running there[?]", reasons[0])
    assert reasons[1] == "Exception: "  # aiormq has no words for it


def test_a_receiver_that_is_refused_on_return_says_why_once_and_never_gives_up(
    pair: Pair, broker: RabbitMqExecutor
) -> None:
    relay = Relay(broker.port)
    broker.rabbitctl_output("add_user", "alice", "secret")
    broker.rabbitctl_output("set_permissions", "alice", ".*", ".*", ".*")
    url = relay.url.replace("://", "://alice:secret@")
    receiver = pair.receive("--url", url, PYTHONPATH=pair.python_path(sitecustomize=HASTE))
    broker.rabbitctl_output("change_password", "alice", "other")
    relay.script = receiver.process
    relay.cuts = [sys.maxsize, 1] * 3  # every other try, it is the relay that hangs up
    relay.hang_up()
    eventually(lambda: len(relay.said) > 6)
    broker.rabbitctl_output("change_password", "alice", "secret")
    refused, hung_up = assert_subscribed_again(pair, receiver, HUNG_UP)
    assert re.fullmatch("ACCESS_REFUSED - .*[(]guest can usually log in from .*", refused)
    assert re.fullmatch(HUNG_UP + "[.] Is RabbitMQ running there[?]", hung_up)


def test_a_receiver_whose_queue_is_deleted_says_so_and_gets_another(
    pair: Pair, broker: RabbitMqExecutor
) -> None:
    receiver = pair.receive()
    broker.rabbitctl_output("delete_queue", the_only(broker, "name"))
    assert assert_subscribed_again(pair, receiver, "queue deleted") == []
    assert len(psutil.Process(receiver.process.pid).net_connections()) == 1


def test_a_receiver_hears_nothing_of_a_deleted_exchange(
    pair: Pair, channel: BlockingChannel
) -> None:
    receiver = pair.receive()
    channel.exchange_delete("logs")
    assert pair.emit("to nobody").err == NOBODY
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
        pair.publish(b"undecodable", properties=year_10000)
    assert len(relay.said) <= 2 + time.monotonic() - begun
    lines = set(receiver.err.splitlines(keepends=True)) - {WAITING}
    assert re.fullmatch(rf"{LOST} \(.*year .*\)\n", lines.pop())
    assert not lines
    assert the_only(broker, "consumers") == "1"  # no other queue is left


def test_nothing_of_the_libraries_reaches_stderr_while_the_broker_is_away(
    pair: Pair, broker: RabbitMqExecutor
) -> None:
    # Where aio-pika's old connections are collected in the thread that looks up the host's
    # name, Python warns that their close() was never awaited.
    path = pair.python_path(
        sitecustomize=HASTE + "import gc, socket\n"
        "look_up = socket.getaddrinfo\n"
        "def getaddrinfo(*args, **kwargs):\n"
        "    gc.collect()\n"
        "    return look_up(*args, **kwargs)\n"
        "socket.getaddrinfo = getaddrinfo\n"
    )
    relay = Relay(broker.port)
    receiver = pair.receive("--url", relay.url, PYTHONPATH=path)
    relay.script = receiver.process
    relay.cuts = [1, 1, 1]
    relay.hang_up()
    assert len(assert_subscribed_again(pair, receiver, HUNG_UP)) == 1


def test_the_line_of_a_loss_says_why_and_stands_where_the_gap_is(
    pair: Pair, broker: RabbitMqExecutor
) -> None:
    log = pair.folder / "both.log"
    pair.shell(f"exec receive_logs.py >'{log}' 2>&1")
    eventually(lambda: log.exists() and log.read_text() == WAITING)
    pair.publish(*[b"before"] * 1000)
    broker.rabbitctl_output("close_all_connections", "moving house at noon")
    pair.emit_until_routed("after")
    eventually(lambda: log.read_text().endswith(" [x] after\n"))
    before, after = log.read_text().removeprefix(WAITING).split(LOST)
    assert set(before.splitlines()) == {" [x] before"}
    reason = "([Errno 320] CONNECTION_FORCED - moving house at noon)\n"
    assert after == f" {reason}{WAITING} [x] after\n"


def test_an_emit_gives_up_on_a_broker_that_blocks_publishers(
    pair: Pair, broker: RabbitMqExecutor, tls: Tls
) -> None:
    path = pair.python_path(sitecustomize=IMPATIENCE)
    broker.rabbitctl_output("set_vm_memory_high_watermark", "0")
    try:
        arguments = ["small"], ["x" * 100_000] * 15, ["small", "--url", tls.url]
        for emitter in [pair.start(EMIT_LOG, *each, PYTHONPATH=path) for each in arguments]:
            assert emitter.ended() == 1
            assert emitter.out == b""
            assert re.search("not confirmed by .* no answer within 10 s .*\\)\n$", emitter.err)
    finally:
        broker.rabbitctl_output("set_vm_memory_high_watermark", "0.4")


def test_an_emit_that_is_cut_short_is_either_confirmed_or_told(
    pair: Pair, broker: RabbitMqExecutor
) -> None:
    receiver = pair.receive()
    whole = Relay(broker.port)
    pair.emit("moment 0.", "--url", whole.url)
    ends = frame_ends(whole.said[0])
    emitters = []
    for cut in sorted([*ends, *(end - 5 for end in ends[-4:])]):
        relay = Relay(broker.port, cut)
        emitter = pair.start(EMIT_LOG, f"moment {cut}.", "--url", relay.url)
        relay.script = emitter.process
        emitters.append((cut, emitter))
    for cut, emitter in emitters:
        if emitter.ended() == 0:
            assert emitter.out == b" [x] Sent moment %d.\n" % cut
            assert emitter.err == ""
        else:
            assert emitter.out == b""
            told = rf"emit_log.py: not confirmed by amqp://localhost:\d+/: ({HUNG_UP}|Exception: )"
            assert re.match(told, emitter.err), emitter.err
    pair.emit("after them")  # what the broker confirmed has arrived before
    eventually(lambda: b" [x] after them\n" in receiver.out)
    sent = [emitter.out.replace(b"Sent ", b"") for _, emitter in emitters]
    assert [line for line in sent if line not in receiver.out] == []
    statuses = [emitter.process.returncode for _, emitter in emitters]
    assert statuses == sorted(statuses, reverse=True)  # told up to the confirm, then confirmed
    assert statuses[0] == 1
    assert statuses[-2:] == [0, 0]


@pytest.mark.parametrize("does", ["await asyncio.Future()", "raise OSError"])
def test_a_confirm_is_a_success_whatever_the_goodbye_does(pair: Pair, does: str) -> None:
    pair.receive()
    goodbye = f"async def close(self): {does}\nConnection.close = close\n"
    patch = f"import asyncio\nfrom aio_pika import Connection\n{goodbye}"
    emitter = pair.emit("confirmed", PYTHONPATH=pair.python_path(sitecustomize=patch))
    assert emitter.ended() == 0
    assert emitter.out == b" [x] Sent confirmed\n"
    assert emitter.err == ""
