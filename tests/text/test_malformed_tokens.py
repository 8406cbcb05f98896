"""Special tokens written in every form that JSON allows: refused where transformers raises."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from fastgen.errors import CheckpointError
from fastgen.text.tokenizer import Tokenizer
from text_parts import tokenizer_at
from tiny_checkpoints import TOKENIZER, write_vocabulary
from tokenizer_folders import write_bert, write_json

CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
TYPED = {"__type": "AddedToken", "content": "<x>"}
VALUES: list[Any] = [
    *(None, 5, 0, True, False, 1.5, "", "<x>"),
    *([], ["<x>"], ["<x>", 5], ["<x>", None], [["<x>"]], ["<x>", "<x>"]),
    *([{"content": "<x>"}], [{"lstrip": True}], [{"content": "<x>", "special": True}], [TYPED]),
    *({}, {"content": "<x>"}, {"content": "<x>", "lstrip": True}, {"lstrip": True}),
    *({"content": 5}, {"content": None}, {"content": ""}, {"content": "<x>", "special": True}),
    *(TYPED, TYPED | {"content": 5}, TYPED | {"content": ""}, TYPED | {"lstrip": "yes"}),
    *(TYPED | {"lstrip": 1}, {"__type": "AddedToken"}, {"__type": "Other", "content": "<x>"}),
    *({"x_token": "<x>"}, {"x_token": 5}, {"x_token": None}, {"x_token": ["<x>"]}),
    *({"x_token": TYPED}, {"x_token": {"content": "<x>"}}, {"a": {"b": TYPED}}),
]
KEYS = [
    *("pad_token", "bos_token", "cls_token", "my_token"),
    *("extra_special_tokens", "additional_special_tokens", "model_specific_special_tokens"),
]
BY_ID: list[Any] = [
    *(None, [], "x", 5, {}, {"x": {"content": "<x>"}}, {"1.5": {"content": "<x>"}}),
    *({" 3 ": {"content": "<x>"}}, {"3": "<x>"}, {"3": None}, {"3": 5}, {"3": []}),
    *({"3": {"content": 5}}, {"3": {"content": "<x>", "lstrip": "yes"}}, {"3": TYPED}),
]
# What transformers gives another id than the file says, without a word.
MISLED: list[tuple[str, Any]] = [
    (CONFIG, {"added_tokens_decoder": {"-1": {"content": "<x>"}}}),
    (CONFIG, {"added_tokens_decoder": {"3": {}}}),
    (CONFIG, {"added_tokens_decoder": {"3": {"content": "<x>"}, "4": {"content": "<x>"}}}),
    (CONFIG, {"added_tokens_decoder": {"99999999999": {"content": "<x>"}}}),
    *((ADDED, {"<x>": value}) for value in ("3", None, 3.0, True, [3], -1)),
    (ADDED, {"": 3}),
]
TEXTS = ["<x> a<x>b", "a x_token b lstrip [CLS]", "ab <|endoftext|>", "[]"]
VOCABULARIES: dict[str, Callable[[Path], None]] = {
    "GPT2Tokenizer": write_vocabulary,
    "PreTrainedTokenizerFast": lambda folder: write_json(folder, "tokenizer.json", TOKENIZER),
    "BertTokenizer": lambda folder: write_bert(folder, None),
}


def write(folder: Path, class_name: str, files: dict[str, Any]) -> Path:
    folder.mkdir()
    VOCABULARIES[class_name](folder)
    write_json(folder, "config.json", {"model_type": "gpt2", "tokenizer_class": class_name})
    for name, content in ({CONFIG: {}} | files).items():
        write_json(folder, name, content)
    return folder


def assert_same(folder: Path, file: str, key: str) -> None:
    """Ids are transformers'; or both refuse, and ours names the file and the key."""
    try:
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
    except Exception:
        with pytest.raises(CheckpointError) as refused:
            Tokenizer.from_folder(folder)
        assert f"{folder / file}: {key}" in str(refused.value)
        return
    ours = tokenizer_at(folder)
    ids = [theirs(text)["input_ids"] for text in TEXTS]
    assert ours.encode(TEXTS, add_special_tokens=True) == ids
    assert ours.decode(ids[0]) == theirs.decode(ids[0], skip_special_tokens=True)


@pytest.mark.parametrize("class_name", VOCABULARIES)
@pytest.mark.parametrize("file", [CONFIG, MAP])
@pytest.mark.parametrize("key", KEYS)
def test_a_form_is_read_or_refused_as_by_transformers(
    key: str, file: str, class_name: str, tmp_path: Path
) -> None:
    for number, value in enumerate(VALUES):
        folder = write(tmp_path / str(number), class_name, {file: {key: value}})
        assert_same(folder, file, key)


@pytest.mark.parametrize("class_name", VOCABULARIES)
@pytest.mark.parametrize(
    "key",
    ["add_prefix_space", "split_special_tokens", "do_lower_case", "tokenize_chinese_chars",
     "strip_accents"],
)  # fmt: skip
def test_switches(key: str, class_name: str, tmp_path: Path) -> None:
    values: list[Any] = [True, False, None, 0, 1, "yes", "", [], {}]
    for number, value in enumerate(values):
        folder = write(tmp_path / str(number), class_name, {CONFIG: {key: value}})
        assert_same(folder, CONFIG, key)


@pytest.mark.parametrize("value", BY_ID, ids=repr)
def test_tokens_by_id(value: Any, tmp_path: Path) -> None:
    key = "added_tokens_decoder"
    assert_same(write(tmp_path / "1", "GPT2Tokenizer", {CONFIG: {key: value}}), CONFIG, key)


@pytest.mark.parametrize("class_name", ["GPT2Tokenizer", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("key", ["extra_special_tokens", "additional_special_tokens"])
def test_extra_tokens_of_two_files(key: str, class_name: str, tmp_path: Path) -> None:
    number = 0
    for first in (["<y>"], {"y_token": "<y>"}, None, 5):
        for second in (["<x>", "<y>"], {"x_token": "<x>"}, {"x_token": 5}, [5], 5, None, []):
            files = {CONFIG: {key: first}, MAP: {"extra_special_tokens": second}}
            folder = write(tmp_path / str(number), class_name, files)
            number += 1
            try:
                transformers.AutoTokenizer.from_pretrained(folder)
            except Exception:
                with pytest.raises(CheckpointError, match=r"\.json: (extra|additional)_special_t"):
                    Tokenizer.from_folder(folder)
            else:
                assert_same(folder, MAP, key)


@pytest.mark.parametrize("class_name", ["GPT2Tokenizer", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize(("file", "content"), MISLED)
def test_an_id_that_a_token_cannot_have_is_refused(
    file: str, content: dict[str, Any], class_name: str, tmp_path: Path
) -> None:
    folder = write(tmp_path / "1", class_name, {file: content})
    with pytest.raises(CheckpointError, match=r"is not a token id|cannot have id"):
        Tokenizer.from_folder(folder)
