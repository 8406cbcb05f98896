"""Every place in which special tokens can be named, against transformers on the same folder."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import transformers

from fastgen.errors import CheckpointError
from fastgen.text.special_tokens import ROLES
from fastgen.text.tokenizer import Tokenizer
from text_parts import tokenizer_at
from tokenizer_folders import (
    BUNDLED_JSON,
    EOS,
    FLAGS,
    TEXTS,
    streamed,
    write_json,
    write_tokenizer_json,
    write_vocab_and_merges,
)

CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
SIZE = len(BUNDLED_JSON["model"]["vocab"])
WORD = "ing"
WORD_ID = str(BUNDLED_JSON["model"]["vocab"][WORD])
USER, MASK, PAD, NOTE = "<|user|>", "<mask>", "[PAD]", "<note>"
FLAGGED = {"content": MASK, **FLAGS, "lstrip": True}
TYPED = {"__type": "AddedToken", **FLAGGED, "special": True}
LISTED = {
    str(SIZE): {"content": USER, **FLAGS, "special": True},
    str(SIZE + 1): {"content": NOTE, **FLAGS, "special": False},
    str(SIZE + 2): {**FLAGGED, "special": True},
}
# Files that name tokens, each in its own way.
PLACES: dict[str, tuple[str, dict[str, Any]]] = {
    "role": (CONFIG, {"pad_token": PAD}),
    "role of none": (CONFIG, {"bos_token": None, "eos_token": None, "unk_token": None}),
    "other roles": (CONFIG, {"bos_token": USER, "eos_token": USER, "unk_token": USER}),
    "role with flags": (CONFIG, {"mask_token": TYPED}),
    "role of a word": (CONFIG, {"sep_token": " a b", "cls_token": WORD}),
    "additional": (CONFIG, {"additional_special_tokens": [USER, MASK]}),
    "additional with flags": (CONFIG, {"additional_special_tokens": [USER, TYPED]}),
    "extra": (CONFIG, {"extra_special_tokens": [USER, PAD]}),
    "extra by name": (CONFIG, {"extra_special_tokens": {"user_token": USER, "x": TYPED}}),
    "extra and additional": (
        CONFIG,
        {"extra_special_tokens": [USER], "additional_special_tokens": [MASK]},
    ),
    "name of one's own": (CONFIG, {"user_token": USER}),
    "name of one's own with flags": (CONFIG, {"user_token": TYPED}),
    "decoder": (CONFIG, {"added_tokens_decoder": LISTED}),
    "decoder and role": (CONFIG, {"added_tokens_decoder": LISTED, "pad_token": NOTE}),
    "decoder of a word": (CONFIG, {"added_tokens_decoder": {WORD_ID: {"content": WORD, **FLAGS}}}),
    "split": (CONFIG, {"split_special_tokens": True, "pad_token": PAD}),
    "map of roles": (MAP, {"pad_token": PAD, "eos_token": USER}),
    "map with flags": (MAP, {"mask_token": FLAGGED}),
    "map of additional": (MAP, {"additional_special_tokens": [USER, NOTE]}),
    "map of extra": (MAP, {"extra_special_tokens": [USER, FLAGGED]}),
    "map of extra by name": (MAP, {"extra_special_tokens": {"user_token": USER}}),
    "map of a name": (MAP, {"user_token": USER}),
    "map of none": (MAP, {"pad_token": None, "bos_token": None}),
    "added": (ADDED, {USER: SIZE, NOTE: SIZE + 1}),
    "added, out of order": (ADDED, {USER: SIZE + 1, PAD: SIZE}),
}


def write_vocabulary_with(folder: Path, *tokens: str) -> None:
    """`tokens` have ids in vocab.json."""
    write_vocab_and_merges(folder)
    vocab = BUNDLED_JSON["model"]["vocab"]
    more = {token: SIZE + number for number, token in enumerate(tokens)}
    write_json(folder, "vocab.json", vocab | more)


def write_stored(folder: Path, class_name: str | None) -> None:
    """A tokenizer.json that lists a token of its own."""
    write_tokenizer_json(folder, class_name)
    added = [*BUNDLED_JSON["added_tokens"], {"id": SIZE, "content": USER, "special": True, **FLAGS}]
    write_json(folder, "tokenizer.json", BUNDLED_JSON | {"added_tokens": added})


VOCABULARIES: dict[str, Callable[[Path], None]] = {
    "vocabulary": write_vocab_and_merges,
    "vocabulary with tokens": lambda f: write_vocabulary_with(f, USER, NOTE, MASK),
    "tokenizer.json": write_tokenizer_json,
    "tokenizer.json with a token": lambda f: write_stored(f, None),
    "as stored": lambda f: write_stored(f, "PreTrainedTokenizerFast"),
}
MENTIONS = [
    f"{USER} a {MASK} b",
    f"a{PAD}b {NOTE}{NOTE} {EOS}",
    f"  {MASK}  {USER}\n{PAD} the and",
    f"{NOTE}x{EOS}{EOS} {USER}",
]


def place(folder: Path, *names: str) -> None:
    """Write the files of these places; several of one file are joined."""
    for name in names:
        file, content = PLACES[name]
        path = folder / file
        before = json.loads(path.read_text("utf-8")) if path.exists() else {}
        write_json(folder, file, before | content)


def assert_same(folder: Path, seed: object) -> None:
    write_json(folder, "config.json", {"model_type": "gpt2"})
    if not (folder / CONFIG).exists():
        write_json(folder, CONFIG, {})
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    listed = json.loads((folder / ADDED).read_text("utf-8")) if (folder / ADDED).exists() else {}
    counts = "added_tokens_decoder" not in json.loads((folder / CONFIG).read_text("utf-8"))
    wrong = [t for t, i in listed.items() if counts and theirs.convert_tokens_to_ids(t) != i]
    if wrong:
        with pytest.raises(CheckpointError, match=f"cannot have id {listed[wrong[0]]}"):
            Tokenizer.from_folder(folder)
        return
    ours = tokenizer_at(folder)
    texts = [*TEXTS, *MENTIONS]
    ids = [theirs.encode(text, add_special_tokens=False) for text in texts]
    assert ours.encode(texts) == ids
    assert ours.encode(texts, add_special_tokens=True) == [theirs(t)["input_ids"] for t in texts]
    assert ours.roles == {r: t for r in ROLES if (t := getattr(theirs, r)) is not None}
    rng = random.Random(str(seed))
    ids += [rng.choices(range(SIZE - 5, len(theirs)), k=rng.randrange(8)) for _ in range(20)]
    for row in ids:
        text = theirs.decode(row, skip_special_tokens=True)
        assert ours.decode(row) == streamed(ours, row) == text
    for token_id in {row[0] for row in ids if row}:
        assert ours.token_text(token_id) == theirs.decode([token_id])


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("name", PLACES)
def test_a_place(name: str, vocabulary: str, tmp_path: Path) -> None:
    VOCABULARIES[vocabulary](tmp_path)
    place(tmp_path, name)
    assert_same(tmp_path, name)


PAIRS = [pair for pair in combinations(PLACES, 2) if PLACES[pair[0]][0] != PLACES[pair[1]][0]]


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_places_of_two_files(vocabulary: str, tmp_path: Path) -> None:
    for number, pair in enumerate(random.Random(vocabulary).sample(PAIRS, 30)):
        folder = tmp_path / str(number)
        folder.mkdir()
        VOCABULARIES[vocabulary](folder)
        place(folder, *pair)
        assert_same(folder, pair)


def test_special_tokens_in_vocab_json_that_only_the_map_names(tmp_path: Path) -> None:
    write_vocabulary_with(tmp_path, USER, NOTE)
    write_json(tmp_path, MAP, {"additional_special_tokens": [USER, NOTE]})
    opened = tokenizer_at(tmp_path)
    [ids] = opened.encode([f"{USER}{NOTE}{EOS}"])
    assert ids == [SIZE, SIZE + 1, BUNDLED_JSON["model"]["vocab"][EOS]]
    assert opened.decode(ids) == streamed(opened, ids) == ""


def test_end_of_text_is_special_unless_other_roles_are_named(tmp_path: Path) -> None:
    write_vocab_and_merges(tmp_path)
    place(tmp_path, "other roles")
    opened = tokenizer_at(tmp_path)
    eos = BUNDLED_JSON["model"]["vocab"][EOS]
    assert opened.encode([EOS]) != [[eos]]
    assert opened.decode([eos]) == EOS
