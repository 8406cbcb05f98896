"""A scheduler without a decoder: rows come, run and end, and who goes before whom is checked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastgen.decoders.interface import Capacity
from fastgen.decoders.memory import BLOCK_SIZE
from fastgen.engine.blocks import BlockPool
from fastgen.engine.leases import Copies
from fastgen.engine.queue import BYPASS
from fastgen.engine.requests import Request, Row
from fastgen.engine.scheduler import ScheduledRow, Scheduler, StepPlan, is_prefilling
from fastgen.sampling.definition import KNOWN_OPTIONS
from fastgen.sampling.params import SamplingParams

LIMITS = Capacity(
    num_blocks=24, block_size=BLOCK_SIZE, max_seq_len=192, max_tokens=80, max_logits=40,
    num_seats=5, batch_invariant=False,
)  # fmt: skip

# Few distinct beginnings, so that rows share blocks often: prompts are cuts of three texts.
TEXTS = [np.random.default_rng(seed).integers(0, 50, 192).tolist() for seed in range(3)]


class FailingPool(BlockPool):
    """Its next `failures` allocations raise."""

    failures = 0

    def allocate(self, count: int) -> list[int]:
        if self.failures:
            self.failures -= 1
            raise MemoryError("injected")
        return super().allocate(count)


def blocks_of(row: Row) -> list[int]:
    """The KV blocks that a row holds."""
    return row.schedule.lease.blocks if row.schedule.seat >= 0 else []


def assert_nothing_held(scheduler: Scheduler) -> None:
    """Every block and every seat is free, and nothing is announced."""
    scheduler.pool.check()
    assert scheduler.pool.num_free == scheduler.limits.num_blocks
    assert sorted(scheduler._free_seats) == list(range(scheduler.limits.num_seats))
    assert not pending_blocks(scheduler.pool)


def pending_blocks(pool: BlockPool) -> list[int | None]:
    """Blocks that somebody has announced to fill."""
    return [pool.pending(key) for key in pool._pending]


def drawn_after(token_ids: Sequence[int]) -> int:
    return hash(tuple(token_ids)) % 50


class Simulation:
    """A scheduler without a decoder: every draw is a function of the row.

    `drafts`: rows that decode have drafts, some of which are right.
    """

    drafts = False

    def __init__(self, limits: Capacity = LIMITS) -> None:
        self.scheduler = Scheduler(limits)
        self.scheduler.pool = self.pool = FailingPool(limits.num_blocks)
        self.limits = limits
        self.rows: list[Row] = []
        self.given: dict[Row, tuple[int, int]] = {}  # the key each row came with
        self.passed_by: dict[Row, list[Row]] = {}  # waiting rows, and who was admitted before them

    def add(
        self,
        prompt: Sequence[int],
        new: int,
        *,
        n: int = 1,
        scored: bool = False,
        priority: int = 0,
    ) -> list[Row]:
        scored = scored or new == 0
        params = SamplingParams(
            n=n, max_new_tokens=new, seed=1, prompt_logprobs=0 if scored else None
        )
        request = Request(tuple(prompt), params, priority=priority)
        if request.prefill_len == 0:
            return []
        if scored:
            request.prompt_logprobs = [None]
        max_len = min(len(prompt) + new, self.limits.max_seq_len)
        request.make_rows(1, max_len, frozenset(), None, KNOWN_OPTIONS)
        for row in request.rows:
            self.scheduler.waiting.add(row)
            self.given[row], self.passed_by[row] = row.schedule.queue_key, []
            assert row.schedule.queue_key == (len(self.rows) + BYPASS * priority, len(self.rows))
            self.rows.append(row)
        return request.rows

    def step(self, *, admits: bool = True) -> StepPlan | None:
        """Admit and schedule; whoever calls it advances the entries."""
        admissions = self.scheduler.admit() if admits else []
        for admission in admissions:
            if admission.error is not None:
                assert blocks_of(admission.row) == [] and admission.row.schedule.seat == -1
                self.end(admission.row)
            else:
                assert is_prefilling(admission.row), "something is left to compute"
                self.copy(admission.copies)
                self._check_order(admission.row)
        decoding = {row for row in self.scheduler.running if not is_prefilling(row)}
        plan = self.scheduler.schedule(self._drafts if self.drafts else None)
        if plan is None:
            assert admissions or not self.scheduler.waiting, "work waits, nothing runs: a deadlock"
            return None
        self.copy(plan.copies)
        assert len(plan.batch.token_ids) <= self.limits.max_tokens
        assert len(plan.batch.logits_at) <= self.limits.max_logits
        assert decoding <= {entry.row for entry in plan.entries}, "a decoding row got no token"
        return plan

    def serve(self, steps: int = 1) -> None:
        for _ in range(steps):
            plan = self.step()
            if plan is not None:
                self.advance(plan)

    def advance(self, plan: StepPlan) -> None:
        for entry in plan.entries:
            row = entry.row
            num_given = 0
            for draft in (*entry.drafts, -1):
                whole = ScheduledRow(row, entry.start + num_given, 1, True)
                self.scheduler.advance(whole if entry.drafts else entry)
                if entry.needs_draw:
                    row.token_ids.append(drawn_after(row.token_ids))
                num_given += 1
                if len(row.token_ids) >= row.max_len or row.token_ids[-1] != draft:
                    break
            if len(row.token_ids) >= row.max_len and not is_prefilling(row):
                self.end(row)
            elif entry.drafts:
                row.schedule.lease.retract(entry.count - num_given)

    def _drafts(self, rows: Sequence[Row], num_rows: int, room: int) -> list[list[int]]:
        """Up to seven tokens a row, the first of them right."""
        assert num_rows >= len(rows) and room > 0
        found = []
        for row in rows:
            token_ids, size = list(row.token_ids), hash((1, *row.token_ids))
            most = min(size % 8, room, row.max_len - 1 - len(token_ids))
            for at in range(most):
                token_ids.append(drawn_after(token_ids) + (at >= size // 8 % 8))
            found.append(token_ids[len(row.token_ids) :])
            room -= most
        return found

    def copy(self, copies: Copies) -> None:
        pass

    def end(self, row: Row) -> None:
        row.finish("cancelled")
        self.scheduler.remove(row)

    def _check_order(self, admitted: Row) -> None:
        """Whoever should have gone first waits for a running row to compute its beginning."""
        ahead = [row for row in self.scheduler.waiting if self.given[row] < self.given[admitted]]
        assert all(row.schedule.awaits_prefix for row in ahead), (
            "a row was passed that could have run"
        )
        assert len(ahead) <= self.limits.num_seats
        for row in ahead:
            self.passed_by[row].append(admitted)
