"""Streams: one request's pieces, pulled by its reader."""

from __future__ import annotations

from abc import abstractmethod
from typing import Self

from fastgen.engine.engine import Engine
from fastgen.engine.requests import Request, Row
from fastgen.errors import StepFailedError, code_of, message_of
from fastgen.frontends.closing import Closing
from fastgen.results import Piece
from fastgen.text.detokenizer import TextSink


class PieceReader:
    """What one reader has read of a request's rows, and what is new. It never waits.

    `one_by_one`: each piece has one token, also where a step has given several. Otherwise a piece
    has all that is there, so that a reader who comes late has less to read.
    """

    def __init__(self, request: Request, *, one_by_one: bool = False) -> None:
        self._request, self._one_by_one = request, one_by_one
        self._read = [0] * len(request.rows)  # new tokens of each row that have been handed out
        self._ended = [False] * len(request.rows)

    @property
    def ended(self) -> bool:
        """Whether the last piece of every row has been handed out."""
        return all(self._ended)

    def has_pending(self) -> bool:
        return self.ended or any(self._is_new(row) for row in self._request.rows)

    def num_unread(self, row: Row) -> int:
        """Tokens of a row that wait for the reader; any thread may ask."""
        return len(row.token_ids) - row.prompt_len - self._read[row.index]

    def end(self) -> None:
        """Hand out nothing more."""
        self._ended = [True] * len(self._ended)

    def piece(self) -> Piece | None:
        """The next one; None if there is nothing new.

        Raises:
            StepFailedError: all has been handed out, and a step had failed.
        """
        for row in self._request.rows:
            if self._is_new(row):
                return self._take(row)
        if self.ended:
            raise_error(self._request)
        return None

    def _is_new(self, row: Row) -> bool:
        if self._ended[row.index]:
            return False
        return row.finish_reason is not None or self.num_unread(row) > 0

    def _take(self, row: Row) -> Piece:
        finish_reason = row.finish_reason  # first: all that it ends is there once it is set
        start = self._read[row.index]
        token_ids = tuple(row.token_ids[row.prompt_len + start :])
        if self._one_by_one and len(token_ids) > 1:
            token_ids, finish_reason = token_ids[:1], None
        self._read[row.index] += len(token_ids)
        logprobs = None
        if row.logprobs is not None:
            logprobs = tuple(row.logprobs[start : start + len(token_ids)])
        ended = self._ended[row.index] = finish_reason is not None
        error = row.error if ended else None
        return Piece(
            index=row.index,
            text=self._text(row, None if finish_reason else self._read[row.index]),
            token_ids=token_ids,
            logprobs=logprobs,
            finish_reason=finish_reason,
            stop_reason=row.stop_reason if ended else None,
            error=None if error is None else message_of(error),
            error_code=None if error is None else self._code(error),
        )

    def _text(self, row: Row, num_tokens: int | None) -> str:
        """What is new of a row's text; `num_tokens`: only as far as so many tokens gave it."""
        if not isinstance(row.sink, TextSink):
            return ""
        return row.sink.take(num_tokens if self._one_by_one else None)

    def _code(self, error: BaseException) -> str:
        """Of what ended a row: its own, or its whole step's."""
        return StepFailedError.code if error is self._request.error else code_of(error)


class PieceStream(Closing):
    """An iterator over the Pieces of one request. Closing or dropping it ends the generation."""

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Piece:
        """The next piece; it is waited for.

        Raises:
            EngineError: a step failed, or (of a ThreadedEngine) too much was left unread.
        """
        try:
            piece = self._next()
        except BaseException:
            self.close()
            raise
        if piece is None:
            raise StopIteration
        return piece

    @abstractmethod
    def _next(self) -> Piece | None:
        """Wait for the next piece; None after the last."""

    def __del__(self) -> None:
        self.close()


class Stream(PieceStream):
    """An iterator over the Pieces of one request.

    It generates while its reader waits for a piece; a reader that pauses stops nobody else. Closing
    it, or dropping it, ends the generation and frees its memory.
    """

    def __init__(self, engine: Engine, request: Request) -> None:
        self._engine, self._request = engine, request
        self._reader = PieceReader(request, one_by_one=True)

    def _next(self) -> Piece | None:
        while (piece := self._reader.piece()) is None and not self._reader.ended:
            self._engine.run(self._reader.has_pending)
        return piece

    def close(self) -> None:
        """End the generation; rows that had not ended end with "cancelled"."""
        if not self._request.done:
            self._engine.cancel(self._request)
        self._reader.end()


def raise_error(request: Request) -> None:
    """Raise StepFailedError if a step that the request was in has failed."""
    if request.error is not None:
        raise StepFailedError(f"generation failed: {request.error}") from request.error
