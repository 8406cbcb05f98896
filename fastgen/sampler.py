"""The sampler's definition, for one row on the host: logits in, an id out.

    filters (temperature, top-k, top-p)  ->  p = exp(logit - max) in float64  ->  the coin

The draw is the first id, in token-id order, whose running sum of kept p exceeds coin * total. Every
other implementation (torch, later C++ and Triton) returns the same id for the same logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fastgen.philox import coins
from fastgen.results import TokenLogprobs
from fastgen.sampling_params import SamplingParams

Floats = NDArray[np.float32]
SCORED_AT_ONCE = 16  # rows


def draw(logits: Floats, params: SamplingParams, position: int) -> tuple[int, bool]:
    """Draw the token at `position` of a row, its index among the row's tokens.

    Args:
        logits: float32 (V,).
        params: the row's options; `seed` is its own.

    Returns:
        The id, and whether the logits allowed a draw: (0, False) for NaN or infinite ones.
    """
    if not np.isfinite(logits.max()):  # NaN propagates; -inf everywhere leaves nothing to draw
        return 0, False
    if params.temperature == 0:
        return int(logits.argmax()), True
    weights = kept_weights(logits, params)
    running = np.cumsum(weights)
    seed = np.array([params.seed or 0], dtype=np.uint64).view(np.int64)
    coin = coins(seed, np.array([position], dtype=np.int64))[0]
    drawn = np.searchsorted(running, coin * running[-1], side="right")
    last = np.searchsorted(running, running[-1], side="left")  # if coin * total rounds to total
    return int(min(drawn, last)), True


def kept_weights(logits: Floats, params: SamplingParams) -> NDArray[np.float64]:
    """Unnormalized probabilities, float64 (V,); zero for what the filters removed."""
    scaled = logits / np.float32(params.temperature)
    if 0 < params.top_k < len(scaled):
        kth = np.partition(scaled, -params.top_k)[-params.top_k]
        scaled = np.where(scaled >= kth, scaled, np.float32(-np.inf))  # equals of the k-th stay
    weights = np.exp(scaled.astype(np.float64) - np.float64(scaled.max()))
    if params.top_p < 1:
        order = np.argsort(-scaled, kind="stable")  # highest first, the lowest ids among equals
        mass = np.cumsum(weights[order])
        size = int(np.searchsorted(mass, params.top_p * mass[-1], side="left")) + 1
        weights[order[size:]] = 0
    return weights


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
    if count == 0:
        return [()] * len(wide)
    candidates = np.sort(np.argpartition(-wide, count - 1, axis=1)[:, :count], axis=1)
    values = np.take_along_axis(wide, candidates, axis=1) - log_total
    order = np.argsort(-values, axis=1, kind="stable")
    ids = np.take_along_axis(candidates, order, axis=1).tolist()
    logprobs = np.take_along_axis(values, order, axis=1).tolist()
    return [tuple(zip(*row, strict=True)) for row in zip(ids, logprobs, strict=True)]
