"""What a caller may do between two steps of an engine: see Engine.between_steps."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from fastgen.decoders.interface import Decoder, Ints, Logits, StepBatch
from fastgen.engine.blocks import blocks_needed
from fastgen.engine.leases import Copies, Lease
from fastgen.engine.scheduler import Scheduler
from fastgen.errors import OutOfBlocksError
from fastgen.speculation.costs import SIZES, StepCosts


class Pause:
    """No step runs during a pause. Rows that have not been admitted stay in the queue.

    A caller runs forwards of its own, in blocks that it leases, and may make the decoder grow. The
    leases outlive the pause, and are touched in pauses only.
    """

    def __init__(self, decoder: Decoder, scheduler: Scheduler) -> None:
        self._decoder, self._scheduler = decoder, scheduler

    def lease(self) -> Lease:
        """One that holds nothing yet; its content is shared with rows that have no cache_salt."""
        return self._scheduler.lease()

    def forward(self, batch: StepBatch) -> Logits:
        """Logits, float32 (L, V), in the decoder's own buffer, valid until its next call."""
        return self._decoder.forward(batch)

    def copy_blocks(self, copies: Copies) -> None:
        """Make the copies that leases have asked for."""
        if copies:
            self._decoder.copy_blocks(copies)

    def measure_steps(self, costs: StepCosts) -> None:
        """Time steps of one row with different numbers of tokens, each three times; nothing is
        measured if there is no free block for them."""
        limits = self._decoder.limits
        most = min(limits.max_tokens, limits.max_logits, limits.max_seq_len)
        lease = self.lease()
        try:
            self.copy_blocks(lease.extend(min(most, SIZES[-1])))
            table = np.array([lease.blocks], np.int32)
            costs.measure(lambda size: self._seconds(size, table), most)
        except OutOfBlocksError:
            return
        finally:
            lease.release()

    def _seconds(self, size: int, table: Ints) -> float:
        batch = StepBatch.ragged(
            token_ids=np.zeros(size, np.int32),
            counts=[size],
            cache_lens=[0],
            block_tables=table,
            logits_at=np.arange(size),
            seats=np.full(size, -1),
        )
        started = time.perf_counter()
        float(self._decoder.forward(batch)[-1, 0])  # one number waits for a device, too
        return time.perf_counter() - started

    def reserve_rows(self, max_lens: Sequence[int]) -> None:
        """Have blocks and seats for rows that get so many tokens, and for those that wait; as many
        at once as a step has logits.

        Raises:
            ValueError, MemoryError: there is no memory; nothing has changed then.
        """
        self._grow([blocks_needed(max_len) for max_len in max_lens], 0)

    def reserve_blocks(self, count: int) -> None:
        """Have so many free blocks beside those that waiting rows need.

        Raises:
            ValueError, MemoryError: there is no memory; nothing has changed then.
        """
        if count > self._scheduler.pool.num_free or self._scheduler.waiting:
            self._grow([], count)

    def _grow(self, needs: Sequence[int], extra: int) -> None:
        """For rows that need so many blocks each, those that wait anyway, and `extra` blocks."""
        limits, scheduler = self._decoder.limits, self._scheduler
        waiting = [blocks_needed(row.max_len) for row in scheduler.waiting]
        num_rows = len(scheduler.running) + len(waiting) + len(needs)
        seats = max(limits.num_seats, min(num_rows, limits.max_logits))
        most = sorted([*waiting, *needs], reverse=True)[: limits.max_logits]
        missing = max(0, sum(most) + extra - scheduler.pool.num_free)
        if missing and extra:  # sequences that grow token by token come again soon
            missing = max(missing, limits.num_blocks // 2)
        if missing or seats > limits.num_seats:
            self._decoder.reserve(limits.num_blocks + missing, seats)
            scheduler.grow(self._decoder.limits)
