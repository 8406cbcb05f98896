"""Folders with a tokenizer's files, of every kind that transformers reads."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers

from data_files import HELD_OUT
from fastgen.frontends.generator import BUNDLED_MODEL
from fastgen.text.tokenizer import Tokenizer
from text_parts import tokenizer_at

BUNDLED_JSON = json.loads((BUNDLED_MODEL / "tokenizer.json").read_text("utf-8"))
EOS = "<|endoftext|>"


def write_vocab_and_merges(folder: Path) -> None:
    model = BUNDLED_JSON["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), "utf-8")
    merges = ["#version: 0.2", *map(" ".join, model["merges"])]
    (folder / "merges.txt").write_text("\n".join(merges) + "\n", "utf-8")


def write_json(folder: Path, name: str, value: Any) -> None:
    (folder / name).write_text(json.dumps(value), "utf-8")


def write_added_tokens(folder: Path) -> None:
    """As transformers 4 saved a GPT-2 with tokens of one's own."""
    write_vocab_and_merges(folder)
    write_json(folder, "added_tokens.json", {"<sp>": 4096, "[PAD]": 4097})
    write_json(folder, "special_tokens_map.json", {"pad_token": "[PAD]", "eos_token": EOS})


def write_added_tokens_decoder(folder: Path) -> None:
    """The same in its later form."""
    write_vocab_and_merges(folder)
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    tokens = {"4096": ("<sp>", False), "4097": ("[PAD]", True), "4098": ("<note>", False)}
    listed = {
        i: {"content": text, "special": special} | flags for i, (text, special) in tokens.items()
    }
    write_json(folder, "tokenizer_config.json", {"added_tokens_decoder": listed})


def write_bert(folder: Path, **config: Any) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "world", "##s", "a", "b", "##b"]
    vocab = dict.fromkeys([*words, *"你好世界今天气很，！,.!'", "don", "t", "n", "s"])
    (folder / "vocab.txt").write_text("\n".join(vocab) + "\n", "utf-8")
    if config:
        write_json(folder, "tokenizer_config.json", config)


def write_sentencepiece(folder: Path, name: str = "spiece.model", **config: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its generated bindings warn on newer Pythons
        import sentencepiece
    lines = [line for line in HELD_OUT.read_text("utf-8").splitlines() if line.strip()][:800]
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*lines, "你好，世界！今天天气很好"]),
        model_writer=trained,
        vocab_size=300,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=5,
    )
    (folder / name).write_bytes(trained.getvalue())
    if config:
        write_json(folder, "tokenizer_config.json", config)


def write_bert_japanese(folder: Path) -> None:
    """One that transformers has in Python only."""
    kind = {"word_tokenizer_type": "basic", "subword_tokenizer_type": "wordpiece"}
    write_bert(folder, tokenizer_class="BertJapaneseTokenizer", **kind)


# What is in the folder, and the class of transformers that reads it.
KINDS: dict[str, tuple[Callable[[Path], None], str]] = {
    "tokenizer.json": (lambda f: write_json(f, "tokenizer.json", BUNDLED_JSON), "GPT2Tokenizer"),
    "vocab and merges": (write_vocab_and_merges, "GPT2Tokenizer"),
    "added tokens": (write_added_tokens, "GPT2Tokenizer"),
    "added_tokens_decoder": (write_added_tokens_decoder, "GPT2Tokenizer"),
    "bert": (write_bert, "BertTokenizer"),
    "bert cased": (lambda f: write_bert(f, do_lower_case=False), "BertTokenizer"),
    "bert japanese": (write_bert_japanese, "BertJapaneseTokenizer"),
    "t5": (write_sentencepiece, "T5Tokenizer"),
    "xlnet": (lambda f: write_sentencepiece(f, tokenizer_class="XLNetTokenizer"), "XLNetTokenizer"),
    "xlm-r": (lambda f: write_sentencepiece(f, "sentencepiece.bpe.model"), "XLMRobertaTokenizer"),
}


def reopened(folder: Path, tokenizer: tokenizers.Tokenizer) -> Tokenizer:
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer_at(folder)


def library() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(json.dumps(BUNDLED_JSON))
