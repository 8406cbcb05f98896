"""When two runs of one request may differ: the rule for decoders that are not batch-invariant.

PyTorch's products change bits with the batch. A difference is allowed where the best two logits
are closer than 1e-3 or, for a sampled row, where the uniform lies within 1e-3 of an edge of its
interval or a filter's edge is that near. A row is not compared beyond that token.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

from fastgen import SamplingParams
from fastgen.frontends.generator import BUNDLED_MODEL
from fastgen.sampling.filters import kept_weights
from fastgen.sampling.philox import uniforms
from fastgen.sampling.processors import RowState, processed
from reference import ReferenceGPT2
from tolerances import TOLERANCES

GAP = TOLERANCES["torch_gap"]
TRIALS = 100  # disturbances that are tried to see what could have been drawn


@cache
def bundled_reference() -> ReferenceGPT2:
    return ReferenceGPT2(BUNDLED_MODEL)


def assert_rows_agree(
    prompt: Sequence[int],
    params: SamplingParams,
    first: Sequence[int],
    second: Sequence[int],
    eos_ids: frozenset[int] = frozenset(),
) -> bool:
    """New tokens of two runs on the bundled model; `params` has the row's own seed.

    Returns:
        Whether they are the same to the end.
    """
    if list(first) == list(second):
        return True
    pairs = zip(first, second, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    assert at is not None, f"one ended early: {len(first)} and {len(second)} tokens"
    token_ids = np.array([*prompt, *first[:at]])
    row = RowState(token_ids, len(prompt), sorted(params.ending_ids(eos_ids)))
    possible = _possible_ids(bundled_reference().logits(token_ids.tolist())[-1], params, row)
    both = {first[at], second[at]}
    assert both <= possible, f"token {at}: {both} of {params}; {sorted(possible)} are near"
    return False


def _possible_ids(logits: np.ndarray, params: SamplingParams, row: RowState) -> set[int]:
    """Ids that are drawn when each logit moves by less than GAP, and the uniform by GAP."""
    rng = np.random.default_rng(0)
    seed = np.array([params.seed or 0], np.uint64).view(np.int64)
    uniform = uniforms(seed, np.array([len(row.token_ids)]))[0]
    possible: set[int] = set()
    for trial in range(TRIALS):
        near = logits + rng.uniform(-GAP, GAP, len(logits)) * (trial > 0)
        scores = processed(near.astype(np.float32), params, row)
        if params.temperature == 0:
            possible |= {int(scores.argmax())}
            continue
        running = np.cumsum(kept_weights(scores, params))
        low, high = np.searchsorted(running, np.array([uniform - GAP, uniform + GAP]) * running[-1])
        possible |= set(range(max(0, int(low)), min(int(high), len(running) - 1) + 1))
    return possible
