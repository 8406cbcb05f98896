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
        """Text before the first token."""
        self._offset += len(text)

    def add_prompt(
        self, text: str, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None]
    ) -> None:
        """A prompt that is shown as this text; the tokens after it are a text of their own."""
        for token_id, own in zip(token_ids, logprobs, strict=True):
            at = self._offset
            self._add(token_id, own)
            if self._offset == at and _stands_at(at, text, self._text(token_id)):
                self._offset += len(self._text(token_id))  # a special one, as its caller wrote it
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
        self._tokens.append(self._text(token_id))
        self._logprobs.append(None if own is None else own.logprob)
        self._top.append(None if own is None else self._best(own))
        self._offsets.append(self._offset)
        if self._sink is not None:
            self._sink.push(token_id)
            self._offset += len(self._sink.take())

    def _best(self, own: TokenLogprobs) -> dict[str, float]:
        """Of tokens with the same text, the likeliest."""
        best: dict[str, float] = {}
        for token_id, logprob in own.top:
            best.setdefault(self._text(token_id), logprob)
        return best

    def _text(self, token_id: int) -> str:
        if self._tokenizer is None:
            return f"token_id:{token_id}"
        return self._tokenizer.token_text(token_id)


def _stands_at(at: int, text: str, token: str) -> bool:
    """Whether the text has this token there; False for a part of a character."""
    return "\ufffd" not in token and text.startswith(token, at)
