"""Hostile bytes: whatever a message holds, it becomes harmless lines in bounded memory."""

import itertools
import os
from unicodedata import bidirectional, category

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripts import Pair, eventually

TURNS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
# Each body, and the text that shows it.
LINES = [
    (b"", ""),
    (b"one newline at the end\n", "one newline at the end"),
    (b"two\n\n", "two\n     "),
    (b"Traceback:\n\tin f\n [x] forged", "Traceback:\n     \tin f\n      [x] forged"),
    (b"System.Exception\r\n   at Main()\r\n", "System.Exception\n        at Main()"),
    (b"progress\rdone\n\r", "progress\n     done\n     "),
    (b"\x1b[2J\x1b]0;title\x07\x00\x7f", r"\x1b[2J\x1b]0;title\x07\x00\x7f"),
    (b"\xff\xfe\xc3 \\udcff 'single' \"double\"", r"\xff\xfe\xc3 \udcff 'single' " + '"double"'),
    ("UTF-16".encode("utf-16-le"), r"U\x00T\x00F\x00-\x001\x006\x00"),
    (
        "\u202eturned \u200earound\u2066 \u2028\x85".encode(),
        r"\u202eturned \u200earound\u2066 \u2028\x85",
    ),
]
# Text is shown as it is, with what some letters need: spaces, joiners, and format characters that
# are invisible, but turn nothing around (those of Thai text and of flags, for example).
AS_IT_IS = [
    "caf\u00e9 \u65e5\u672c \U0001f600 20\u202f%\u00a0\u3000 \u0645\u06cc\u200c\u062e",
    "\U0001f469\u200d\U0001f52c newer than Python's tables: \U0001fa77, private: \ue0b0",
    "\u200b\u2060\u2064\u206a\u206f\ufeff \U0001f3f4\U000e0067\U000e0062\U000e007f",
    "8 MiB " * (2**23 // 6),
]


def test_a_body_becomes_harmless_lines(pair: Pair) -> None:
    receiver = pair.receive(PYTHONIOENCODING="utf-8")
    lines = [*LINES, *[(text.encode(), text) for text in AS_IT_IS]]
    pair.publish(*[body for body, _ in lines])
    receiver.assert_prints("".join(f" [x] {line}\n" for _, line in lines).encode())


def test_what_stdout_cannot_encode_is_escaped(pair: Pair) -> None:
    receiver = pair.receive(PYTHONIOENCODING="cp437")
    emitter = pair.emit("10 \u20ac", b"\xff", "\x1b\n", PYTHONIOENCODING="cp437")
    assert emitter.ended() == 0
    assert emitter.out == rb" [x] Sent 10 \u20ac \xff \x1b\n" + b"\n"
    receiver.assert_prints(rb" [x] 10 \u20ac \xff \x1b" + b"\n")


@pytest.mark.parametrize("piece", [b"\xff", b"ab\n"], ids=str)
def test_one_message_cannot_fill_the_memory(pair: Pair, piece: bytes) -> None:
    receiver = pair.receive()
    pair.publish(piece * (2**24 // len(piece)), b"after it")

    def last_line() -> bytes:
        with receiver.out_path.open("rb") as out:
            out.seek(max(0, out.seek(0, os.SEEK_END) - 14))
            return out.read()

    eventually(lambda: last_line() == b" [x] after it\n")
    assert receiver.peak_memory() < 600


def test_random_bytes_are_printed_once_in_order_and_harmless(pair: Pair) -> None:
    receiver = pair.receive(PYTHONIOENCODING="utf-8")
    counted = itertools.count()
    seen = 0

    nasty = st.text(st.characters(codec="utf-8")).map(str.encode)

    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.binary() | nasty, min_size=20))
    def each_is_printed_once_in_order_and_harmless(bodies: list[bytes]) -> None:
        nonlocal seen
        numbered = [b"%d:%s" % (next(counted), body) for body in bodies]
        last = b"%d:" % next(counted)
        pair.publish(*numbered, last)
        eventually(lambda: receiver.out.endswith(b" [x] %s\n" % last))
        text = receiver.out[seen:].decode()
        lines = text.removesuffix("\n").split("\n")
        seen = len(receiver.out)

        assert not [c for c in set(text) - {"\t", "\n"} if category(c) in {"Cc", "Cs", "Zl", "Zp"}]
        assert not [c for c in set(text) if bidirectional(c) in TURNS or c in "\u061c\u200e\u200f"]
        for body in [*numbered, last]:
            number = body.partition(b":")[0].decode()
            assert lines.pop(0).startswith(f" [x] {number}:")
            for _ in body.splitlines()[1:]:
                assert lines.pop(0).startswith("     ")
        assert lines == []

    each_is_printed_once_in_order_and_harmless()
    assert next(counted) > 800
    assert receiver.process.poll() is None
