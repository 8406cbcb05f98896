"""Which class of transformers reads a folder's tokenizer, and how: here, or in transformers.

The class is the one that transformers' AutoTokenizer takes for a GPT-2: the one that
tokenizer_config.json or config.json names, else GPT2Tokenizer. A class decides how text is cut up
before its vocabulary is looked at, also where a tokenizer.json says otherwise; so each class is
known here by name, with the files that it reads, and any other is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from fastgen.errors import CheckpointError, shown
from fastgen.text.backends import FastBackend, TokenizerBackend, TransformersBackend
from fastgen.text.special_tokens import add_special_tokens, special_tokens
from fastgen.text.tokenizer_files import JSON_FILE, TokenizerFiles, usable

_GPT2, _BERT = "GPT2Tokenizer", "BertTokenizer"
_STORED = "TokenizersBackend"  # reads tokenizer.json as it stands
# Read by the class `_STORED`, whatever the model: the class's names before and since version 5.
_ALIASES = {
    **dict.fromkeys(("PreTrainedTokenizer", "PythonBackend", "BloomTokenizer"), _STORED),
    "ElectraTokenizer": _BERT,
}
# The files that each class reads where there is no tokenizer.json. All but the first three are
# opened by transformers: data readers, no remote code.
_FILES_OF = {
    _GPT2: ("vocab.json", "merges.txt"),
    _BERT: ("vocab.txt",),
    _STORED: (JSON_FILE,),
    "AlbertTokenizer": ("spiece.model",),
    "BarthezTokenizer": ("sentencepiece.bpe.model",),
    "BertJapaneseTokenizer": ("vocab.txt",),
    "BigBirdTokenizer": ("spiece.model",),
    "CamembertTokenizer": ("sentencepiece.bpe.model",),
    "CpmTokenizer": ("spiece.model",),
    "DistilBertTokenizer": ("vocab.txt",),
    "GPTNeoXTokenizer": (JSON_FILE,),
    "GPTSw3Tokenizer": ("spiece.model",),
    "Qwen2Tokenizer": ("vocab.json", "merges.txt"),
    "RobertaTokenizer": ("vocab.json", "merges.txt"),
    "T5Tokenizer": ("spiece.model",),
    "XLMRobertaTokenizer": ("sentencepiece.bpe.model",),
    "XLNetTokenizer": ("spiece.model",),
}
# Where there is no tokenizer.json, transformers reads one of these in place of a class's own file.
_READ_INSTEAD = ("tekken.json", "tokenizer.model", "tiktoken.model")


def open_backend(files: TokenizerFiles) -> TokenizerBackend | None:
    """The tokenizer of a folder; None if there is no vocabulary in it.

    Raises:
        CheckpointError: a file is there but cannot be used, or not by the class that is named.
    """
    if not files.vocabularies:
        return None
    for name in files.vocabularies:
        files.path(name)
    class_name = _known_class(files)
    _check_files(files, class_name)
    if class_name in (_GPT2, _BERT, _STORED):
        return FastBackend(usable(_where(files, class_name), lambda: _built(files, class_name)))
    return _opened_by_transformers(files, class_name)


def _known_class(files: TokenizerFiles) -> str:
    name = _GPT2 if files.class_name is None else files.class_name
    name = _ALIASES.get(name, name)
    if name in _FILES_OF:
        return name
    if files.holds(JSON_FILE) and _is_unknown_to_transformers(name):
        return _STORED  # as transformers does
    raise CheckpointError(
        f"{files.folder / files.vocabularies[0]}: tokenizer_class {shown(name)} is not supported"
    )


def _is_unknown_to_transformers(name: str) -> bool:
    try:
        import transformers  # noqa: F401
        from transformers.models.auto.tokenization_auto import tokenizer_class_from_name
    except ImportError:
        return False
    return name.isidentifier() and tokenizer_class_from_name(name) is None


def _check_files(files: TokenizerFiles, class_name: str) -> None:
    """A class without its file would make up an empty vocabulary."""
    if files.holds(JSON_FILE):
        return
    needed = _FILES_OF[class_name]
    found, first = " and ".join(files.vocabularies), files.folder / files.vocabularies[0]
    missing = [name for name in needed if not files.holds(name)]
    if missing and files.class_name is None and not {*needed} & {*files.vocabularies}:
        raise CheckpointError(
            f"{first}: neither tokenizer_config.json nor config.json names the tokenizer_class "
            "that reads it"
        )
    if missing:
        raise CheckpointError(
            f"{files.folder}: holds {found}, but no {' and no '.join(missing)}, which "
            f"{class_name} reads"
        )
    instead = [name for name in _READ_INSTEAD if files.holds(name) and name not in needed]
    if instead:
        raise CheckpointError(
            f"{files.folder / instead[0]}: is not read by {class_name}, and {found} are there, too"
        )


def _where(files: TokenizerFiles, class_name: str) -> str:
    names = (JSON_FILE,) if files.holds(JSON_FILE) else _FILES_OF[class_name]
    return f"{files.folder}/{', '.join(names)}"


def _built(files: TokenizerFiles, class_name: str) -> tokenizers.Tokenizer:
    """As the class's own constructor in transformers makes it."""
    if class_name == _GPT2:
        tokenizer, defaults = _gpt2(files)
    elif class_name == _BERT:
        tokenizer, defaults = _bert(files)
    else:
        tokenizer, defaults = _as_stored(files)
    add_special_tokens(tokenizer, special_tokens(files, defaults))
    tokenizer.encode_special_tokens = files.settings.get("split_special_tokens") is True
    return tokenizer


def _gpt2(files: TokenizerFiles) -> tuple[tokenizers.Tokenizer, Mapping[str, Any]]:
    """Byte-level BPE. Of a tokenizer.json only the vocabulary and merges count."""
    if files.holds(JSON_FILE):
        model = _plain_bpe(files)
    else:
        model = models.BPE.from_file(*(str(files.path(name)) for name in _FILES_OF[_GPT2]))
    tokenizer = tokenizers.Tokenizer(model)
    spaced = files.settings.get("add_prefix_space") is True
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=spaced)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")


def _plain_bpe(files: TokenizerFiles) -> models.BPE:
    """The model of tokenizer.json without the options that GPT2Tokenizer does not take over."""
    model: models.BPE = _stored_model(files, models.BPE, _GPT2)
    if model.continuing_subword_prefix or model.end_of_word_suffix:
        return models.BPE(*_vocab_and_merges(files))
    model.dropout = model.unk_token = None
    model.fuse_unk = model.byte_fallback = model.ignore_merges = False
    return model


def _vocab_and_merges(files: TokenizerFiles) -> tuple[dict[str, int], list[tuple[str, str]]]:
    stored = files.stored_json["model"]
    merges = [m.split(" ") if isinstance(m, str) else m for m in stored["merges"]]
    return stored["vocab"], [(first, second) for first, second in merges]


def _bert(files: TokenizerFiles) -> tuple[tokenizers.Tokenizer, Mapping[str, Any]]:
    """WordPiece. Of a tokenizer.json only the vocabulary counts."""
    settings = files.settings
    unknown = settings.get("unk_token", "[UNK]")
    unknown = str(unknown["content"] if isinstance(unknown, dict) else unknown)
    if files.holds(JSON_FILE):
        _stored_model(files, models.WordPiece, _BERT)
        model = models.WordPiece(files.stored_json["model"]["vocab"], unk_token=unknown)
    else:
        model = models.WordPiece.from_file(str(files.path("vocab.txt")), unk_token=unknown)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        strip_accents=settings.get("strip_accents"),
        lowercase=settings.get("do_lower_case", True),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    roles = ("unk", "sep", "pad", "cls", "mask")
    return tokenizer, {f"{role}_token": f"[{role.upper()}]" for role in roles}


def _as_stored(files: TokenizerFiles) -> tuple[tokenizers.Tokenizer, Mapping[str, Any]]:
    padding = files.stored.padding
    return files.stored, {} if padding is None else {"pad_token": padding["pad_token"]}


def _stored_model(files: TokenizerFiles, kind: type[Any], class_name: str) -> Any:
    """The model of tokenizer.json, which must be of the class's kind."""
    model = files.stored.model
    if not isinstance(model, kind):
        raise CheckpointError(
            f"{files.folder}/{JSON_FILE}: holds a model of the kind {type(model).__name__}, which "
            f"{class_name} does not read; a tokenizer_class of PreTrainedTokenizerFast in "
            "tokenizer_config.json has the file read as it stands"
        )
    return model


def _opened_by_transformers(files: TokenizerFiles, class_name: str) -> TokenizerBackend:
    names = [name for name in _FILES_OF[class_name] if files.holds(name)] or [JSON_FILE]
    path = files.path(names[0])
    try:
        import transformers
    except ImportError:
        raise CheckpointError(
            f"{path}: this tokenizer ({class_name}) needs transformers: pip install 'fastgen[hf]'"
        ) from None
    for name in ("special_tokens_map.json", "added_tokens.json"):
        files.json_object(name)  # transformers reads them, too
    try:
        kind = getattr(transformers, class_name)
        opened = kind.from_pretrained(files.folder, local_files_only=True)
    except Exception as error:  # whatever transformers meets in the files
        raise CheckpointError(f"{path}: {class_name} cannot read it: {error}") from error
    plain = transformers.PreTrainedTokenizerFast
    if isinstance(opened, plain) and all(
        getattr(kind, method) is getattr(plain, method) for method in ("_encode_plus", "_decode")
    ):
        return FastBackend(opened.backend_tokenizer)
    return TransformersBackend(opened)
