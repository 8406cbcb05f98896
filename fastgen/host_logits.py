"""What a step's logits are for on the host: a prompt's log-probabilities, and the draws of rows
whose options only the host can run.
"""

from __future__ import annotations

import numpy as np

from fastgen.decoders.interface import Draw
from fastgen.errors import NothingToDrawError
from fastgen.processors import Floats, RowState
from fastgen.request import Row
from fastgen.results import TokenLogprobs
from fastgen.sampler import draw, token_logprobs
from fastgen.scheduler import Entry


def use_logits(entry: Entry, logits: Floats) -> Draw | None:
    """Score what the entry scores, and draw if its row draws on the host.

    Args:
        logits: float32 (entry.num_host_logits, V), not changed.

    Raises:
        NothingToDrawError: a score would be NaN.
        Whatever the row's logits_processor raises.
    """
    if entry.scores:
        _score(entry, logits[: entry.scores])
    return _drawn(entry.row, logits[-1]) if len(logits) > entry.scores else None


def _score(entry: Entry, logits: Floats) -> None:
    if not np.isfinite(logits.max(axis=1)).all():
        raise NothingToDrawError
    request = entry.row.request
    assert request.prompt_logprobs is not None
    first = entry.start + 1  # each token's logits are for the next one
    targets = request.prompt_token_ids[first : first + entry.scores]
    request.prompt_logprobs += token_logprobs(logits, targets, request.params.prompt_logprobs or 0)


def _drawn(row: Row, logits: Floats) -> Draw:
    state = RowState(np.array(row.token_ids, np.int64), row.prompt_len, sorted(row.stop_ids))
    token_id, ok = draw(logits, row.params, state)
    logprobs: TokenLogprobs | None = None
    if ok and row.params.logprobs is not None:
        [logprobs] = token_logprobs(logits[None], [token_id], row.params.logprobs)
    return Draw(row.seat, token_id, ok, logprobs)
