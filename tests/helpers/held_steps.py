"""Steps that are held or watched, and results to compare: for tests of engines on threads."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

import fastgen
from engine_harness import greedy
from fastgen.results import Piece
from waits import WITHIN


@contextmanager
def stepping(model: fastgen.Generator, before: Callable[[], Any]) -> Iterator[None]:
    """`before` is called before each step of the decoder, and may raise."""
    decoder = model.engine.decoder
    original = decoder.step

    def step(batch: Any) -> Any:
        before()
        return original(batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "step", step)
        yield


class Gate:
    """Steps wait at it until it opens."""

    def __init__(self) -> None:
        self._entered, self._opened = threading.Event(), threading.Event()
        self.open = self._opened.set
        self.num_inside = 0

    def pass_through(self) -> None:
        self.num_inside += 1
        self._entered.set()
        try:
            assert self._opened.wait(WITHIN)
        finally:
            self.num_inside -= 1

    def await_step(self) -> None:
        assert self._entered.wait(WITHIN)


@contextmanager
def held(model: fastgen.Generator) -> Iterator[Gate]:
    """No step ends until the gate opens, at the end of the block if not before."""
    gate = Gate()
    try:
        with stepping(model, gate.pass_through):
            yield gate
    finally:
        gate.open()


@contextmanager
def held_for_a_cancel(model: fastgen.Generator) -> Iterator[None]:
    """After a few steps none is run before a request is cancelled, however long that takes."""
    cancel, cancelled, steps = model.engine.cancel, threading.Event(), itertools.count()

    def cancel_and_tell(*args: Any, **options: Any) -> None:
        cancel(*args, **options)
        cancelled.set()

    def hold() -> None:
        assert next(steps) < 3 or cancelled.wait(WITHIN)

    with pytest.MonkeyPatch.context() as patch, stepping(model, hold):
        patch.setattr(model.engine, "cancel", cancel_and_tell)
        yield


def pieces_joined(pieces: Sequence[Piece]) -> list[tuple[Any, ...]]:
    """What a stream's pieces say of each completion, as `facts` says it."""
    rows = [[piece for piece in pieces if piece.index == index] for index in range(9)]
    return [
        ("".join(map(str, row)), tuple(token_id for piece in row for token_id in piece.token_ids),
         row[-1].finish_reason, row[-1].stop_reason) for row in rows if row
    ]  # fmt: skip


def facts(generation: fastgen.Generation) -> list[tuple[Any, ...]]:
    return [(c.text, c.token_ids, c.finish_reason, c.stop_reason) for c in generation.completions]


TEXTS = ["And it came to pass", "In the beginning", "Blessed are the meek:", "The LORD is my"]


LONG = greedy(max_new_tokens=240, ignore_eos=True, speculate=False)  # a token a step
