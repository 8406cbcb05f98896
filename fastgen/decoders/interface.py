"""The decoder interface: a StepBatch in, logits or draws out.

One ragged call covers a prefill, a chunk of one, a decode step, a mix of them, and the check of
several speculated tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastgen.decoders.memory import MemoryPlan
from fastgen.sampling.draw import Draw
from fastgen.sampling.params import SamplingParams

Ints = NDArray[np.int32]
Logits = Any  # float32 (L, V), an array or tensor in the decoder's own buffer


@dataclass(frozen=True, slots=True)
class StepBatch:
    """R rows with N new tokens in all, at least one each, without padding; every array is int32.

    `ragged` and `decode` make one.

    Attributes:
        token_ids: (N,) row after row; -1 - s stands for the token that seat s drew last.
        positions: (N,) indices into the position embedding.
        row_starts: (R + 1,) row r is token_ids[row_starts[r]:row_starts[r + 1]].
        cache_lens: (R,) tokens of the row already in the cache; the new ones follow.
        block_tables: (R, M) the row's KV blocks, in order.
        logits_at: (L,) packed indices of the tokens whose next-token logits are wanted.
        seats: (L,) the sampler seat that draws there; -1 for no draw: PendingStep.logits has it.
    """

    token_ids: Ints
    positions: Ints
    row_starts: Ints
    cache_lens: Ints
    block_tables: Ints
    logits_at: Ints
    seats: Ints

    @classmethod
    def ragged(
        cls,
        *,
        token_ids: ArrayLike,
        counts: ArrayLike,
        cache_lens: ArrayLike,
        block_tables: Ints,
        logits_at: ArrayLike,
        seats: ArrayLike,
        positions: ArrayLike | None = None,
    ) -> StepBatch:
        """Any step; integers of any kind are taken.

        Args:
            counts: (R,) new tokens of each row, at least one.
            positions: (N,); None: each row's follow its cached tokens.
        """
        new, cached = np.asarray(counts, np.int32), np.asarray(cache_lens, np.int32)
        row_starts = np.zeros(len(new) + 1, np.int32)
        np.cumsum(new, out=row_starts[1:])
        if positions is None:
            positions = np.arange(row_starts[-1], dtype=np.int32)
            positions += np.repeat(cached - row_starts[:-1], new)
        return cls(
            token_ids=np.asarray(token_ids, np.int32),
            positions=np.asarray(positions, np.int32),
            row_starts=row_starts,
            cache_lens=cached,
            block_tables=block_tables,
            logits_at=np.asarray(logits_at, np.int32),
            seats=np.asarray(seats, np.int32),
        )

    @classmethod
    def decode(
        cls, token_ids: Sequence[int], cache_lens: Sequence[int], block_tables: Ints, seats: Ints
    ) -> StepBatch:
        """One new token for each row (R,), and a draw after it; nearly all steps are such."""
        cached, numbers = np.array(cache_lens, np.int32), _numbers_to(len(cache_lens))
        return cls(
            token_ids=np.array(token_ids, np.int32),
            positions=cached,
            row_starts=numbers,
            cache_lens=cached,
            block_tables=block_tables,
            logits_at=numbers[:-1],
            seats=seats,
        )

    def drafts_after(self, logits_at: Ints) -> Ints:
        """The token that is fed after each of these, where a draft would stand; -1 at the end."""
        return np.append(self.token_ids, np.int32(-1))[logits_at + 1]


@dataclass(frozen=True, slots=True)
class Capacity:
    """What one decoder can hold (fixed at load) and take in one step.

    `max_tokens` bounds N, `max_logits` bounds L; `batch_invariant` promises the same bits for a row
    whatever else is in the batch.
    """

    num_blocks: int
    block_size: int
    max_seq_len: int
    max_tokens: int
    max_logits: int
    num_seats: int
    batch_invariant: bool


@lru_cache(maxsize=1024)
def _numbers_to(count: int) -> Ints:
    """0, 1, ..., count; nobody writes there."""
    return np.arange(count + 1, dtype=np.int32)


class PendingStep(Protocol):
    """A step under way. `wait` blocks until its draws are on the host."""

    @property
    def is_async(self) -> bool:
        """Whether it goes on without the host: then the next step can be started before it is
        waited for, its draws fed back as -1 - seat."""
        ...

    def wait(self) -> list[Draw]:
        """The draws, in the order of `logits_at`; drafts after a rejected one are left out."""
        ...

    @property
    def logits(self) -> NDArray[np.float32]:
        """float32 (rows with seat -1, V), in order; valid until the decoder's next call."""
        ...

    @property
    def drawn_logits(self) -> NDArray[np.float32]:
        """float32 (rows with a seat, V), what was drawn from; valid as long."""
        ...


class Decoder(Protocol):
    """A model on its device. Calls act in the order made; one thread at a time.

    Attributes:
        known_options: names of the options that its sampler draws with. Rows with others are drawn
            on the host, from their logits.
    """

    limits: Capacity
    known_options: frozenset[str]

    @property
    def survives_fork(self) -> bool:
        """Whether it can be used in a forked child, where only the thread that forked and the
        host's memory are left."""
        ...

    def forward(self, batch: StepBatch) -> Logits:
        """Logits, float32 (L, V), in the decoder's own buffer, valid until the next call."""
        ...

    def step(self, batch: StepBatch) -> PendingStep:
        """forward, then a draw at each entry of `logits_at` that has a seat."""
        ...

    def bind(self, seat: int, params: SamplingParams, token_ids: Sequence[int]) -> None:
        """Give `seat` to a row: its options with its own seed, and its prompt.

        Penalties, bans and lengths count from there. `bad_words` holds token ids only.

        Raises:
            OptionError: an option is set that is not among `known_options`.
        """
        ...

    def observe(self, seat: int, token_id: int) -> None:
        """A token of the row that the host chose."""
        ...

    def release(self, seat: int) -> None:
        """The row in `seat` has ended."""
        ...

    def set_mask(self, seat: int, allowed: NDArray[np.bool_] | None) -> None:
        """Tokens the next draws of `seat` may be, bool (V,); None allows all."""
        ...

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy KV blocks, (source, destination) each, all read before any is written."""
        ...

    def reserve(self, blocks: int, seats: int) -> None:
        """Grow to at least this many blocks and seats, between steps; block ids stay valid."""
        ...

    def memory(self) -> MemoryPlan:
        """Bytes of weights, KV and scratch."""
        ...

    def warmup(self) -> None:
        """Do once, at a chosen time, what the first step would otherwise have to do."""
        ...

    def close(self) -> None:
        """Give threads and memory back; the decoder is not used afterwards."""
        ...


def with_capacity(limits: Capacity, blocks: int, seats: int) -> Capacity:
    """The limits of a decoder with at least so many blocks and seats.

    Raises:
        ValueError: a step has not so many logits: one for each seat.
    """
    if seats > limits.max_logits:
        raise ValueError(f"{seats} seats: a step has {limits.max_logits} logits")
    blocks, seats = max(blocks, limits.num_blocks), max(seats, limits.num_seats)
    return replace(limits, num_blocks=blocks, num_seats=seats)


def check_batch(batch: StepBatch, limits: Capacity) -> None:
    """Raise AssertionError where a batch breaks the interface; the scheduler never makes one."""
    num_rows, num_tokens = len(batch.cache_lens), len(batch.token_ids)
    assert 0 < num_tokens <= limits.max_tokens, "token budget"
    assert len(batch.logits_at) == len(batch.seats) <= limits.max_logits, "logits budget"
    assert batch.positions.shape == (num_tokens,), "positions"
    assert batch.row_starts.shape == (num_rows + 1,), "row_starts"
    assert batch.row_starts[0] == 0 and batch.row_starts[-1] == num_tokens, "row_starts"
    assert batch.block_tables.ndim == 2 and len(batch.block_tables) == num_rows, "block_tables"
