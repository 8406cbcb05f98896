"""TokenizerBackend: one tokenizer library, and its two kinds: the tokenizers library's, and those
that transformers has in Python only."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from fastgen.errors import OptionError
from fastgen.text.detokenizer import ByteLevelDecoder, Detokenizer, WindowDecoder
from fastgen.text.tokenizer_files import is_librarys

_BYTE_PIECE = re.compile("<0x([0-9A-Fa-f]{2})>")


class TokenizerBackend(Protocol):
    """One tokenizer library. All ids and texts are plain Python.

    `roles`: the special tokens that have a role ("bos_token", ...), as texts.
    """

    roles: Mapping[str, str]

    def encode(self, texts: list[str], *, add_special_tokens: bool = False) -> list[list[int]]: ...
    def decode(self, token_ids: Sequence[int]) -> str: ...
    def decode_all(self, token_ids: Sequence[int]) -> str: ...
    def detokenizer(self) -> Detokenizer: ...
    def token_text(self, token_id: int) -> str: ...
    def token_bytes(self, token_id: int) -> bytes: ...
    @property
    def max_chars_per_token(self) -> int | None: ...


class FastBackend:
    """A `tokenizers.Tokenizer`."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, roles: Mapping[str, str]) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer, self.roles = tokenizer, roles
        added = tokenizer.get_added_tokens_decoder()
        self._special = {i: self.token_text(i) for i in added if self._is_left_out(i)}
        self._byte_level = isinstance(tokenizer.decoder, decoders.ByteLevel)
        self._bytes: dict[int, bytes] = dict.fromkeys(self._special, b"")

    def encode(self, texts: list[str], *, add_special_tokens: bool = False) -> list[list[int]]:
        encode = self._tokenizer.encode_batch_fast
        try:
            encoded = encode(texts, add_special_tokens=add_special_tokens)
        except BaseException as error:
            if not is_librarys(error):
                raise
            raise OptionError(f"the tokenizer cannot encode this: {error}", "text") from error
        return [item.ids for item in encoded]

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def decode_all(self, token_ids: Sequence[int]) -> str:
        """With special tokens written out."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=False)

    def detokenizer(self) -> Detokenizer:
        if self._byte_level:
            return ByteLevelDecoder(self._token_bytes, self._special_text)
        return WindowDecoder(self, self._special)

    def token_text(self, token_id: int) -> str:
        return self.decode_all([token_id])

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

    def _is_left_out(self, token_id: int) -> bool:
        """Of a token that is special, or was when it was first added."""
        return not self.decode([token_id]) and bool(self.decode_all([token_id]))

    def _special_text(self, token_id: int) -> str:
        return self._special.get(token_id, "")

    def _token_bytes(self, token_id: int) -> bytes:
        """Bytes of a byte-level token; of an id the tokenizer does not know (padding): none."""
        known = self._bytes.get(token_id)
        if known is None:
            known = _byte_level_bytes(self._tokenizer.id_to_token(token_id) or "")
            self._bytes[token_id] = known
        return known


class TransformersBackend:
    """A tokenizer written in Python within transformers."""

    max_chars_per_token = None

    def __init__(self, tokenizer: Any, roles: Mapping[str, str]) -> None:
        self._tokenizer, self.roles = tokenizer, roles
        ids = tokenizer.all_special_ids
        self._special = dict(zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True))

    def encode(self, texts: list[str], *, add_special_tokens: bool = False) -> list[list[int]]:
        encode = self._tokenizer.encode
        return [encode(text, add_special_tokens=add_special_tokens) for text in texts]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Without transformers' clean-up of spaces: it would take back what a stream has shown."""
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return str(self._tokenizer.decode(list(token_ids), **options))

    def decode_all(self, token_ids: Sequence[int]) -> str:
        """With special tokens written out."""
        return str(self._tokenizer.decode(list(token_ids), clean_up_tokenization_spaces=False))

    def detokenizer(self) -> Detokenizer:
        return WindowDecoder(self, self._special)

    def token_text(self, token_id: int) -> str:
        return str(self._tokenizer.decode([token_id]))

    def token_bytes(self, token_id: int) -> bytes:
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        return _bytes_of(self.token_text(token_id), piece)


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
