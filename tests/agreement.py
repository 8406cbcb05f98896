"""When two runs of one request may differ: the rule for decoders that are not batch-invariant.

PyTorch's products change bits with the batch. A difference is allowed where the best two logits
are closer than 1e-3 or, for a sampled row, where the coin lies within 1e-3 of an edge of its
interval or a filter's edge is that near. A row is not compared beyond that token.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

from conftest import TOLERANCES
from fastgen import SamplingParams
from fastgen.filters import kept_weights
from fastgen.generator import BUNDLED_MODEL
from fastgen.philox import coins
from reference import ReferenceGPT2

GAP = TOLERANCES["torch_gap"]


@cache
def bundled_reference() -> ReferenceGPT2:
    return ReferenceGPT2(BUNDLED_MODEL)


def assert_rows_agree(
    prompt: Sequence[int], params: SamplingParams, first: Sequence[int], second: Sequence[int]
) -> None:
    """New tokens of two runs on the bundled model; `params` has the row's own seed."""
    if list(first) == list(second):
        return
    pairs = zip(first, second, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    assert at is not None, f"one ended early: {len(first)} and {len(second)} tokens"
    row = [*prompt, *first[:at]]
    logits = bundled_reference().logits(row)[-1]
    assert _is_near(logits, params, len(row)), f"token {at}: {first[at]} and {second[at]}"


def _is_near(logits: np.ndarray, params: SamplingParams, position: int) -> bool:
    ordered = np.sort(logits)[::-1]
    if params.temperature == 0:
        return ordered[0] - ordered[1] < GAP
    if 0 < params.top_k < len(ordered) and ordered[params.top_k - 1] - ordered[params.top_k] < GAP:
        return True
    unfiltered = SamplingParams(temperature=params.temperature, top_k=params.top_k)
    mass = np.sort(kept_weights(logits.astype(np.float32), unfiltered))[::-1].cumsum()
    if params.top_p < 1 and np.abs(mass / mass[-1] - params.top_p).min() < GAP:
        return True
    running = np.cumsum(kept_weights(logits.astype(np.float32), params))
    seed = np.array([params.seed or 0], np.uint64).view(np.int64)
    coin = coins(seed, np.array([position]))[0]
    return bool(np.abs(running / running[-1] - coin).min() < GAP)
