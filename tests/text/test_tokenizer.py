"""Tokenizer: every kind of tokenizer file, against the library that defines it, and bad input.

The files are made on the spot: from the bundled tokenizer, from a few words, or by training.
"""

from __future__ import annotations

import json
import random
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, pre_tokenizers

from data_files import HELD_OUT
from engine_harness import assert_linear
from fastgen.errors import CheckpointError
from fastgen.frontends.generator import BUNDLED_MODEL
from fastgen.text.tokenizer import Tokenizer
from text_parts import library_of, tokenizer_at
from tokenizer_folders import (
    BUNDLED_JSON,
    EOS,
    TEXTS,
    library,
    reopened,
    streamed,
    write_bert,
    write_json,
    write_sentencepiece,
    write_vocab_and_merges,
)
from waits import WITHIN

BUNDLED = tokenizer_at(BUNDLED_MODEL)
LONGEST = max(map(len, BUNDLED_JSON["model"]["vocab"]))


# Files


def test_vocab_and_merges_are_the_tokenizer_json(tmp_path: Path) -> None:
    write_vocab_and_merges(tmp_path)
    opened = tokenizer_at(tmp_path)
    texts = [*TEXTS, HELD_OUT.read_text("utf-8")[:50_000]]
    assert opened.encode(texts) == BUNDLED.encode(texts)
    eos = BUNDLED_JSON["model"]["vocab"][EOS]
    assert opened.encode([f"{EOS}{EOS}"]) == [[eos, eos]]
    assert opened.decode([eos]) == streamed(opened, [eos]) == ""


def test_chinese_characters_of_bert(tmp_path: Path) -> None:
    write_bert(tmp_path)
    opened = tokenizer_at(tmp_path)
    vocab = (tmp_path / "vocab.txt").read_text("utf-8").split()
    [ids] = opened.encode(["你好龘Hellos"])
    assert [vocab[i] for i in ids] == ["你", "好", "[UNK]", "hello", "##s"]
    assert opened.decode(ids) == streamed(opened, ids) == "你 好 hellos"
    assert opened.token_text(vocab.index("[UNK]")) == "[UNK]"


def test_sentencepiece_words_come_back(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path)
    opened = tokenizer_at(tmp_path)
    [ids] = opened.encode(["In the beginning was the word"])
    assert len(ids) > 6
    assert opened.decode(ids) == streamed(opened, ids) == "In the beginning was the word"


@pytest.mark.parametrize("files", [[], ["tokenizer_config.json"], ["config.json"]])
def test_no_tokenizer_in_the_folder(files: list[str], tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).write_text("{}")
    assert Tokenizer.from_folder(tmp_path) is None


HOSTILE_MODEL = BUNDLED_JSON["model"] | {"continuing_subword_prefix": "much longer than a merge"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", ""),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", '{"model": {"type": "none"}}'),
        ("tokenizer.json", json.dumps(BUNDLED_JSON | {"model": HOSTILE_MODEL})),
        ("spiece.model", "no model"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", "{"),
        ("vocab.json", '{"a": "b"}'),
        ("merges.txt", "no such"),
        ("merges.txt", "one"),
    ],
)
def test_unusable_files_are_named(name: str, content: str, tmp_path: Path) -> None:
    if name in ("tokenizer_config.json", "vocab.json", "merges.txt"):
        write_vocab_and_merges(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=r"vocab\.json" if name == "merges.txt" else name):
        Tokenizer.from_folder(tmp_path)


def test_files_elsewhere_are_not_opened(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "vocab.txt", "spiece.model"):
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        (folder / name).symlink_to(BUNDLED_MODEL / "tokenizer.json")
        with pytest.raises(CheckpointError, match="leads out of the folder"):
            Tokenizer.from_folder(folder)


def test_without_transformers_the_way_to_get_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sentencepiece(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(CheckpointError, match=r"T5Tokenizer.*pip install 'fastgen\[hf\]'"):
        Tokenizer.from_folder(tmp_path)


def test_stored_truncation_and_padding_have_no_effect(tmp_path: Path) -> None:
    stored = library()
    stored.enable_truncation(3)
    stored.enable_padding(length=50, pad_token=EOS)
    opened = reopened(tmp_path, stored)
    assert '"truncation": {' in (tmp_path / "tokenizer.json").read_text("utf-8")
    assert opened.encode(TEXTS) == BUNDLED.encode(TEXTS)


@pytest.mark.parametrize("content", ["<note>", "中", "a b", "é", "Ġx", "ab\u0301"])
def test_added_tokens_stream_as_they_decode(content: str, tmp_path: Path) -> None:
    with_added = library()
    with_added.add_tokens([AddedToken(content, special=False)])
    opened = reopened(tmp_path, with_added)
    [ids] = opened.encode([f"so {content} is {content}{content}"])
    assert streamed(opened, ids) == opened.decode(ids) == with_added.decode(ids)


def test_cleaning_up_spaces_does_not_part_stream_and_decode(tmp_path: Path) -> None:
    """transformers would clean the whole text, which takes back what a stream has shown."""
    for kind in ("BertTokenizer", "BertJapaneseTokenizer"):
        settings = {"word_tokenizer_type": "basic", "clean_up_tokenization_spaces": True}
        write_bert(tmp_path, kind, **settings)
        opened = tokenizer_at(tmp_path)
        [ids] = opened.encode(["don't a 's b, a ."])
        assert streamed(opened, ids) == opened.decode(ids)


# Texts


@given(st.lists(st.text().filter(lambda text: "<|endoftext|>" not in text), max_size=4))
@settings(deadline=None)
def test_every_text_comes_back(texts: list[str]) -> None:
    encoded = BUNDLED.encode(texts)
    assert [BUNDLED.decode(ids) for ids in encoded] == texts
    assert encoded == [ids for text in texts for ids in BUNDLED.encode([text])]
    for text, ids in zip(texts, encoded, strict=True):
        assert BUNDLED.encode([text], len(ids)) == [ids]  # what fits is never refused


@pytest.mark.parametrize("text", [b"ab", None, 1, ["ab"], bytearray(b"ab")])
def test_only_strings_are_encoded(text: Any) -> None:
    with pytest.raises(TypeError, match=f"must be a string, not {type(text).__name__}"):
        BUNDLED.encode(["fine", text])


@pytest.mark.parametrize("text", ["\ud800", "ab\udfffc", "\ude00\ud83d"])
def test_lone_surrogates_are_refused(text: str) -> None:
    at = next(i for i, character in enumerate(text) if "\ud800" <= character <= "\udfff")
    with pytest.raises(ValueError, match=f"lone surrogate at character {at}"):
        BUNDLED.encode(["fine", text])


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The texts that reach the tokenizer library."""
    calls: list[list[str]] = []
    encode: Callable[..., list[list[int]]] = library_of(BUNDLED).encode

    def count(texts: list[str], **options: bool) -> list[list[int]]:
        calls.append(texts)
        return encode(texts, **options)

    monkeypatch.setattr(library_of(BUNDLED), "encode", count)
    return calls


def test_what_cannot_fit_is_refused_before_any_work(encoded: list[list[str]]) -> None:
    size = 10 * LONGEST + 1
    with pytest.raises(ValueError, match=rf"{size} characters.* 10 tokens.* {LONGEST} characters"):
        BUNDLED.encode(["short", "a" * size], 10)
    with pytest.raises(ValueError, match="10000000 characters"):
        BUNDLED.encode(["a" * 10_000_000], 1024)
    assert encoded == []


def test_what_might_fit_is_encoded(encoded: list[list[str]]) -> None:
    text = max(BUNDLED_JSON["model"]["vocab"], key=len).replace("Ġ", " ") * 10
    assert len(text) == 10 * LONGEST
    assert len(BUNDLED.encode([text], 10)[0]) == 10
    assert len(BUNDLED.encode(["a" * 10 * LONGEST], 10)[0]) > 10  # only the count can tell
    assert len(encoded) == 2


def swallows_spaces(tokenizer: tokenizers.Tokenizer) -> None:
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True)])


def splits_at_spaces(tokenizer: tokenizers.Tokenizer) -> None:
    steps = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel()]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)


@pytest.mark.parametrize("change", [swallows_spaces, splits_at_spaces])
def test_a_text_that_shrinks_is_not_refused(
    change: Callable[[tokenizers.Tokenizer], None], tmp_path: Path
) -> None:
    shrinking = library()
    change(shrinking)
    assert len(reopened(tmp_path, shrinking).encode([" " * 1000 + "<mask>"], 10)[0]) <= 10


def test_a_text_of_unknown_characters_is_not_refused(tmp_path: Path) -> None:
    write_json(tmp_path, "vocab.json", {EOS: 0, "a": 1, "b": 2, "ab": 3})
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    assert tokenizer_at(tmp_path).encode(["z" * 1000 + "ab"], 10) == [[3]]


@pytest.mark.parametrize("unit", ["a", " ", "\n", "你", "e\u0301", "9", "'"])
def test_a_megabyte_of_one_character(unit: str) -> None:
    def there_and_back(size: int) -> None:
        text = unit * (size // len(unit.encode()))
        [ids] = BUNDLED.encode([text])
        assert BUNDLED.decode(ids) == text

    assert_linear(there_and_back, 2**20)


def test_other_threads_run_while_a_text_is_encoded() -> None:
    """A thread is never asked here to give way, so another one runs only if the GIL is let go."""
    rng = random.Random(3)
    text = " ".join("".join(rng.choices("abcdefghij你é", k=7)) for _ in range(130_000))
    ticks, begun, done = 0, threading.Event(), threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not done.is_set():
            ticks += 1
            begun.set()
            time.sleep(0.0005)

    other, interval = threading.Thread(target=tick, daemon=True), sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        other.start()
        assert begun.wait(WITHIN)
        before = ticks
        BUNDLED.encode([text])
        meanwhile = ticks - before
    finally:
        sys.setswitchinterval(interval)
        done.set()
        other.join()
    assert meanwhile > 5, "not only for a moment"
