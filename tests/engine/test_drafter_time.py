"""Drafters that take time themselves are asked as far as that pays. The clock is a count: a step of
one token takes 1, each further token 0.03.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest

from engine_harness import (
    assert_idle,
    counting_decoder_of,
    greedy,
    make_counting_engine,
    new_tokens,
    next_counted,
    run_all,
)
from fastgen.engine.engine import Engine
from fastgen.speculation.drafter import Draft, Drafter, DraftRow, FunctionDrafter

NUM_TOKENS = 100  # of each request
MORE = 0.03


class Clock:
    """Counts what is done, in steps of one token."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def counted(token_ids: Sequence[int], most: int) -> list[int]:
    """What a CountingDecoder draws after these."""
    ids = list(token_ids)
    for _ in range(most):
        ids.append(int(next_counted(ids[-1], len(ids) - 1)))
    return ids[len(token_ids) :]


def timed_engine(seats: int = 4) -> tuple[Engine, Clock]:
    engine, clock = make_counting_engine(seats), Clock()
    decoder: Any = counting_decoder_of(engine)
    step = decoder.step

    def timed(batch: Any) -> Any:
        clock.now += 1 + MORE * (len(batch.token_ids) - 1)
        return step(batch)

    decoder.step = timed
    engine.drafting.clock = clock
    return engine, clock


def seconds_of(make: Callable[[Clock], Sequence[Drafter]], batch: int, num_turns: int) -> float:
    """Of so many turns of `batch` requests; checks their tokens."""
    engine, clock = timed_engine(batch)
    engine.drafting.use(make(clock))
    for turn in range(num_turns):
        prompts = [[1 + (turn * batch + at) % 90] for at in range(batch)]
        requests = [
            engine.add_request(prompt, greedy(max_new_tokens=NUM_TOKENS)) for prompt in prompts
        ]
        run_all(engine, requests)
        assert [new_tokens(r) for r in requests] == [[counted(p, NUM_TOKENS)] for p in prompts]
    assert_idle(engine)
    return clock.now


class Function:
    """Takes `fixed` seconds a call, `each` a token; its ids are right, wrong, or seldom there."""

    def __init__(self, clock: Clock, kind: str, fixed: float, each: float) -> None:
        self.clock, self.kind, self.fixed, self.each = clock, kind, fixed, each
        self.calls = 0

    def __call__(self, token_ids: Sequence[int], most: int) -> list[int]:
        self.calls += 1
        self.clock.now += self.fixed + self.each * most
        if self.kind == "seldom" and self.calls % 20:
            return []
        ids = counted(token_ids, most)
        return [(one + 1) % 97 for one in ids] if self.kind == "wrong" else ids


@cache
def plain_seconds(batch: int, num_turns: int) -> float:
    return seconds_of(lambda clock: (), batch, num_turns)


def times_plain(kind: str, fixed: float, each: float, batch: int, num_turns: int) -> float:
    found = seconds_of(
        lambda clock: [FunctionDrafter(Function(clock, kind, fixed, each))], batch, num_turns
    )
    return found / plain_seconds(batch, num_turns)


@pytest.mark.parametrize(
    ("kind", "fixed", "each", "batch"),
    [
        ("wrong", 0.01, 0.0, 1),
        ("wrong", 0.5, 0.0, 1),
        ("wrong", 5.0, 0.0, 1),
        ("wrong", 0.0, 0.25, 1),
        ("wrong", 0.5, 0.0, 4),
        ("wrong", 0.0, 0.25, 4),
        ("seldom", 0.5, 0.0, 1),
        ("seldom", 0.0, 0.05, 4),
        ("right", 60.0, 0.0, 1),
        ("right", 0.0, 3.0, 1),
    ],
)
def test_a_function_that_does_not_pay_is_hardly_asked(
    kind: str, fixed: float, each: float, batch: int
) -> None:
    assert times_plain(kind, fixed, each, batch, 40) < 1.1


@pytest.mark.parametrize(
    ("fixed", "each", "most"),
    [(0.0, 0.0, 0.15), (0.01, 0.0, 0.2), (0.3, 0.0, 0.3), (0.5, 0.0, 0.4), (0.0, 0.25, 0.7)],
)
def test_a_function_that_pays_is_asked(fixed: float, each: float, most: float) -> None:
    assert times_plain("right", fixed, each, 1, 10) < most


def test_a_function_that_was_held_up_once_is_asked_again() -> None:
    """The first time it loads something, later it waits for something, once."""

    def make(clock: Clock) -> Sequence[Drafter]:
        function = Function(clock, "right", 0.01, 0.0)

        def held_up(token_ids: Sequence[int], most: int) -> list[int]:
            clock.now += {1: 500.0, 20: 50.0}.get(function.calls + 1, 0.0)
            return function(token_ids, most)

        return [FunctionDrafter(held_up)]

    assert seconds_of(make, 1, 40) - 550 < 0.3 * plain_seconds(1, 40)


class ReadsRows:
    """Right, but for the time that its first answer for a row takes, and that each token takes."""

    is_free = False
    reads_rows = True
    survives_fork = True

    def __init__(self, clock: Clock, reading: float, each: float) -> None:
        self.clock, self.reading, self.each = clock, reading, each
        self.read: set[DraftRow] = set()

    def propose(self, rows: Sequence[DraftRow], most: Sequence[int]) -> list[Draft]:
        self.clock.now += self.reading * len(set(rows) - self.read) + self.each * max(most)
        self.read |= set(rows)
        return [Draft(counted(row.token_ids, n)) for row, n in zip(rows, most, strict=True)]

    def accepted(self, row: DraftRow, ids: Sequence[int]) -> None:
        pass

    def ended(self, row: DraftRow) -> None:
        self.read.discard(row)

    def warmup(self) -> None:
        pass

    def close(self) -> None:
        pass


def test_what_a_drafter_takes_to_read_a_row_is_no_token_s_time() -> None:
    def times(reading: float, each: float) -> float:
        drafted = seconds_of(lambda clock: [ReadsRows(clock, reading, each)], 1, 20)
        return drafted / plain_seconds(1, 20)

    assert times(10.0, 0.05) < 0.4
    assert times(0.0, 3.0) < 1.1


@pytest.mark.parametrize("survives", [True, False])
def test_in_a_forked_child_only_drafters_that_survive_are_asked(survives: bool) -> None:
    engine, clock = timed_engine()
    drafter = ReadsRows(clock, 0.0, 0.01)
    drafter.survives_fork = survives
    engine.drafting.use([drafter])
    request = engine.add_request([5], greedy(max_new_tokens=NUM_TOKENS))
    engine.run(lambda: engine.stats.accepted_tokens > 0)
    steps = engine.stats.speculated_steps
    engine.inherit()
    later = engine.add_request([6], greedy(max_new_tokens=NUM_TOKENS))
    run_all(engine, [request, later])
    assert new_tokens(request) == [counted([5], NUM_TOKENS)]
    assert new_tokens(later) == [counted([6], NUM_TOKENS)]
    assert (engine.stats.speculated_steps > steps) == survives
    assert len(drafter.read) == (not survives), "a row that the parent's drafter alone knows"
    assert_idle(engine)
