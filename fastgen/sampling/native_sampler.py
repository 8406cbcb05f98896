"""The C++ sampler: fastgen.sampling.definition's definition, for all rows of a step in one call.

For decoders whose logits are in the host's memory. The GIL is released while it draws.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastgen.native import native
from fastgen.results import TokenLogprobs
from fastgen.sampling.draw import Draw
from fastgen.sampling.options import require_known
from fastgen.sampling.params import SamplingParams

# Fields of the C++ struct; it is handed ending_ids for stop_token_ids and ignore_eos.
_FIELDS = frozenset(() if native is None else native.Sampler.options)
_OPTIONS = tuple(sorted(_FIELDS - {"seed", "ending_ids"}))
_DRAWN, _SKIPPED = 0, 2


class NativeSampler:
    """Per-seat options and draws; see TorchSampler, which does the same."""

    known_options = _FIELDS - {"ending_ids"} | {"stop_token_ids", "ignore_eos"}

    def __init__(
        self,
        num_seats: int,
        vocab_size: int,
        eos_ids: Iterable[int],
        max_seq_len: int,
        num_threads: int,
    ) -> None:
        self.last_drawn = np.zeros(num_seats, np.int64)
        self._num_logprobs = np.full(num_seats, -1)
        self._scored: set[int] = set()  # seats that want log-probabilities
        self._eos_ids, self._vocab_size = frozenset(eos_ids), vocab_size
        self.native = native.Sampler(num_seats, vocab_size, max_seq_len, num_threads)

    def reserve(self, num_seats: int) -> None:
        self.native.reserve(num_seats)
        more = num_seats - len(self.last_drawn)
        self.last_drawn = np.append(self.last_drawn, np.zeros(more, np.int64))
        self._num_logprobs = np.append(self._num_logprobs, np.full(more, -1))

    def bind(self, seat: int, params: SamplingParams, token_ids: Sequence[int]) -> None:
        require_known(self.known_options, params)
        options = {name: getattr(params, name) for name in _OPTIONS}
        options["seed"] = params.seed or 0
        options["ending_ids"] = sorted(params.ending_ids(self._eos_ids))
        self.native.bind(seat, token_ids, options)
        self.release(seat)
        if params.logprobs is not None:
            self._num_logprobs[seat] = params.logprobs
            self._scored.add(seat)

    def observe(self, seat: int, token_id: int) -> None:
        self.native.observe(seat, token_id)
        self.last_drawn[seat] = token_id

    def release(self, seat: int) -> None:
        self._num_logprobs[seat] = -1
        self._scored.discard(seat)

    def set_mask(self, seat: int, allowed: NDArray[np.bool_] | None) -> None:
        self.native.set_mask(seat, allowed)

    def draw(self, logits: Any, seats: NDArray[np.int32], drafts: Sequence[int]) -> list[Draw]:
        """Draw one token a row of `logits`.

        Args:
            logits: float32 (n, V), an array or what NumPy sees as one without a copy; not changed.
            seats: int32 (n,) seat of each draw; neighbours with the same seat check drafts.
            drafts: (n,) the id that the next draw of the same seat takes for granted; -1 for none.

        Returns:
            The draws in order, without those after a draw that differs from its draft.
        """
        found = self.native.draw(
            np.asarray(logits), seats, np.asarray(drafts, np.int32), self.max_top(seats)
        )
        return self.taken(seats, *found)

    def max_top(self, seats: NDArray[np.int32]) -> int:
        """Log-probabilities beside the drawn one that some draw of `seats` wants."""
        if not self._scored:
            return 0
        return min(max(0, int(self._num_logprobs[seats].max())), self._vocab_size)

    def taken(
        self,
        seats: NDArray[np.int32],
        ids: NDArray[np.int32],
        statuses: NDArray[np.uint8],
        *scores: NDArray[Any],
    ) -> list[Draw]:
        """What C++ drew at `seats`, as `draw` returns it; the seats remember it."""
        found = statuses.tolist()
        if not self._scored and _SKIPPED not in found:
            self.last_drawn[seats] = ids  # of several draws of a seat, the last
            drawn = zip(seats.tolist(), ids.tolist(), found, strict=True)
            return [Draw(seat, token_id, status == _DRAWN) for seat, token_id, status in drawn]
        kept = np.flatnonzero(statuses != _SKIPPED)
        self.last_drawn[seats[kept]] = ids[kept]
        wanted = self._num_logprobs[seats]
        return [
            Draw(
                int(seats[at]),
                int(ids[at]),
                bool(ok := statuses[at] == _DRAWN),
                _logprobs(int(ids[at]), wanted[at], *(column[at] for column in scores))
                if ok and wanted[at] >= 0
                else None,
            )
            for at in kept.tolist()
        ]


def _logprobs(
    token_id: int,
    wanted: np.int64,
    logprob: np.float64,
    top_ids: NDArray[np.int32],
    top_logprobs: NDArray[np.float64],
) -> TokenLogprobs:
    num_top = int((top_ids[:wanted] >= 0).sum())
    top = zip(top_ids[:num_top].tolist(), top_logprobs[:num_top].tolist(), strict=True)
    return TokenLogprobs(token_id, float(logprob), tuple(top))
