"""Log-probabilities in the form that completions have them: lists beside each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from fastgen.results import TokenLogprobs
from fastgen.text.detokenizer import TextSink
from fastgen.text.tokenizer import Tokenizer


class LogprobsWriter:
    """Writes one choice's tokens down, at once or as they come. Offsets are in characters of the
    choice's text: where the text stood when the token came.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._begin_text(0)
        self._clear()

    def skip(self, text: str) -> None:
        """Text before the first token, whether or not the choice shows it."""
        self._offset += len(text)

    def add_prompt(
        self, text: str, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None]
    ) -> None:
        """A prompt that is shown as this text; the tokens after it are a text of their own."""
        for token_id, own in zip(token_ids, logprobs, strict=True):
            at = self._offset
            self._add(token_id, own)
            if self._offset == at:  # a special one, as its caller wrote it
                self._offset += self._length_at(at, text, token_id)
        self._begin_text(len(text))

    def add(self, logprobs: Iterable[TokenLogprobs]) -> None:
        for own in logprobs:
            self._add(own.token_id, own)

    def take(self) -> dict[str, Any]:
        """What has been added since the last time."""
        taken = {
            "tokens": self._tokens,
            "token_logprobs": self._logprobs,
            "top_logprobs": self._top,
            "text_offset": self._offsets,
        }
        self._clear()
        return taken

    def _begin_text(self, offset: int) -> None:
        self._sink: TextSink | None = None if self._tokenizer is None else self._tokenizer.sink()
        self._offset = offset

    def _clear(self) -> None:
        self._tokens: list[str] = []
        self._logprobs: list[float | None] = []
        self._top: list[dict[str, float] | None] = []
        self._offsets: list[int] = []

    def _add(self, token_id: int, own: TokenLogprobs | None) -> None:
        self._tokens.append(shown_token(self._tokenizer, token_id))
        self._logprobs.append(None if own is None else own.logprob)
        self._top.append(None if own is None else self._best(own))
        self._offsets.append(self._offset)
        if self._sink is not None:
            self._sink.push(token_id)
            self._offset += len(self._sink.take())

    def _best(self, own: TokenLogprobs) -> dict[str, float]:
        """The most likely tokens, and this one. No two have the same key."""
        best: dict[str, float] = {}
        chosen = shown_token(self._tokenizer, own.token_id)
        for token_id, logprob in own.top:
            if token_id == own.token_id:
                best[chosen] = own.logprob
                continue
            key = shown_token(self._tokenizer, token_id)
            best[_by_id(token_id) if key in best or key == chosen else key] = logprob
        best.setdefault(chosen, own.logprob)
        return best

    def _length_at(self, at: int, text: str, token_id: int) -> int:
        """Characters of a token that the text has there; 0 for a part of a character."""
        token = "" if self._tokenizer is None else self._tokenizer.token_text(token_id)
        return len(token) if "\ufffd" not in token and text.startswith(token, at) else 0


def shown_token(tokenizer: Tokenizer | None, token_id: int) -> str:
    r"""A token as OpenAI's answers show it: its text, or `bytes:\xe2\x80` for bytes that are only
    parts of characters. Of these, letters and other signs of ASCII stand as they are."""
    if tokenizer is None:
        return _by_id(token_id)
    shown = tokenizer.token_bytes(token_id)
    try:
        return shown.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(map(_shown_byte, shown))


def _shown_byte(byte: int) -> str:
    is_plain = 0x20 <= byte < 0x7F and byte != ord("\\")
    return chr(byte) if is_plain else f"\\x{byte:02x}"


def _by_id(token_id: int) -> str:
    return f"token_id:{token_id}"
