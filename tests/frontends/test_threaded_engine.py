"""ThreadedEngine, and what both faces have of EngineThread: exactness, health, failures, races."""

from __future__ import annotations

import gc
import logging
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import fastgen
from engine_harness import assert_idle, greedy, random_prompt, running_rows
from engine_threads import (
    Clock,
    handle_of,
    handles_of,
    has_stopped,
    held_until_cancelled,
    is_alive,
    listeners_of,
)
from fastgen import EngineError, SamplingParams
from fastgen.engine.inbox import Inbox, Pending
from fastgen.frontends.engine_thread import EngineThread, QueueConfig, RequestHandle, estimate_size
from fastgen.frontends.jobs import Job
from fastgen.frontends.threaded_engine import ThreadedEngine, ThreadedStream
from held_steps import LONG, TEXTS, facts, held, pieces_joined, stepping
from waits import WITHIN, wait_until

pytestmark = pytest.mark.usefixtures("left_idle")


def test_sizes_are_counted_no_further_than_until_it_is_certain_that_they_are_large() -> None:
    assert estimate_size([5, "abc", [1, 2]]) == 1 + 4 + 3
    assert estimate_size(["x"] * 2000) == 4000
    for items in ([7] * 10**6, ["ab"] * 10**6, "x" * 10**6):
        left = iter(items)
        assert estimate_size(left) > 4000 and len(list(left)) > 0.99 * 10**6


def test_sixteen_threads_at_once_are_exact(model: fastgen.Generator) -> None:
    rng = np.random.default_rng(0)
    calls: list[tuple[str, Any, SamplingParams]] = []
    for index in range(96):
        prompt = [*TEXTS, random_prompt(rng, 70)][index % 5]
        params = SamplingParams(
            seed=index, temperature=float(rng.choice([0.0, 0.7, 1.2])), n=1 + index % 2,
            max_new_tokens=int(rng.integers(1, 40)), stop=("and",) if index % 5 == 0 else (),
        )  # fmt: skip
        calls.append((("submit", "stream", "score")[index % 3], prompt, params))

    def alone(kind: str, prompt: Any, params: SamplingParams) -> Any:
        if kind == "score":
            return model.score([prompt])
        return facts(model.generate([prompt], params)[0])

    expected = [alone(*call) for call in calls]
    with ThreadedEngine(model) as engine, ThreadPoolExecutor(16) as threads:

        def together(kind: str, prompt: Any, params: SamplingParams) -> Any:
            if kind == "score":
                return engine.score([prompt])
            if kind == "submit":
                return facts(engine.submit(prompt, params).result(WITHIN))
            return pieces_joined(list(engine.stream(prompt, params)))

        found = list(threads.map(lambda call: together(*call), calls))
        plain = threads.submit(model.generate, TEXTS, LONG)  # without the engine, beside it
        beside = [engine.submit(text, LONG) for text in TEXTS]
        whole = [facts(generation) for generation in plain.result(WITHIN)]
        assert [facts(future.result(WITHIN)) for future in beside] == whole
        assert engine.ready
        assert not listeners_of(engine)
    assert found == expected


def test_what_has_nothing_to_compute_ends_at_once(model: fastgen.Generator) -> None:
    with held(model), ThreadedEngine(model) as engine:
        nothing = SamplingParams(max_new_tokens=0, prompt_logprobs=0)
        [completion] = engine.submit([5], nothing).result(WITHIN).completions
        assert (completion.token_ids, completion.finish_reason) == ((), "length")
        [piece] = engine.stream([5], nothing)
        assert (piece.token_ids, piece.finish_reason) == ((), "length")


def test_of_jobs_that_come_together_one_bad_one_refuses_all(model: fastgen.Generator) -> None:
    params, told = greedy(max_new_tokens=4), list[RequestHandle]()
    thread = EngineThread(model, QueueConfig())
    try:
        with pytest.raises(ValueError, match="0 sinks"):
            thread.submit([Job([5, 6], params, None), Job([7], params, [])], told.extend)
        wait_until(lambda: model.engine.num_unfinished == 0)
    finally:
        model.engine.run(lambda: model.engine.num_unfinished == 0)
        thread.stop()


def test_cancelling_a_future_ends_its_request_and_no_other(model: fastgen.Generator) -> None:
    [expected] = model.generate(TEXTS[0], LONG)
    with ThreadedEngine(model) as engine:
        with held(model):
            futures = [engine.submit(text, LONG) for text in TEXTS * 2]  # four run, four wait
            for future in (*futures[1:4], *futures[5:]):
                assert future.cancel()
                with pytest.raises(CancelledError):
                    future.result(WITHIN)
        for future in (futures[0], futures[4]):
            assert facts(future.result(WITHIN)) == facts(expected)
        assert not futures[0].cancel()
        wait_until(lambda: not handles_of(engine))
        assert not listeners_of(engine)
        assert_idle(model.engine)


@pytest.mark.usefixtures("own_garbage")
@pytest.mark.parametrize("how", ["close", "with", "drop"])
def test_leaving_a_stream_ends_its_request_and_no_other(model: fastgen.Generator, how: str) -> None:
    [expected] = model.generate(TEXTS[0], LONG)
    left, last = threading.Event(), model.engine.stats.steps + 100
    with (
        ThreadedEngine(model) as engine,
        stepping(model, lambda: model.engine.stats.steps < last or left.wait(WITHIN)),
    ):
        stream: ThreadedStream | None = engine.stream(TEXTS[1], LONG)
        other = engine.submit(TEXTS[0], LONG)
        assert stream is not None and next(stream).token_ids
        request = handle_of(stream).request
        assert request is not None
        if how == "close":
            stream.close()
        elif how == "with":
            with stream:
                pass
        stream = None
        gc.collect()
        left.set()
        wait_until(lambda: request.done)
        assert request.rows[0].finish_reason == "cancelled"
        assert facts(other.result(WITHIN)) == facts(expected)
        assert not listeners_of(engine)


def test_a_reader_that_stalls_is_cut_off_and_others_go_on(model: fastgen.Generator) -> None:
    [expected] = model.generate(TEXTS[0], LONG)
    with ThreadedEngine(model, QueueConfig(max_unread=8)) as engine:
        stream = engine.stream(TEXTS[1], LONG)
        other = engine.submit(TEXTS[0], LONG)
        assert facts(other.result(WITHIN)) == facts(expected)
        with pytest.raises(EngineError, match="more than 8 tokens of a row waited to be read"):
            list(stream)
        request = handle_of(stream).request
        assert request is not None
        [row] = request.rows
        assert row.finish_reason == "cancelled" and 8 < len(row.new_token_ids) <= 11


def test_closing_ends_what_is_under_way_with_cancelled(model: fastgen.Generator) -> None:
    engine = ThreadedEngine(model)
    with held_until_cancelled(model, engine), ThreadPoolExecutor(1) as thread:
        futures = [engine.submit(text, LONG) for text in TEXTS * 2]
        reading = thread.submit(list, engine.stream(TEXTS[0], LONG))
        engine.close()
        engine.close()
        assert reading.result(WITHIN)[-1].finish_reason == "cancelled"
    for future in futures:
        assert future.result(WITHIN).completions[0].finish_reason == "cancelled"
    assert not engine.ready and not is_alive(engine)
    with pytest.raises(EngineError, match="has been closed"):
        engine.submit("And")


def test_closing_does_not_wait_for_a_step_that_hangs(model: fastgen.Generator) -> None:
    engine = ThreadedEngine(model)
    with held(model) as gate:
        future, stream = engine.submit(TEXTS[0], LONG), engine.stream(TEXTS[1], LONG)
        gate.await_step()
        engine.thread.stop(timeout=0.2)
        assert gate.num_inside == 1, "it has waited for the step"
        with pytest.raises(EngineError, match="has been closed"):
            future.result(WITHIN)
        with pytest.raises(EngineError, match="has been closed"):
            list(stream)
    engine.close()


def test_a_step_that_fails_ends_its_rows_and_no_others(model: fastgen.Generator) -> None:
    [expected] = model.generate(TEXTS[0], LONG)
    fails = list[bool]()

    def fail_once() -> None:
        if fails:  # the first does not end before the second has come
            wait_until(lambda: model.engine.num_unfinished == 2)
        running = running_rows(model.engine)
        if fails and len(running) == 2 and min(len(row.new_token_ids) for row in running) > 3:
            fails.clear()
            raise OSError("boom")

    with ThreadedEngine(model) as engine, stepping(model, fail_once):
        for _ in range(4):  # failures that do not follow each other do no harm
            fails[:] = [True]
            future, stream = engine.submit(TEXTS[0], LONG), engine.stream(TEXTS[1], LONG)
            with pytest.raises(EngineError, match="boom"):
                future.result(WITHIN)
            with pytest.raises(EngineError, match="boom"):
                list(stream)
            assert engine.ready
            assert facts(engine.submit(TEXTS[0], LONG).result(WITHIN)) == facts(expected)


def test_an_engine_whose_steps_all_fail_ends_everything(
    model: fastgen.Generator, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        assert gate.wait(WITHIN)
        raise OSError("boom")

    gate, tries = threading.Event(), model.engine.stats.failed_steps
    with ThreadedEngine(model) as engine, stepping(model, fail), caplog.at_level(logging.ERROR):
        futures = [engine.submit(text, LONG) for text in TEXTS * 6]
        streams = [engine.stream(text, LONG) for text in TEXTS]
        gate.set()
        errors = [future.exception(WITHIN) for future in futures]
        assert all(isinstance(error, EngineError) for error in errors)
        assert {str(error) for error in errors[12:]} == {"this engine cannot go on: OSError: boom"}
        for stream in streams:
            with pytest.raises(EngineError, match="cannot go on: OSError: boom"):
                list(stream)
        assert model.engine.stats.failed_steps - tries == 3
        assert not engine.ready
        with pytest.raises(EngineError, match="cannot go on: OSError: boom"):
            engine.submit("And")
        [critical] = [record for record in caplog.records if record.levelno == logging.CRITICAL]
        assert "cannot go on: OSError: boom" in critical.getMessage() and critical.exc_info
        assert engine.drain(WITHIN)


def test_a_step_that_hangs_is_noticed_and_forgiven(model: fastgen.Generator, clock: Clock) -> None:
    [expected] = model.generate(TEXTS[0], LONG)
    with ThreadedEngine(model, QueueConfig(stall_timeout=10)) as engine:
        clock.now += 11
        assert engine.ready, "there is nothing to do"
        with held(model) as gate:
            future = engine.submit(TEXTS[0], LONG)
            gate.await_step()
            clock.now += 9
            assert engine.ready, "the work has only begun"
            clock.now += 2
            assert not engine.ready
            gate.open()
            wait_until(lambda: engine.ready)
            assert facts(future.result(WITHIN)) == facts(expected)


def test_others_who_run_the_model_do_not_make_the_engine_look_stalled(
    model: fastgen.Generator, clock: Clock
) -> None:
    with (
        ThreadedEngine(model, QueueConfig(stall_timeout=1)) as engine,
        ThreadPoolExecutor(1) as threads,
        held(model) as gate,
    ):
        clock.now += 1.1  # nothing to do
        scoring = threads.submit(engine.score, [TEXTS[0] * 30] * 30)
        gate.await_step()
        assert engine.ready
        gate.open()
        assert scoring.result(WITHIN)


def test_a_request_that_comes_while_the_engine_breaks_is_told(model: fastgen.Generator) -> None:
    """Two jobs at once: the engine breaks after the first was taken."""
    last, taking = threading.Event(), threading.Event()
    original, steps = model.engine.add_request, list[None]()

    def fail() -> None:
        steps.append(None)
        if len(steps) == 3:
            last.set()
            taking.wait(WITHIN)
        raise OSError("boom")

    def add_request(*args: Any, **options: Any) -> Any:
        if last.is_set():
            taking.set()
            end = time.monotonic() + 1  # a chance to break meanwhile, which is not to be taken
            while not has_stopped(thread) and time.monotonic() < end:
                time.sleep(0.001)
        return original(*args, **options)

    told, job = list[RequestHandle](), Job([5, 6], LONG, None)
    thread = EngineThread(model, QueueConfig())
    with pytest.MonkeyPatch.context() as patch, stepping(model, fail):
        patch.setattr(model.engine, "add_request", add_request)
        thread.submit([job] * 12, told.extend)
        last.wait(WITHIN)
        handles = thread.submit([job, job], told.extend)
    try:
        wait_until(lambda: all(handle.done for handle in handles))
        assert model.engine.num_unfinished == 0
    finally:
        for handle in handles:
            if handle.request is not None:
                model.engine.cancel(handle.request)
        thread.stop()


def test_a_row_that_another_thread_is_about_to_queue_is_work(model: fastgen.Generator) -> None:
    """Whoever drives takes rows out of the inbox, and then puts them among those that wait."""
    original_add, original_take = model.engine.add_request, Inbox.take
    taken = threading.Event()
    asked = ("And", greedy(max_new_tokens=2))
    plain = threading.Thread(target=model.generate, args=asked, daemon=True)

    def add_request(*args: Any, **options: Any) -> Any:
        request = original_add(*args, **options)
        if not plain.ident:
            plain.start()
            assert taken.wait(WITHIN)
        return request

    def take(inbox: Inbox) -> Pending:
        pending = original_take(inbox)
        if threading.current_thread() is plain and not taken.is_set():
            taken.set()
            time.sleep(0.2)
        return pending

    with ThreadedEngine(model) as engine, pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.engine, "add_request", add_request)
        patch.setattr(Inbox, "take", take)
        future = engine.submit("And", LONG)
        plain.join(WITHIN)
        assert future.result(WITHIN).completions[0].finish_reason == "length"
