"""Drafters for tests: they know what plain decoding draws, and tell it, spoil it, or worse."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np

from fastgen.engine.engine import Engine
from fastgen.results import Generation, Timings
from fastgen.speculation.drafter import Draft, Drafter, DraftRow

KINDS = ("right", "wrong", "random", "spoiled", "none", "hostile")
Continuations = dict[tuple[tuple[int, ...], int], tuple[int, ...]]  # by prompt and the row's seed


def continuations_of(generations: Sequence[Generation]) -> Continuations:
    """What plain decoding gave each row."""
    return {
        (generation.prompt_token_ids, completion.seed): completion.token_ids
        for generation in generations
        for completion in generation.completions
    }


def told(generations: Sequence[Generation]) -> list[Generation]:
    """All but the time."""
    nothing = Timings(None, None, 0.0)
    return [dataclasses.replace(generation, timings=nothing) for generation in generations]


class KnowingDrafter:
    """Knows what follows; each row is of one kind, or of the given one.

    "right": all of it. "wrong": nothing of it. "spoiled": each token wrong with probability 1/3.
    "hostile": too many ids, ids that are none, other types, or an exception.
    """

    is_free = True
    reads_rows = False
    survives_fork = True

    def __init__(self, known: Continuations, vocab_size: int, kind: str | None = None) -> None:
        self.known, self.vocab_size, self.kind = known, vocab_size, kind
        self.rng = np.random.default_rng(7)
        self.told: dict[DraftRow, list[int]] = {}  # what `accepted` said
        self.ended_rows: list[DraftRow] = []
        self.is_closed = False

    def propose(self, rows: Sequence[DraftRow], most: Sequence[int]) -> list[Draft]:
        assert min(most) >= 1
        return [self._draft(row, count) for row, count in zip(rows, most, strict=True)]

    def accepted(self, row: DraftRow, ids: Sequence[int]) -> None:
        ids = list(ids)
        assert row.token_ids[len(row.token_ids) - 1 - len(ids) : -1] == ids
        self.told.setdefault(row, []).extend(ids)

    def ended(self, row: DraftRow) -> None:
        self.ended_rows.append(row)

    def warmup(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        self.is_closed = True

    def _draft(self, row: DraftRow, most: int) -> Draft:
        prompt, seed = tuple(row.token_ids[: row.prompt_len]), row.params.seed
        assert seed is not None
        right = list(self.known.get((prompt, seed), ()))[len(row.token_ids) - row.prompt_len :]
        kind = self.kind or KINDS[hash((prompt, seed)) % len(KINDS)]
        level = int(self.rng.integers(16))
        if kind == "right":
            return Draft(right[:most], level)
        if kind == "none":
            return Draft((), level)
        if kind == "random":
            return Draft(self.rng.integers(0, self.vocab_size, most).tolist(), level)
        if kind == "hostile":
            hostile: Draft = self._hostile(right, most)
            return hostile
        share = 1.0 if kind == "wrong" else 1 / 3
        spoiled = self.rng.random(len(right)) < share
        ids = [
            (one + 1) % self.vocab_size if bad else one
            for one, bad in zip(right, spoiled, strict=True)
        ]
        return Draft(ids[:most], level)

    def _hostile(self, right: list[int], most: int) -> Any:
        """What a drafter must not return."""
        case = int(self.rng.integers(8))
        if case == 0:
            raise RuntimeError("injected by the drafter")
        return [
            None,
            Draft([*right[:1], self.vocab_size, 3]),
            Draft([*right[:2], -1]),
            Draft([1] * (most + 200), 10**6),
            Draft([*right[:1], math.nan, "2"], -5),  # type: ignore[list-item]
            Draft(np.array(right[:3], np.int64)),  # type: ignore[arg-type]
            Draft([True, False]),
            5,
        ][case]


@contextmanager
def all_tried() -> Iterator[None]:
    """All that is drafted is tried, whatever it costs."""

    def lengths_of(shares: Sequence[float], most: Sequence[int], *rest: Any) -> list[int]:
        room, lengths = rest[-1], []
        for count in most:
            lengths.append(min(count, room))
            room -= lengths[-1]
        return lengths

    def rounds_of(shares: Sequence[float], most: int, *rest: Any) -> int:
        return min(most, 7)

    changes: dict[str, Any] = {
        "choose_lengths": lengths_of,
        "choose_rounds": rounds_of,
        "_CHEAP": 0.0,  # what takes time is asked for as many tokens as rounds_of says
    }
    with mock.patch.multiple("fastgen.engine.drafting", **changes):
        yield


@contextmanager
def drafted_by(engine: Engine, *drafters: Drafter) -> Iterator[None]:
    """Have the engine's rows drafted for by these alone; all that they propose is tried."""
    before = engine.drafting.drafters
    engine.drafting.use(drafters)
    try:
        with all_tried():
            yield
    finally:
        engine.drafting.use(before)
