"""The sampler's definition, for one row on the host: logits in, an id out.

    processors  ->  filters  ->  p = exp(logit - max) in float64  ->  the uniform

The draw is the first id, in token-id order, whose running sum of kept p exceeds uniform * total.
Every other implementation (C++, torch, Triton) returns the same id for the same logits, for rows
whose options it knows; the definition knows all.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fastgen.results import TokenLogprobs
from fastgen.sampling.filters import kept_weights
from fastgen.sampling.options import DRAWN
from fastgen.sampling.params import SamplingParams
from fastgen.sampling.philox import uniforms
from fastgen.sampling.processors import Floats, RowState, processed

KNOWN_OPTIONS = frozenset(option.name for option in DRAWN)
SCORED_AT_ONCE = 16  # rows


def draw(logits: Floats, params: SamplingParams, row: RowState) -> tuple[int, bool]:
    """Draw the next token of a row.

    Args:
        logits: float32 (V,), not changed.
        params: the row's options; `seed` is its own.

    Returns:
        The id, and whether there was one to draw: (0, False) for logits that are NaN or +inf, as
        the model or the row's own options made them, and where everything has been ruled out.

    Raises:
        Whatever the row's logits_processor raises.
    """
    if not np.isfinite(logits.max()):  # NaN propagates; -inf everywhere leaves nothing to draw
        return 0, False
    scores = processed(logits, params, row)
    if params.temperature == 0:
        return (int(scores.argmax()), True) if np.isfinite(scores.max()) else (0, False)
    with np.errstate(over="ignore"):
        highest = scores.max() / np.float32(params.temperature)
    if not np.isfinite(highest):
        return 0, False
    running = np.cumsum(kept_weights(scores, params))
    seed = np.array([params.seed or 0], dtype=np.uint64).view(np.int64)
    uniform = uniforms(seed, np.array([len(row.token_ids)], dtype=np.int64))[0]
    drawn = np.searchsorted(running, uniform * running[-1], side="right")
    last = np.searchsorted(running, running[-1], side="left")  # if uniform * total rounds to total
    return int(min(drawn, last)), True


def token_logprobs(logits: Floats, token_ids: Sequence[int], num_top: int) -> list[TokenLogprobs]:
    """Log-probabilities of given tokens under raw logits, float32 (n, V), one row a token.

    A few rows at a time: the work is done in float64, in several arrays of their size.
    """
    return [
        scored
        for at in range(0, len(token_ids), SCORED_AT_ONCE)
        for scored in _some_logprobs(
            logits[at : at + SCORED_AT_ONCE], token_ids[at : at + SCORED_AT_ONCE], num_top
        )
    ]


def _some_logprobs(logits: Floats, token_ids: Sequence[int], num_top: int) -> list[TokenLogprobs]:
    wide = logits.astype(np.float64)
    highest = wide.max(axis=1, keepdims=True)
    log_total = highest + np.log(np.exp(wide - highest).sum(axis=1, keepdims=True))
    own = wide[np.arange(len(wide)), token_ids] - log_total[:, 0]
    top = _top(wide, log_total, min(num_top, wide.shape[1]))
    return [
        TokenLogprobs(int(token_id), float(logprob), best)
        for token_id, logprob, best in zip(token_ids, own, top, strict=True)
    ]


def _top(
    wide: NDArray[np.float64], log_total: NDArray[np.float64], count: int
) -> list[tuple[tuple[int, float], ...]]:
    """The `count` highest of each row, best first, of equals the lowest id first."""
    if count == 0:
        return [()] * len(wide)
    least = np.partition(wide, -count, axis=1)[:, -count]
    top: list[tuple[tuple[int, float], ...]] = []
    for row, lowest, total in zip(wide, least, log_total[:, 0], strict=True):
        candidates = np.flatnonzero((row >= lowest) & np.isfinite(row))  # and the last's equals
        ids = candidates[np.argsort(-row[candidates], kind="stable")[:count]]
        top.append(tuple(zip(ids.tolist(), (row[ids] - total).tolist(), strict=True)))
    return top
