"""Block accounting by a state machine: admit, step, finish, cancel, share, copy on write, and
allocations that fail.
"""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fastgen.decoders.memory import BLOCK_SIZE
from fastgen.engine.leases import Copies
from fastgen.engine.scheduler import StepPlan, is_prefilling
from simulation import LIMITS, TEXTS, Simulation, assert_nothing_held, blocks_of, pending_blocks


class CacheModel(RuleBasedStateMachine):
    """Keeps by hand what each block's slots hold.

    A slot's content is the whole row up to its token, as keys and values depend on all of it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.simulation = Simulation()
        self.simulation.copy = self._copy  # type: ignore[method-assign]
        self.scheduler = self.simulation.scheduler
        self.slots: dict[tuple[int, int], tuple[int, ...]] = {}

    @rule(
        text=st.integers(0, 2), length=st.integers(1, 150), new=st.integers(0, 60),
        n=st.integers(1, 4), scored=st.booleans(), priority=st.integers(-2, 2),
    )  # fmt: skip
    def add(self, text: int, length: int, new: int, n: int, scored: bool, priority: int) -> None:
        self.simulation.add(TEXTS[text][:length], new, n=n, scored=scored, priority=priority)

    @rule(count=st.integers(1, 3))
    def allocations_fail(self, count: int) -> None:
        self.simulation.pool.failures = count

    @rule(drafts=st.booleans())
    def step(self, drafts: bool) -> None:
        self.simulation.drafts = drafts
        self.run_step()

    def run_step(self, *, admits: bool = True) -> None:
        plan = self.simulation.step(admits=admits)
        if plan is not None:
            self._write(plan)
            self.simulation.advance(plan)

    @precondition(lambda self: self.simulation.rows)
    @rule(which=st.integers(0, 10**6))
    def cancel(self, which: int) -> None:
        row = self.simulation.rows[which % len(self.simulation.rows)]
        if row.finish_reason is None:
            self.simulation.end(row)

    @precondition(lambda self: self.scheduler.pool.num_free > LIMITS.num_seats)
    @rule(which=st.integers(0, 10**6), count=st.integers(1, 70))
    def take_drawn_tokens_back(self, which: int, count: int) -> None:
        """Others are drawn in their place; what their step writes is copied first where shared."""
        drawn = [row for row in self.scheduler.running if len(row.token_ids) > row.prompt_len]
        if drawn:
            row = drawn[which % len(drawn)]
            kept = max(row.prompt_len + 1, len(row.token_ids) - count)
            row.schedule.lease.rewind(len(row.token_ids) - kept)
            row.token_ids[kept - 1 :] = [50]  # no text has it
            self.simulation.pool.failures = 0
            self.run_step(admits=False)

    @invariant()
    def books_balance(self) -> None:
        pool = self.scheduler.pool
        pool.check()
        held = [block for row in self.scheduler.running for block in blocks_of(row)]
        for block in set(held):
            assert pool.ref_count(block) == held.count(block)
        assert pool.num_free == LIMITS.num_blocks - len(set(held))
        open_rows = [row for row in self.simulation.rows if row.finish_reason is None]
        assert self.scheduler.num_unfinished == len(open_rows)

    @invariant()
    def every_row_reads_its_own_content(self) -> None:
        for row in self.scheduler.running:
            for at in range(row.schedule.lease.num_tokens):
                slot = (blocks_of(row)[at // BLOCK_SIZE], at % BLOCK_SIZE)
                assert self.slots[slot] == tuple(row.token_ids[: at + 1])

    @invariant()
    def what_is_announced_is_being_computed(self) -> None:
        for block in pending_blocks(self.scheduler.pool):
            running = self.scheduler.running
            assert any(is_prefilling(row) and block in blocks_of(row) for row in running)

    def teardown(self) -> None:
        for row in self.simulation.rows:
            if row.finish_reason is None:
                self.simulation.end(row)
        assert_nothing_held(self.scheduler)

    def _copy(self, copies: Copies) -> None:
        for source, destination in copies:
            for offset in range(BLOCK_SIZE):
                if (source, offset) in self.slots:
                    self.slots[destination, offset] = self.slots[source, offset]

    def _write(self, plan: StepPlan) -> None:
        for entry in plan.entries:
            row, token_ids = entry.row, [*entry.row.token_ids, *entry.drafts]
            for at in range(entry.start, entry.start + entry.count):
                block = blocks_of(row)[at // BLOCK_SIZE]
                owners = [r for r in self.scheduler.running if block in blocks_of(r)]
                assert owners == [row], "a row writes a block that others read"
                self.slots[block, at % BLOCK_SIZE] = tuple(token_ids[: at + 1])


CacheModel.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestCacheModel = CacheModel.TestCase


@pytest.mark.parametrize("which", range(8))
def test_an_allocation_that_fails_takes_nothing(which: int) -> None:
    """The k-th admission fails, for every k; the others run as if it had never been."""
    simulation = Simulation()
    for index in range(8):  # shared beginnings, copies on write, more rows than seats
        simulation.add(TEXTS[index % 2][: 70 + index // 2], 10, scored=index == 5)
    allocate, calls = simulation.pool.allocate, iter(range(100))

    def failing(count: int) -> list[int]:
        if next(calls) == which:
            raise MemoryError("injected")
        return allocate(count)

    simulation.pool.allocate = failing  # type: ignore[method-assign]
    while simulation.scheduler.num_unfinished:
        simulation.serve()
        simulation.pool.check()
        held = {block for row in simulation.scheduler.running for block in blocks_of(row)}
        assert simulation.pool.num_free == LIMITS.num_blocks - len(held)
    assert not pending_blocks(simulation.pool)
    ended = [len(row.token_ids) == row.max_len for row in simulation.rows]
    assert ended.count(False) == 1
