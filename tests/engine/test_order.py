"""The order in which rows run: priorities, who may pass whom, and that nobody starves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastgen.engine.queue import BYPASS
from fastgen.engine.requests import Row
from simulation import LIMITS, TEXTS, Simulation

SHARE = LIMITS.max_tokens - LIMITS.num_seats  # of a step, what prompts get at least
SCORED_SHARE = LIMITS.max_logits - LIMITS.num_seats


@dataclass
class Arrival:
    at: int  # step
    text: int
    length: int
    new: int
    priority: int
    scored: bool


ARRIVALS = st.builds(
    Arrival, at=st.integers(0, 40), text=st.integers(0, 2), length=st.integers(1, 150),
    new=st.integers(0, 42), priority=st.integers(-3, 3), scored=st.booleans(),
)  # fmt: skip


@dataclass
class Life:
    """What a row met: from when to when it was there, and who was served before it."""

    began: int
    ended: int = 0
    lowest_key: tuple[int, int] = (0, 0)
    running_before: list[Row] = field(default_factory=list)


def units(row: Row) -> int:
    """Steps that a row needs, each of which gives it a share of the budget, or a token."""
    share = min(SHARE, SCORED_SHARE) if row.scores_prompt else SHARE
    return -(-row.request.prefill_len // share) + row.params.max_new_tokens


def run_through(arrivals: Sequence[Arrival]) -> tuple[Simulation, dict[Row, Life]]:
    simulation, step = Simulation(), 0
    scheduler, lives = simulation.scheduler, dict[Row, Life]()
    left = sorted(arrivals, key=lambda arrival: arrival.at)
    while left or scheduler.num_unfinished:
        while left and left[0].at <= step:
            new = left.pop(0)
            prompt = TEXTS[new.text][: new.length]
            for row in simulation.add(prompt, new.new, scored=new.scored, priority=new.priority):
                lives[row] = Life(step, running_before=list(scheduler.running))
        plan = simulation.step()
        step += 1
        for row in scheduler.running:
            lives[row].lowest_key = row.schedule.queue_key
        if plan is not None:
            simulation.advance(plan)
        for row, life in lives.items():
            if row.finish_reason is not None and not life.ended:
                life.ended = step
    return simulation, lives


@settings(max_examples=150, deadline=None)
@given(st.lists(ARRIVALS, min_size=1, max_size=40))
@example([Arrival(0, 0, 150, 40, 3, False)] + [Arrival(s, 1, 150, 40, -3, True) for s in range(30)])
def test_every_row_ends_within_a_computed_bound(arrivals: list[Arrival]) -> None:
    """While a row is there, each step serves somebody whom it has to let go first, or itself: rows
    of earlier keys, their own or taken over; rows that ran when it came; rows that passed it.
    """
    simulation, lives = run_through(arrivals)
    for row, life in lives.items():
        mine = simulation.given[row]
        first = {other for other in lives if lives[other].lowest_key <= mine}
        first |= {row, *life.running_before, *simulation.passed_by[row]}
        assert life.ended - life.began <= sum(units(other) for other in first)
    assert simulation.pool.num_free == LIMITS.num_blocks


def test_an_endless_stream_of_urgent_rows_starves_nobody() -> None:
    """A level of priority is 1000 places: that many rows pass, and no more."""
    simulation = Simulation()
    rng = np.random.default_rng(0)

    def stream() -> None:
        for _ in range(LIMITS.num_seats):
            simulation.add(rng.integers(0, 50, 3).tolist(), 1, priority=-1)

    for _ in range(4):
        stream()
    [patient] = simulation.add([7] * 60, 1, priority=0)
    before = len(simulation.rows)
    while patient.finish_reason is None:
        stream()
        simulation.serve()
        assert len(simulation.rows) - before <= BYPASS + 10 * LIMITS.num_seats, "it starves"
    assert len(simulation.rows) - before >= BYPASS


def test_in_short_queues_priorities_are_strict_and_equals_keep_their_order() -> None:
    simulation = Simulation()
    rng = np.random.default_rng(1)
    order = rng.integers(-3, 4, 200).tolist()
    for priority in order:
        simulation.add(rng.integers(0, 50, 20).tolist(), 3, priority=priority)
    admitted: list[Row] = []
    while simulation.scheduler.num_unfinished:
        simulation.serve()
        admitted += [row for row in simulation.scheduler.running if row not in admitted]
    expected = sorted(range(200), key=lambda index: (order[index], index))
    assert [simulation.rows.index(row) for row in admitted] == expected


def test_prompts_share_the_budget_in_the_order_of_their_keys() -> None:
    simulation = Simulation()
    rng = np.random.default_rng(2)
    [slow] = simulation.add(rng.integers(0, 50, 150).tolist(), 1, priority=1)
    simulation.serve()
    [urgent] = simulation.add(rng.integers(0, 50, 100).tolist(), 1, priority=0)
    before = slow.schedule.lease.num_tokens
    simulation.serve()
    assert (slow.schedule.lease.num_tokens, urgent.schedule.lease.num_tokens) == (
        before,
        LIMITS.max_tokens,
    )
    simulation.serve()
    assert urgent.finish_reason is not None
    assert slow.schedule.lease.num_tokens == before + LIMITS.max_tokens - 20


def test_who_computes_an_urgent_rows_beginning_takes_over_its_key() -> None:
    simulation = Simulation()
    rng = np.random.default_rng(3)
    others = [simulation.add(rng.integers(0, 50, 60).tolist(), 1)[0] for _ in range(3)]
    beginning = rng.integers(0, 50, 70).tolist()
    [slow] = simulation.add([*beginning, 1, 2], 1, priority=5)
    simulation.serve()  # the first of the others, and a third of the second
    [urgent] = simulation.add([*beginning, 3], 1, priority=-5)
    simulation.serve()
    assert slow.finish_reason is not None, "in one step, though it would have been the last"
    assert others[1].finish_reason is None and urgent.schedule.awaits_prefix
    simulation.serve()
    assert urgent.finish_reason is not None
    simulation.serve(2)
    assert simulation.scheduler.num_unfinished == 0


def test_a_row_that_waits_for_its_beginning_lets_others_pass() -> None:
    simulation = Simulation()
    rng = np.random.default_rng(4)
    same = rng.integers(0, 50, 150).tolist()
    first, second = (simulation.add(same, 5)[0] for _ in range(2))
    [other] = simulation.add(rng.integers(0, 50, 10).tolist(), 5)
    simulation.serve()
    assert first.schedule.seat >= 0 and other.schedule.seat >= 0
    assert second.schedule.seat == -1 and second.schedule.awaits_prefix
    simulation.serve(2)
    assert second.schedule.seat >= 0


def test_a_row_that_lacks_blocks_lets_nobody_pass() -> None:
    """Else small rows would keep a large one out for ever."""
    simulation = Simulation()
    rng = np.random.default_rng(5)
    for _ in range(4):
        simulation.add(rng.integers(0, 50, 120).tolist(), 40)  # 5 blocks of 24 each
    [large] = simulation.add(rng.integers(0, 50, 150).tolist(), 20)  # 6 blocks
    [small] = simulation.add([1, 2], 3)  # 1 block
    simulation.serve()
    assert simulation.pool.num_free == 4
    assert large.schedule.seat == small.schedule.seat == -1 and not large.schedule.awaits_prefix
    simulation.serve(90)
    assert large.finish_reason is not None and small.finish_reason is not None


def test_only_so_many_rows_are_passed_over() -> None:
    simulation = Simulation()
    rng = np.random.default_rng(6)
    same = rng.integers(0, 50, 150).tolist()
    for _ in range(LIMITS.num_seats + 1):  # one that computes, and as many as seats that wait
        simulation.add(same, 1)
    [beyond] = simulation.add([1, 2, 3], 1)
    [near] = simulation.add([4, 5, 6], 1, priority=-1)
    simulation.serve()
    assert near.finish_reason is not None
    assert beyond.schedule.seat == -1
    simulation.serve(20)
    assert simulation.scheduler.num_unfinished == 0
