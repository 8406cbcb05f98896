"""Tokenizer: text to token ids and back.

Fast tokenizer files run in the `tokenizers` library; vocabularies that only transformers can read
(BERT's, sentencepiece's) are opened through it when it is installed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from fastgen.checkpoints.files import checked_file, holds, read_json
from fastgen.errors import CheckpointError, OptionError, OptionTypeError, shown
from fastgen.text.detokenizer import ByteLevelDecoder, Detokenizer, TextSink, WindowDecoder

# Tokenizer classes that transformers may be asked for by name: data readers, no remote code.
_TRANSFORMERS_CLASSES = (
    "AlbertTokenizer",
    "AlbertTokenizerFast",
    "BertJapaneseTokenizer",
    "BertTokenizer",
    "BertTokenizerFast",
    "CpmTokenizer",
    "GPT2Tokenizer",
    "GPT2TokenizerFast",
    "PreTrainedTokenizerFast",
    "T5Tokenizer",
    "T5TokenizerFast",
    "XLMRobertaTokenizer",
    "XLMRobertaTokenizerFast",
    "XLNetTokenizer",
    "XLNetTokenizerFast",
)
_BYTE_PIECE = re.compile("<0x([0-9A-Fa-f]{2})>")
_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_CLASS_BY_FILE = {
    "vocab.txt": "BertTokenizer",
    "spiece.model": "T5Tokenizer",
    "sentencepiece.bpe.model": "XLMRobertaTokenizer",
}


class TokenizerBackend(Protocol):
    """One tokenizer library. All ids and texts are plain Python."""

    def encode(self, texts: list[str]) -> list[list[int]]: ...
    def decode(self, token_ids: Sequence[int]) -> str: ...
    def decode_all(self, token_ids: Sequence[int]) -> str: ...
    def detokenizer(self) -> Detokenizer: ...
    def token_text(self, token_id: int) -> str: ...
    def token_bytes(self, token_id: int) -> bytes: ...
    @property
    def max_chars_per_token(self) -> int | None: ...


class Tokenizer:
    """One model's tokenizer. Prompts are encoded as they stand: no special token is added, but one
    that is written out in the text, such as `<|endoftext|>`, becomes its id (as in transformers).
    """

    def __init__(self, backend: TokenizerBackend) -> None:
        self._backend = backend

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer | None:
        """The tokenizer whose files lie in `folder`; None if there are none.

        Raises:
            CheckpointError: a file is there but cannot be used; says why.
        """
        if holds(folder, "tokenizer.json"):
            return cls(_FastBackend(_open_tokenizer_json(folder)))
        if holds(folder, "vocab.json") and holds(folder, "merges.txt"):
            return cls(_FastBackend(_open_vocab_and_merges(folder)))
        return _open_with_transformers(folder)

    def encode(self, texts: list[str], max_tokens: int | None = None) -> list[list[int]]:
        """Token ids of each text; the GIL is released while it runs.

        Raises:
            TypeError, ValueError: not a string, not valid Unicode, or certainly longer than
                `max_tokens` tokens (found before any work is done on it).
        """
        for text in texts:
            self._check_text(text, max_tokens)
        return self._backend.encode(texts)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ids, without special tokens, or with them written out."""
        if skip_special_tokens:
            return self._backend.decode(token_ids)
        return self._backend.decode_all(token_ids)

    def token_text(self, token_id: int) -> str:
        """One token as text, special ones written out; for showing to people."""
        return self._backend.token_text(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """What `token_text` shows, in UTF-8. A token that is only a part of a character has bytes
        that are not valid UTF-8."""
        return self._backend.token_bytes(token_id)

    def sink(self, stop: Sequence[str] = (), *, include_stop: bool = False) -> TextSink:
        """A TextSink for one row."""
        return TextSink(self._backend.detokenizer(), stop, include_stop=include_stop)

    def _check_text(self, text: Any, max_tokens: int | None) -> None:
        if not isinstance(text, str):
            told = f"text must be a string, not {type(text).__name__}"
            raise OptionTypeError(told, "text")
        if max_tokens is not None and len(text) > max_tokens:
            longest = self._backend.max_chars_per_token
            if longest is not None and len(text) > max_tokens * longest:
                raise OptionError(
                    f"the text has {len(text)} characters: more than {max_tokens} tokens, "
                    f"the most that fits, even at {longest} characters a token",
                    "text",
                )
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise OptionError(
                f"the text is not valid Unicode: a lone surrogate at character {error.start}",
                "text",
            ) from None


class _FastBackend:
    """A `tokenizers.Tokenizer`."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._special = {token_id for token_id, token in added.items() if token.special}
        self._byte_level = isinstance(tokenizer.decoder, decoders.ByteLevel)
        self._bytes: dict[int, bytes] = dict.fromkeys(self._special, b"")

    def encode(self, texts: list[str]) -> list[list[int]]:
        try:
            encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except BaseException as error:
            if not _is_librarys(error):
                raise
            raise OptionError(f"the tokenizer cannot encode this: {error}", "text") from error
        return [item.ids for item in encoded]

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def decode_all(self, token_ids: Sequence[int]) -> str:
        """With special tokens written out."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=False)

    def detokenizer(self) -> Detokenizer:
        return ByteLevelDecoder(self._token_bytes) if self._byte_level else WindowDecoder(self)

    def token_text(self, token_id: int) -> str:
        return self._tokenizer.decode([token_id], skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        if self._byte_level and token_id not in self._special:
            return self._token_bytes(token_id)
        return _bytes_of(self.token_text(token_id), self._tokenizer.id_to_token(token_id))

    @cached_property
    def max_chars_per_token(self) -> int | None:
        """Only where no text can vanish: byte-level all through, and every byte has a token."""
        tokenizer, vocab = self._tokenizer, self._tokenizer.get_vocab(True)
        added = tokenizer.get_added_tokens_decoder().values()
        lossless = (
            self._byte_level
            and tokenizer.normalizer is None
            and isinstance(tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel)
            and isinstance(tokenizer.model, models.BPE)
            and vocab.keys() >= _BYTE_OF.keys()
            and not any(token.lstrip or token.rstrip for token in added)
        )
        return max(map(len, vocab)) if lossless else None

    def _token_bytes(self, token_id: int) -> bytes:
        """Bytes of a byte-level token; of an id the tokenizer does not know (padding): none."""
        known = self._bytes.get(token_id)
        if known is None:
            known = _byte_level_bytes(self._tokenizer.id_to_token(token_id) or "")
            self._bytes[token_id] = known
        return known


class _TransformersBackend:
    """A tokenizer written in Python within transformers."""

    max_chars_per_token = None

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [self._tokenizer.encode(text, add_special_tokens=False) for text in texts]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Without transformers' clean-up of spaces: it would take back what a stream has shown."""
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return str(self._tokenizer.decode(list(token_ids), **options))

    def decode_all(self, token_ids: Sequence[int]) -> str:
        """With special tokens written out."""
        return str(self._tokenizer.decode(list(token_ids), clean_up_tokenization_spaces=False))

    def detokenizer(self) -> Detokenizer:
        return WindowDecoder(self)

    def token_text(self, token_id: int) -> str:
        return str(self._tokenizer.decode([token_id]))

    def token_bytes(self, token_id: int) -> bytes:
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        return _bytes_of(self.token_text(token_id), piece)


def _open_tokenizer_json(folder: Path) -> tokenizers.Tokenizer:
    path = checked_file(folder, "tokenizer.json")
    _check_merges(folder)
    return _parsed(path, lambda: tokenizers.Tokenizer.from_file(str(path)))


def _open_vocab_and_merges(folder: Path) -> tokenizers.Tokenizer:
    """GPT-2's own files: a byte-level BPE vocabulary and its merges."""
    vocab, merges = checked_file(folder, "vocab.json"), checked_file(folder, "merges.txt")
    settings = _tokenizer_config(folder)
    if "added_tokens_decoder" not in settings:  # as before transformers 4.34
        settings |= _json_object(folder, "special_tokens_map.json")
    add_prefix_space = settings.get("add_prefix_space") is True

    def build() -> tokenizers.Tokenizer:
        tokenizer = tokenizers.Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
        tokenizer.decoder = decoders.ByteLevel()
        names = {_token_text(settings.get(f"{role}_token")) for role in _ROLES}
        special = sorted({name for name in names if name} | {"<|endoftext|>"})
        tokenizer.add_special_tokens([t for t in special if tokenizer.token_to_id(t) is not None])
        for token_id, token in sorted(_added_tokens(folder, settings, special).items()):
            tokenizer.add_tokens([token])
            if tokenizer.token_to_id(token.content) != token_id:
                raise ValueError(f"added token {token.content!r} cannot have id {token_id}")
        return tokenizer

    return _parsed(f"{vocab}, {merges.name}", build)


def _added_tokens(
    folder: Path, settings: dict[str, Any], special: Sequence[str]
) -> dict[int, tokenizers.AddedToken]:
    """Tokens that do not stand in vocab.json, by id."""
    if "added_tokens_decoder" in settings:
        listed = settings["added_tokens_decoder"].items()
        return {int(token_id): tokenizers.AddedToken(**token) for token_id, token in listed}
    return {
        token_id: tokenizers.AddedToken(content, special=content in special)
        for content, token_id in _json_object(folder, "added_tokens.json").items()
    }


def _parsed(path: Path | str, build: Any) -> tokenizers.Tokenizer:
    try:
        tokenizer: tokenizers.Tokenizer = build()
    except BaseException as error:  # bare Exception for what it cannot parse, or a Rust panic
        if not _is_librarys(error):
            raise
        raise CheckpointError(f"{path}: not a usable tokenizer: {error}") from error
    return tokenizer


def _is_librarys(error: BaseException) -> bool:
    """Not Ctrl-C and the like: a bare Exception, or a Rust panic, which is a BaseException."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _check_merges(folder: Path) -> None:
    """What a merge cuts off must be there: elsewhere the library may cut within a character, and
    abort the process. The file is strict JSON, so that the library sees what is checked here.
    """
    data = read_json(folder, "tokenizer.json")
    model = data.get("model") if isinstance(data, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("merges"), list):
        return
    prefix = model.get("continuing_subword_prefix") or ""
    for merge in model["merges"] if prefix else ():
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not (isinstance(parts, list) and parts and str(parts[-1]).startswith(str(prefix))):
            raise CheckpointError(
                f"{folder}/tokenizer.json: not a usable tokenizer: merge {shown(merge)} does not "
                f"have the continuing_subword_prefix {shown(prefix)}"
            )


def _open_with_transformers(folder: Path) -> Tokenizer | None:
    found = [name for name in _CLASS_BY_FILE if holds(folder, name)]
    class_name = _tokenizer_config(folder).get("tokenizer_class")
    if not found:
        return None
    if class_name not in _TRANSFORMERS_CLASSES:
        class_name = _CLASS_BY_FILE[found[0]]
    path = checked_file(folder, found[0])
    try:
        import transformers
    except ImportError:
        raise CheckpointError(
            f"{path}: this tokenizer ({class_name}) needs transformers: pip install 'fastgen[hf]'"
        ) from None
    try:
        opened = getattr(transformers, class_name).from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever transformers meets in the files
        raise CheckpointError(f"{path}: {class_name} cannot read it: {error}") from error
    fast = getattr(opened, "backend_tokenizer", None)
    return Tokenizer(_FastBackend(fast) if fast is not None else _TransformersBackend(opened))


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    return _json_object(folder, "tokenizer_config.json")


def _json_object(folder: Path, name: str) -> dict[str, Any]:
    """Of a file that need not be there."""
    if not holds(folder, name):
        return {}
    value = read_json(folder, name)
    if not isinstance(value, dict):
        raise CheckpointError(f"{folder / name}: must hold a JSON object")
    return value


def _token_text(value: Any) -> str | None:
    """A special token is written as a string, or as an object with its content."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def _bytes_of(text: str, piece: str | None) -> bytes:
    """Of a token that is shown as this text; sentencepiece writes a single byte as `<0xNN>`."""
    byte = _BYTE_PIECE.fullmatch(piece or "")
    return bytes.fromhex(byte[1]) if byte and text == "\ufffd" else text.encode("utf-8", "replace")


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes(_BYTE_OF[character] for character in token)
    except KeyError:  # not written in the byte alphabet: the token stands for its own text
        return token.encode("utf-8", errors="replace")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: itself where printable, else from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
