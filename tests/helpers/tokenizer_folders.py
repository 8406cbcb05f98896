"""Folders with a tokenizer of each class, made on the spot: from the bundled tokenizer, from a few
words, or by training."""

from __future__ import annotations

import io
import json
import random
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers

from data_files import HELD_OUT
from fastgen.frontends.generator import BUNDLED_MODEL
from fastgen.text.tokenizer import Tokenizer
from text_parts import tokenizer_at

BUNDLED_JSON = json.loads((BUNDLED_MODEL / "tokenizer.json").read_text("utf-8"))
EOS = "<|endoftext|>"
TEXTS = [
    "",
    "Hello, world!",
    "  In the beginning\twas the word.\n\n\n  ",
    "don't we'll I'm 12345 n't 's .",
    "你好，世界！今天天气很好龘",
    "👩‍👩‍👧‍👦 e\u0301 naïve Ωμέγα",
    f"{EOS}a{EOS} b",
    "[SEP]你[MASK] </s> <extra_id_0>",
    "a <sp> b[PAD]<note>c",
    "\0\x7f\u2028",
]
FLAGS = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
# What random texts are made of.
_PIECES = [
    *(
        "the",
        "The",
        " word",
        "hello",
        "a",
        "b",
        "s",
        "'s",
        "n't",
        "12",
        "0",
        ".",
        ",",
        "!",
        "\u3000",
    ),
    *(
        " ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "\r\n",
        "你",
        "好，",
        "龘",
        "é",
        "e\u0301",
        "Ω",
        "👩‍👧",
        "\u2028",
    ),
    *(EOS, "<s>", "</s>", "<unk>", "<pad>", "<mask>", "[CLS]", "[SEP]", "[UNK]", "[MASK]", "<sp>"),
    *(
        "\u3000",
        "\u2028",
        "<extra_id_0>",
        "<note>",
        "<|user|>",
        "▁",
        "Ġ",
        "##s",
        "\xa0",
        "\ufeff",
        "ﬁ",
        "①Ａ",
    ),
]


def random_texts(seed: object, count: int = 60) -> list[str]:
    """With runs of white space, special tokens of many vocabularies, and all kinds of letters."""
    rng = random.Random(str(seed))
    return ["".join(rng.choices(_PIECES, k=rng.randrange(1, 16))) for _ in range(count)]


def streamed(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    sink = tokenizer.sink()
    pieces = []
    for token_id in ids:
        assert not sink.push(token_id)
        pieces.append(sink.take())
    sink.finish()
    return "".join([*pieces, sink.take()])


def write_json(folder: Path, name: str, value: Any) -> None:
    (folder / name).write_text(json.dumps(value), "utf-8")


def name_class(folder: Path, class_name: str, **settings: Any) -> None:
    write_json(folder, "tokenizer_config.json", {"tokenizer_class": class_name, **settings})


def write_tokenizer_json(folder: Path, class_name: str | None = None, **settings: Any) -> None:
    write_json(folder, "tokenizer.json", BUNDLED_JSON)
    if class_name is not None:
        name_class(folder, class_name, **settings)


def write_vocab_and_merges(folder: Path, class_name: str | None = None, **settings: Any) -> None:
    model = BUNDLED_JSON["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), "utf-8")
    merges = ["#version: 0.2", *map(" ".join, model["merges"])]
    (folder / "merges.txt").write_text("\n".join(merges) + "\n", "utf-8")
    if class_name is not None:
        name_class(folder, class_name, **settings)


def write_added_tokens(folder: Path) -> None:
    """As transformers 4 saved a GPT-2 with tokens of one's own."""
    write_vocab_and_merges(folder)
    write_json(folder, "added_tokens.json", {"<sp>": 4096, "[PAD]": 4097})
    write_json(folder, "special_tokens_map.json", {"pad_token": "[PAD]", "eos_token": EOS})


def write_added_tokens_decoder(folder: Path) -> None:
    """The same in its later form."""
    write_vocab_and_merges(folder)
    tokens = {"4096": ("<sp>", False), "4097": ("[PAD]", True), "4098": ("<note>", False)}
    listed = {
        i: {"content": text, "special": special} | FLAGS for i, (text, special) in tokens.items()
    }
    write_json(folder, "tokenizer_config.json", {"added_tokens_decoder": listed})


def write_bert(folder: Path, class_name: str | None = "BertTokenizer", **settings: Any) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "world", "##s", "a", "b", "##b"]
    vocab = dict.fromkeys([*words, *"你好世界今天气很，！,.!'", "don", "t", "n", "s"])
    (folder / "vocab.txt").write_text("\n".join(vocab) + "\n", "utf-8")
    if class_name is not None:
        name_class(folder, class_name, **settings)


def write_sentencepiece(
    folder: Path,
    name: str = "spiece.model",
    class_name: str | None = "T5Tokenizer",
    **settings: Any,
) -> None:
    (folder / name).write_bytes(_sentencepiece_model(class_name in ("AlbertTokenizer",)))
    if class_name is not None:
        name_class(folder, class_name, **settings)


@cache
def _sentencepiece_model(with_roles: bool) -> bytes:
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
        control_symbols=["[CLS]", "[SEP]"] if with_roles else [],
        user_defined_symbols=["[MASK]"] if with_roles else [],
    )
    return trained.getvalue()


def write_bert_japanese(folder: Path) -> None:
    """One that transformers has in Python only."""
    kind = {"word_tokenizer_type": "basic", "subword_tokenizer_type": "wordpiece"}
    write_bert(folder, "BertJapaneseTokenizer", **kind)


def write_as_json(folder: Path, write: Callable[[Path], None], class_name: str) -> None:
    """What transformers saves of a tokenizer: a tokenizer.json, and tokenizer_config.json."""
    import transformers

    write(folder)
    opened = getattr(transformers, class_name).from_pretrained(folder)
    for file in folder.iterdir():
        file.unlink()
    opened.save_pretrained(folder)


def _spm(class_name: str, file: str = "spiece.model") -> Callable[[Path], None]:
    return lambda folder: write_sentencepiece(folder, file, class_name)


_BPE_FILE = "sentencepiece.bpe.model"
# What is in the folder, and the class of transformers that reads it.
KINDS: dict[str, tuple[Callable[[Path], None], str]] = {
    "tokenizer.json": (write_tokenizer_json, "GPT2Tokenizer"),
    "tokenizer.json, fast": (
        lambda f: write_tokenizer_json(f, "GPT2TokenizerFast"),
        "GPT2Tokenizer",
    ),
    "as stored": (
        lambda f: write_tokenizer_json(f, "PreTrainedTokenizerFast"),
        "PreTrainedTokenizerFast",
    ),
    "vocab and merges": (write_vocab_and_merges, "GPT2Tokenizer"),
    "added tokens": (write_added_tokens, "GPT2Tokenizer"),
    "added_tokens_decoder": (write_added_tokens_decoder, "GPT2Tokenizer"),
    "roberta": (lambda f: write_vocab_and_merges(f, "RobertaTokenizer"), "RobertaTokenizer"),
    "qwen2": (lambda f: write_vocab_and_merges(f, "Qwen2Tokenizer"), "Qwen2Tokenizer"),
    "gpt-neox": (lambda f: write_tokenizer_json(f, "GPTNeoXTokenizerFast"), "GPTNeoXTokenizer"),
    "bert": (write_bert, "BertTokenizer"),
    "bert cased": (lambda f: write_bert(f, do_lower_case=False), "BertTokenizer"),
    "bert, other settings": (
        lambda f: write_bert(f, tokenize_chinese_chars=False, strip_accents=False),
        "BertTokenizer",
    ),
    "bert, tokenizer.json": (
        lambda f: write_as_json(f, write_bert, "BertTokenizer"),
        "BertTokenizer",
    ),
    "electra": (lambda f: write_bert(f, "ElectraTokenizerFast"), "BertTokenizer"),
    "distilbert": (lambda f: write_bert(f, "DistilBertTokenizer"), "DistilBertTokenizer"),
    "bert japanese": (write_bert_japanese, "BertJapaneseTokenizer"),
    "albert": (_spm("AlbertTokenizer"), "AlbertTokenizer"),
    "big bird": (_spm("BigBirdTokenizer"), "BigBirdTokenizer"),
    "cpm": (_spm("CpmTokenizer"), "CpmTokenizer"),
    "gpt-sw3": (_spm("GPTSw3Tokenizer"), "GPTSw3Tokenizer"),
    "t5": (_spm("T5Tokenizer"), "T5Tokenizer"),
    "t5, tokenizer.json": (
        lambda f: write_as_json(f, write_sentencepiece, "T5Tokenizer"),
        "T5Tokenizer",
    ),
    "xlnet": (_spm("XLNetTokenizer"), "XLNetTokenizer"),
    "barthez": (_spm("BarthezTokenizer", _BPE_FILE), "BarthezTokenizer"),
    "camembert": (_spm("CamembertTokenizer", _BPE_FILE), "CamembertTokenizer"),
    "xlm-r": (_spm("XLMRobertaTokenizer", _BPE_FILE), "XLMRobertaTokenizer"),
}


def reopened(folder: Path, tokenizer: tokenizers.Tokenizer) -> Tokenizer:
    """Read as it stands."""
    name_class(folder, "PreTrainedTokenizerFast")
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer_at(folder)


def library() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(json.dumps(BUNDLED_JSON))
