"""Hostile bytes: whatever a message holds, it becomes harmless lines in bounded memory."""

import itertools
from unicodedata import category

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripts import Pair, eventually

MANY_SPACES = "20\u202f%\u00a0\u3000 \u0645\u06cc\u200c\u062e \U0001f469\u200d\U0001f52c".encode()
LETTERS = "caf\u00e9 \U0001f600 \u65e5\u672c".encode()
INVISIBLE = "\u202e\u200b\u2028\x85\U000e0041".encode()


@pytest.mark.parametrize(
    ("body", "line"),
    [
        (b"", b" [x] \n"),
        (b"one newline at the end\n", b" [x] one newline at the end\n"),
        (b"two\n\n", b" [x] two\n     \n"),
        (b"Traceback:\n\tin f\n [x] forged", b" [x] Traceback:\n     \tin f\n      [x] forged\n"),
        (b"\x1b[2J\x1b]0;title\x07\r\x00\x7f", rb" [x] \x1b[2J\x1b]0;title\x07\r\x00\x7f" + b"\n"),
        (b"\xff\xfe\xc3", rb" [x] \xff\xfe\xc3" + b"\n"),
        (INVISIBLE, rb" [x] \u202e\u200b\u2028\x85\U000e0041" + b"\n"),
        (LETTERS, b" [x] " + LETTERS + b"\n"),
        (MANY_SPACES, b" [x] " + MANY_SPACES + b"\n"),
        (b"8 MiB " * (2**23 // 6), b" [x] " + b"8 MiB " * (2**23 // 6) + b"\n"),
    ],
    ids=lambda value: str(value[:20]),
)
def test_a_body_becomes_harmless_lines(pair: Pair, body: bytes, line: bytes) -> None:
    receiver = pair.receive(PYTHONIOENCODING="utf-8")
    pair.publish(body)
    receiver.assert_prints(line)


@pytest.mark.parametrize(
    ("words", "echo"),
    [
        ("\x1b[2J\r", rb"\x1b[2J\r"),
        ("ok\n [x] Sent fine", rb"ok\n [x] Sent fine"),
        (MANY_SPACES, MANY_SPACES),
    ],
    ids=["control", "newline", "spaces"],
)
def test_the_echo_of_the_emitter_is_one_harmless_line(
    pair: Pair, words: str | bytes, echo: bytes
) -> None:
    assert pair.emit(words, PYTHONIOENCODING="utf-8").out == b" [x] Sent " + echo + b"\n"


@pytest.mark.parametrize("encoding", ["ascii", "cp437"])
def test_what_stdout_cannot_encode_is_escaped(pair: Pair, encoding: str) -> None:
    receiver = pair.receive(PYTHONIOENCODING=encoding)
    emitter = pair.emit("10 \u20ac", b"\xff", PYTHONIOENCODING=encoding)
    assert emitter.ended() == 0
    assert emitter.out == b" [x] Sent 10 \\u20ac \\xff\n"
    receiver.assert_prints(b" [x] 10 \\u20ac \\xff\n")


@pytest.mark.parametrize("byte", [b"\0", b"\xff", b"\n", b"\xe2\x80\xae"])
def test_one_message_cannot_fill_the_memory(pair: Pair, byte: bytes) -> None:
    receiver = pair.receive()
    idle = receiver.peak_memory()
    pair.publish(byte * (2**24 // len(byte)), b"after it")
    eventually(lambda: receiver.out[-15:].endswith(b" [x] after it\n"))
    assert receiver.peak_memory() < idle + 5 * 16


def test_random_bytes_are_printed_once_in_order_and_harmless(pair: Pair) -> None:
    receiver = pair.receive(PYTHONIOENCODING="utf-8")
    counted = itertools.count()
    seen = 0

    nasty = st.text(st.characters(codec="utf-8")).map(str.encode)

    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.binary() | nasty, min_size=20))
    def each_is_printed_once_in_order_and_harmless(bodies: list[bytes]) -> None:
        nonlocal seen
        numbered = [b"%d:%s" % (next(counted), body) for body in bodies]
        last = b"%d:" % next(counted)
        pair.publish(*numbered, last)
        eventually(lambda: receiver.out.endswith(b" [x] %s\n" % last))
        lines = receiver.out[seen:].decode().removesuffix("\n").split("\n")
        seen = len(receiver.out)

        shown = {c for line in lines for c in line if not c.isprintable()}
        assert shown - {"\t", "\u200c", "\u200d"} == {c for c in shown if category(c) == "Zs"}
        for body in [*numbered, last]:
            number = body.partition(b":")[0].decode()
            assert lines.pop(0).startswith(f" [x] {number}:")
            for _ in range(body.removesuffix(b"\n").count(b"\n")):
                assert lines.pop(0).startswith("     ")
        assert lines == []

    each_is_printed_once_in_order_and_harmless()
    assert next(counted) > 2000
    assert receiver.process.poll() is None
