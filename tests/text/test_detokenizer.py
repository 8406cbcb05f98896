"""TextSink: text out of a stream of ids, in whole characters, and stop strings wherever they lie.

Tokens are cut in every way, through characters too; each result is compared with a plain
computation on the whole text.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from fastgen.frontends.generator import BUNDLED_MODEL
from fastgen.text.detokenizer import TextSink, WindowDecoder
from text_parts import tokenizer_at
from text_sinks import MANY_BYTES, pieces_of, sink_of_bytes

REPLACEMENT = "\ufffd"
BUNDLED = tokenizer_at(BUNDLED_MODEL)
LIBRARY = tokenizers.Tokenizer.from_file(str(BUNDLED_MODEL / "tokenizer.json"))
VOCAB_SIZE = LIBRARY.get_vocab_size()
EOS = 0
# Pieces of bytes that fit together in many ways: whole and partial characters, and stray bytes.
BYTES = [*map(str.encode, ("a", "ab", "é", "你", "🏽")), b"\xe4", b"\xbd\xa0", b"\xf0\x9f", b"\xff"]

random_ids = st.lists(st.integers(0, VOCAB_SIZE + 9), max_size=40)


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

    def decode_all(self, token_ids: Sequence[int]) -> str:
        self.lengths.append(len(token_ids))
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=False))


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
