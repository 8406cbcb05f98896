"""Each tokenizer class against transformers' AutoTokenizer on its folder; others are refused."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from fastgen.errors import CheckpointError
from fastgen.text.special_tokens import ROLES
from fastgen.text.tokenizer import Tokenizer
from text_parts import tokenizer_at
from tokenizer_folders import (
    BUNDLED_JSON,
    KINDS,
    TEXTS,
    name_class,
    random_texts,
    streamed,
    write_bert,
    write_json,
    write_sentencepiece,
    write_tokenizer_json,
    write_vocab_and_merges,
)


def auto(folder: Path) -> Any:
    """What transformers opens for a GPT-2 in `folder`."""
    if not (folder / "config.json").exists():
        write_json(folder, "config.json", {"model_type": "gpt2"})
    return transformers.AutoTokenizer.from_pretrained(folder)


def assert_same(folder: Path, seed: str) -> None:
    """Ids of texts, and texts of ids, whole and streamed, are transformers'."""
    theirs, ours = auto(folder), tokenizer_at(folder)
    texts = [*TEXTS, *random_texts(seed)]
    ids = [theirs.encode(text, add_special_tokens=False) for text in texts]
    assert ours.encode(texts) == ids
    assert ours.encode(texts, add_special_tokens=True) == [theirs(t)["input_ids"] for t in texts]
    assert ours.roles == {r: t for r in ROLES if (t := getattr(theirs, r)) is not None}
    rng = random.Random(seed)
    ids += [rng.choices(range(len(theirs)), k=rng.randrange(12)) for _ in range(100)]
    options = {"clean_up_tokenization_spaces": False}
    for row in ids:
        text = theirs.decode(row, skip_special_tokens=True, **options)
        assert ours.decode(row) == streamed(ours, row) == text
    for token_id in range(0, len(theirs), 7):
        assert ours.token_text(token_id) == theirs.decode([token_id], **options)


@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_transformers(kind: str, tmp_path: Path) -> None:
    write, class_name = KINDS[kind]
    write(tmp_path)
    assert type(auto(tmp_path)) is getattr(transformers, class_name)
    assert_same(tmp_path, kind)


@pytest.mark.parametrize("kind", ["bert", "t5", "gpt-sw3", "vocab and merges"])
def test_the_class_may_stand_in_config_json(kind: str, tmp_path: Path) -> None:
    write, class_name = KINDS[kind]
    write(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink(missing_ok=True)
    config = {"model_type": "gpt2", "tokenizer_class": class_name}
    write_json(tmp_path, "config.json", config)
    assert_same(tmp_path, kind)


def test_tokenizer_config_counts_over_config_json(tmp_path: Path) -> None:
    write_bert(tmp_path, "BertTokenizerFast")
    write_json(tmp_path, "config.json", {"model_type": "gpt2", "tokenizer_class": "T5Tokenizer"})
    assert_same(tmp_path, "both")


# add_prefix_space


@pytest.mark.parametrize("class_name", [None, "GPT2TokenizerFast", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("setting", [None, False, True])
def test_add_prefix_space_of_a_tokenizer_json(
    class_name: str | None, stored: bool, setting: bool | None, tmp_path: Path
) -> None:
    """GPT2Tokenizer follows the setting, and the others the file."""
    spaced = pre_tokenizers.ByteLevel(add_prefix_space=stored)
    write_changed_json(tmp_path, lambda tokenizer: setattr(tokenizer, "pre_tokenizer", spaced))
    settings = {} if setting is None else {"add_prefix_space": setting}
    named = {} if class_name is None else {"tokenizer_class": class_name}
    write_json(tmp_path, "tokenizer_config.json", settings | named)
    assert_same(tmp_path, "spaces")
    follows = stored if class_name == "PreTrainedTokenizerFast" else bool(setting)
    opened = tokenizer_at(tmp_path)
    [plain, with_space] = opened.encode(["he", " he"])
    assert (plain == with_space) == follows


@pytest.mark.parametrize("setting", [False, True])
def test_add_prefix_space_of_a_vocabulary(setting: bool, tmp_path: Path) -> None:
    write_vocab_and_merges(tmp_path, "GPT2Tokenizer", add_prefix_space=setting)
    assert_same(tmp_path, "spaces")


# Special tokens at the ends of a text


@pytest.mark.parametrize("write", [write_vocab_and_merges, write_tokenizer_json])
@pytest.mark.parametrize("bos", [True, False, None])
@pytest.mark.parametrize("eos", [True, False])
def test_add_bos_and_eos_token(
    write: Callable[[Path], None], bos: bool | None, eos: bool, tmp_path: Path
) -> None:
    """They count for a vocabulary; a tokenizer.json says itself what it adds."""
    write(tmp_path)
    settings = {"add_bos_token": bos, "add_eos_token": eos, "bos_token": "<s>", "eos_token": "ing"}
    write_json(tmp_path, "tokenizer_config.json", settings)
    assert_same(tmp_path, "ends")
    opened = tokenizer_at(tmp_path)
    [plain] = opened.encode(["a b"])
    [whole] = opened.encode(["a b"], add_special_tokens=True)
    adds = write is write_vocab_and_merges
    assert len(whole) == len(plain) + (adds and bool(bos)) + (adds and eos)


@pytest.mark.parametrize("missing", ["bos_token", "eos_token"])
def test_a_token_that_is_none_is_not_added(missing: str, tmp_path: Path) -> None:
    write_vocab_and_merges(tmp_path)
    settings = {"add_bos_token": True, "add_eos_token": True, missing: None}
    write_json(tmp_path, "tokenizer_config.json", settings)
    assert_same(tmp_path, missing)


@pytest.mark.parametrize("class_name", [None, "PreTrainedTokenizerFast"])
def test_what_a_tokenizer_json_adds(class_name: str | None, tmp_path: Path) -> None:
    def add(tokenizer: tokenizers.Tokenizer) -> None:
        tokens = [("ing", tokenizer.token_to_id("ing")), ("<|endoftext|>", 0)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A ing", special_tokens=tokens
        )

    write_changed_json(tmp_path, add, class_name)
    assert_same(tmp_path, "template")
    [ids] = tokenizer_at(tmp_path).encode([""], add_special_tokens=True)
    assert len(ids) == 2


@pytest.mark.parametrize("named", [{"cls_token": "hello"}, {"sep_token": "<sep>"},
                                   {"cls_token": None, "sep_token": None}])  # fmt: skip
@pytest.mark.parametrize("unknown", [{}, {"unk_token": "[PAD]"}])
def test_what_bert_adds(named: dict[str, Any], unknown: dict[str, Any], tmp_path: Path) -> None:
    write_bert(tmp_path, **named)
    write_json(tmp_path, "special_tokens_map.json", unknown)
    assert_same(tmp_path, "bert")


# What a tokenizer.json says beside its vocabulary


def write_changed_json(
    folder: Path, change: Callable[[tokenizers.Tokenizer], None], class_name: str | None = None
) -> None:
    write_tokenizer_json(folder, class_name)
    changed = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    change(changed)
    changed.save(str(folder / "tokenizer.json"))


def normalize(tokenizer: tokenizers.Tokenizer) -> None:
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])


def cut_digits(tokenizer: tokenizers.Tokenizer) -> None:
    cuts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts)


def join_words(tokenizer: tokenizers.Tokenizer) -> None:
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("e", "3")])


def take_unknown(tokenizer: tokenizers.Tokenizer) -> None:
    tokenizer.model.unk_token, tokenizer.model.fuse_unk = "!", True


def suffix_words(tokenizer: tokenizers.Tokenizer) -> None:
    tokenizer.model.end_of_word_suffix = "s"


def pad(tokenizer: tokenizers.Tokenizer) -> None:
    tokenizer.enable_padding(pad_token="ing", pad_id=tokenizer.token_to_id("ing"))


CHANGES = [normalize, cut_digits, join_words, take_unknown, suffix_words, pad]


@pytest.mark.parametrize("class_name", [None, "GPT2Tokenizer", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("change", CHANGES)
def test_the_class_decides_what_counts(
    change: Callable[[tokenizers.Tokenizer], None], class_name: str | None, tmp_path: Path
) -> None:
    write_changed_json(tmp_path, change, class_name)
    assert_same(tmp_path, change.__name__)


def test_a_class_that_transformers_does_not_know_leaves_the_file_as_it_stands(
    tmp_path: Path,
) -> None:
    write_changed_json(tmp_path, cut_digits, "SomebodysTokenizer")
    assert_same(tmp_path, "unknown")
    [ids] = tokenizer_at(tmp_path).encode(["12"])
    assert len(ids) == 2


@pytest.mark.parametrize("class_name", [None, "BertTokenizer"])
def test_a_model_of_another_kind_is_refused(class_name: str | None, tmp_path: Path) -> None:
    tokenizer = tokenizers.Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    if class_name is not None:
        name_class(tmp_path, class_name)
    refused = r"tokenizer\.json: .* WordLevel, which " + (class_name or "GPT2Tokenizer")
    with pytest.raises(CheckpointError, match=refused):
        Tokenizer.from_folder(tmp_path)
    name_class(tmp_path, "PreTrainedTokenizerFast")
    assert tokenizer_at(tmp_path).encode(["a"]) == [[0]]


# Refusals

SPIECE, BPE_MODEL = "spiece.model", "sentencepiece.bpe.model"


@pytest.mark.parametrize(
    ("class_name", "file"),
    [
        ("NoSuchTokenizer", SPIECE),
        ("PegasusTokenizer", SPIECE),
        ("MBartTokenizer", BPE_MODEL),
        ("NllbTokenizerFast", BPE_MODEL),
        ("LlamaTokenizer", "tokenizer.model"),
        ("GPT2LMHeadModel", SPIECE),
        ("pipeline", SPIECE),
        ("../evil.Tokenizer", SPIECE),
        ("", SPIECE),
    ],
)
def test_a_class_that_is_not_known_is_refused_by_name(
    class_name: str, file: str, tmp_path: Path
) -> None:
    write_sentencepiece(tmp_path, file, class_name)
    named = class_name.removesuffix("Fast")
    with pytest.raises(CheckpointError, match=f"{file}: tokenizer_class '{named}' is not supp"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("class_name", ["LlamaTokenizerFast", "CodeGenTokenizer", "pipeline"])
def test_a_class_of_transformers_that_is_not_known_here_is_refused(
    class_name: str, tmp_path: Path
) -> None:
    """Also with a tokenizer.json: such a class would read it in a way of its own."""
    write_tokenizer_json(tmp_path, class_name)
    with pytest.raises(CheckpointError, match=f"'{class_name.removesuffix('Fast')}' is not supp"):
        Tokenizer.from_folder(tmp_path)


def test_without_transformers_an_unknown_class_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tokenizer_json(tmp_path, "SomebodysTokenizer")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(CheckpointError, match="'SomebodysTokenizer' is not supported"):
        Tokenizer.from_folder(tmp_path)


def test_a_package_that_a_class_needs_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sentencepiece(tmp_path, SPIECE, "CpmTokenizer")
    monkeypatch.setitem(sys.modules, "rjieba", None)
    with pytest.raises(CheckpointError, match=r"spiece\.model: CpmTokenizer .* rjieba"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("name", [5, ["GPT2Tokenizer"], {}, True])
def test_a_class_must_be_a_name(name: Any, tmp_path: Path) -> None:
    write_vocab_and_merges(tmp_path)
    name_class(tmp_path, name)
    with pytest.raises(CheckpointError, match="tokenizer_class must be a name"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: write_bert(folder, None),
        lambda folder: write_sentencepiece(folder, SPIECE, None),
        lambda folder: write_sentencepiece(folder, BPE_MODEL, None),
        lambda folder: write_sentencepiece(folder, "tokenizer.model", None),
    ],
)
def test_nothing_is_guessed_where_no_class_is_named(
    write: Callable[[Path], None], tmp_path: Path
) -> None:
    write(tmp_path)
    [file] = tmp_path.iterdir()
    with pytest.raises(CheckpointError, match=f"{file.name}: .* names the tokenizer_class"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("missing", ["vocab.json", "merges.txt"])
@pytest.mark.parametrize("class_name", [None, "GPT2Tokenizer", "RobertaTokenizer"])
def test_half_a_vocabulary_names_the_other_half(
    missing: str, class_name: str | None, tmp_path: Path
) -> None:
    write_vocab_and_merges(tmp_path, class_name)
    (tmp_path / missing).unlink()
    with pytest.raises(CheckpointError, match=f"but no {missing}, which"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("class_name", ["T5Tokenizer", "BertTokenizer", "GPT2Tokenizer"])
def test_the_file_of_another_class_is_not_read(class_name: str, tmp_path: Path) -> None:
    write_sentencepiece(tmp_path, BPE_MODEL, class_name)
    with pytest.raises(CheckpointError, match=f"holds {BPE_MODEL}, but no .*which {class_name}"):
        Tokenizer.from_folder(tmp_path)


def test_a_file_that_transformers_would_read_first_is_refused(tmp_path: Path) -> None:
    write_vocab_and_merges(tmp_path)
    write_sentencepiece(tmp_path, "tokenizer.model", None)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: is not read by GPT2Tokenizer"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "vocab.json").unlink()
    (tmp_path / "merges.txt").unlink()
    write_json(tmp_path, "tokenizer.json", BUNDLED_JSON)
    assert_same(tmp_path, "tokenizer.json first")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vocab", {"a": 0}),
        ("merges", [["a", "b"]]),
        ("init_inputs", ["a"]),
        ("fast_tokenizer_files", ["tokenizer.json", "tokenizer.4.0.0.json"]),
    ],
)
def test_settings_that_replace_the_files_are_refused(key: str, value: Any, tmp_path: Path) -> None:
    write_vocab_and_merges(tmp_path)
    write_json(tmp_path, "tokenizer_config.json", {key: value})
    with pytest.raises(CheckpointError, match=rf"tokenizer_config\.json: {key} is not supported"):
        Tokenizer.from_folder(tmp_path)
