"""The sampler of the CUDA decoder: a table of seats on the device, and kernels that draw from it.

Options that the kernels do not know send their row to the host: its logits are copied, and the
C++ sampler (or torch's) draws. All return the ids that fastgen.sampling.definition defines.

Shapes: n draws of a step, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastgen.decoders.machine import granted_cores
from fastgen.kernels.embedding import STEPS_COUNTED
from fastgen.kernels.launch import Settings, cdiv
from fastgen.kernels.processing import (
    CHANGES,
    CHUNK,
    FREQUENCY,
    HAS_BIAS,
    HAS_MASK,
    IN_PROMPT,
    MIN_P,
    MOST_TOP_K,
    NUM_OPTIONS,
    PRESENCE,
    REPETITION,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    ProcessedLogits,
    SeatTable,
    process,
    weigh,
)
from fastgen.kernels.sampling import MOST_CANDIDATES, Feedback, sample
from fastgen.kernels.vocabulary import TILE
from fastgen.native import native
from fastgen.sampling.draw import Draw
from fastgen.sampling.native_sampler import NativeSampler
from fastgen.sampling.options import BY_NAME, unknown_to
from fastgen.sampling.params import SamplingParams
from fastgen.sampling.torch_sampler import NO_LOGPROBS, TorchSampler, logprobs_of

# Columns that hold options as they are.
_COLUMNS = {
    "temperature": TEMPERATURE.value,
    "top_p": TOP_P.value,
    "min_p": MIN_P.value,
    "repetition_penalty": REPETITION.value,
    "frequency_penalty": FREQUENCY.value,
    "presence_penalty": PRESENCE.value,
}
_PENALTIES = ("repetition_penalty", "frequency_penalty", "presence_penalty")
_TOP_K, _CHANGES = TOP_K.value, CHANGES.value
_HAS_BIAS, _HAS_MASK = HAS_BIAS.value, HAS_MASK.value
RING = 64  # steps that may be under way before the first is looked at


class Kind(NamedTuple):
    """What some row of a step needs besides the greedy draw."""

    samples: bool = False
    processes: bool = False  # its logits change
    weighs: bool = False  # it samples, and no small top-k makes it short


class CudaSampler:
    """Per-seat options and draws of logits on one device.

    Attributes:
        on_device: options that kernels draw with. Rows with others are drawn on the host.
        known_options: these, and those of the host's sampler.
        table: what kernels know of the seats; moved on by their draws.
        scores: logits and all that kernels make of them.
        feedback: where draws go.
    """

    on_device = frozenset({
        *_COLUMNS, "top_k", "logit_bias", "allowed_token_ids",
        "stop_token_ids", "ignore_eos", "seed", "logprobs",
    })  # fmt: skip

    def __init__(
        self,
        settings: Settings,
        num_seats: int,
        vocab_size: int,
        eos_ids: frozenset[int],
        max_seq_len: int,
        max_draws: int,
        device: torch.device,
    ) -> None:
        self.settings, self.device = settings, device
        self._vocab_size = vocab_size
        self.table = new_table(num_seats, vocab_size, device)
        self.scores = new_scores(max_draws, vocab_size, device)
        shape = (RING, max_draws)
        drawn = torch.zeros(shape, dtype=torch.int32, pin_memory=device.type == "cuda")
        self.feedback = Feedback(drawn, torch.zeros(1, dtype=torch.int32, device=device))
        self._drawn: NDArray[np.int32] = drawn.numpy()
        # Seats whose options are new; those just bound with their seed and length.
        self._new_options: dict[int, tuple[int, int] | None] = {}
        self._host: NativeSampler | TorchSampler
        if native is not None:
            sizes = (num_seats, vocab_size, eos_ids, max_seq_len)
            self._host = NativeSampler(*sizes, granted_cores())
        else:
            self._host = TorchSampler(num_seats, vocab_size, eos_ids, torch.device("cpu"))
        self.known_options = self.on_device | self._host.known_options
        self._listed: dict[int, NDArray[np.bool_]] = {}  # allowed_token_ids
        self._options = np.zeros((num_seats, NUM_OPTIONS.value))
        self._num_logprobs = np.full(num_seats, NO_LOGPROBS, np.int64)
        self.on_host = np.zeros(num_seats, bool)
        self.num_steps = 0  # as feedback.num_steps will be when all kernels have run

    @property
    def num_seats(self) -> int:
        return len(self.on_host)

    def count_as_device(self) -> None:
        """Take over how many steps the device has counted, at most one more than the host."""
        counted = int(self.feedback.num_steps.item()) - self.num_steps
        self.num_steps += counted % STEPS_COUNTED

    def clear(self) -> None:
        """Give the memory back."""
        self.table = new_table(0, self._vocab_size, self.device)
        self.scores = new_scores(0, self._vocab_size, self.device)

    def reserve(self, num_seats: int) -> None:
        self.flush()
        more = num_seats - self.num_seats
        with_capacity = new_table(num_seats, self._vocab_size, self.device)
        for name in SeatTable.__slots__:
            old, new = getattr(self.table, name), getattr(with_capacity, name)
            new[: len(old)] = old
        self.table = with_capacity
        self._options = np.vstack([self._options, np.zeros((more, NUM_OPTIONS.value))])
        self._num_logprobs = np.append(self._num_logprobs, np.full(more, NO_LOGPROBS, np.int64))
        self.on_host = np.append(self.on_host, np.zeros(more, bool))
        self._host.reserve(num_seats)

    def bind(self, seat: int, params: SamplingParams, token_ids: Sequence[int]) -> None:
        self.release(seat)
        self._num_logprobs[seat] = NO_LOGPROBS if params.logprobs is None else params.logprobs
        if unknown_to(self.on_device, params):
            self._host.bind(seat, params, token_ids)
            self.on_host[seat] = True
            return
        own = self._options[seat]
        own[:] = 0
        for name, column in _COLUMNS.items():
            own[column] = getattr(params, name)
        own[_TOP_K] = params.top_k if params.top_k < self._vocab_size else 0
        own[_HAS_BIAS] = bool(params.logit_bias)
        if self._penalizes(seat):
            self.table.counts[seat].copy_(torch.from_numpy(self._counts(token_ids)))
        if params.logit_bias:
            self.table.biases[seat].copy_(torch.from_numpy(self._biases(params)))
        if params.allowed_token_ids is not None:
            self._listed[seat] = np.zeros(self._vocab_size, bool)
            self._listed[seat][list(params.allowed_token_ids)] = True
        seed = int(np.uint64(params.seed or 0).view(np.int64))
        self._new_options[seat] = (seed, len(token_ids))
        self.set_mask(seat, None)

    def observe(self, seat: int, token_id: int) -> None:
        if self.on_host[seat]:
            self._host.observe(seat, token_id)
        else:
            self.flush()
            self.table.lengths[seat] += 1
            self.table.counts[seat, token_id] += 1
        self.table.last_drawn[seat] = token_id

    def release(self, seat: int) -> None:
        if self.on_host[seat]:
            self._host.release(seat)
        self.on_host[seat] = False
        self._num_logprobs[seat] = NO_LOGPROBS
        self._listed.pop(seat, None)

    def set_mask(self, seat: int, allowed: NDArray[np.bool_] | None) -> None:
        if self.on_host[seat]:
            self._host.set_mask(seat, allowed)
            return
        masks = [mask for mask in (self._listed.get(seat), allowed) if mask is not None]
        own = self._options[seat]
        own[_HAS_MASK] = bool(masks)
        if masks:
            bits = np.packbits(np.logical_and.reduce(masks), bitorder="little")
            words = np.zeros(self.table.masks.shape[1], np.int32)
            words.view(np.uint8)[: len(bits)] = bits
            self.table.masks[seat].copy_(torch.from_numpy(words))
        own[_CHANGES] = bool(own[_HAS_BIAS] or own[_HAS_MASK] or self._penalizes(seat))
        self._new_options.setdefault(seat, None)

    def kind(self, seats: NDArray[np.int32]) -> Kind:
        """What a step with draws of these seats needs; -1 is none."""
        own = self._options[seats[seats >= 0]].T
        samples, top_k = own[_COLUMNS["temperature"]] > 0, own[_TOP_K]
        weighs = samples & ((top_k == 0) | (top_k > MOST_TOP_K))
        return Kind(bool(samples.any()), bool(own[_CHANGES].any()), bool(weighs.any()))

    def launch(
        self,
        seats: Tensor,
        num_draws: int,
        kind: Kind,
        feedback: Feedback | None = None,
    ) -> None:
        """Draw from the first n logits; nothing is waited for. seats: int32 (n,), none twice."""
        if kind.processes:
            process(self.settings, self.scores, seats, self.table, num_draws)
        if kind.weighs:
            weigh(self.settings, self.scores, seats, self.table, num_draws)
        sample(
            self.settings,
            feedback or self.feedback,
            seats,
            self.table,
            self.scores,
            num_draws,
            samples=kind.samples,
            processes=kind.processes,
        )

    def line(self, number: int) -> NDArray[np.int32]:
        """Ids (n,) that this step drew; -1: none could be. Valid until RING steps later."""
        line: NDArray[np.int32] = self._drawn[number % RING]
        return line

    def draws_of(
        self, seats: NDArray[np.int32], ids: NDArray[np.int32], at: NDArray[np.intp]
    ) -> list[Draw]:
        """What kernels drew, as `line` has it, from the logits at `at`; with log-probabilities for
        who wants them, if these are still the last step's."""
        ok = ids >= 0
        drawn_ids = np.where(ok, ids, 0).astype(np.int64)
        logprobs = {}
        wanted = self._num_logprobs[seats]
        if (wanted != NO_LOGPROBS).any():
            index = torch.from_numpy(at).to(self.device)
            logprobs = logprobs_of(self.scores.logits.index_select(0, index), wanted, drawn_ids, ok)
        found = zip(seats.tolist(), drawn_ids.tolist(), ok.tolist(), strict=True)
        return [Draw(*drawn, logprobs.get(at)) for at, drawn in enumerate(found)]

    def draw_on_host(
        self, logits: NDArray[np.float32], seats: NDArray[np.int32], drafts: NDArray[np.int32]
    ) -> list[Draw]:
        """For rows whose options kernels do not know; see NativeSampler.draw."""
        draws = self._host.draw(torch.from_numpy(logits), seats, drafts.tolist())
        last = {draw.seat: draw.token_id for draw in draws}
        index = torch.tensor(list(last), device=self.device)
        drawn = torch.tensor(list(last.values()), dtype=torch.int32, device=self.device)
        self.table.last_drawn[index] = drawn
        return draws

    def wants_logprobs(self, seats: NDArray[np.int32]) -> bool:
        return bool((self._num_logprobs[seats] != NO_LOGPROBS).any())

    def flush(self) -> None:
        """Let the device know of rows that were bound."""
        if not self._new_options:
            return
        seats = np.array(list(self._new_options))
        index = torch.from_numpy(seats).to(self.device)
        options = torch.from_numpy(self._options[seats]).to(self.device)
        self.table.options.index_copy_(0, index, options)
        bound = {seat: new for seat, new in self._new_options.items() if new is not None}
        if bound:
            index = torch.tensor(list(bound), device=self.device)
            seeds, lengths = zip(*bound.values(), strict=True)
            for name, values in (("seeds", seeds), ("lengths", lengths)):
                own: Tensor = getattr(self.table, name)
                own[index] = torch.tensor(values, dtype=own.dtype, device=self.device)
        self._new_options = {}

    def _penalizes(self, seat: int) -> bool:
        """Whether the seat's draws depend on what its row has."""
        own = self._options[seat]
        return any(own[_COLUMNS[name]] != BY_NAME[name].default for name in _PENALTIES)

    def _counts(self, token_ids: Sequence[int]) -> NDArray[np.int32]:
        counts = np.zeros(self._vocab_size, np.int32)
        counts[np.asarray(token_ids, np.int64)] = IN_PROMPT
        return counts

    def _biases(self, params: SamplingParams) -> NDArray[np.float32]:
        biases = np.zeros(self._vocab_size, np.float32)
        for token_id, bias in params.logit_bias:
            biases[token_id] = bias
        return biases


def new_table(num_seats: int, vocab_size: int, device: torch.device) -> SeatTable:
    def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    return SeatTable(
        options=zeros(num_seats, NUM_OPTIONS.value, dtype=torch.float64),
        seeds=zeros(num_seats, dtype=torch.int64),
        lengths=zeros(num_seats),
        last_drawn=zeros(num_seats),
        counts=zeros(num_seats, vocab_size),
        biases=zeros(num_seats, vocab_size, dtype=torch.float32),
        masks=zeros(num_seats, cdiv(vocab_size, 32)),
    )


def new_scores(num_draws: int, vocab_size: int, device: torch.device) -> ProcessedLogits:
    def empty(width: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(num_draws, width, dtype=dtype, device=device)

    tiles = cdiv(vocab_size, TILE)
    return ProcessedLogits(
        logits=empty(vocab_size, torch.float32),
        tile_max=empty(tiles, torch.float32),
        tile_ids=empty(tiles, torch.int32),
        scores=empty(vocab_size, torch.float32),
        score_max=empty(tiles, torch.float32),
        score_ids=empty(tiles, torch.int32),
        weights=empty(vocab_size, torch.int64),
        chunk_sums=empty(cdiv(vocab_size, CHUNK), torch.int64),
        hot_tiles=empty(tiles, torch.int32),
        candidate_values=empty(MOST_CANDIDATES, torch.float32),
        candidate_ids=empty(MOST_CANDIDATES, torch.int32),
    )


def sampler_bytes(num_seats: int, num_draws: int, vocab_size: int) -> int:
    """What the device holds for a CudaSampler."""
    meta = torch.device("meta")
    parts = (new_table(num_seats, vocab_size, meta), new_scores(num_draws, vocab_size, meta))
    tensors = (getattr(part, name) for part in parts for name in type(part).__slots__)
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)
