"""Outages: the broker goes away, freezes, refuses or blocks, or the queue is lost."""

import re
import signal
import sys
import time
from typing import BinaryIO

import pika
import psutil
import pytest
from pika.adapters.blocking_connection import BlockingChannel
from pytest_rabbitmq.factories.executor import RabbitMqExecutor
from scripts import EMIT_LOG, LOST, NOBODY, WAITING, Pair, Script, eventually
from servers import Relay, Tls, frame_ends, signal_node

pytestmark = pytest.mark.usefixtures("healthy")
HASTE = """
import asyncio
real = asyncio.sleep
asyncio.sleep = lambda seconds: real(seconds / 10)
"""  # for a script that tries again every tenth of a second


def the_only(broker: RabbitMqExecutor, *columns: str) -> list[str]:
    """Return these columns of the only queue, once those of earlier receivers are gone."""

    def one() -> list[str]:
        listing = broker.rabbitctl_output("-q", "list_queues", "--no-table-headers", *columns)
        rows = listing.splitlines()
        return rows[0].split("\t") if len(rows) == 1 else []

    return eventually(one)


def reasons(receiver: Script) -> list[str]:
    """Return why a receiver could not come back at once, after its only loss so far."""
    told = receiver.err.removeprefix(WAITING + LOST).removesuffix(WAITING)
    return [
        re.fullmatch(r"receive_logs.py: (?:amqp://)?localhost:\d+/\S*: (.+)", line)[1]  # type: ignore[index]
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
    receiver.assert_prints(b" [x] before\n")
    broker.kill(sig=signal.SIGKILL)
    lost(receiver)
    eventually(lambda: reasons(receiver)[-1:] == ["cannot connect. Is RabbitMQ running there?"])
    broker.start()
    assert_subscribed_again(pair, receiver, b" [x] before\n")


def test_a_receiver_survives_a_broker_that_freezes(pair: Pair, broker: RabbitMqExecutor) -> None:
    receiver = pair.receive("--url", pair.url + "?heartbeat=1")
    signal_node(broker, signal.SIGSTOP)
    lost(receiver)
    signal_node(broker, signal.SIGCONT)
    assert_subscribed_again(pair, receiver)


def test_a_receiver_survives_every_moment_in_which_the_broker_hangs_up(
    pair: Pair, broker: RabbitMqExecutor
) -> None:
    relay = Relay(broker.port)
    receiver = pair.receive("--url", relay.url, PYTHONPATH=pair.python_path(sitecustomize=HASTE))
    relay.script = receiver.process
    relay.cuts = moments = frame_ends(relay.said[0])[:-1]
    tries = len(moments) + 2
    relay.hang_up()
    assert_subscribed_again(pair, receiver)
    assert len(relay.said) == tries


@pytest.mark.parametrize(
    ("spoil", "mend", "reason"),
    [
        (
            ["change_password", "first", "other"],
            ["change_password", "first", "secret"],
            "ProbableAuthenticationError: ACCESS_REFUSED - ",
        ),
        (
            ["set_permissions", "second", "^logs$", ".*", ".*"],
            ["set_permissions", "second", ".*", ".*", ".*"],
            r"ChannelAccessRefused: ACCESS_REFUSED - .*access to queue 'amq\.gen-\.\.\.' ",
        ),
    ],
    ids=["login", "rights"],
)
def test_a_receiver_that_is_refused_on_return_says_why_once_and_never_gives_up(
    pair: Pair, broker: RabbitMqExecutor, spoil: list[str], mend: list[str], reason: str
) -> None:
    relay = Relay(broker.port)
    user = spoil[1]
    broker.rabbitctl_output("add_user", user, "secret")
    broker.rabbitctl_output("set_permissions", user, ".*", ".*", ".*")
    url = relay.url.replace("://", f"://{user}:secret@")
    receiver = pair.receive("--url", url, PYTHONPATH=pair.python_path(sitecustomize=HASTE))
    broker.rabbitctl_output(*spoil)
    relay.script = receiver.process
    relay.cuts = [sys.maxsize, 1] * 3  # every other try, it is the relay that hangs up
    relay.hang_up()
    eventually(lambda: len(relay.said) > 6)
    broker.rabbitctl_output(*mend)
    assert_subscribed_again(pair, receiver)
    refused, hung_up = reasons(receiver)
    assert re.match(reason, refused)
    assert hung_up == "the server hung up"


def test_a_receiver_whose_queue_is_deleted_comes_back_without_a_pause(
    pair: Pair, broker: RabbitMqExecutor
) -> None:
    # Of all pauses, only the first one ends: the second that begins with the first try.
    path = pair.python_path(
        sitecustomize="import asyncio\n"
        "real = asyncio.sleep\n"
        "times = iter([1])\n"
        "asyncio.sleep = lambda t: real(next(times, 1e6) if t > 0.1 else t)\n"
    )
    receiver = pair.receive(PYTHONPATH=path)
    subscribed = time.monotonic()
    queue = the_only(broker, "name")[0]
    eventually(lambda: time.monotonic() > subscribed + 1)  # there is at most one try a second
    broker.rabbitctl_output("delete_queue", queue)
    assert_subscribed_again(pair, receiver)
    assert reasons(receiver) == []
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
    assert set(receiver.err.splitlines(keepends=True)) == {WAITING, LOST}
    assert the_only(broker, "consumers") == ["1"]  # no other queue is left


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
    assert_subscribed_again(pair, receiver)


def test_the_line_of_a_loss_stands_where_the_gap_is(pair: Pair, broker: RabbitMqExecutor) -> None:
    log = pair.folder / "both.log"
    pair.shell(f"exec receive_logs.py >'{log}' 2>&1")
    eventually(lambda: log.exists() and log.read_text() == WAITING)
    pair.publish(*[b"before"] * 1000)
    broker.rabbitctl_output("close_all_connections", "the broker stops")
    pair.emit_until_routed("after")
    eventually(lambda: log.read_text().endswith(" [x] after\n"))
    before, after = log.read_text().removeprefix(WAITING).split(LOST)
    assert set(before.splitlines()) == {" [x] before"}
    assert after == WAITING + " [x] after\n"


def test_many_losses_in_one_pause_do_not_fill_the_memory(
    pair: Pair, broker: RabbitMqExecutor, stalled: tuple[Script, BinaryIO]
) -> None:
    receiver, out = stalled
    idle = receiver.peak_memory()
    bodies = [b"%03d %s" % (number, b"x" * 2**19) for number in range(110)]
    for _ in range(2):
        pair.emit_until_routed("begin")
        pair.publish(*bodies)
        eventually(lambda: the_only(broker, "messages_unacknowledged") == ["110"])
        broker.rabbitctl_output("close_all_connections", "the broker stops")
    # The messages of one subscription are 55 MiB. With those of two, it does not come back,
    # although there is time for three tries.
    time.sleep(3)
    assert pair.emit("into the gap").err == NOBODY
    assert receiver.peak_memory() < idle + 2.6 * 55
    printed = [out.readline()[5:10] for _ in range(221)]
    begins = [n for n, start in enumerate(printed) if start == b"begin"]
    receiver.waiting(times=3)
    pair.emit("the last one")
    assert out.readline() == b" [x] the last one\n"
    # The first "begin" was acknowledged before the pause, the second one counts among the 110.
    assert begins == [0, 111]
    assert printed[1:111] == [body[:5] for body in bodies]
    assert printed[112:] == [body[:5] for body in bodies[:109]]
    assert receiver.err == (WAITING + LOST) * 2 + WAITING


def test_an_emit_gives_up_on_a_broker_that_blocks_publishers(
    pair: Pair, broker: RabbitMqExecutor, tls: Tls
) -> None:
    unsure = "may or may not have been sent"
    broker.rabbitctl_output("set_vm_memory_high_watermark", "0")
    try:
        arguments = ["small"], ["x" * 100_000] * 15, ["small", "--url", tls.url]
        for emitter in [pair.start(EMIT_LOG, *each) for each in arguments]:
            assert emitter.ended(20) == 1
            assert emitter.out == b""
            [told] = emitter.err.splitlines()
            assert re.search(f"no answer within 10 s.*{unsure}$", told)
    finally:
        broker.rabbitctl_output("set_vm_memory_high_watermark", "0.4")


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
    unsure = "; the message may or may not have been sent"
    for cut, emitter in emitters:
        if emitter.ended() == 0:
            assert emitter.out == b" [x] Sent moment %d.\n" % cut
            assert emitter.err == ""
        else:
            assert emitter.out == b""
            # The sixth frame says that the exchange is declared.
            told = "the server hung up" + unsure * (cut >= ends[5])
            assert re.fullmatch(f"emit_log.py: amqp://localhost:\\d+/: {told}\n", emitter.err)
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
