"""Stop strings: found wherever tokens cut them, and shown no earlier than it is certain."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_harness import assert_linear
from fastgen.frontends.generator import BUNDLED_MODEL
from fastgen.text.detokenizer import ByteLevelDecoder, StopMatcher, TextSink
from text_parts import tokenizer_at
from text_sinks import MANY_BYTES, cut, pieces_of, sink_of_bytes

BUNDLED = tokenizer_at(BUNDLED_MODEL)
stop_sets = st.lists(st.text("ab你", min_size=1, max_size=4), min_size=1, max_size=4, unique=True)


def first_stop(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """The end of the stop string that ends first, and the string: the longest of those."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return end, max(found, key=len)
    return None


def naive(text: str, stops: Sequence[str], include_stop: bool) -> tuple[str, str | None]:
    """What a row may show of `text`, and why it stops there."""
    match = first_stop(text, stops)
    if match is None:
        return text, None
    end, stop = match
    return text[: end if include_stop else end - len(stop)], stop


def may_begin_stop(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins a stop string."""
    ends = [n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n])]
    return max(ends, default=0)


@pytest.mark.parametrize(
    ("stops", "text", "before", "reason"),
    [
        (["aab"], "aaab!", "a", "aab"),
        (["abab"], "abaabab!", "aba", "abab"),
        (["ab", "abc"], "xabc", "x", "ab"),
        (["abc", "ab"], "xabc", "x", "ab"),
        (["b", "ab", "cab"], "xcab!", "x", "cab"),
        (["abcd", "c"], "abce", "ab", "c"),
        (["bcd", "abc"], "abcd", "", "abc"),
        (["\n\n"], "a\nb\n\nc", "a\nb", "\n\n"),
        (["aaa"], "aa", "aa", None),
        (["世界"], "你好世，世界！", "你好世，", "世界"),
        (["👩‍👧"], "👩‍👩‍👧‍👦 👩‍👧!", "👩‍", "👩‍👧"),
        (["\u0301"], "ae\u0301", "ae", "\u0301"),
        (["乐"], "么丐乑乐", "么丐乑", "乐"),  # the others share bytes with it
        (["a" * 50 + "b"], "a" * 80 + "b!", "a" * 30, "a" * 50 + "b"),
    ],
)
@pytest.mark.parametrize("include_stop", [False, True])
def test_stop_strings(
    stops: list[str], text: str, before: str, reason: str | None, include_stop: bool
) -> None:
    expected = before + (reason or "") if include_stop else before
    data = text.encode()
    rng = random.Random(text)
    cuts = [range(1, len(data)), [], [1], [len(data) - 1]]
    cuts += [rng.sample(range(len(data)), rng.randrange(len(data))) for _ in range(20)]
    for ends in cuts:
        tokens = cut(data, ends)
        sink = sink_of_bytes(tokens, stops, include_stop)
        pieces = pieces_of(sink, range(len(tokens)))
        assert ("".join(pieces), sink.text, sink.stop_reason) == (expected, expected, reason)


@given(
    text=st.text("ab你👧", max_size=24),
    stops=stop_sets,
    include_stop=st.booleans(),
    ends=st.lists(st.integers(0, 40), max_size=40),
    takes=st.randoms(use_true_random=False),
)
def test_stops_as_the_whole_text_has_them(
    text: str, stops: list[str], include_stop: bool, ends: list[int], takes: random.Random
) -> None:
    data = text.encode()
    tokens = cut(data, [end for end in ends if end <= len(data)])
    expected, reason = naive(text, stops, include_stop)
    sink = sink_of_bytes(tokens, stops, include_stop)
    taken = ""
    for index in range(len(tokens)):
        ended = sink.push(index)
        taken += sink.take() if takes.random() < 0.5 else ""
        assert expected.startswith(taken)
        if ended:
            break
    assert ended == (reason is not None)
    sink.finish()
    assert (taken + sink.take(), sink.text, sink.stop_reason) == (expected, expected, reason)


@given(text=st.text("ab", max_size=24), stops=stop_sets)
def test_no_more_is_held_back_than_may_begin_a_stop(text: str, stops: list[str]) -> None:
    sink = sink_of_bytes([character.encode() for character in text], stops)
    for index in range(len(text)):
        if sink.push(index):
            return
        so_far = text[: index + 1]
        assert sink.text == so_far[: len(so_far) - may_begin_stop(so_far, stops)]
    sink.finish()
    assert sink.text == text


def test_a_stop_lies_in_several_tokens_of_one_character_each() -> None:
    for text in MANY_BYTES:
        [ids] = BUNDLED.encode([text + text])
        for start in range(len(text) - 1):
            stop = text[start : start + 3]
            expected, reason = naive(text + text, [stop], False)
            pieces = pieces_of(sink := BUNDLED.sink([stop]), ids)
            assert ("".join(pieces), sink.stop_reason) == (expected, reason)


def test_a_reader_on_another_thread_gets_every_piece_once() -> None:
    rng = random.Random(5)
    tokens = [rng.choice(["a", "b", "你", "ab"]).encode() for _ in range(30_000)]
    sink = sink_of_bytes(tokens, ["abababab!"])
    done, taken = threading.Event(), list[str]()

    def read() -> None:
        while not done.is_set():
            taken.append(sink.take())

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        assert not any(sink.push(index) for index in range(len(tokens)))
        sink.finish()
    finally:
        done.set()
        reader.join()
    assert "".join(taken) + sink.take() == b"".join(tokens).decode()


class CountedStop(str):
    """A stop string that counts how often a character of it is looked at."""

    looks = 0

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        CountedStop.looks += 1
        return super().__getitem__(index)


@pytest.mark.parametrize("unit", ["a", "ab", "aab"])
def test_steps_of_a_stop_string_are_linear(unit: str) -> None:
    stop = CountedStop(unit * 2000 + "c")
    text = unit * 1999 + unit[:-1] + unit * 3000
    CountedStop.looks = 0
    assert StopMatcher([stop]).feed(text) is None
    assert CountedStop.looks <= 5 * (len(stop) + len(text))


def test_a_megabyte_of_stop_string() -> None:
    """Held back a character at a time to the last but one, then released."""

    def push(size: int) -> None:
        decoder = ByteLevelDecoder(lambda token_id: b"ab"[token_id : token_id + 1])
        sink = TextSink(decoder, ["a" * size])
        for _ in range(size - 1):
            sink.push(0)
        assert sink.text == ""
        sink.push(1)
        assert sink.text == "a" * (size - 1) + "b"

    assert_linear(push, 2**20)
