"""Tokenizer: text to token ids and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastgen.errors import OptionError, OptionTypeError
from fastgen.text.backends import TokenizerBackend
from fastgen.text.detokenizer import TextSink
from fastgen.text.tokenizer_classes import open_backend
from fastgen.text.tokenizer_files import TokenizerFiles


class Tokenizer:
    """One model's tokenizer. Prompts are encoded as they stand: no special token is added, but one
    that is written out in the text, such as `<|endoftext|>`, becomes its id (as in transformers).

    Attributes:
        chat_template: the Jinja source for chats that lies beside it; None if there is none.
    """

    def __init__(self, backend: TokenizerBackend, chat_template: str | None = None) -> None:
        self._backend, self.chat_template = backend, chat_template

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer | None:
        """The tokenizer whose files lie in `folder`; None if there are none.

        Raises:
            CheckpointError: a file is there but cannot be used, or not as transformers' class that
                the folder names would use it; says why.
        """
        files = TokenizerFiles(folder)
        backend = open_backend(files)
        return None if backend is None else cls(backend, files.chat_template())

    @property
    def roles(self) -> Mapping[str, str]:
        """Texts of the special tokens that have a role, by role: "bos_token", "pad_token", ..."""
        return self._backend.roles

    def encode(
        self, texts: list[str], max_tokens: int | None = None, *, add_special_tokens: bool = False
    ) -> list[list[int]]:
        """Token ids of each text; the GIL is released while it runs.

        Args:
            texts: a string each.
            max_tokens: the most that are of use, if anything bounds them.
            add_special_tokens: add those that transformers' tokenizer adds by default: none for a
                GPT-2's usual files, `[CLS]` and `[SEP]` for BERT's.

        Raises:
            OptionTypeError, OptionError: not a string, not valid Unicode, or certainly longer than
                `max_tokens` tokens (found before any work is done on it).
        """
        for text in texts:
            self._check_text(text, max_tokens)
        return self._backend.encode(texts, add_special_tokens=add_special_tokens)

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
