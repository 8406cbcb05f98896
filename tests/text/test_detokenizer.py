"""TextSink: text out of a stream of ids, in whole characters, and stop strings wherever they lie.

Tokens are cut in every way, through characters too; each result is compared with a plain
computation on the whole text.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from itertools import pairwise

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from engine_harness import assert_linear
from fastgen.frontends.generator import BUNDLED_MODEL
from fastgen.text.detokenizer import ByteLevelDecoder, StopMatcher, TextSink, WindowDecoder
from text_parts import tokenizer_at

REPLACEMENT = "\ufffd"
BUNDLED = tokenizer_at(BUNDLED_MODEL)
LIBRARY = tokenizers.Tokenizer.from_file(str(BUNDLED_MODEL / "tokenizer.json"))
VOCAB_SIZE = LIBRARY.get_vocab_size()
EOS = 0
MANY_BYTES = [
    "你好，世界！",
    "👩‍👩‍👧‍👦 and 🏳️‍🌈, 👋🏽",
    "e\u0301 o\u0308\u0304 A\u030a \u0928\u093f \u1112\u1161\u11ab",
    "naïve Ωμέγα привет שלום مرحبا ไทย 𝔘𝔫𝔦",
]
# Pieces of bytes that fit together in many ways: whole and partial characters, and stray bytes.
BYTES = [*map(str.encode, ("a", "ab", "é", "你", "🏽")), b"\xe4", b"\xbd\xa0", b"\xf0\x9f", b"\xff"]

random_ids = st.lists(st.integers(0, VOCAB_SIZE + 9), max_size=40)
stop_sets = st.lists(st.text("ab你", min_size=1, max_size=4), min_size=1, max_size=4, unique=True)


def pieces_of(sink: TextSink, ids: Sequence[int]) -> list[str]:
    """What a reader that takes after every token gets."""
    pieces = []
    for token_id in ids:
        ended = sink.push(token_id)
        pieces.append(sink.take())
        if ended:
            break
    sink.finish()
    return [*pieces, sink.take()]


def sink_of_bytes(
    tokens: Sequence[bytes], stops: Sequence[str] = (), include_stop: bool = False
) -> TextSink:
    """A sink whose token i stands for `tokens[i]`."""
    return TextSink(ByteLevelDecoder(tokens.__getitem__), stops, include_stop=include_stop)


def cut(data: bytes, ends: Sequence[int]) -> list[bytes]:
    """`data` in pieces that end at `ends`."""
    edges = [0, *sorted(ends), len(data)]
    return [data[start:end] for start, end in pairwise(edges)]


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


# Whole characters


@pytest.mark.parametrize("text", MANY_BYTES)
def test_pieces_hold_whole_characters(text: str) -> None:
    [ids] = BUNDLED.encode([text])
    assert any(REPLACEMENT in LIBRARY.decode([token_id]) for token_id in ids)
    pieces = pieces_of(BUNDLED.sink(), ids)
    assert "".join(pieces) == text == BUNDLED.decode(ids)
    assert not any(REPLACEMENT in piece for piece in pieces)
    assert sum(map(bool, pieces)) > len(text) // 4  # it does stream


@pytest.mark.parametrize("text", ["\ufffd", "a\ufffd你\ufffd", "\0", "\r\n\u2028"])
def test_characters_like_any_other(text: str) -> None:
    [ids] = BUNDLED.encode([text])
    assert "".join(pieces_of(BUNDLED.sink(), ids)) == text


@given(st.text().filter(lambda text: "<|endoftext|>" not in text))  # which is left out
@settings(deadline=None)
def test_any_text_streams_as_it_was(text: str) -> None:
    [ids] = BUNDLED.encode([text])
    so_far = ""
    for piece in pieces_of(BUNDLED.sink(), ids):
        so_far += piece
        assert text.startswith(so_far)
    assert so_far == text


@given(random_ids)
@settings(deadline=None)
def test_any_ids_stream_as_the_library_decodes_them(ids: list[int]) -> None:
    text = LIBRARY.decode(ids, skip_special_tokens=True)
    assert "".join(pieces_of(BUNDLED.sink(), ids)) == text == BUNDLED.decode(ids)


@given(st.lists(st.sampled_from(BYTES) | st.binary(max_size=3), max_size=12))
def test_invalid_bytes_are_replaced_as_python_does(tokens: list[bytes]) -> None:
    sink = sink_of_bytes(tokens)
    data, shown = b"", ""
    for index, token in enumerate(tokens):
        data += token
        sink.push(index)
        shown += sink.take()
        assert data.decode("utf-8", "replace").startswith(shown)
        assert len(data.decode("utf-8", "replace")) - len(shown) <= 3  # an unfinished character
    sink.finish()
    assert sink.text == data.decode("utf-8", "replace")


def test_special_and_unknown_ids_give_no_text() -> None:
    rng = random.Random(1)
    for text in MANY_BYTES:
        [ids] = BUNDLED.encode([text])
        mixed = [j for i in ids for j in (*rng.choices([EOS, VOCAB_SIZE, 2**31 - 1], k=2), i, EOS)]
        assert "".join(pieces_of(BUNDLED.sink(), mixed)) == text
    assert "".join(pieces_of(BUNDLED.sink(), [EOS, VOCAB_SIZE, 99_999])) == ""


# Tokenizers without bytes: WindowDecoder


class Counted:
    """A tokenizers.Tokenizer that notes how many ids it was given to decode, each time."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.lengths: list[int] = []

    def decode(self, token_ids: Sequence[int]) -> str:
        self.lengths.append(len(token_ids))
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))


def with_decoder(vocab: Sequence[str], decoder: decoders.Decoder) -> tokenizers.Tokenizer:
    """Id i is vocab[i]; <s>, the last one, is special."""
    tokens = [*vocab, "<s>"]
    ids = {token: index for index, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(ids, unk_token="<s>"))
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


def byte_token(byte: int) -> str:
    return f"<0x{byte:02X}>"


def byte_fallback() -> tokenizers.Tokenizer:
    """As Llama's: words, and byte tokens for what no word covers. Id b is byte b."""
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    vocab = [*map(byte_token, range(256)), "▁a", "b", "▁", "你"]
    return with_decoder(vocab, decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)]))


WORDS = ["ab", "##c", "你", "好", ",", ".", "n't", "'", "s", "##你", "▁a", "▁", "b", REPLACEMENT]
BY_WORDS = {
    "wordpiece": with_decoder(WORDS, decoders.WordPiece()),
    "metaspace": with_decoder(WORDS, decoders.Metaspace()),
    "bpe": with_decoder(WORDS, decoders.BPEDecoder("b")),
}


@pytest.mark.parametrize("name", BY_WORDS)
@given(ids=st.lists(st.integers(0, len(WORDS) + 2), max_size=20))
@settings(deadline=None)
def test_words_stream_as_the_library_decodes_them(name: str, ids: list[int]) -> None:
    decoding = Counted(BY_WORDS[name])
    assert "".join(pieces_of(TextSink(WindowDecoder(decoding)), ids)) == decoding.decode(ids)


@given(st.lists(st.sampled_from(["a", "b", " ", "你", "é", "👩‍👧", "e\u0301"]), max_size=30))
@settings(deadline=None)
def test_byte_fallback_streams_whole_characters(characters: list[str]) -> None:
    ids = [byte for character in characters for byte in character.encode()]
    decoding = Counted(byte_fallback())
    pieces = pieces_of(TextSink(WindowDecoder(decoding)), ids)
    assert "".join(pieces) == decoding.decode(ids)
    assert not any(REPLACEMENT in piece for piece in pieces)


def test_tokens_that_straddle_characters_one_after_another() -> None:
    """Every token ends one character and begins the next, so no token's end is a character's."""
    [first, second, third] = LIBRARY.encode("你").tokens
    vocab = [first + second, third + first + second, third]
    decoding = Counted(with_decoder(vocab, decoders.Sequence([decoders.ByteLevel()])))
    ids = [0, *[1] * 50, 2]
    pieces = pieces_of(TextSink(WindowDecoder(decoding)), ids)
    assert decoding.decode(ids) == "你" * 51
    assert "".join(pieces) == "你" * 51
    assert max(decoding.lengths[:-1]) <= 64


@pytest.mark.parametrize(
    "ids",
    [
        [256, 257, 258, 259] * 1250,
        list("你好，世界！👩‍👧".encode()) * 170,
        [256, *[260] * 5000],  # special
        [256, *[9999] * 5000],  # unknown
        [0xFF] * 5000,
        [0xE4, 0xBD] * 2500,
        [256, *[0xF0] * 20, *[260] * 20] * 120,
    ],
    ids=["words", "bytes", "special", "unknown", "invalid", "cut", "mixed"],
)
def test_cost_of_a_token_does_not_grow_with_the_row(ids: list[int]) -> None:
    decoding = Counted(byte_fallback())
    decoder = WindowDecoder(decoding)
    for token_id in ids:
        decoder.push(token_id)
    decoder.finish()
    assert len(decoding.lengths) <= 2 * (len(ids) + 1)
    assert max(decoding.lengths) <= 32


def test_a_special_run_does_not_lose_the_space_after_it() -> None:
    decoding = Counted(BY_WORDS["metaspace"])
    ids = [WORDS.index("▁a"), *[len(WORDS)] * 100, WORDS.index("▁a")]
    assert "".join(pieces_of(TextSink(WindowDecoder(decoding)), ids)) == "a a"


# Stop strings


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

    reader = threading.Thread(target=read)
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
