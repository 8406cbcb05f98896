"""Streamers: one for each row of a batch, and readers that learn of errors."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers.generation.streamers import BaseStreamer


class RowStreamers(BaseStreamer):  # type: ignore[misc]
    """One streamer a row, each of which sees its row alone: the prompt, then token by token.

    A row's streamer ends with the row, where it is known which ids end one.
    """

    def __init__(self, streamers: Sequence[Any]) -> None:
        self.streamers = list(streamers)
        self.eos_ids: frozenset[int] = frozenset()
        self._open = [True] * len(self.streamers)

    def put(self, value: Tensor) -> None:
        """The prompts (B, T), then the tokens (B,) of a step."""
        if len(value) != len(self.streamers):
            raise ValueError(
                f"{len(self.streamers)} streamers were given for {len(value)} rows: it takes one "
                "for each prompt and each of its num_return_sequences"
            )
        for at, streamer in enumerate(self.streamers):
            if self._open[at]:
                streamer.put(value[at : at + 1])
                if value.dim() == 1 and int(value[at]) in self.eos_ids:
                    self.end_row(at)

    def end_row(self, at: int) -> None:
        if self._open[at]:
            self._open[at] = False
            self.streamers[at].end()

    def end(self) -> None:
        for at in range(len(self.streamers)):
            self.end_row(at)


def as_streamer(streamer: Any) -> Any:
    """A list of streamers, one a row, as one."""
    return RowStreamers(streamer) if isinstance(streamer, (list, tuple)) else streamer


@contextmanager
def readers_told_of_errors(streamer: Any) -> Iterator[None]:
    """What is raised inside also reaches those who read from queues, so that nobody waits on."""
    for each in _each(streamer):
        _forget_failures(each)
    try:
        yield
    except BaseException as error:
        for each in _each(streamer):
            _tell(each, error)
        raise


def _each(streamer: Any) -> Iterable[Any]:
    if isinstance(streamer, RowStreamers):
        return streamer.streamers
    return () if streamer is None else (streamer,)


class _Failure:
    """What a reader gets in place of text: to compare it with the stop signal raises the error.

    transformers' readers do nothing else with what they take from the queue.
    """

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __eq__(self, other: object) -> bool:
        raise self._error

    __hash__ = None  # type: ignore[assignment]


def _forget_failures(streamer: Any) -> None:
    """Drop failures of an earlier call that nobody has read."""
    texts = getattr(streamer, "text_queue", None)
    if isinstance(texts, queue.Queue):
        with texts.mutex:
            kept = [text for text in texts.queue if not isinstance(text, _Failure)]
            texts.queue.clear()
            texts.queue.extend(kept)


def _tell(streamer: Any, error: BaseException) -> None:
    texts = getattr(streamer, "text_queue", None)
    if isinstance(texts, queue.Queue):
        texts.put(_Failure(error))
    elif isinstance(texts, asyncio.Queue):
        streamer.loop.call_soon_threadsafe(texts.put_nowait, _Failure(error))
