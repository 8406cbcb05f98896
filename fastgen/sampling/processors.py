"""What changes logits before anything is drawn, for one row on the host: transformers' processors.

Each means what it means there, in float32, and they act in its order:

    logit_bias and sequence_bias, repetition_penalty, [frequency and presence penalty],
    no_repeat_ngram_size, bad_words, min_new_tokens, allowed_token_ids,
    exponential_decay_length_penalty, suppress_tokens, begin_suppress_tokens, [logits_processor]

This is the definition: stateless, it looks at the whole row each time. Those in brackets are not
transformers'. Source: transformers/generation/logits_process.py, 5.23.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastgen.sampling.params import SamplingParams

Floats = NDArray[np.float32]
MAX_RISE = 1e30  # of an ending id's logit, in multiples of it: float32 ends at 3e38


@dataclass(frozen=True, slots=True)
class RowState:
    """A row as its next draw sees it.

    Attributes:
        token_ids: int64 (T,), the prompt and what was generated.
        prompt_len: tokens of the prompt.
        ending_ids: the ids that end the row, in ascending order.
        mask: bool (V,), what may be drawn (Decoder.set_mask); None: everything.
    """

    token_ids: NDArray[np.int64]
    prompt_len: int
    ending_ids: Sequence[int] = ()
    mask: NDArray[np.bool_] | None = None

    @property
    def num_new(self) -> int:
        return len(self.token_ids) - self.prompt_len


def processed(logits: Floats, params: SamplingParams, row: RowState) -> Floats:
    """A changed copy of logits, float32 (V,); ruled out tokens are -inf.

    Raises:
        ValueError, TypeError, or whatever a logits_processor raises.
    """
    scores = logits.copy()
    with np.errstate(over="ignore"):  # an infinite logit ends its row
        for process in _CHAIN:
            process(scores, params, row)
    if params.logits_processor is not None:
        scores = _by_callable(scores, params, row)
    return scores


def length_rise(params: SamplingParams, num_new: int) -> np.float32 | None:
    """How many times its absolute value an ending id's logit rises; None where it does not."""
    if params.exponential_decay_length_penalty is None:
        return None
    start, factor = params.exponential_decay_length_penalty
    if num_new <= start:
        return None
    try:
        return np.float32(min(factor ** (num_new - start) - 1, MAX_RISE))
    except OverflowError:
        return np.float32(MAX_RISE)


def _bias(scores: Floats, params: SamplingParams, row: RowState) -> None:
    if not (params.logit_bias or params.sequence_bias):
        return
    biases = np.zeros(len(scores), np.float32)
    for token_id, bias in params.logit_bias:
        biases[token_id] = bias
    for (*before, last), bias in params.sequence_bias:
        start = len(row.token_ids) - len(before)
        if start >= 0 and row.token_ids[start:].tolist() == before:
            biases[last] += np.float32(bias)
    scores += biases


def _repetition(scores: Floats, params: SamplingParams, row: RowState) -> None:
    if params.repetition_penalty != 1:
        seen = np.unique(row.token_ids)
        penalty, some = np.float32(params.repetition_penalty), scores[seen]
        scores[seen] = np.where(some < 0, some * penalty, some / penalty)


def _frequency(scores: Floats, params: SamplingParams, row: RowState) -> None:
    if params.frequency_penalty or params.presence_penalty:
        seen, counts = np.unique(row.token_ids[row.prompt_len :], return_counts=True)
        each = np.float32(params.frequency_penalty) * counts.astype(np.float32)
        scores[seen] = scores[seen] - each - np.float32(params.presence_penalty)


def _ngrams(scores: Floats, params: SamplingParams, row: RowState) -> None:
    size, length = params.no_repeat_ngram_size, len(row.token_ids)
    if 0 < size <= length:
        prefix = row.token_ids[length - size + 1 :]
        windows = np.lib.stride_tricks.sliding_window_view(row.token_ids, size)
        scores[windows[(windows[:, :-1] == prefix).all(axis=1), -1]] = -np.inf


def _bad_words(scores: Floats, params: SamplingParams, row: RowState) -> None:
    for word in params.bad_words:
        assert not isinstance(word, str), "text is encoded before"
        *prefix, last = word
        if not prefix and last in row.ending_ids:
            continue  # as transformers has it: a row must be able to end
        start = len(row.token_ids) - len(prefix)
        if start >= 0 and row.token_ids[start:].tolist() == prefix:
            scores[last] = -np.inf


def _min_new(scores: Floats, params: SamplingParams, row: RowState) -> None:
    if row.num_new < params.min_new_tokens:
        scores[list(row.ending_ids)] = -np.inf


def _allowed(scores: Floats, params: SamplingParams, row: RowState) -> None:
    if params.allowed_token_ids is None and row.mask is None:
        return
    allowed = np.ones(len(scores), bool) if row.mask is None else row.mask.copy()
    if params.allowed_token_ids is not None:
        listed = np.zeros(len(scores), bool)
        listed[list(params.allowed_token_ids)] = True
        allowed &= listed
    scores[~allowed] = -np.inf
    if scores.max() == -np.inf:
        scores[allowed] = 0  # all of them were ruled out: then any of them


def _length(scores: Floats, params: SamplingParams, row: RowState) -> None:
    rise = length_rise(params, row.num_new)
    if rise is not None:
        ending = np.array([t for t in row.ending_ids if np.isfinite(scores[t])], dtype=np.int64)
        scores[ending] += np.abs(scores[ending]) * rise


def _suppress(scores: Floats, params: SamplingParams, row: RowState) -> None:
    scores[list(params.suppress_tokens)] = -np.inf
    if row.num_new == 0:
        scores[list(params.begin_suppress_tokens)] = -np.inf


def _by_callable(scores: Floats, params: SamplingParams, row: RowState) -> Floats:
    assert params.logits_processor is not None
    token_ids = row.token_ids.copy()
    returned: Any = params.logits_processor(token_ids, scores)
    changed = np.asarray(scores if returned is None else returned, dtype=np.float32)
    if changed.shape != scores.shape:
        raise ValueError(
            f"logits_processor returned shape {changed.shape}; the logits have {scores.shape}"
        )
    return changed


_CHAIN: tuple[Callable[[Floats, SamplingParams, RowState], None], ...] = (
    _bias,
    _repetition,
    _frequency,
    _ngrams,
    _bad_words,
    _min_new,
    _allowed,
    _length,
    _suppress,
)
