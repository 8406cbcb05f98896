"""The sampler of the torch decoder: fastgen.sampler's definition for many rows at once.

Rows keep their options in arrays by seat, so a step gathers them without looking at each row.
Shapes: `n` draws of a step, `V` vocabulary, `K` candidates of a row (V, or few under top-k).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastgen.decoders.interface import Draw
from fastgen.philox import coins, philox4x32, words_to_coin
from fastgen.results import TokenLogprobs
from fastgen.sampling_params import SamplingParams

_MASK32 = 0xFFFFFFFF
_NO_LOGPROBS = -1
_TOP_P_WIDTH = 256  # candidates looked at first for top-p; eight times as many as long as too few
_OPTIONS = np.dtype(
    [
        ("seed", np.int64),  # the 64 bits of the unsigned seed
        ("length", np.int64),  # tokens of the row so far
        ("temperature", np.float32),
        ("top_k", np.int64),
        ("top_p", np.float64),
        ("num_logprobs", np.int64),
    ]
)
Options = NDArray[np.void]  # (n,) of _OPTIONS


class TorchSampler:
    """Per-seat options and draws, on the device that holds the logits."""

    def __init__(self, num_seats: int, device: torch.device) -> None:
        self.device = device
        self.last_drawn = torch.zeros(num_seats, dtype=torch.int64, device=device)
        self._options: Options = np.zeros(num_seats, _OPTIONS)
        self._masks: dict[int, Tensor] = {}

    def reserve(self, num_seats: int) -> None:
        more = num_seats - len(self._options)
        self._options = np.concatenate([self._options, np.zeros(more, _OPTIONS)])
        self.last_drawn = torch.cat([self.last_drawn, self.last_drawn.new_zeros(more)])

    def bind(self, seat: int, params: SamplingParams, num_tokens: int) -> None:
        seed = int(np.uint64(params.seed or 0).view(np.int64))
        logprobs = _NO_LOGPROBS if params.logprobs is None else params.logprobs
        options = (seed, num_tokens, params.temperature, params.top_k, params.top_p, logprobs)
        self._options[seat] = options
        self._masks.pop(seat, None)

    def observe(self, seat: int, token_id: int) -> None:
        self._options["length"][seat] += 1
        self.last_drawn[seat] = token_id

    def set_mask(self, seat: int, allowed: NDArray[np.bool_] | None) -> None:
        self._masks.pop(seat, None)
        if allowed is not None:
            self._masks[seat] = torch.from_numpy(np.ascontiguousarray(allowed)).to(self.device)

    def draw(self, logits: Tensor, seats: NDArray[np.int32], drafts: Sequence[int]) -> list[Draw]:
        """Draw one token a row of `logits`.

        Args:
            logits: float32 (n, V), never changed.
            seats: (n,) seat of each draw; neighbours with the same seat check drafts.
            drafts: (n,) the id that the next draw of the same seat takes for granted; -1 for none.

        Returns:
            The draws in order, without those behind a draw that differs from its draft.
        """
        runs = _run_offsets(seats)
        options = self._options[seats]
        ids, ok = self._draw_ids(self._masked(logits, seats), options, options["length"] + runs)
        kept = _accepted(ids, runs, drafts)
        logprobs = self._logprobs(logits, options["num_logprobs"], ids)
        np.add.at(self._options["length"], seats[kept], 1)
        self._remember(seats, ids, kept)
        return [Draw(int(seats[at]), ids[at], ok[at], logprobs.get(at)) for at in kept]

    def _remember(self, seats: NDArray[np.int32], ids: list[int], kept: list[int]) -> None:
        last = {int(seats[at]): ids[at] for at in kept}  # of several draws of a seat, the last
        index = torch.tensor(list(last), device=self.device)
        self.last_drawn[index] = torch.tensor(list(last.values()), device=self.device)

    def _masked(self, logits: Tensor, seats: NDArray[np.int32]) -> Tensor:
        if not self._masks:
            return logits
        rows = [
            row.masked_fill(~self._masks[seat], -math.inf) if seat in self._masks else row
            for row, seat in zip(logits, seats.tolist(), strict=True)
        ]
        return torch.stack(rows)

    def _draw_ids(
        self, logits: Tensor, options: Options, positions: NDArray[np.int64]
    ) -> tuple[list[int], list[bool]]:
        highest, ids = logits.max(dim=1)  # (n,) each; the first, so the lowest id, among equals
        sampled = np.flatnonzero(options["temperature"] > 0)
        if len(sampled) == len(options):
            ids = self._sample(logits, options, positions)
        elif len(sampled):
            rows = self._tensor(sampled)
            ids[rows] = self._sample(logits[rows], options[sampled], positions[sampled])
        ok = highest.isfinite()
        return ids.masked_fill(~ok, 0).tolist(), ok.tolist()  # sync: the draws go to the host

    def _sample(self, logits: Tensor, options: Options, positions: NDArray[np.int64]) -> Tensor:
        """Ids (n,) of rows with a temperature."""
        scaled = logits / self._tensor(options["temperature"])[:, None]  # (n, V)
        candidates, token_ids = _top_k(scaled, options["top_k"])  # (n, K); None: every id
        weights = (candidates.double() - candidates.amax(1, keepdim=True).double()).exp()
        if (options["top_p"] < 1).any():
            keep = _top_p(candidates, weights, self._tensor(options["top_p"])[:, None])
            weights = weights.where(keep, 0.0)
        picked = _pick(weights, self._coins(options["seed"], positions))  # (n, 1)
        return (picked if token_ids is None else token_ids.gather(1, picked))[:, 0]

    def _coins(self, seeds: NDArray[np.int64], positions: NDArray[np.int64]) -> Tensor:
        """float64 (n, 1), as fastgen.philox.coins has them."""
        if self.device.type == "cpu":
            return torch.from_numpy(coins(seeds, positions))[:, None]
        key, counter = self._tensor(seeds), self._tensor(positions) & _MASK32
        zero = torch.zeros_like(counter)
        words = (key & _MASK32, (key >> 32) & _MASK32)
        high, low, _, _ = philox4x32((counter, zero, zero, zero), words)
        drawn: Tensor = words_to_coin(high, low).double() * 2.0**-53
        return drawn[:, None]

    def _tensor(self, values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(values.copy()).to(self.device)  # a field is strided: packed by copy

    def _logprobs(
        self, logits: Tensor, wanted: NDArray[np.int64], ids: list[int]
    ) -> dict[int, TokenLogprobs]:
        """By draw, for those that want them; of the raw logits."""
        rows = np.flatnonzero(wanted != _NO_LOGPROBS)
        if not len(rows):
            return {}
        some = logits[self._tensor(rows)].double()
        logprobs = some - some.logsumexp(1, keepdim=True)  # (n, V)
        chosen = torch.tensor([[ids[at]] for at in rows], device=self.device)
        own = logprobs.gather(1, chosen)[:, 0].tolist()
        best, best_ids = logprobs.topk(min(int(wanted.max()), logprobs.shape[1]))
        return {
            int(at): TokenLogprobs(ids[at], own[i], tuple(zip(top_ids, top, strict=True))[:count])
            for i, (at, count, top_ids, top) in enumerate(
                zip(rows, wanted[rows], best_ids.tolist(), best.tolist(), strict=True)
            )
        }


def _run_offsets(seats: NDArray[np.int32]) -> NDArray[np.int64]:
    """How many draws of the same seat stand directly before each; drafts are checked there."""
    at = np.arange(len(seats))
    starts = np.r_[True, seats[1:] != seats[:-1]]
    return at - np.maximum.accumulate(np.where(starts, at, 0))


def _accepted(ids: list[int], runs: NDArray[np.int64], drafts: Sequence[int]) -> list[int]:
    """The draws that count: of each run, up to the first that differs from its draft."""
    if not runs.any():
        return list(range(len(ids)))
    kept: list[int] = []
    accepting = True
    for at, offset in enumerate(runs.tolist()):
        accepting = offset == 0 or (accepting and ids[at - 1] == drafts[at - 1])
        if accepting:
            kept.append(at)
    return kept


def _top_k(scaled: Tensor, top_k: NDArray[np.int64]) -> tuple[Tensor, Tensor | None]:
    """Candidates (n, K), -inf for what top-k removed, and their ids in ascending order.

    All equals of the k-th stay. None for the ids: the candidates are the whole vocabulary.
    """
    vocab_size = scaled.shape[1]
    wanted = np.where((top_k > 0) & (top_k < vocab_size), top_k, vocab_size)
    largest = int(wanted.max())
    if largest == vocab_size:
        if (wanted < vocab_size).any():  # some rows have top-k, some have not
            kth = scaled.new_full((len(scaled), 1), -math.inf)
            for row in np.flatnonzero(wanted < vocab_size).tolist():
                kth[row] = scaled[row].topk(int(wanted[row])).values[-1]
            scaled = scaled.masked_fill(scaled < kth, -math.inf)
        return scaled, None
    index = torch.from_numpy(wanted - 1).to(scaled.device)[:, None]
    values, token_ids = scaled.topk(largest)
    kth = values.gather(1, index)  # (n, 1)
    with_equals = int((scaled >= kth).sum(1).amax())
    if with_equals > largest:
        values, token_ids = scaled.topk(with_equals)
    token_ids, order = token_ids.sort(dim=1)
    values = values.gather(1, order)
    return values.masked_fill(values < kth, -math.inf), token_ids


def _top_p(candidates: Tensor, weights: Tensor, top_p: Tensor) -> Tensor:
    """Which candidates stay, bool (n, K): the smallest set whose mass reaches top_p.

    A row's set is known from its lowest member, the edge, and how many of its equals are in. Only
    the highest candidates are looked at, more of them while the mass is not reached.
    """
    goal = top_p * weights.sum(1, keepdim=True)
    num_candidates = candidates.shape[1]
    width = min(_TOP_P_WIDTH, num_candidates)
    while True:
        values, index = candidates.topk(width)  # (n, width), highest first
        reached = weights.gather(1, index).cumsum(1) >= goal
        if width == num_candidates or bool(reached[:, -1].all()):
            break
        width = min(8 * width, num_candidates)
    last = torch.where(reached[:, -1:], reached.byte().argmax(1, keepdim=True), width - 1)
    edge = values.gather(1, last)  # (n, 1)
    num_equal = last + 1 - (values > edge).sum(1, keepdim=True)
    equal = candidates == edge
    keep = (candidates > edge) | (equal & (equal.cumsum(1) <= num_equal))
    return keep | (top_p >= 1)


def _pick(weights: Tensor, coins: Tensor) -> Tensor:
    """Index (n, 1) of the first weight whose running sum exceeds coin * total."""
    running = weights.cumsum(1)
    total = running[:, -1:].contiguous()
    drawn = torch.searchsorted(running, coins * total, right=True)
    picked = torch.minimum(drawn, torch.searchsorted(running, total))  # coin * total may round up
    return picked.clamp_max(weights.shape[1] - 1)  # rows of NaN: they are marked, not drawn from
