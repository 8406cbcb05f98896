"""Tokenizer files that are broken, or that break the library that reads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastgen.errors import CheckpointError, EngineError
from tiny_checkpoints import (
    TOKENIZER,
    assert_loads,
    assert_names,
    assert_refused,
    cases,
    load,
    refusals,
    write_checkpoint,
    write_json,
    write_vocabulary,
)


def bpe(**changes: Any) -> dict[str, Any]:
    """The usual tokenizer.json, with `changes` to its model."""
    return {**TOKENIZER, "model": {**TOKENIZER["model"], **changes}}


def added(**changes: Any) -> dict[str, Any]:
    """The usual tokenizer.json, with `changes` to a token that is added to it."""
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    token = {"id": 3, "content": "<x>", "special": True, **dict.fromkeys(flags, False)}
    return {**TOKENIZER, "added_tokens": [{**token, **changes}]}


REGEX = {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}
# Content of tokenizer.json -> what the message says of it.
TOKENIZERS: dict[str, tuple[Any, str]] = {
    "empty": (b"", "is not valid JSON"),
    "cut": (json.dumps(TOKENIZER).encode()[:-1], "is not valid JSON"),
    "not JSON": (b"a b", "is not valid JSON"),
    "not UTF-8": (b'{"version": "\xff"}', "is not valid JSON"),
    "deep": (b'{"model":' * 10**5, "is nested too deeply"),
    "array": ([], "invalid type: sequence"),
    "null": (None, "invalid type: null"),
    "empty object": ({}, "Model missing"),
    "null model": ({**TOKENIZER, "model": None}, "data did not match any variant"),
    "list model": ({**TOKENIZER, "model": []}, "data did not match any variant"),
    "unknown model": (bpe(type="Evil"), "data did not match any variant"),
    "unknown version": ({**TOKENIZER, "version": "9"}, "Unknown tokenizer version '9'"),
    "list vocabulary": (bpe(vocab=["a", "b", "ab"]), "invalid type: sequence"),
    "string id": (bpe(vocab={"a": "0"}), 'invalid type: string "0"'),
    "negative id": (bpe(vocab={"a": -1}), "invalid value: integer `-1`"),
    "fractional id": (bpe(vocab={"a": 0.5}), "floating point `0.5`"),
    "id 2^32": (bpe(vocab={"a": 2**32}), "integer `4294967296`"),
    "merge of an unknown token": (bpe(merges=["a zz"]), "Token `zz` out of vocabulary"),
    "merge to an unknown token": (bpe(merges=["b a"]), "Token `ba` out of vocabulary"),
    "merge of one": (bpe(merges=["ab"]), "Merges text file invalid at line 1"),
    "merge of three": (bpe(merges=["a b ab"]), "Merges text file invalid at line 1"),
    "merge number": (bpe(merges=[5]), "MergeType"),
    "dropout above 1": (bpe(dropout=5), "Dropout should be between 0 and 1"),
    "bad regex": ({**TOKENIZER, "pre_tokenizer": REGEX}, "unmatched parenthesis"),
    "unknown decoder": ({**TOKENIZER, "decoder": {"type": "Evil"}}, "data did not match"),
    "added token with id -1": (added(id=-1), "invalid value: integer `-1`"),
    "added token without text": (added(content=None), "invalid type: null"),
    "empty unigram": (
        {**TOKENIZER, "model": {"type": "Unigram", "unk_id": 0, "vocab": []}},
        "EmptyVocabulary",
    ),
    "unigram without its unknown": (
        {**TOKENIZER, "model": {"type": "Unigram", "unk_id": 9, "vocab": [["a", -1.0]]}},
        "UnkIdNotInVocabulary",
    ),
    "model twice": (
        f'{{"model": null, {json.dumps(TOKENIZER)[1:]}'.encode(),
        "key 'model' stands twice",
    ),
    # These make the tokenizers library panic, which is no ordinary exception in Python.
    "broken charsmap": (
        {**TOKENIZER, "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        "Cannot parse precompiled_charsmap",
    ),
    "prefix longer than a token": (
        bpe(continuing_subword_prefix="#" * 9),
        "not a usable tokenizer",
    ),
}


def write_tokenizer(folder: Path, content: Any) -> Path:
    write_checkpoint(folder)
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    (folder / "tokenizer.json").write_bytes(text)
    return folder


@pytest.mark.parametrize(("content", "cause"), cases(TOKENIZERS))
def test_malformed_tokenizer(tmp_path: Path, content: Any, cause: str) -> None:
    assert_refused(write_tokenizer(tmp_path, content), "tokenizer.json: ", cause)


def aborting() -> str:
    """A tokenizer.json of which the library cuts a token within a character, reports that in a text
    that is not valid UTF-8, and thereby aborts the process.
    """
    vocabulary = {"a": 0, "é": 1, "aé": 2}
    return json.dumps(bpe(vocab=vocabulary, merges=["a é"], continuing_subword_prefix="#"))


ABORTING = {
    "plain": aborting(),
    "overridden by a good model": f'{aborting()[:-1]}, "model": {json.dumps(bpe()["model"])}}}',
    "before what is no JSON": f"{aborting()[:-1]}, ???",
    "behind a number of 5001 digits": f'{{"x": 1{"0" * 5000}, {aborting()[1:]}',
    "behind a deep value": f'{{"x": {"[" * 120}{"]" * 120}, {aborting()[1:]}',
}


@pytest.mark.parametrize("text", cases(ABORTING))
def test_tokenizer_that_would_abort_the_process(tmp_path: Path, text: str) -> None:
    told = refusals(write_tokenizer(tmp_path, text.encode()))
    assert told, "the process was aborted"
    assert_names(told[0], str(tmp_path), "tokenizer.json: ")


FAILS_LATER = {
    "chunks of nothing": {**TOKENIZER, "pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "unknown token unknown": bpe(unk_token="nope"),
    "no unknown token": {
        **TOKENIZER,
        "model": {"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0]]},
    },
}


@pytest.mark.parametrize("content", cases(FAILS_LATER))
def test_tokenizer_that_fails_on_a_text(tmp_path: Path, content: Any) -> None:
    """Found at load or at the text, it is told as an error of ours: nothing else escapes."""
    write_tokenizer(tmp_path, content)
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    with (
        pytest.raises((CheckpointError, EngineError, ValueError)),
        load(tmp_path) as model,
    ):
        model.generate("xyz", max_new_tokens=1)


def test_good_tokenizers(tmp_path: Path) -> None:
    """What the cases above start from is not what they fail on."""
    with load(write_tokenizer(tmp_path, added())) as model:
        assert model.tokenizer is not None
        assert model.tokenizer.encode(["abba", "<x>"]) == [[2, 1, 0], [3]]
    (tmp_path / "tokenizer.json").unlink()
    write_vocabulary(tmp_path)
    with load(tmp_path) as model:
        assert model.tokenizer is not None
        assert model.tokenizer.encode(["abba"]) == [[2, 1, 0]]


def test_token_outside_the_models_vocabulary(tmp_path: Path) -> None:
    with load(write_tokenizer(tmp_path, bpe(vocab={"a": 0, "b": 1, "ab": 99}))) as model:
        assert_names(told_by(lambda: model.generate("ab", max_new_tokens=1)), "99")


def told_by(act: Callable[[], Any]) -> str:
    with pytest.raises(ValueError) as caught:
        act()
    return str(caught.value)


VOCABULARIES = {
    "vocabulary not JSON": ("vocab.json", "a b", ""),
    "vocabulary list": ("vocab.json", '["a", "b", "ab"]', ""),
    "vocabulary of strings": ("vocab.json", '{"a": "0", "b": "1", "ab": "2"}', ""),
    "vocabulary empty": ("vocab.json", "{}", ""),
    "merge of an unknown token": ("merges.txt", "a zz\n", "`zz` out of vocabulary"),
    "merge of one": ("merges.txt", "#version: 0.2\nab\n", "Merges text file invalid"),
    "merge of three": ("merges.txt", "a b ab\n", "Merges text file invalid"),
    "settings not JSON": ("tokenizer_config.json", "{", "tokenizer_config.json: is not valid"),
    "settings array": ("tokenizer_config.json", "[]", "must hold a JSON object"),
    "settings deep": ("tokenizer_config.json", "[" * 10**5, "nested too deeply"),
    "settings twice": ("tokenizer_config.json", '{"a": 1, "a": 1}', "key 'a' stands twice"),
}


@pytest.mark.parametrize(("file", "text", "cause"), cases(VOCABULARIES))
def test_malformed_vocabulary(tmp_path: Path, file: str, text: str, cause: str) -> None:
    write_vocabulary(write_checkpoint(tmp_path))
    (tmp_path / file).write_text(text)
    assert_refused(tmp_path, file, cause)


USABLE, BY_ID = "not a usable tokenizer", "tokenizer_config.json: added_tokens_decoder: "
ADDED = {
    "list": ("tokenizer_config.json", {"added_tokens_decoder": [1]}, BY_ID),
    "null": ("tokenizer_config.json", {"added_tokens_decoder": None}, BY_ID),
    "id no number": ("tokenizer_config.json", {"added_tokens_decoder": {"x": {}}}, "'x'"),
    "id after a gap": (
        "tokenizer_config.json",
        {"added_tokens_decoder": {"9": {"content": "<x>"}}},
        "'<x>' cannot have id 9",
    ),
    "negative id": (
        "tokenizer_config.json",
        {"added_tokens_decoder": {"-1": {"content": "<x>"}}},
        "'<x>' cannot have id -1",
    ),
    "text": ("tokenizer_config.json", {"added_tokens_decoder": {"3": "<x>"}}, BY_ID),
    "number": ("tokenizer_config.json", {"added_tokens_decoder": {"3": {"content": 5}}}, BY_ID),
    "unknown field": ("tokenizer_config.json", {"added_tokens_decoder": {"3": {"a": 1}}}, USABLE),
    "older, list": ("added_tokens.json", ["<x>"], "added_tokens.json: must hold a JSON object"),
    "older, id after a gap": ("added_tokens.json", {"<x>": 9}, "'<x>' cannot have id 9"),
    "older, id text": ("added_tokens.json", {"<x>": "3"}, "added_tokens.json: '<x>': '3' is not a"),
    "older, mixed ids": (
        "added_tokens.json",
        {"<x>": 3, "<y>": "4"},
        "'<y>': '4' is not a token id",
    ),
    "map list": ("special_tokens_map.json", [], "special_tokens_map.json: must hold a JSON object"),
}


@pytest.mark.parametrize(("file", "content", "cause"), cases(ADDED))
def test_malformed_added_tokens(tmp_path: Path, file: str, content: Any, cause: str) -> None:
    write_vocabulary(write_checkpoint(tmp_path))
    write_json(tmp_path / file, content)
    assert_refused(tmp_path, cause)


def test_settings_of_odd_types(tmp_path: Path) -> None:
    write_vocabulary(write_checkpoint(tmp_path))
    settings: dict[str, Any] = {
        "bos_token": None,
        "unk_token": None,
        "add_bos_token": 5,
        "errors": [],
        "model_max_length": "long",
    }
    write_json(tmp_path / "tokenizer_config.json", settings)
    assert_loads(tmp_path)


@pytest.mark.parametrize(
    ("file", "class_name", "cause"),
    [
        ("spiece.model", "T5Tokenizer", "cannot read it"),
        ("sentencepiece.bpe.model", "XLMRobertaTokenizer", "cannot read it"),
        ("vocab.txt", "BertJapaneseTokenizer", "cannot read it"),
        ("vocab.txt", "BertTokenizer", USABLE),
    ],
)
def test_broken_vocabulary(tmp_path: Path, file: str, class_name: str, cause: str) -> None:
    pytest.importorskip("transformers")
    (write_checkpoint(tmp_path) / file).write_bytes(b"\xff\xfe\x00" * 9)
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": class_name})
    with pytest.raises(CheckpointError):
        load(tmp_path)  # imports what transformers reads it with
    assert_refused(tmp_path, file, cause)
