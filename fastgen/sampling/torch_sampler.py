"""The sampler of the torch decoder: fastgen.sampling.definition's definition for many rows at once.

Rows keep their options in arrays by seat, so a step gathers them without looking at each row; only
rows whose options change logits have theirs copied and changed one by one.

Shapes: n draws of a step, V vocabulary, K candidates of a row (V, or few).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastgen.results import TokenLogprobs
from fastgen.sampling.draw import Draw
from fastgen.sampling.history import KNOWN_OPTIONS, RowHistory
from fastgen.sampling.options import require_known
from fastgen.sampling.params import SamplingParams
from fastgen.sampling.philox import philox4x32, uniforms, words_to_uniform
from fastgen.sampling.torch_filters import (
    FILTER_FIELDS,
    FILTERS,
    Options,
    candidates,
    filter_options,
    kept_weights,
)
from fastgen.sampling.torch_processors import process

Ids = NDArray[np.int64]
_MASK32 = 0xFFFFFFFF
NO_LOGPROBS = -1
_OPTIONS = np.dtype(
    [
        ("seed", np.int64),  # the 64 bits of the unsigned seed
        ("length", np.int64),  # tokens of the row so far
        ("num_logprobs", np.int64),
        ("changes", bool),  # logits are processed, or masked
        ("temperature", np.float32),
        *FILTER_FIELDS,
    ]
)


class TorchSampler:
    """Per-seat options and draws, on the device that holds the logits.

    Attributes:
        known_options: those that it draws with; rows with others must be drawn elsewhere.
    """

    known_options = frozenset({
        *KNOWN_OPTIONS, "allowed_token_ids", "temperature", *FILTERS,
        "stop_token_ids", "ignore_eos", "seed", "logprobs",
    })  # fmt: skip

    def __init__(
        self, num_seats: int, vocab_size: int, eos_ids: frozenset[int], device: torch.device
    ) -> None:
        self.device = device
        self.last_drawn = torch.zeros(num_seats, dtype=torch.int64, device=device)
        self._vocab_size, self._eos_ids = vocab_size, eos_ids
        self._options: Options = np.zeros(num_seats, _OPTIONS)
        self._histories: dict[int, RowHistory] = {}
        self._listed: dict[int, NDArray[np.bool_]] = {}  # allowed_token_ids
        self._allowed: dict[int, Tensor] = {}  # these and the mask

    def reserve(self, num_seats: int) -> None:
        more = num_seats - len(self._options)
        self._options = np.concatenate([self._options, np.zeros(more, _OPTIONS)])
        self.last_drawn = torch.cat([self.last_drawn, self.last_drawn.new_zeros(more)])

    def bind(self, seat: int, params: SamplingParams, token_ids: Sequence[int]) -> None:
        require_known(self.known_options, params)
        self.release(seat)
        own = filter_options(params, self._vocab_size) | {
            "seed": int(np.uint64(params.seed or 0).view(np.int64)),
            "length": len(token_ids),
            "num_logprobs": NO_LOGPROBS if params.logprobs is None else params.logprobs,
            "changes": False,
            "temperature": params.temperature,
        }
        self._options[seat] = tuple(own[name] for name in _OPTIONS.names or ())
        self._histories[seat] = RowHistory(params, token_ids, self._eos_ids)
        if params.allowed_token_ids is not None:
            self._listed[seat] = np.zeros(self._vocab_size, bool)
            self._listed[seat][list(params.allowed_token_ids)] = True
        self.set_mask(seat, None)

    @torch.inference_mode()  # `last_drawn` may have been grown in it
    def observe(self, seat: int, token_id: int) -> None:
        self._options["length"][seat] += 1
        self._histories[seat].observe(token_id)
        self._remember({seat: token_id})

    def release(self, seat: int) -> None:
        for by_seat in (self._histories, self._listed, self._allowed):
            by_seat.pop(seat, None)

    def set_mask(self, seat: int, allowed: NDArray[np.bool_] | None) -> None:
        masks = [mask for mask in (self._listed.get(seat), allowed) if mask is not None]
        self._allowed.pop(seat, None)
        if masks:
            both = np.logical_and.reduce(masks)
            self._allowed[seat] = torch.from_numpy(both).to(self.device)
        self._options["changes"][seat] = bool(masks) or not self._histories[seat].is_plain

    def draw(self, logits: Tensor, seats: NDArray[np.int32], drafts: Sequence[int]) -> list[Draw]:
        """Draw one token a row of `logits`.

        Args:
            logits: float32 (n, V), never changed.
            seats: (n,) seat of each draw; neighbours with the same seat check drafts.
            drafts: (n,) the id that the next draw of the same seat takes for granted; -1 for none.

        Returns:
            The draws in order, without those after a draw that differs from its draft.
        """
        drawn: dict[int, Draw] = {}
        follows = np.zeros(len(seats) + 1, bool)  # the draw before is of the same seat
        follows[1:-1] = seats[1:] == seats[:-1]
        wave = np.flatnonzero(~follows[:-1])
        while len(wave):  # the first draws of all seats, the second where the draft was right, ...
            drawn |= zip(wave.tolist(), self._wave(_take(logits, wave), seats[wave]), strict=True)
            right = [
                at for at in wave.tolist() if drawn[at].ok and drawn[at].token_id == drafts[at]
            ]
            wave = np.array([at + 1 for at in right if follows[at + 1]], np.intp)
        kept = [drawn[at] for at in sorted(drawn)]
        self._remember({one.seat: one.token_id for one in kept})  # of a seat's draws, the last
        return kept

    def _wave(self, logits: Tensor, seats: NDArray[np.int32]) -> list[Draw]:
        """One draw a seat, which its row then counts."""
        ids, ok = self._draw_ids(logits, seats)
        logprobs = logprobs_of(logits, self._options["num_logprobs"][seats], ids, ok)
        self._options["length"][seats[ok]] += 1
        for seat, token_id in zip(seats[ok].tolist(), ids[ok].tolist(), strict=True):
            self._histories[seat].observe(token_id)
        draws = zip(seats.tolist(), ids.tolist(), ok.tolist(), strict=True)
        return [Draw(*drawn, logprobs.get(at)) for at, drawn in enumerate(draws)]

    def _remember(self, last: dict[int, int]) -> None:
        index = torch.tensor(list(last), device=self.device)
        self.last_drawn[index] = torch.tensor(list(last.values()), device=self.device)

    def _draw_ids(self, logits: Tensor, seats: NDArray[np.int32]) -> tuple[Ids, NDArray[np.bool_]]:
        """Ids (n,), and whether there was one to draw."""
        options = self._options[seats]
        ids, ok = np.zeros(len(seats), np.int64), np.zeros(len(seats), bool)
        for changes in (False, True):
            at = np.flatnonzero(options["changes"] == changes)
            if len(at):
                scores = self._processed(logits, seats, at) if changes else _take(logits, at)
                ids[at], ok[at] = self._choose(scores, options[at])
        return ids, ok

    def _processed(self, logits: Tensor, seats: NDArray[np.int32], at: NDArray[np.intp]) -> Tensor:
        scores = logits.index_select(0, self._tensor(at))  # a copy
        rows = seats[at].tolist()
        histories = [self._histories[seat] for seat in rows]
        process(scores, histories, [self._allowed.get(seat) for seat in rows])
        return scores

    def _choose(self, scores: Tensor, options: Options) -> tuple[Ids, NDArray[np.bool_]]:
        """Ids (n,) of rows whose scores, float32 (n, V), are final, and which have one."""
        sampled = options["temperature"] > 0
        divisors = np.where(sampled, options["temperature"], np.float32(1))
        with np.errstate(over="ignore"):
            ok = np.isfinite(scores.amax(1).cpu().numpy() / divisors)
        ids = np.zeros(len(ok), np.int64)
        few = options["num_candidates"] > 0
        ways = (
            (~sampled, _greedy),
            (sampled & few, self._sample),
            (sampled & ~few, self._sample),
        )
        for chosen, way in ways:
            at = np.flatnonzero(chosen & ok)
            if len(at):  # the ids go to the host: the device is waited for
                ids[at] = way(_take(scores, at), options[at]).cpu().numpy()
        return ids, ok

    def _sample(self, scores: Tensor, options: Options) -> Tensor:
        """Ids (n,) of rows with a temperature; all with few candidates, or all without."""
        scaled = scores / self._tensor(options["temperature"])[:, None]  # (n, V)
        weights, token_ids = kept_weights(scaled, options)  # (n, K)
        picked = _pick(weights, self._uniforms(options["seed"], options["length"]))  # (n, 1)
        return (picked if token_ids is None else token_ids.gather(1, picked))[:, 0]

    def _uniforms(self, seeds: Ids, positions: Ids) -> Tensor:
        """float64 (n, 1), as fastgen.sampling.philox.uniforms has them."""
        if self.device.type == "cpu":
            return torch.from_numpy(uniforms(seeds, positions))[:, None]
        key, counter = self._tensor(seeds), self._tensor(positions) & _MASK32
        zero = torch.zeros_like(counter)
        words = (key & _MASK32, (key >> 32) & _MASK32)
        high, low, _, _ = philox4x32((counter, zero, zero, zero), words)
        drawn: Tensor = words_to_uniform(high, low).double() * 2.0**-53
        return drawn[:, None]

    def _tensor(self, values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(values.copy()).to(self.device)  # a field is strided: packed by copy


def logprobs_of(
    logits: Tensor, wanted: Ids, ids: Ids, ok: NDArray[np.bool_]
) -> dict[int, TokenLogprobs]:
    """Log-probabilities of drawn ids (n,) under raw logits, float32 (n, V), by draw.

    Args:
        wanted: (n,) how many besides the drawn one; -1 for draws that want none at all.
        ok: bool (n,), whether there was a draw.
    """
    at = np.flatnonzero((wanted != NO_LOGPROBS) & ok)
    if not len(at):
        return {}
    some = _take(logits, at)
    log_total = some.double().logsumexp(1, keepdim=True)
    own = some.gather(1, torch.from_numpy(ids[at]).to(some.device)[:, None]) - log_total
    counts = wanted[at].clip(max=some.shape[1])
    best, best_ids = candidates(some, counts.clip(1))
    top, order = (best - log_total).sort(dim=1, descending=True, stable=True)  # lowest id first
    top, order = top[:, : counts.max()], order[:, : counts.max()]
    top_ids = order if best_ids is None else best_ids.gather(1, order)
    rows = zip(ids[at].tolist(), own.tolist(), top_ids.tolist(), top.tolist(), counts, strict=True)
    scored = (
        TokenLogprobs(token_id, logprob, _finite(zip(*pairs, strict=True), count))
        for token_id, (logprob,), *pairs, count in rows
    )
    return dict(zip(at.tolist(), scored, strict=True))


def _finite(top: Iterable[tuple[int, float]], count: int) -> tuple[tuple[int, float], ...]:
    """The first `count`, without those that cannot be drawn; these come last."""
    return tuple(pair for pair in islice(top, count) if pair[1] > -math.inf)


def _take(logits: Tensor, at: NDArray[np.intp]) -> Tensor:
    """Some rows; all of them without a copy."""
    if len(at) == len(logits):
        return logits
    return logits.index_select(0, torch.from_numpy(at).to(logits.device))


def _greedy(scores: Tensor, options: Options) -> Tensor:
    return scores.argmax(1)  # of equals the first: the lowest id


def _pick(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Index (n, 1) of the first weight whose running sum exceeds uniform * total."""
    running = weights.cumsum(1)
    total = running[:, -1:].contiguous()
    drawn = torch.searchsorted(running, uniforms * total, right=True)
    return torch.minimum(drawn, torch.searchsorted(running, total))  # uniform * total may round up
