"""What the options of one row ask about its tokens, kept up to date token by token.

fastgen.sampling.processors is the definition, and reads the whole row for each draw; this observes
each token once. Arrays of ids are int64; what a method returns is valid until the next `observe`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from fastgen.sampling.options import BY_NAME
from fastgen.sampling.params import SamplingParams
from fastgen.sampling.processors import Floats, length_rise

Ids = NDArray[np.int64]
KNOWN_OPTIONS = (  # the processors that are followed here
    "logit_bias",
    "sequence_bias",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "no_repeat_ngram_size",
    "bad_words",
    "min_new_tokens",
    "exponential_decay_length_penalty",
    "suppress_tokens",
    "begin_suppress_tokens",
)


class RowHistory:
    """For the next draw of a row: which logits change, and by what. In the order in which they act:

    biases, repeated, counted, banned, (what is allowed: the sampler's own), risen, suppressed

    Each returns token ids, without repeats unless they are ruled out, then what it takes for each.

    Attributes:
        is_plain: none of KNOWN_OPTIONS is set; nothing is kept of the row, nothing to be asked.
    """

    def __init__(
        self, params: SamplingParams, token_ids: Sequence[int], eos_ids: frozenset[int]
    ) -> None:
        self.is_plain = not any(BY_NAME[name].is_set(params) for name in KNOWN_OPTIONS)
        if self.is_plain:
            return
        self._params, self._num_new = params, 0
        self._ending_ids = _ids(sorted(params.ending_ids(eos_ids)))
        self._biases = {token_id: np.float32(bias) for token_id, bias in params.logit_bias}
        longest = max((len(ids) for ids, _ in params.sequence_bias), default=1) - 1
        self._tail = deque(token_ids, maxlen=longest)
        self._suppressed = _ids(params.suppress_tokens)
        self._suppressed_first = _ids([*params.suppress_tokens, *params.begin_suppress_tokens])
        self._seen = _TokenCounts(token_ids) if params.repetition_penalty != 1 else None
        counts = params.frequency_penalty or params.presence_penalty
        self._generated = _TokenCounts() if counts else None
        bans = params.no_repeat_ngram_size or params.bad_words
        self._bans = _SequenceBans(params, token_ids, self._ending_ids) if bans else None

    def observe(self, token_id: int) -> None:
        """The row has got another token."""
        if self.is_plain:
            return
        self._num_new += 1
        self._tail.append(token_id)
        for part in (self._seen, self._generated, self._bans):
            if part is not None:
                part.add(token_id)

    def biases(self) -> tuple[Ids, Floats]:
        biases, tail = self._biases, tuple(self._tail)
        if self._params.sequence_bias:
            biases = dict(biases)
            for (*before, last), bias in self._params.sequence_bias:
                if len(before) <= len(tail) and tail[len(tail) - len(before) :] == tuple(before):
                    biases[last] = biases.get(last, np.float32(0)) + np.float32(bias)
        return _ids(biases), np.array(list(biases.values()), np.float32)

    def repeated(self) -> tuple[Ids, Floats]:
        """And by what their logits are divided, or multiplied."""
        if self._seen is None:
            return _NO_IDS, _NO_VALUES
        ids = self._seen.ids
        return ids, np.full(len(ids), self._params.repetition_penalty, np.float32)

    def counted(self) -> tuple[Ids, Floats, Floats]:
        """And what is subtracted, one after the other: for each time, and for any."""
        if self._generated is None:
            return _NO_IDS, _NO_VALUES, _NO_VALUES
        ids, counts = self._generated.ids, self._generated.counts.astype(np.float32)
        once = np.full(len(ids), self._params.presence_penalty, np.float32)
        return ids, np.float32(self._params.frequency_penalty) * counts, once

    def banned(self) -> tuple[Ids]:
        ids = _NO_IDS if self._bans is None else self._bans.next_ids()
        if self._num_new < self._params.min_new_tokens:
            return (np.concatenate([ids, self._ending_ids]),)
        return (ids,)

    def risen(self) -> tuple[Ids, Floats]:
        """And how many times their absolute value their logits rise."""
        rise = length_rise(self._params, self._num_new)
        if rise is None:
            return _NO_IDS, _NO_VALUES
        return self._ending_ids, np.full(len(self._ending_ids), rise)

    def suppressed(self) -> tuple[Ids]:
        return (self._suppressed if self._num_new else self._suppressed_first,)


class _TokenCounts:
    """Ids that occurred, and how often: arrays that grow."""

    def __init__(self, token_ids: Sequence[int] = ()) -> None:
        self._ids, self._counts = np.unique(_ids(token_ids), return_counts=True)
        self._places = {token_id: place for place, token_id in enumerate(self._ids.tolist())}

    def add(self, token_id: int) -> None:
        place = self._places.setdefault(token_id, len(self._places))
        if place == len(self._ids):
            more = np.zeros(max(16, place), np.int64)
            self._ids = np.concatenate([self._ids, more])
            self._counts = np.concatenate([self._counts, more])
        self._ids[place] = token_id
        self._counts[place] += 1

    @property
    def ids(self) -> Ids:
        return self._ids[: len(self._places)]

    @property
    def counts(self) -> NDArray[np.int64]:
        return self._counts[: len(self._places)]


class _SequenceBans:
    """What no_repeat_ngram_size and bad_words rule out: last ids, by the ids before them."""

    def __init__(self, params: SamplingParams, token_ids: Sequence[int], ending_ids: Ids) -> None:
        self._words: dict[tuple[int, ...], list[int]] = {}
        for word in params.bad_words:
            assert not isinstance(word, str), "text is encoded before"
            *prefix, last = word
            if prefix or last not in ending_ids:  # a row must be able to end
                self._words.setdefault(tuple(prefix), []).append(last)
        self._word_prefix_lens = {len(prefix) for prefix in self._words}
        self._ngram_size = params.no_repeat_ngram_size
        self._followers: dict[tuple[int, ...], list[int]] = {}  # of n - 1 ids, in the row so far
        self._row: list[int] = []
        for token_id in token_ids:
            self.add(token_id)

    def add(self, token_id: int) -> None:
        if self._ngram_size and len(self._row) >= self._ngram_size - 1:
            self._followers.setdefault(self._last(self._ngram_size - 1), []).append(token_id)
        self._row.append(token_id)

    def next_ids(self) -> Ids:
        ids: list[int] = []
        if self._ngram_size:
            ids += self._followers.get(self._last(self._ngram_size - 1), ())
        for length in self._word_prefix_lens:
            ids += self._words.get(self._last(length), ())
        return _ids(ids)

    def _last(self, count: int) -> tuple[int, ...]:
        """Of a shorter row, fewer: what is known of those holds for it too."""
        return tuple(self._row[max(0, len(self._row) - count) :])


def _ids(values: Iterable[int]) -> Ids:
    return np.fromiter(values, np.int64)


_NO_IDS, _NO_VALUES = _ids(()), np.zeros(0, np.float32)
