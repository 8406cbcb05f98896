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
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from fastgen.errors import CheckpointError, shown
from fastgen.text.backends import FastBackend, TokenizerBackend, TransformersBackend
from fastgen.text.special_tokens import ROLES, add_special_tokens, special_tokens
from fastgen.text.tokenizer_files import JSON_FILE, TokenizerFiles, usable

_GPT2, _BERT = "GPT2Tokenizer", "BertTokenizer"
_STORED = "TokenizersBackend"  # reads tokenizer.json as it stands
Roles = Mapping[str, str]  # special tokens as texts, by role
# The tokens of roles that no file names.
_GPT2_TOKENS = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
_BERT_TOKENS = {
    f"{role}_token": f"[{role.upper()}]" for role in ("unk", "sep", "pad", "cls", "mask")
}
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
        return usable(_where(files, class_name), lambda: _built(files, class_name))
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


def _built(files: TokenizerFiles, class_name: str) -> FastBackend:
    """As the class's own constructor in transformers makes it."""
    build, defaults = {
        _GPT2: (_gpt2, _GPT2_TOKENS),
        _BERT: (_bert, _BERT_TOKENS),
        _STORED: (_as_stored, _padding_token(files) if class_name == _STORED else {}),
    }[class_name]
    tokens = special_tokens(files, defaults)
    tokenizer = build(files, tokens.roles)
    add_special_tokens(tokenizer, tokens)
    tokenizer.encode_special_tokens = files.switch("split_special_tokens", False)
    if class_name == _GPT2:
        tokenizer.post_processor = _gpt2_ends(files, tokenizer, tokens.roles)
    elif class_name == _BERT:
        tokenizer.post_processor = _bert_ends(tokenizer, tokens.roles)
    return FastBackend(tokenizer, tokens.roles)


def _gpt2(files: TokenizerFiles, roles: Roles) -> tokenizers.Tokenizer:
    """Byte-level BPE. Of a tokenizer.json only the vocabulary and merges count, and what it adds to
    a text."""
    if files.holds(JSON_FILE):
        model = _plain_bpe(files)
    else:
        model = models.BPE.from_file(*(str(files.path(name)) for name in _FILES_OF[_GPT2]))
    tokenizer = tokenizers.Tokenizer(model)
    spaced = files.switch("add_prefix_space", False)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=spaced)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _gpt2_ends(files: TokenizerFiles, tokenizer: tokenizers.Tokenizer, roles: Roles) -> Any:
    """What `add_special_tokens` adds to a text: what tokenizer.json says, else the settings."""
    if files.holds(JSON_FILE):
        return files.stored.post_processor
    begins, ends = (
        roles.get(role) if _is_on(files.settings.get(f"add_{role}")) else None
        for role in ("bos_token", "eos_token")
    )
    named = [token for token in (begins, ends) if token is not None]
    return _template(begins, ends, {token: _id(tokenizer, token, roles) for token in named})


def _is_on(setting: Any) -> bool:
    """A string is not a switch: it is a token with a name of its own."""
    return bool(setting) and not isinstance(setting, str)


def _id(tokenizer: tokenizers.Tokenizer, token: str, roles: Roles) -> int | None:
    """Of a token that cannot be added, since it is empty, that of the unknown token."""
    found = tokenizer.token_to_id(token)
    return tokenizer.token_to_id(roles.get("unk_token", "")) if found is None else found


def _template(
    begins: str | None, ends: str | None, ids: Mapping[str, int | None]
) -> processors.TemplateProcessing:
    parts = [f"{part}:0" for part in (begins, "$A", ends) if part is not None]
    return processors.TemplateProcessing(single=" ".join(parts), special_tokens=list(ids.items()))


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


def _bert(files: TokenizerFiles, roles: Roles) -> tokenizers.Tokenizer:
    """WordPiece. Of a tokenizer.json only the vocabulary counts."""
    unknown, strips = roles.get("unk_token", "None"), files.settings.get("strip_accents")
    if files.holds(JSON_FILE):
        _stored_model(files, models.WordPiece, _BERT)
        model = models.WordPiece(files.stored_json["model"]["vocab"], unk_token=unknown)
    else:
        model = models.WordPiece.from_file(str(files.path("vocab.txt")), unk_token=unknown)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=files.switch("tokenize_chinese_chars", True),
        strip_accents=None if strips is None else files.switch("strip_accents", False),
        lowercase=files.switch("do_lower_case", True),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return tokenizer


def _bert_ends(tokenizer: tokenizers.Tokenizer, roles: Roles) -> processors.TemplateProcessing:
    """`[CLS]` before a text and `[SEP]` after it; where a file says null, ids 2 and 3."""
    ids: dict[str, int | None] = {}
    for role, default in (("cls_token", 2), ("sep_token", 3)):
        token = roles.get(role)
        found = None if token is None else _id(tokenizer, token, roles)
        ids[str(token)] = default if found is None else found
    begins, ends = (str(roles.get(role)) for role in ("cls_token", "sep_token"))
    return _template(begins, ends, ids)


def _as_stored(files: TokenizerFiles, roles: Roles) -> tokenizers.Tokenizer:
    return files.stored


def _padding_token(files: TokenizerFiles) -> Roles:
    padding = files.stored.padding
    return {} if padding is None else {"pad_token": padding["pad_token"]}


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
    roles = {role: str(text) for role in ROLES if (text := getattr(opened, role)) is not None}
    plain = transformers.PreTrainedTokenizerFast
    if isinstance(opened, plain) and all(
        getattr(kind, method) is getattr(plain, method) for method in ("_encode_plus", "_decode")
    ):
        return FastBackend(opened.backend_tokenizer, roles)
    return TransformersBackend(opened, roles)
