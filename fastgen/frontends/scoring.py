"""Scoring of texts that may be longer than the context: cut into windows, and joined again."""

from __future__ import annotations

from collections.abc import Sequence

from fastgen.engine.requests import Request
from fastgen.results import Score


def windows_of(token_ids: Sequence[int], context: int) -> list[tuple[int, Sequence[int]]]:
    """Start and tokens of each window of a text to be scored."""
    if len(token_ids) < 2:
        return []
    step = max(1, context // 2)
    last = max(0, len(token_ids) - context)
    starts = [*range(0, last, step), last]
    return [(start, token_ids[start : start + context]) for start in starts]


def joined_score(token_ids: Sequence[int], windows: Sequence[tuple[int, Request]]) -> Score:
    """A text's score from its windows; where two overlap, the one with more context counts."""
    logprobs: list[float | None] = [None] * min(1, len(token_ids))
    for start, request in windows:
        assert request.prompt_logprobs is not None
        for scored in request.prompt_logprobs[len(logprobs) - start :]:
            logprobs.append(None if scored is None else scored.logprob)
    return Score(tuple(token_ids), tuple(logprobs), len(windows))
