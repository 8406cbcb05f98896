"""Every kind of EngineError: raised by what it is for, in each way of using a model, with a code of
its own. They survive a pickle, as they must to come from another process.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import pkgutil
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastgen
import fastgen.bench
from engine_harness import assert_pickles, greedy
from fastgen import EngineError, QueueConfig
from fastgen.engine.blocks import BlockPool
from fastgen.errors import (
    EngineClosedError,
    EngineDeadError,
    ForkedEngineError,
    NothingToDrawError,
    NothingToRunError,
    OutOfBlocksError,
    QueueFull,
    ReentrantCallError,
    RequestCancelledError,
    RequestTimeoutError,
    RowFailedError,
    SlowReaderError,
    StepFailedError,
)
from fastgen.frontends.async_engine import AsyncEngine
from fastgen.frontends.threaded_engine import ThreadedEngine
from held_steps import LONG, TEXTS, held, stepping
from poisoned import POISON, save_poisoned
from processes import in_fork
from waits import WITHIN, wait_in_loop_until, wait_until

SHORT = greedy(max_new_tokens=3, ignore_eos=True)
POISONED = [5, 6, POISON, 7]
SIX_WINDOWS = [TEXTS[0] * 60] * 3  # more than run at a time, fewer than are queued ahead
Model = fastgen.Generator


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_poisoned(tmp_path_factory.mktemp("poisoned"))


@pytest.fixture(scope="module")
def shared(folder: Path) -> Iterator[Model]:
    with opened(folder) as loaded:
        yield loaded


def opened(folder: Path) -> Model:
    return fastgen.load(folder, decoder="cpu", max_batch_size=4, max_seq_len=256)


def caught(call: Callable[..., Any], *args: Any, **options: Any) -> EngineError:
    with pytest.raises(EngineError) as found:
        call(*args, **options)
    return found.value


async def caught_in(work: Awaitable[Any]) -> EngineError:
    with pytest.raises(EngineError) as found:
        await work
    return found.value


def boom() -> None:
    raise OSError("boom")


def raises_key_error(ids: Any, logits: Any) -> Any:
    raise KeyError("mine")


def makes_nan(ids: Any, logits: Any) -> Any:
    return logits * np.nan


# What happens, and what it raises. A model that is closed by it is one of its own.


def closed(model: Model) -> Iterator[EngineError]:
    model.close()
    yield caught(model.generate, "And", SHORT)
    yield caught(model.stream, "And", SHORT)
    yield caught(model.score, "And it")
    yield caught(model.warmup)


def closed_threaded(model: Model) -> Iterator[EngineError]:
    engine = ThreadedEngine(model)
    engine.drain()
    yield caught(engine.submit, "And", SHORT)
    engine.close()
    for call in (engine.submit, engine.stream, engine.score):
        yield caught(call, "And it")


async def closed_async(model: Model) -> list[EngineError]:
    engine = AsyncEngine(model)
    await engine.drain()
    found = [await caught_in(engine.generate("And", SHORT))]
    await engine.close()
    calls: list[Awaitable[Any]] = [
        engine.generate("And"), engine.stream("And").open(), engine.score("And it"),
    ]  # fmt: skip
    return found + [await caught_in(call) for call in calls]


def hung_threaded(model: Model) -> Iterator[EngineError]:
    """A step that does not end is not waited for."""
    engine = ThreadedEngine(model)
    with held(model) as gate:
        future, stream = engine.submit("And", SHORT), engine.stream("And", SHORT)
        gate.await_step()
        engine.thread.stop(timeout=0.2)
        yield caught(future.result, WITHIN)
        yield caught(list, stream)
    engine.close()
    wait_until(lambda: not model.engine.num_unfinished)


def dead_threaded(model: Model) -> Iterator[EngineError]:
    with ThreadedEngine(model) as engine, stepping(model, boom):
        for _ in range(3):
            assert isinstance(engine.submit("And", SHORT).exception(WITHIN), StepFailedError)
        for call in (engine.submit, engine.stream, engine.score):
            yield caught(call, "And it")


async def dead_async(model: Model) -> list[EngineError]:
    async with AsyncEngine(model) as engine:
        with stepping(model, boom):
            for _ in range(3):
                assert isinstance(await caught_in(engine.generate("And", SHORT)), StepFailedError)
            calls: list[Awaitable[Any]] = [
                engine.generate("And"), engine.stream("And").open(), engine.score("And it"),
            ]  # fmt: skip
            return [await caught_in(call) for call in calls]


def step_failed(model: Model) -> Iterator[EngineError]:
    with stepping(model, boom):
        yield caught(model.generate, "And", SHORT)
        yield caught(list, model.stream("And", SHORT))
        yield caught(model.score, "And it")


def step_failed_threaded(model: Model) -> Iterator[EngineError]:
    with ThreadedEngine(model) as engine, stepping(model, boom):
        yield caught(engine.submit("And", SHORT).result, WITHIN)
        yield caught(list, engine.stream("And", SHORT))


async def step_failed_async(model: Model) -> list[EngineError]:
    async with AsyncEngine(model) as engine:
        with stepping(model, boom):
            return [
                await caught_in(engine.generate("And", SHORT)),
                await caught_in(anext_of_last(engine)),
            ]


async def anext_of_last(engine: AsyncEngine) -> None:
    async for _ in engine.stream("And", SHORT):
        pass


def timeout_threaded(model: Model) -> Iterator[EngineError]:
    with ThreadedEngine(model) as engine:
        yield caught(engine.score, "And it", timeout=0)


async def timeout_async(model: Model) -> list[EngineError]:
    async with AsyncEngine(model) as engine:
        return [await caught_in(engine.score("And it", timeout=0))]


def closing_while(model: Model, score: Callable[[Any], Any]) -> EngineError:
    """The model is closed while texts are scored, which would take more steps than one."""
    with held(model) as gate, ThreadPoolExecutor(2) as pool:
        scoring = pool.submit(score, SIX_WINDOWS)
        gate.await_step()
        pool.submit(model.close)
        wait_until(lambda: model.engine.closed)
        gate.open()
        return caught(scoring.result, WITHIN)


def cancelled(model: Model) -> Iterator[EngineError]:
    yield closing_while(model, model.score)


def cancelled_threaded(model: Model) -> Iterator[EngineError]:
    with ThreadedEngine(model) as engine:
        yield closing_while(model, engine.score)


async def cancelled_async(model: Model) -> list[EngineError]:
    async with AsyncEngine(model) as engine:
        with held(model) as gate:
            scoring = asyncio.ensure_future(engine.score(SIX_WINDOWS))
            await asyncio.sleep(0)
            await asyncio.to_thread(gate.await_step)
            closing = asyncio.ensure_future(asyncio.to_thread(model.close))
            await wait_in_loop_until(lambda: model.engine.closed)
            gate.open()
            error = await caught_in(scoring)
            await closing
    return [error]


def slow_threaded(model: Model) -> Iterator[EngineError]:
    with ThreadedEngine(model, QueueConfig(max_unread=8)) as engine:
        stream = engine.stream(TEXTS[1], LONG)
        engine.submit(TEXTS[0], LONG).result(WITHIN)
        yield caught(list, stream)


async def slow_async(model: Model) -> list[EngineError]:
    async with AsyncEngine(model, QueueConfig(max_unread=8)) as engine:
        stream = engine.stream(TEXTS[1], LONG)
        await stream.open()
        await engine.generate(TEXTS[0], LONG)
        return [await caught_in(anext(stream))]


def full_threaded(model: Model) -> Iterator[EngineError]:
    with ThreadedEngine(model, QueueConfig(max_waiting=0)) as engine, held(model):
        futures = [engine.submit("And", SHORT) for _ in range(4)]
        for call in (engine.submit, engine.stream, engine.score):
            yield caught(call, "And it")
        assert not any(future.done() for future in futures)


async def full_async(model: Model) -> list[EngineError]:
    async with AsyncEngine(model, QueueConfig(max_waiting=0)) as engine:
        with held(model):
            running = asyncio.ensure_future(engine.generate(["And"] * 4, SHORT))
            await wait_in_loop_until(lambda: model.engine.num_unfinished == 4)
            calls: list[Awaitable[Any]] = [
                engine.generate("And"), engine.stream("And").open(), engine.score("And it"),
            ]  # fmt: skip
            found = [await caught_in(call) for call in calls]
        assert await running
    return found


def nothing_to_draw(model: Model) -> Iterator[EngineError]:
    yield caught(model, "And", logits_processor=makes_nan)
    yield caught(model.score, [POISONED])


def nothing_to_draw_threaded(model: Model) -> Iterator[EngineError]:
    with ThreadedEngine(model) as engine:
        yield caught(engine.score, [POISONED])


async def nothing_to_draw_async(model: Model) -> list[EngineError]:
    async with AsyncEngine(model) as engine:
        return [await caught_in(engine.score([POISONED]))]


def row_failed(model: Model) -> Iterator[EngineError]:
    yield caught(model, "And", logits_processor=raises_key_error)


def nothing_to_run(model: Model) -> Iterator[EngineError]:
    yield caught(model.engine.run, lambda: False)


def reentrant(model: Model) -> Iterator[EngineError]:
    inner: list[EngineError] = []

    def generates(ids: Any, logits: Any) -> None:
        inner.append(caught(model.generate, "And", SHORT))

    model.generate("And", max_new_tokens=1, logits_processor=generates)
    yield from inner


def forked(model: Model) -> Iterator[EngineError]:
    with ThreadedEngine(model) as engine:
        for call in (engine.submit, engine.stream, engine.score):
            yield in_fork(partial(caught, call, "And it"))


def out_of_blocks(model: Model) -> Iterator[EngineError]:
    pool = BlockPool(3)
    yield caught(pool.allocate, 4)
    assert pool.num_free == 3


SITUATIONS: dict[type[EngineError], tuple[Callable[[Model], Any], ...]] = {
    EngineClosedError: (closed, closed_threaded, closed_async, hung_threaded),
    EngineDeadError: (dead_threaded, dead_async),
    StepFailedError: (step_failed, step_failed_threaded, step_failed_async),
    RequestTimeoutError: (timeout_threaded, timeout_async),
    RequestCancelledError: (cancelled, cancelled_threaded, cancelled_async),
    SlowReaderError: (slow_threaded, slow_async),
    QueueFull: (full_threaded, full_async),
    NothingToDrawError: (nothing_to_draw, nothing_to_draw_threaded, nothing_to_draw_async),
    RowFailedError: (row_failed,),
    NothingToRunError: (nothing_to_run,),
    OutOfBlocksError: (out_of_blocks,),
    ReentrantCallError: (reentrant,),
    ForkedEngineError: (forked,),
}
CLOSE_THEIR_MODEL = (closed, cancelled, cancelled_threaded, cancelled_async)
CASES = [(kind, situation) for kind, each in SITUATIONS.items() for situation in each]


@pytest.mark.parametrize(("kind", "situation"), CASES, ids=[case[1].__name__ for case in CASES])
def test_a_situation_raises_its_own_kind(
    shared: Model, folder: Path, kind: type[EngineError], situation: Callable[[Model], Any]
) -> None:
    own = opened(folder) if situation in CLOSE_THEIR_MODEL else None
    try:
        made = situation(own or shared)
        errors = asyncio.run(made) if inspect.iscoroutine(made) else list(made)
    finally:
        if own is not None:
            own.close()
    assert errors
    for error in errors:
        assert type(error) is kind
        assert_pickles(error)
    assert len(shared.generate("And", SHORT)) == 1, "the model works on"


def kinds(of: type[EngineError] = EngineError) -> list[type[EngineError]]:
    return [of, *(kind for child in of.__subclasses__() for kind in kinds(child))]


def test_every_kind_has_a_code_of_its_own_and_a_situation() -> None:
    for module in pkgutil.walk_packages(fastgen.__path__, "fastgen."):
        if module.name.startswith(("fastgen.engine", "fastgen.frontends", "fastgen.bench.peer")):
            importlib.import_module(module.name)
    ours = [kind for kind in kinds() if kind.__module__.startswith("fastgen.")]
    assert all("code" in vars(kind) for kind in ours)
    assert len({kind.code for kind in ours}) == len(ours)
    in_errors = {kind for kind in ours if kind.__module__ == "fastgen.errors"}
    assert in_errors == {EngineError, *SITUATIONS}


def test_codes_do_not_change() -> None:
    """Programs hold to them."""
    assert {kind.code for kind in SITUATIONS} == {
        *("engine_closed", "engine_dead", "step_failed", "timeout", "cancelled", "slow_reader"),
        *("queue_full", "row_failed", "nothing_to_draw", "nothing_to_run", "reentrant_call"),
        *("out_of_blocks", "forked"),
    }
    assert EngineError.code == "engine_error"


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"logits_processor": makes_nan}, "nothing_to_draw"),
        ({"logits_processor": raises_key_error}, "row_failed"),
        ({"best_of": 2, "rank": lambda completions: [1.0]}, "row_failed"),
        ({}, None),
    ],
)
def test_a_completion_says_the_code_of_what_ended_it(
    shared: Model, options: dict[str, Any], code: str | None
) -> None:
    given = {"max_new_tokens": 2, **options}
    with ThreadedEngine(shared) as engine:
        found = [shared.generate("And", **given)[0], engine.submit("And", **given).result(WITHIN)]
        if "best_of" not in options:
            pieces = [list(shared.stream("And", **given)), list(engine.stream("And", **given))]
            assert [piece[-1].error_code for piece in pieces] == [code] * 2
    assert [each.completions[0].error_code for each in found] == [code] * 2
    assert [each.completions[0].error is None for each in found] == [code is None] * 2


def test_a_streams_last_piece_says_that_its_step_failed(shared: Model) -> None:
    stream = shared.stream("And", SHORT)
    with stepping(shared, boom):
        piece = next(stream)
        assert (piece.finish_reason, piece.error_code) == ("error", StepFailedError.code)
        error = caught(next, stream)
    assert isinstance(error, StepFailedError) and isinstance(error.__cause__, OSError)
