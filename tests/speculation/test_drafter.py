"""A function of the caller's as a drafter: what it is given, and what it may do wrong."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from typing import Any

import pytest

from draft_rows import PlainRow
from fastgen.speculation.drafter import Draft, FunctionDrafter


def test_the_function_sees_the_ids_and_how_many_are_wanted() -> None:
    calls: list[tuple[Any, int]] = []

    def function(token_ids: Any, most: int) -> list[int]:
        calls.append((token_ids, most))
        return [token_ids[-1] + 1]

    drafter = FunctionDrafter(function)
    rows = [PlainRow([1, 2]), PlainRow([7])]
    assert drafter.propose(rows, [3, 1]) == [Draft([3]), Draft([8])]
    rows[0].token_ids.append(9)
    assert drafter.propose(rows[:1], [2]) == [Draft([10])]
    assert calls == [((1, 2), 3), ((7,), 1), ((1, 2, 9), 2)]


@pytest.mark.parametrize("ids", [(), [5, 6], (5, 6, 7, 8), itertools.count(5)])
def test_as_many_are_taken_as_were_asked_for(ids: Any) -> None:
    [draft] = FunctionDrafter(lambda *_: ids).propose([PlainRow([1])], [3])
    assert draft.ids == [5, 6, 7][: len(draft.ids)] and draft.level == 0
    assert len(draft.ids) == min(3, 3 if isinstance(ids, itertools.count) else len(ids))


def raises(*_: Any) -> Any:
    raise RuntimeError("no idea")


@pytest.mark.parametrize(
    "wrong", [raises, lambda *_: None, lambda *_: 5, lambda *_: ["a"], lambda *_: [1.5]]
)
def test_what_fails_for_one_row_ends_its_drafts_alone(
    wrong: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    asked = []

    def function(token_ids: Any, most: int) -> Any:
        asked.append(token_ids[0])
        return wrong(token_ids, most) if token_ids[0] == 1 else [most]

    drafter = FunctionDrafter(function)
    rows = [PlainRow([0]), PlainRow([1]), PlainRow([2])]
    with caplog.at_level(logging.ERROR, logger="fastgen"):
        for _ in range(3):
            assert drafter.propose(rows, [4, 4, 4]) == [Draft([4]), Draft(()), Draft([4])]
    assert asked == [0, 1, 2, 0, 2, 0, 2]
    assert len(caplog.records) == 1 and caplog.records[0].exc_info is not None
    drafter.accepted(rows[0], [4])
    drafter.ended(rows[1])
    drafter.ended(rows[1])
    drafter.close()


def test_each_reason_of_a_failure_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """However many rows it fails for, and whatever the messages say."""

    def function(token_ids: Any, most: int) -> Any:
        [number] = token_ids
        if number % 3 == 0:
            raise KeyError(f"nothing known of {number}")
        if number % 3 == 1:
            raise KeyError(f"nothing at all of {number}")
        return None

    drafter = FunctionDrafter(function)
    rows = [PlainRow([number]) for number in range(30)]
    with caplog.at_level(logging.ERROR, logger="fastgen"):
        for _ in range(2):
            assert drafter.propose(rows, [4] * 30) == [Draft(())] * 30
    kinds = [one.exc_info[0] for one in caplog.records if one.exc_info is not None]
    assert kinds == [KeyError, KeyError, TypeError]


def test_an_interrupt_is_nobodys_failure() -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        FunctionDrafter(interrupted).propose([PlainRow([1])], [1])
