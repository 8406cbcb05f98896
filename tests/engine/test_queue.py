"""The queue's order, its count, and what it costs that rows leave it early."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgen.engine.queue import BYPASS, WaitingQueue
from fastgen.engine.requests import Request, Row
from fastgen.sampling.definition import KNOWN_OPTIONS
from fastgen.sampling.params import SamplingParams


def a_row(priority: int = 0) -> Row:
    request = Request((1,), SamplingParams(seed=1), priority=priority)
    request.make_rows(1, 2, frozenset(), None, KNOWN_OPTIONS)
    return request.rows[0]


ACTIONS = st.one_of(
    st.tuples(st.just("add"), st.integers(-2, 2)),
    st.tuples(st.just("pop"), st.just(0)),
    st.tuples(st.just("look"), st.integers(1, 4)),
    st.tuples(st.just("remove"), st.integers(0, 1000)),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(ACTIONS, max_size=60))
def test_rows_leave_in_the_order_of_their_keys(actions: list[tuple[str, int]]) -> None:
    queue = WaitingQueue()
    model: list[tuple[int, int, Row]] = []
    arrived = 0
    for name, value in actions:
        if name == "add":
            row = a_row(value)
            queue.add(row)
            model.append((arrived + BYPASS * value, arrived, row))
            arrived += 1
        elif name == "pop" and model:
            first = min(model, key=lambda item: item[:2])
            model.remove(first)
            assert queue.pop() is first[2]
        elif name == "look":  # take some, and put them back
            taken = [queue.pop() for _ in range(min(value, len(model)))]
            assert taken == [item[2] for item in sorted(model, key=lambda i: i[:2])][: len(taken)]
            queue.put_back(taken)
        elif name == "remove" and model:
            queue.remove(model.pop(value % len(model))[2])
        assert len(queue) == len(model)
        assert set(queue) == {item[2] for item in model}


def test_an_empty_queue_has_nothing_to_give() -> None:
    queue = WaitingQueue()
    row = a_row()
    queue.remove(row)  # never was in it
    queue.add(row)
    queue.remove(row)
    queue.remove(row)
    assert len(queue) == 0
    with pytest.raises(IndexError):
        queue.pop()


def test_rows_that_leave_early_leave_no_weight() -> None:
    """Each is marked; the heap is rebuilt when most of it is marked, so rarely."""
    queue = WaitingQueue()
    rows = [a_row(priority) for priority in np.random.default_rng(0).integers(-9, 9, 5000)]
    for row in rows:
        queue.add(row)
    rebuilt, heap = 0, queue._heap
    for row in rows[::-1]:
        queue.remove(row)
        assert len(queue._heap) <= 2 * len(queue) + 1
        rebuilt, heap = rebuilt + (queue._heap is not heap), queue._heap
    assert rebuilt <= 14, "5000 is 2 ** 12.3"
    assert queue._heap == []
