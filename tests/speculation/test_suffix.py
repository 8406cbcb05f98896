"""The suffix drafter: what it learns of rows, for whom, and what it holds."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

from draft_rows import PlainRow
from fastgen.native import native
from fastgen.speculation.drafter import MAX_LEVEL, Drafter, DraftRow
from fastgen.speculation.suffix import CONTEXT_TOKENS, STORE_TOKENS, SuffixDrafter

MB = 2**20


@pytest.fixture(params=["C++", "Python"])
def drafter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> SuffixDrafter:
    if request.param == "Python":
        monkeypatch.setattr("fastgen.speculation.suffix.native", None)
    elif native is None:
        pytest.skip("the C++ extension is not built")
    return SuffixDrafter(4096)


def ids_of(drafter: Drafter, row: DraftRow, most: int = 4) -> list[int]:
    [draft] = drafter.propose([row], [most])
    assert len(draft.ids) <= most and 0 <= draft.level <= MAX_LEVEL
    return list(draft.ids)


def test_rows_get_drafts_from_their_own_tokens(drafter: SuffixDrafter) -> None:
    first, second, third = (
        PlainRow([1, 2, 3, 1, 2]),
        PlainRow([3, 2, 7, 7, 3, 2]),
        PlainRow([1, 2, 3]),
    )
    drafts = drafter.propose([first, second, third], [3, 1, 9])
    assert [list(draft.ids) for draft in drafts] == [[3, 1, 2], [7], []]
    first.token_ids.append(3)
    drafter.accepted(first, [3])
    third.token_ids += [1, 2]
    assert [list(draft.ids) for draft in drafter.propose([first, third], [4, 4])] == [
        [1, 2, 3, 1],
        [3, 1, 2, 3],
    ]


def test_tokens_may_come_without_being_asked_for(drafter: SuffixDrafter) -> None:
    """A row gets the same drafts whether it is asked for at each token or for the first time."""
    generator = random.Random(5)
    row = PlainRow([])
    for _ in range(200):
        row.token_ids.append(generator.randrange(4))
        if generator.random() < 0.7:
            assert ids_of(drafter, row, 6) == ids_of(drafter, PlainRow(list(row.token_ids)), 6)


def test_outputs_are_learnt_when_their_rows_end(drafter: SuffixDrafter) -> None:
    prompt, output = list(range(100)), list(range(500, 600))
    row = PlainRow(prompt + output, len(prompt))
    assert ids_of(drafter, PlainRow([500, 501, 502])) == []  # while it runs, it is its own
    drafter.ended(row)
    assert ids_of(drafter, PlainRow([500, 501, 502])) == [503, 504, 505, 506]
    assert ids_of(drafter, PlainRow([7, *prompt[-3:]])) == [500, 501, 502, 503]  # from the first on
    assert ids_of(drafter, PlainRow(prompt[:50])) == []  # of the prompt only what leads there
    start = len(prompt) - CONTEXT_TOKENS
    assert ids_of(drafter, PlainRow(prompt[start - 1 : start + 2])) == []
    assert ids_of(drafter, PlainRow(prompt[start : start + 3])) == prompt[start + 3 : start + 7]


def test_rows_that_were_never_asked_for_end_too(drafter: SuffixDrafter) -> None:
    for row in (PlainRow([]), PlainRow([], 5), PlainRow([1, 2, 3], 3), PlainRow([1, 2, 3, 4], 3)):
        drafter.ended(row)
        drafter.ended(row)
    drafter.close()


@pytest.mark.parametrize(
    ("mine", "yours", "learns"),
    [
        (None, None, True),
        ("a", "a", True),
        ("ä" * 10_000, "ä" * 10_000, True),
        (None, "a", False),
        ("a", None, False),
        ("a", "b", False),
        ("a" * 10_000, "a" * 10_001, False),
    ],
)
def test_only_rows_with_the_same_salt_learn(
    drafter: SuffixDrafter, mine: str | None, yours: str | None, learns: bool
) -> None:
    drafter.ended(PlainRow([1, 2, 3, 4, 5], 1, mine))
    assert ids_of(drafter, PlainRow([1, 2, 3], 0, yours)) == ([4, 5] if learns else [])


def test_what_is_closed_has_forgotten(drafter: SuffixDrafter) -> None:
    drafter.ended(PlainRow([1, 2, 3, 4, 5], 1))
    drafter.close()
    assert ids_of(drafter, PlainRow([1, 2, 3])) == []


def test_a_row_that_lost_tokens_is_refused(drafter: SuffixDrafter) -> None:
    row = PlainRow([1, 2, 3])
    drafter.propose([row], [1])
    row.token_ids.pop()
    with pytest.raises(ValueError, match="fewer tokens"):
        drafter.propose([row], [1])
    drafter.ended(row)


def _resident() -> int:
    """Bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def _through(drafter: SuffixDrafter, num_tokens: int) -> None:
    """Rows of 1,000 tokens, with salts of all lengths, each asked once and ended."""
    generator = random.Random(num_tokens)
    for number in range(num_tokens // 1000):
        salt = None if number % 3 == 0 else str(number) * (number % 100)
        row = PlainRow(generator.choices(range(50_000), k=1000), 100, salt)
        drafter.propose([row], [4])
        drafter.ended(row)


@pytest.mark.skipif(native is None, reason="the C++ extension is not built")
@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
@pytest.mark.parametrize(
    ("store_tokens", "num_tokens"),
    [(2**14, 100_000), pytest.param(STORE_TOKENS, 10_000_000, marks=pytest.mark.slow)],
)
def test_the_store_stays_within_its_memory(store_tokens: int, num_tokens: int) -> None:
    drafter = SuffixDrafter(store_tokens)
    _through(drafter, 2 * store_tokens)  # the ring is full
    before = _resident()
    _through(drafter, num_tokens)
    assert _resident() - before < 2 * MB  # an allocator's play; the tokens alone are 40 MB
    row = PlainRow(list(range(60_000, 60_030)), 5)
    drafter.ended(row)
    assert ids_of(drafter, PlainRow([60_010, 60_011, 60_012])) == list(range(60_013, 60_017))


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
def test_rows_that_have_ended_hold_nothing() -> None:
    drafter = SuffixDrafter(64)
    _through(drafter, 100_000)
    before = _resident()
    _through(drafter, 300_000)
    assert _resident() - before < 4 * MB  # 300 rows would hold 33 MB
