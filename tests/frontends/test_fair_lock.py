"""FairLock, the fair lock: in the order of asking, one at a time; and two models that share it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest

import fastgen
from engine_harness import assert_idle, greedy
from engine_threads import is_free, num_waiting
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
    lock, order = FairLock(), list[int]()

    def work(index: int) -> None:
        with lock:
            order.append(index)

    threads = []
    with lock:
        for index in range(40):
            threads.append(started(partial(work, index)))
            wait_until(lambda: num_waiting(lock) == len(threads))
        assert order == []
    joined(threads)
    assert order == list(range(40))
    with lock:  # and it is free again
        pass


def test_whoever_leaves_goes_behind_those_who_wait() -> None:
    """threading.Lock would let them take it again at once."""
    lock, order = FairLock(), list[str]()

    def other() -> None:
        for _ in range(50):
            with lock:
                order.append("other")
                wait_until(lambda: num_waiting(lock) or len(order) >= 99)

    with lock:
        thread = started(other)
        wait_until(lambda: num_waiting(lock) == 1)
    for _ in range(50):
        with lock:
            order.append("mine")
            wait_until(lambda: num_waiting(lock) or len(order) >= 99)
    joined([thread])
    assert order == ["other", "mine"] * 50


def test_many_threads_hold_it_one_at_a_time_and_none_starves() -> None:
    lock, inside, most = FairLock(), 0, 0
    counts = [0] * 12

    def others_are_done(index: int) -> bool:
        return all(count == 200 for other, count in enumerate(counts) if other != index)

    def work(index: int) -> None:
        nonlocal inside, most
        for _ in range(200):
            with lock:
                inside += 1
                most = max(most, inside)
                counts[index] += 1
                if counts[index] % 50 == 0:
                    # others run meanwhile, as far as they can, and must not come in
                    wait_until(lambda: num_waiting(lock) or others_are_done(index))
                inside -= 1

    joined([started(partial(work, index)) for index in range(12)])
    assert most == 1
    assert counts == [200] * 12
    assert is_free(lock)


def test_an_exception_inside_hands_it_on() -> None:
    lock, entered = FairLock(), threading.Event()

    def other() -> None:
        with lock:
            entered.set()

    def fail() -> None:
        with lock:
            started(other)
            wait_until(lambda: num_waiting(lock))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert entered.wait(WITHIN)
    with lock:
        pass


@pytest.fixture
def models() -> Iterator[list[fastgen.Generator]]:
    with ExitStack() as stack:
        options: dict[str, Any] = {"max_batch_size": 2, "max_seq_len": 256, "speculate": "off"}
        two = [stack.enter_context(fastgen.load(**options)) for _ in range(2)]
        yield two
        wait_until(lambda: not any(model.engine.num_unfinished for model in two))
        for model in two:
            assert_idle(model.engine)


def test_models_that_share_a_processor_both_make_progress(
    models: list[fastgen.Generator], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step by step: the short request of one does not wait for the long one of the other."""
    lock, steps, is_over = FairLock(), list[int](), threading.Event()
    inside, most = 0, 0

    def other_is_done(other: int) -> bool:
        """Nor will it be asked: the long request does not get on before the short one comes."""
        is_idle = not models[other].engine.num_unfinished
        return is_idle and (len(steps) <= 4 or is_over.is_set())

    def watched(index: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def step(batch: Any) -> Any:
            nonlocal inside, most
            inside += 1
            most = max(most, inside)
            steps.append(index)
            wait_until(lambda: num_waiting(lock) or other_is_done(1 - index))
            try:
                return original(batch)
            finally:
                inside -= 1

        return step

    for index, model in enumerate(models):
        decoder = model.engine.decoder
        monkeypatch.setattr(decoder, "step", watched(index, decoder.step))
    queue_config = QueueConfig(fair_lock=lock)
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
            is_over.set()
            meanwhile = steps[before:]
            other = models.index(slow.thread.model)
            assert meanwhile.count(other) >= 5, "the long one has waited for the short one"
            assert len(long.result(WITHIN).completions[0].token_ids) == 240
            steps.clear()
            is_over.clear()
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
