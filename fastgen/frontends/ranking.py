"""best_of: which of the completions that were drawn a request returns, and in what order."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fastgen.checks import real, sequence
from fastgen.errors import RowFailedError, message_of
from fastgen.results import Completion
from fastgen.sampling.params import SamplingParams


def best(completions: tuple[Completion, ...], params: SamplingParams) -> tuple[Completion, ...]:
    """The n best, best first; of equals the one with the lower index; failed ones are the worst.

    The score is the mean log-probability a token, or what the caller's `rank` says; if that raises
    or returns anything but a number for each, every completion is an error.
    """
    if not params.selects_best:
        return completions
    try:
        scores = _scores(completions, params)
    except Exception as error:
        cause = f"rank failed: {message_of(error)}"
        return tuple(
            replace(
                completion,
                finish_reason="error",
                stop_reason=None,
                error=cause,
                error_code=RowFailedError.code,
            )
            for completion in completions[: params.n]
        )

    def place(index: int) -> tuple[bool, float, int]:
        return completions[index].finish_reason == "error", -scores[index], index

    return tuple(completions[i] for i in sorted(range(len(completions)), key=place)[: params.n])


def _scores(completions: tuple[Completion, ...], params: SamplingParams) -> Sequence[float]:
    if params.rank is None:
        return [mean_logprob(completion) for completion in completions]
    scores = sequence("what rank returns", params.rank(completions))
    if len(scores) != len(completions):
        raise ValueError(f"{len(scores)} scores for {len(completions)} completions")
    return [_score(score) for score in scores]


def _score(score: Any) -> float:
    """A number, or a yes or no; -inf rejects."""
    if isinstance(score, (bool, np.bool_)):
        return float(score)
    if isinstance(score, numbers.Real) and math.isinf(score):
        return float(score)
    return real("a score", score, -math.inf, math.inf)


def mean_logprob(completion: Completion) -> float:
    """A token; -inf for a completion without any."""
    scored = completion.logprobs or ()
    return math.fsum(entry.logprob for entry in scored) / len(scored) if scored else -math.inf
