"""How many drafted tokens a step gets: from what they cost, and how often they are right."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgen.speculation.acceptance import Acceptance
from fastgen.speculation.costs import AskCosts, StepCosts
from fastgen.speculation.lengths import choose_lengths, choose_rounds


def costs_of(seconds: Callable[[int], float]) -> StepCosts:
    """As if every size were measured."""
    costs = StepCosts()
    with mock.patch("fastgen.speculation.costs.SIZES", range(1, 65)):
        costs.measure(seconds, 64)
    return costs


FLAT = costs_of(lambda size: 1.0)
LINEAR = costs_of(lambda size: float(size))
LINEAR_OF_TEN = costs_of(lambda size: 1.0 + 0.1 * size)
TILES = costs_of(lambda size: 1.0 + -(-size // 8))  # 8 rows a tile


def test_where_tokens_cost_nothing_all_that_may_be_right_are_taken() -> None:
    assert choose_lengths([0.9, 0.5, 0.01], [8, 3, 4], 3, FLAT, 60) == [8, 3, 0]


def test_where_each_token_costs_as_much_as_the_first_none_is_taken() -> None:
    assert choose_lengths([0.9, 0.99], [8, 8], 2, LINEAR, 60) == [0, 0]


@pytest.mark.parametrize("num_rows", [1, 4, 5, 8])
def test_a_tile_is_filled_and_its_border_not_crossed(num_rows: int) -> None:
    lengths = choose_lengths([0.3] * num_rows, [5] * num_rows, num_rows, TILES, 60)
    assert num_rows + sum(lengths) == (8 if num_rows > 1 else 4)


def test_a_border_is_crossed_where_that_pays() -> None:
    assert sum(choose_lengths([0.99] * 8, [7] * 8, 8, TILES, 120)) > 40


def test_rows_that_are_right_more_often_get_more() -> None:
    lengths = choose_lengths([0.3, 0.9, 0.6], [6, 6, 6], 3, TILES, 60)
    assert lengths[1] > lengths[2] >= lengths[0] and sum(lengths) >= 5


def test_the_room_is_kept() -> None:
    assert choose_lengths([0.9, 0.9], [8, 8], 2, FLAT, 5) in ([3, 2], [2, 3])
    assert choose_lengths([0.9], [8], 1, FLAT, 0) == [0]


@given(
    shares=st.lists(st.floats(0.01, 0.99), min_size=1, max_size=3),
    seconds=st.lists(st.floats(0.01, 3.0), min_size=16, max_size=16),
)
def test_no_other_choice_gives_more_tokens_a_second(
    shares: list[float], seconds: list[float]
) -> None:
    """Of all lengths up to three; but what adds less than a fiftieth of a token, or makes it less
    than a tenth faster, is left."""
    growing = np.cumsum(seconds)
    costs = costs_of(lambda size: float(growing[min(size, 16) - 1]))
    num_rows = len(shares)

    def rate(lengths: tuple[int, ...]) -> float:
        gains = (share**place for share, n in zip(shares, lengths, strict=True)
                 for place in range(1, n + 1))  # fmt: skip
        return (num_rows + sum(gains)) / costs.seconds(num_rows, sum(lengths))

    chosen = tuple(choose_lengths(shares, [3] * num_rows, num_rows, costs, 60))
    best = max(map(rate, itertools.product(range(4), repeat=num_rows)))
    assert rate(chosen) >= best / 1.18


def each(price: float) -> Callable[[int], float]:
    return lambda num_tokens: price * num_tokens


def test_a_drafter_that_takes_time_is_asked_for_less() -> None:
    rounds = [choose_rounds([0.8], 16, 1, FLAT, each(price)) for price in (0.0, 0.1, 0.4, 0.9)]
    assert rounds[0] == 16 and rounds == sorted(rounds, reverse=True) and rounds[-1] == 0
    assert 1 <= rounds[2] <= 4


def test_a_drafter_that_takes_time_once_is_asked_for_more_or_not_at_all() -> None:
    def rounds(seconds: float) -> int:
        return choose_rounds([0.8], 16, 1, LINEAR_OF_TEN, lambda _: seconds)

    assert 1 <= rounds(0.0) < rounds(1.0) and rounds(9.0) == 0


def test_a_drafter_that_seldom_has_a_draft_is_worth_less_time() -> None:
    def rounds(answered: float) -> int:
        return choose_rounds([0.9], 16, 1, LINEAR_OF_TEN, lambda _: 0.5, answered)

    assert rounds(1.0) > 0 and rounds(0.1) == 0


def test_the_time_of_an_answer_is_a_line() -> None:
    costs = AskCosts()
    assert not costs.is_measured and costs.seconds(5) == 0
    costs.observe(8, 2.0)
    assert costs.is_measured and costs.seconds(8) == pytest.approx(2.0)
    assert costs.seconds(4) == pytest.approx(1.0), "as long as nothing else is known"
    rng = np.random.default_rng(3)
    for _ in range(60):
        size = int(rng.integers(1, 16))
        costs.observe(size, (1.0 + 0.1 * size) * float(rng.uniform(0.98, 1.02)))
    assert [costs.seconds(n) for n in (1, 8, 16)] == pytest.approx([1.1, 1.8, 2.6], rel=0.2)
    before = costs.seconds(8)
    costs.observe(8, 10_000.0)
    assert costs.seconds(8) < 2 * before, "what was held up counts little"


@given(times=st.lists(st.tuples(st.integers(1, 32), st.floats(0.0, 1e3)), min_size=1, max_size=30))
def test_no_answer_takes_less_than_nothing(times: list[tuple[int, float]]) -> None:
    costs = AskCosts()
    for size, seconds in times:
        costs.observe(size, seconds)
    found = [costs.seconds(size) for size in range(1, 33)]
    assert found == sorted(found) and found[0] >= 0
    assert found[-1] <= 32.001 * max(seconds for _, seconds in times)


def test_without_a_table_each_token_costs_a_little_more() -> None:
    costs = StepCosts()
    assert not costs.is_measured and costs.seconds(5, 3) == 0
    costs.observe(1, 0, 1.0)
    assert costs.is_measured and costs.seconds(1) == 1.0
    assert 1.2 < costs.seconds(1, 7) < 1.5 and 1.2 < costs.seconds(8) < 1.5
    costs.observe(0, 0, 1.0)
    costs.observe(2, 0, 0.0)
    assert costs.seconds(1) == 1.0 and costs.seconds(1, 5000) == costs.seconds(1, 5000)


def test_rows_that_grow_slower_make_no_draft_look_free() -> None:
    """With their contexts all steps take longer; what drafts add is what it was."""
    costs = costs_of(lambda size: 1.0 + 0.1 * size)
    for at in range(200):
        costs.observe(4, 0, 1.4 + 0.02 * at)
    assert costs.seconds(4) == pytest.approx(5.4, abs=0.3)
    assert costs.seconds(4, 5) - costs.seconds(4) == pytest.approx(0.5)


@pytest.mark.parametrize("real", [0.03, 0.1, 0.4])
def test_what_drafts_add_is_learned_from_steps_that_had_some(real: float) -> None:
    costs = costs_of(lambda size: 1.0 + 0.1 * size)
    rng = np.random.default_rng(0)
    for _ in range(1000):
        drafted = int(rng.integers(0, 8))
        noise = float(rng.uniform(0.95, 1.05))
        costs.observe(4, drafted, (1.4 + real * drafted) * noise)
    assert costs.seconds(4) == pytest.approx(1.4, abs=0.15)
    assert costs.seconds(4, 7) - costs.seconds(4) == pytest.approx(7 * real, rel=0.2, abs=0.1)
    assert costs.seconds(4, 1) - costs.seconds(4) == pytest.approx(real, abs=0.1)


@pytest.mark.parametrize("real", [0.02, 0.3])
def test_single_drafts_are_enough_to_learn_it_from(real: float) -> None:
    """Of steps whose contexts grow, with one drafted token in every third."""
    costs = costs_of(lambda size: 1.0 + 0.1 * size)
    rng = np.random.default_rng(1)
    for at in range(150):
        rows, drafted = 1.4 + 0.002 * at, int(at % 3 == 0)
        costs.observe(4, drafted, (rows + real * drafted) * float(rng.uniform(0.97, 1.03)))
    assert costs.seconds(4, 1) - costs.seconds(4) == pytest.approx(real, abs=0.06)


def test_a_bad_time_is_forgotten() -> None:
    """Factors of drafts that are not tried any more, since something once held them up."""
    costs = costs_of(lambda size: 1.0 + 0.1 * size)
    for _ in range(50):
        costs.observe(1, 0, 1.1)
        costs.observe(1, 4, 10.0)
    assert costs.seconds(1, 4) > 3
    for _ in range(600):
        costs.observe(1, 0, 1.1)
    assert costs.seconds(1, 4) == pytest.approx(1.5, abs=0.1)


def test_a_step_that_something_else_held_up_counts_little() -> None:
    costs = costs_of(lambda size: 1.0)
    costs.observe(1, 0, 1.0)
    costs.observe(1, 0, 50.0)
    assert costs.seconds(1) < 1.2


def test_a_table_is_measured_up_to_what_a_step_may_have() -> None:
    seen: list[int] = []

    def step(size: int) -> float:
        seen.append(size)
        return 1.0 + 0.1 * size

    costs = StepCosts()
    costs.measure(step, 20)
    assert set(seen) == {1, 2, 3, 4, 6, 8, 10, 12, 16, 20} and len(seen) == 30
    assert costs.seconds(14) == pytest.approx(2.4)
    assert costs.seconds(14, 16) == pytest.approx(4.0), "beyond it, as between the last two"


def test_a_slow_start_makes_no_larger_step_look_free() -> None:
    """The first steps take twice as long; so does, each time, one of another size."""
    num_steps = 0

    def step(size: int) -> float:
        nonlocal num_steps
        num_steps += 1
        return (1.0 + 0.1 * size) * (2 if num_steps < 8 or size == 6 else 1)

    costs = StepCosts()
    costs.measure(step, 64)
    assert costs.seconds(1) == pytest.approx(1.1) and costs.seconds(2) == pytest.approx(1.2)
    assert costs.seconds(4) < costs.seconds(6) <= costs.seconds(8) == pytest.approx(1.8)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
def test_acceptance_finds_the_share(share: float) -> None:
    rng = np.random.default_rng(4)
    shared = Acceptance()
    for _ in range(40):
        row = Acceptance(shared)
        for _ in range(60):
            right = rng.random(4) < share
            row.note(2, 4, int(np.argmin(right)) if not right.all() else 4)
    assert shared.share(2) == pytest.approx(share, abs=0.07)
    assert Acceptance(shared).share(2) == min(shared.share(2), 0.5), "a new row begins with it"
    assert shared.share(3) == 0.4, "other levels are told apart"
    assert row.share(2) < 1


def test_a_row_that_begins_to_repeat_itself_is_believed_soon() -> None:
    shared = Acceptance()
    row = Acceptance(shared)
    for _ in range(50):
        row.note(0, 1, 0)
    assert row.share(0) < 0.05
    for _ in range(6):
        row.note(0, 4, 4)
    assert row.share(0) > 0.5 > shared.share(0)
