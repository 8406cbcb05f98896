"""Block accounting by a state machine: admit, step, finish, cancel, share, copy on write."""

from __future__ import annotations

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fastgen.decoders.interface import DecoderLimits
from fastgen.kv_cache import BLOCK_SIZE, blocks_for
from fastgen.request import Request, Row
from fastgen.sampling_params import SamplingParams
from fastgen.scheduler import Scheduler

LIMITS = DecoderLimits(
    num_blocks=24, block_size=BLOCK_SIZE, max_seq_len=192, max_tokens=80, max_logits=40,
    num_seats=5, batch_invariant=False,
)  # fmt: skip

# Few distinct beginnings, so that rows share blocks often: prompts are cuts of three texts.
TEXTS = [np.random.default_rng(seed).integers(0, 50, 192).tolist() for seed in range(3)]


class CacheModel(RuleBasedStateMachine):
    """Runs the scheduler without a decoder, and keeps by hand what each block's slots hold.

    A slot's content is the whole row up to its token, as keys and values depend on all of it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(LIMITS)
        self.rows: list[Row] = []
        self.slots: dict[tuple[int, int], tuple[int, ...]] = {}

    @rule(
        text=st.integers(0, 2), length=st.integers(1, 150), new=st.integers(0, 60),
        n=st.integers(1, 4), scored=st.booleans(),
    )  # fmt: skip
    def add(self, text: int, length: int, new: int, n: int, scored: bool) -> None:
        scored = scored or new == 0
        params = SamplingParams(
            n=n, max_new_tokens=new, seed=1, prompt_logprobs=0 if scored else None
        )
        request = Request(tuple(TEXTS[text][:length]), params)
        if request.prefill_len == 0:
            return
        if scored:
            request.prompt_logprobs = [None]
        request.make_rows(1, min(length + new, LIMITS.max_seq_len), frozenset(), None)
        self.scheduler.waiting.extend(request.rows)
        self.rows += request.rows

    @rule()
    def step(self) -> None:
        _, copies = self.scheduler.admit()
        self._copy(copies)
        decoding = {id(row) for row in self.scheduler.running if not row.is_prefilling}
        plan = self.scheduler.schedule()
        if plan is None:
            assert not self.scheduler.waiting, "work waits, nothing runs: a deadlock"
            return
        batch = plan.batch
        assert len(batch.token_ids) <= LIMITS.max_tokens
        assert len(batch.logits_at) <= LIMITS.max_logits
        served = {id(entry.row) for entry in plan.entries}
        assert decoding <= served, "a decoding row went without its token"
        self._write(plan)
        self.scheduler.advance(plan.entries)
        for entry in plan.entries:
            self._take_draw(entry.row, entry.draws)

    @precondition(lambda self: self.rows)
    @rule(which=st.integers(0, 10**6))
    def cancel(self, which: int) -> None:
        row = self.rows[which % len(self.rows)]
        if row.finish_reason is None:
            self._end(row)

    @invariant()
    def books_balance(self) -> None:
        pool = self.scheduler.pool
        pool.check()
        held = [block for row in self.scheduler.running for block in row.blocks]
        for block in set(held):
            assert pool.ref_count(block) == held.count(block)
        assert pool.num_free == LIMITS.num_blocks - len(set(held))

    @invariant()
    def every_row_reads_its_own_content(self) -> None:
        for row in self.scheduler.running:
            for at in range(row.num_cached):
                slot = (row.blocks[at // BLOCK_SIZE], at % BLOCK_SIZE)
                assert self.slots[slot] == tuple(row.token_ids[: at + 1])

    def teardown(self) -> None:
        for row in self.rows:
            if row.finish_reason is None:
                self._end(row)
        self.scheduler.pool.check()
        assert self.scheduler.pool.num_free == LIMITS.num_blocks
        assert not self.scheduler.pool._pending

    def _copy(self, copies: list[tuple[int, int]]) -> None:
        before = dict(self.slots)
        for source, destination in copies:
            for offset in range(BLOCK_SIZE):
                if (source, offset) in before:
                    self.slots[destination, offset] = before[source, offset]

    def _write(self, plan: object) -> None:
        writers: set[int] = set()
        for entry in plan.entries:  # type: ignore[attr-defined]
            row = entry.row
            for at in range(entry.start, entry.start + entry.count):
                block = row.blocks[at // BLOCK_SIZE]
                owners = [r for r in self.scheduler.running if block in r.blocks]
                assert owners == [row], "a row writes a block that others read"
                self.slots[block, at % BLOCK_SIZE] = tuple(row.token_ids[: at + 1])
                writers.add(block)

    def _take_draw(self, row: Row, drawn: bool) -> None:
        if drawn:
            row.token_ids.append(hash(tuple(row.token_ids)) % 50)
            if len(row.token_ids) >= row.max_len:
                self._end(row)
        elif not row.is_prefilling:
            self._end(row)

    def _end(self, row: Row) -> None:
        row.finish("cancelled")
        self.scheduler.remove(row)


CacheModel.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestCacheModel = CacheModel.TestCase


def test_everything_admitted_ends_within_a_computed_bound() -> None:
    """Each row needs its prompt's share of the budget and a step a token: nobody starves."""
    rng = np.random.default_rng(0)
    scheduler = Scheduler(LIMITS)
    rows: list[Row] = []
    for _ in range(60):
        length, new = int(rng.integers(1, 150)), int(rng.integers(1, 40))
        request = Request(
            tuple(rng.integers(0, 50, length).tolist()), SamplingParams(max_new_tokens=new)
        )
        request.make_rows(int(rng.integers(2**32)), length + new, frozenset(), None)
        rows += request.rows
    scheduler.waiting.extend(rows)
    share = LIMITS.max_tokens - LIMITS.num_seats
    bound = sum(
        blocks_for(row.prompt_len) * BLOCK_SIZE // share + 1 + row.params.max_new_tokens
        for row in rows
    )
    steps = 0
    while scheduler.num_unfinished:
        scheduler.admit()
        plan = scheduler.schedule()
        assert plan is not None
        scheduler.advance(plan.entries)
        for entry in plan.entries:
            if entry.draws:
                entry.row.token_ids.append(1)
                if len(entry.row.token_ids) >= entry.row.max_len:
                    scheduler.remove(entry.row)
        steps += 1
        assert steps <= bound
    assert scheduler.pool.num_free == LIMITS.num_blocks
