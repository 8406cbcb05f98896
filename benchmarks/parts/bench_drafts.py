"""Drafts from a row's own tokens and from earlier outputs: what they add to a step, a row.

The store is full, of held-out text and random ids. "nothing" shows what calls take that propose
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

import fastgen
from fastgen.frontends.generator import BUNDLED_MODEL
from fastgen.native import native
from fastgen.speculation.drafter import Draft, DraftRow
from fastgen.speculation.suffix import STORE_TOKENS, SuffixDrafter
from fastgen.text.tokenizer import Tokenizer

PROMPT, STEPS, MOST = 500, 50, 8
TEXTS = ("held-out", "random", "repetitive")
CASES = ("nothing", *TEXTS)

pytestmark = pytest.mark.skipif(native is None, reason="fastgen's C++ extension is not built")


@dataclass(eq=False)
class Row:
    token_ids: list[int]
    prompt_len: int = PROMPT
    cache_salt: str | None = None
    max_len: int = 1024
    params: fastgen.SamplingParams = field(default_factory=fastgen.SamplingParams)


class NoDrafts:
    """The calls of a drafter, and nothing else."""

    def propose(self, rows: Sequence[DraftRow], most: Sequence[int]) -> list[Draft]:
        return [Draft(()) for _ in zip(rows, most, strict=True)]

    def ended(self, row: DraftRow) -> None:
        pass


@pytest.fixture(scope="module")
def held_out_ids(held_out: str) -> list[int]:
    tokenizer = Tokenizer.from_folder(BUNDLED_MODEL)
    assert tokenizer is not None
    [ids] = tokenizer.encode([held_out])
    return ids


@pytest.fixture(scope="module")
def drafter(held_out_ids: list[int]) -> SuffixDrafter:
    made = SuffixDrafter()
    rng = np.random.default_rng(1)
    for _ in range(STORE_TOKENS // 1000):
        made.ended(Row(rng.integers(0, 50_000, 1000).tolist(), 0))
    for start in range(0, len(held_out_ids), 1000):
        made.ended(Row(held_out_ids[start : start + 1000], 0))
    return made


def some_text(text: str, held_out_ids: list[int], rng: np.random.Generator) -> list[int]:
    """PROMPT + STEPS ids."""
    count = PROMPT + STEPS
    if text in ("held-out", "nothing"):
        start = int(rng.integers(0, len(held_out_ids) - count))
        return held_out_ids[start : start + count]
    if text == "random":
        return rng.integers(0, 50_000, count).tolist()  # type: ignore[no-any-return]
    return (rng.integers(0, 50_000, 10).tolist() * count)[:count]  # type: ignore[no-any-return]


@pytest.mark.parametrize("text", CASES)
def test_steps(
    text: str,
    drafter: SuffixDrafter,
    held_out_ids: list[int],
    rng: np.random.Generator,
    timed: Any,
    describe: Any,
) -> None:
    """A token and a draft, STEPS times for one row."""
    asked = NoDrafts() if text == "nothing" else drafter

    def make() -> tuple[Row, list[int]]:
        ids = some_text(text, held_out_ids, rng)
        row = Row(ids[:PROMPT])
        asked.propose([row], [MOST])
        return row, ids[PROMPT:]

    def call(made: tuple[Row, list[int]]) -> int:
        row, following = made
        drafted = 0
        for token_id in following:
            row.token_ids.append(token_id)
            drafted += len(asked.propose([row], [MOST])[0].ids)
        return drafted

    drafted = timed(call, make, group="drafts: a row's steps", rounds=100)
    assert (drafted == STEPS * MOST) == (text == "repetitive") and (
        drafted > 0 or text != "held-out"
    )
    describe(rows=1, steps=STEPS, drafted=drafted)


@pytest.mark.parametrize("text", CASES)
def test_prompt(
    text: str,
    drafter: SuffixDrafter,
    held_out_ids: list[int],
    rng: np.random.Generator,
    timed: Any,
    describe: Any,
) -> None:
    """The first draft of a row, which reads its prompt; and its end, which stores it."""
    asked = NoDrafts() if text == "nothing" else drafter

    def call(row: Row) -> list[Draft]:
        drafts = asked.propose([row], [MOST])
        asked.ended(row)
        return drafts

    drafts = timed(
        call,
        lambda: Row(some_text(text, held_out_ids, rng), 1),
        group="drafts: a prompt and its end",
        rounds=100,
    )
    assert len(drafts[0].ids) <= MOST
    describe(rows=1, tokens=PROMPT + STEPS)
