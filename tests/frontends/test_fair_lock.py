"""FairLock, the fair lock: in the order of asking, one at a time; and two models that share it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest

import fastgen
from engine_harness import assert_idle, greedy
from fastgen.frontends.engine_thread import QueueConfig
from fastgen.frontends.fair_lock import FairLock
from fastgen.frontends.threaded_engine import ThreadedEngine
from waits import WITHIN, wait_until


def started(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def joined(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.join(WITHIN)
    assert not any(thread.is_alive() for thread in threads)


def test_it_is_handed_on_in_the_order_of_asking() -> None:
    turns, order = FairLock(), list[int]()

    def work(index: int) -> None:
        with turns:
            order.append(index)

    threads = []
    with turns:
        for index in range(40):
            threads.append(started(partial(work, index)))
            wait_until(lambda: len(turns._waiting) == len(threads))
        assert order == []
    joined(threads)
    assert order == list(range(40))
    with turns:  # and it is free again
        pass


def test_whoever_leaves_goes_behind_those_who_wait() -> None:
    """threading.Lock would let them take it again at once."""
    turns, order = FairLock(), list[str]()

    def other() -> None:
        for _ in range(50):
            with turns:
                order.append("other")
                wait_until(lambda: turns._waiting or len(order) >= 99)

    with turns:
        thread = started(other)
        wait_until(lambda: len(turns._waiting) == 1)
    for _ in range(50):
        with turns:
            order.append("mine")
            wait_until(lambda: turns._waiting or len(order) >= 99)
    joined([thread])
    assert order == ["other", "mine"] * 50


def test_many_threads_hold_it_one_at_a_time_and_none_starves() -> None:
    turns, inside, most = FairLock(), 0, 0
    counts = [0] * 12

    def work(index: int) -> None:
        nonlocal inside, most
        for _ in range(200):
            with turns:
                inside += 1
                most = max(most, inside)
                counts[index] += 1
                if counts[index] % 50 == 0:
                    time.sleep(0.0005)  # others run meanwhile, and must not come in
                inside -= 1

    joined([started(partial(work, index)) for index in range(12)])
    assert most == 1
    assert counts == [200] * 12
    assert not turns._waiting and not turns._taken


def test_an_exception_inside_hands_it_on() -> None:
    turns, entered = FairLock(), threading.Event()

    def other() -> None:
        with turns:
            entered.set()

    def fail() -> None:
        with turns:
            started(other)
            wait_until(lambda: turns._waiting)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert entered.wait(WITHIN)
    with turns:
        pass


@pytest.fixture
def models() -> Iterator[list[fastgen.Generator]]:
    with ExitStack() as stack:
        two = [
            stack.enter_context(fastgen.load(max_batch_size=2, max_seq_len=256)) for _ in range(2)
        ]
        yield two
        wait_until(lambda: not any(model.engine.num_unfinished for model in two))
        for model in two:
            assert_idle(model.engine)


def test_models_that_share_a_processor_both_make_progress(
    models: list[fastgen.Generator], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step by step: the short request of one does not wait for the long one of the other."""
    turns, steps = FairLock(), list[int]()
    inside, most = 0, 0

    def watched(index: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def step(batch: Any) -> Any:
            nonlocal inside, most
            inside += 1
            most = max(most, inside)
            steps.append(index)
            time.sleep(0.002)
            try:
                return original(batch)
            finally:
                inside -= 1

        return step

    for index, model in enumerate(models):
        decoder = model.engine.decoder
        monkeypatch.setattr(decoder, "step", watched(index, decoder.step))
    queue_config = QueueConfig(fair_lock=turns)
    with (
        ThreadedEngine(models[0], queue_config) as first,
        ThreadedEngine(models[1], queue_config) as second,
    ):
        for slow, quick in ((first, second), (second, first)):
            long = slow.submit("And it came to pass", greedy(max_new_tokens=240, ignore_eos=True))
            wait_until(lambda: len(steps) > 3)
            before = len(steps)
            short = quick.submit("In the beginning", greedy(max_new_tokens=20, ignore_eos=True))
            assert len(short.result(WITHIN).completions[0].token_ids) == 20
            assert not long.done(), "the short one has waited for the long one"
            meanwhile = steps[before:]
            other = models.index(slow.thread.model)
            assert meanwhile.count(other) >= 5, "the long one has waited for the short one"
            assert len(long.result(WITHIN).completions[0].token_ids) == 240
            steps.clear()
    assert most == 1, "two steps at the same time"


def test_a_failing_step_hands_the_turn_to_the_other_model(
    models: list[fastgen.Generator], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(batch: Any) -> Any:
        raise OSError("boom")

    queue_config = QueueConfig(fair_lock=FairLock())
    with (
        ThreadedEngine(models[0], queue_config) as first,
        ThreadedEngine(models[1], queue_config) as second,
    ):
        with monkeypatch.context() as patch:
            patch.setattr(models[0].engine.decoder, "step", broken)
            for _ in range(4):  # beyond the first three it refuses
                with pytest.raises(fastgen.EngineError):
                    first.submit("And", max_new_tokens=5).result(WITHIN)
        assert not first.ready and second.ready
        assert second.submit("And", max_new_tokens=5).result(WITHIN).completions
    assert models[0].generate("And", max_new_tokens=5)
