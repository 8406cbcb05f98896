"""AsyncEngine: exact under load, bounded, and gone when its callers are; the loop never blocks."""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from itertools import chain
from typing import Any, ParamSpec, TypeVar

import numpy as np
import pytest

import fastgen
from engine_harness import assert_idle, greedy, random_prompt
from engine_threads import (
    handle_of,
    handles_of,
    held_until_cancelled,
    is_alive,
    listeners_of,
    num_unread,
)
from fastgen import EngineError, QueueFull, SamplingParams
from fastgen.engine.drafting import MOST_DRAFTED
from fastgen.frontends.async_engine import AsyncEngine, AsyncStream
from fastgen.frontends.engine_thread import QueueConfig, RequestHandle
from fastgen.frontends.threaded_engine import ThreadedEngine
from fastgen.results import Piece
from held_steps import LONG, TEXTS, facts, held, pieces_joined, stepping
from text_parts import tokenizer_of
from waits import WITHIN, wait_in_loop_until, wait_until

T = TypeVar("T")
P = ParamSpec("P")

pytestmark = pytest.mark.usefixtures("left_idle")


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(work, 2 * WITHIN))


def in_loop(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    @functools.wraps(test)
    def plain(*args: P.args, **options: P.kwargs) -> None:
        run(test(*args, **options))

    return plain


async def read(stream: AsyncStream) -> list[Piece]:
    return [piece async for piece in stream]


def every_call(engine: AsyncEngine) -> list[Coroutine[Any, Any, Any]]:
    return [engine.generate("A"), engine.score("A b"), engine.stream("A").open()]


@in_loop
async def test_two_hundred_calls_at_once_are_exact(model: fastgen.Generator) -> None:
    rng = np.random.default_rng(0)
    calls: list[tuple[str, Any, SamplingParams]] = []
    for index in range(200):
        kind = ("stream", "generate", "stream", "score")[index % 4]
        prompt: Any = [*TEXTS, random_prompt(rng, 90), random_prompt(rng, 3)][index % 6]
        params = SamplingParams(
            seed=index, temperature=float(rng.choice([0.0, 0.7, 1.3])), n=1 + index % 3 % 2,
            max_new_tokens=int(rng.integers(1, 30)), stop=("and",) if index % 5 == 0 else (),
            logprobs=2 if index % 7 == 0 else None,
        )  # fmt: skip
        calls.append((kind, prompt, params))

    def alone(kind: str, prompt: Any, params: SamplingParams) -> Any:
        if kind == "score":
            return model.score([prompt, TEXTS[0]])
        generations = model.generate([prompt] if kind == "stream" else [prompt, "In"], params)
        if kind == "stream":
            return facts(generations[0]), [c.logprobs or () for c in generations[0].completions]
        return [(each.prompt_token_ids, each.completions) for each in generations]

    async def together(engine: AsyncEngine, kind: str, prompt: Any, params: SamplingParams) -> Any:
        if kind == "score":
            return await engine.score([prompt, TEXTS[0]])
        if kind == "generate":
            found = await engine.generate([prompt, "In"], params)
            return [(each.prompt_token_ids, each.completions) for each in found]
        pieces = await read(engine.stream(prompt, params))
        each = [[p.logprobs or () for p in pieces if p.index == i] for i in range(params.n)]
        return pieces_joined(pieces), [tuple(chain(*one)) for one in each]

    expected, whole = [alone(*call) for call in calls], model.generate(TEXTS, LONG)
    async with AsyncEngine(model) as engine:
        # a plain thread uses the model at the same time, without the engine
        plain = asyncio.create_task(asyncio.to_thread(model.generate, TEXTS, LONG))
        found = await asyncio.gather(*(together(engine, *call) for call in calls))
        assert list(map(facts, await plain)) == list(map(facts, whole))
        assert engine.ready and not listeners_of(engine) and not handles_of(engine)
        assert_idle(model.engine)
    assert found == expected


@in_loop
async def test_a_full_queue_refuses_all_of_a_list_and_takes_again(model: fastgen.Generator) -> None:
    async with AsyncEngine(model, QueueConfig(max_waiting=3)) as engine:
        with held(model):
            each = [engine.generate(text, max_new_tokens=3, n=2) for text in TEXTS[:3]]
            first = list(map(asyncio.ensure_future, each))
            await wait_in_loop_until(lambda: model.engine.num_unfinished == 6)
            with pytest.raises(QueueFull, match="2 more would exceed the 7 completions"):
                await engine.generate(["And", "In"], max_new_tokens=3)
            assert model.engine.num_unfinished == 6
            last = asyncio.ensure_future(engine.generate("And", max_new_tokens=3))
            await wait_in_loop_until(lambda: model.engine.num_unfinished == 7)
            for refused in every_call(engine):
                with pytest.raises(QueueFull):
                    await refused
            assert len(handles_of(engine)) == 4
        assert all(await asyncio.gather(*first, last))
        assert len(await engine.generate(TEXTS, max_new_tokens=2)) == 4


BAD: list[tuple[Any, dict[str, Any]]] = [
    ("And", {"temprature": 1}), ("And", {"n": 0}), ("And", {"priority": 5000}),
    ("And", {"timeout": -1}), ("And", {"cache_salt": 3}), ([5000], {}), (["x"], {}), (None, {}),
    ([1] * 256, {}), (["And", "In"], {}),
]  # fmt: skip


@pytest.mark.parametrize(("prompt", "options"), BAD)
@in_loop
async def test_a_bad_request_raises_and_leaves_the_engine_untouched(
    model: fastgen.Generator, prompt: Any, options: dict[str, Any]
) -> None:
    several = [prompt, "And"] if prompt != ["And", "In"] else [prompt]
    async with AsyncEngine(model) as engine:
        with ThreadedEngine(model) as threaded:
            steps = model.engine.stats.steps
            for call in (threaded.submit, threaded.stream):
                with pytest.raises((TypeError, ValueError)):
                    call(prompt, **options)
            with pytest.raises((TypeError, ValueError)):
                await anext(engine.stream(prompt, **options))
            with pytest.raises((TypeError, ValueError)):
                await engine.generate(several, **options)
            assert not handles_of(engine) and not handles_of(threaded)
            assert model.engine.stats.steps == steps and model.engine.num_unfinished == 0
            assert threaded.submit("And", max_new_tokens=2).result(WITHIN)
        assert await engine.generate("And", max_new_tokens=2)


@in_loop
async def test_an_empty_prompt_starts_where_the_model_does(model: fastgen.Generator) -> None:
    params = greedy(max_new_tokens=5)
    expected = list(map(facts, model.generate(["", []], params)))
    async with AsyncEngine(model) as engine:
        assert await engine.generate([]) == []
        assert list(map(facts, await engine.generate(["", []], params))) == expected


@in_loop
async def test_deadlines_salts_and_priorities_reach_the_engine(model: fastgen.Generator) -> None:
    stats, rng = model.engine.stats, np.random.default_rng(8)
    prompt, order = random_prompt(rng, 100), [3, -1, 0, -1000, 1000, 3, -1]
    async with AsyncEngine(model) as engine:
        [late] = await engine.generate(TEXTS[0], LONG, timeout=0)
        assert late.completions[0].finish_reason == "timeout"
        with held(model) as gate:
            stream = engine.stream(TEXTS[0], LONG, timeout=0.2)
            await stream.open()
            assert stream.request is not None and stream.request.deadline is not None
            late_at = stream.request.deadline
            await wait_in_loop_until(lambda: time.monotonic() > late_at)
            gate.open()
            pieces = await read(stream)
        assert pieces[-1].finish_reason == "timeout"
        with pytest.raises(EngineError, match="timeout"):
            await engine.score(TEXTS[0], timeout=0)
        reused = stats.reused_tokens
        for salt in ("a", "b", None):
            await engine.generate(prompt, greedy(max_new_tokens=1), cache_salt=salt)
        assert stats.reused_tokens == reused
        await engine.generate(prompt, greedy(max_new_tokens=1), cache_salt="b")
        assert stats.reused_tokens - reused >= 96
        with held(model) as gate:
            first = asyncio.ensure_future(engine.generate(TEXTS[0], LONG))
            await asyncio.sleep(0)
            await asyncio.to_thread(gate.await_step)
            streams = [
                engine.stream(random_prompt(rng, 9), greedy(max_new_tokens=3), priority=priority)
                for priority in order
            ]
            for stream in streams:
                await stream.open()
        await asyncio.gather(first, *map(read, streams))
        admitted = [stream.request.admitted or 0 if stream.request else 0 for stream in streams]
        found = sorted(range(len(order)), key=lambda index: admitted[index])
        assert found == sorted(range(len(order)), key=lambda index: (order[index], index))


@pytest.mark.parametrize("how", ["generate", "read", "close", "with", "drop"])
@in_loop
async def test_whoever_leaves_ends_their_request_and_no_other(
    model: fastgen.Generator, how: str
) -> None:
    [expected] = model.generate(TEXTS[0], LONG)

    async def leave(engine: AsyncEngine, stream: AsyncStream) -> None:
        assert (await anext(stream)).token_ids
        task: asyncio.Future[Any] | None = None
        if how == "close":
            await stream.aclose()
            assert await read(stream) == []
        elif how == "with":
            async with stream:
                pass
        elif how == "read":
            task = asyncio.ensure_future(read(stream))
            await wait_in_loop_until(lambda: handle_of(stream) in listeners_of(engine))
        elif how == "generate":
            await stream.aclose()
            task = asyncio.ensure_future(engine.generate(TEXTS[1:], LONG))
            before = handles_of(engine)
            await wait_in_loop_until(lambda: len(handles_of(engine) - before) == 3)
            victims.extend(handles_of(engine) - before)
        if task is not None:
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    left, last = threading.Event(), model.engine.stats.steps + 100
    victims: list[RequestHandle] = []
    async with AsyncEngine(model) as engine:
        with stepping(model, lambda: model.engine.stats.steps < last or left.wait(WITHIN)):
            streams = [engine.stream(TEXTS[1], LONG)]
            await streams[0].open()  # before steps can pause
            victims.extend(handles_of(engine))
            other = asyncio.ensure_future(engine.generate(TEXTS[0], LONG))
            await wait_in_loop_until(lambda: len(handles_of(engine)) == 2)
            await leave(engine, streams.pop())
            left.set()
            await wait_in_loop_until(lambda: handles_of(engine).isdisjoint(victims))
            for handle in victims:
                assert handle.request is not None
                assert handle.request.rows[0].finish_reason == "cancelled"
            assert facts((await other)[0]) == facts(expected)
            assert not listeners_of(engine)
            assert_idle(model.engine)


@in_loop
async def test_a_reader_that_stalls_is_cut_off_and_others_go_on(model: fastgen.Generator) -> None:
    [expected] = model.generate(TEXTS[0], LONG)
    async with AsyncEngine(model, QueueConfig(max_unread=8)) as engine:
        stream = engine.stream(TEXTS[1], LONG)
        await stream.open()
        assert facts((await engine.generate(TEXTS[0], LONG))[0]) == facts(expected)
        with pytest.raises(EngineError, match="more than 8 tokens of a row waited to be read"):
            await read(stream)
        assert stream.request is not None
        [row] = stream.request.rows
        most = 8 + 2 * (1 + MOST_DRAFTED)  # what a step had begun, and the one before gave
        assert row.finish_reason == "cancelled" and 8 < len(row.new_token_ids) <= most


@in_loop
async def test_a_reader_that_reads_is_not_cut_off(model: fastgen.Generator) -> None:
    [expected] = model.generate(TEXTS[1], LONG)
    async with AsyncEngine(model, QueueConfig(max_unread=8)) as engine:
        stream = engine.stream(TEXTS[1], LONG)

        with stepping(model, lambda: wait_until(lambda: num_unread(stream) <= 4)):
            assert pieces_joined(await read(stream)) == facts(expected)


@in_loop
async def test_draining_takes_nothing_new_and_waits_for_what_runs(model: fastgen.Generator) -> None:
    [expected] = model.generate(TEXTS[0], LONG)
    async with AsyncEngine(model) as engine:
        with held(model):
            task = asyncio.ensure_future(engine.generate(TEXTS[0], LONG))
            await wait_in_loop_until(lambda: handles_of(engine))
            assert not await engine.drain(0.05)
            assert not engine.ready
            for refused in every_call(engine):
                with pytest.raises(EngineError, match="shutting down"):
                    await refused
            assert not task.done()
        assert await engine.drain(WITHIN)
        assert facts((await task)[0]) == facts(expected)


@in_loop
async def test_closing_ends_what_is_under_way_with_cancelled(model: fastgen.Generator) -> None:
    engine = AsyncEngine(model)
    with held_until_cancelled(model, engine):
        tasks = [asyncio.ensure_future(engine.generate(text, LONG)) for text in TEXTS * 2]
        reading = asyncio.ensure_future(read(engine.stream(TEXTS[0], LONG)))
        scoring = asyncio.ensure_future(engine.score([TEXTS[0] * 60] * 6))
        await wait_in_loop_until(lambda: len(handles_of(engine)) >= 15)
        await asyncio.gather(engine.close(), engine.close())
        await engine.close()
        for [generation] in await asyncio.gather(*tasks):
            assert generation.completions[0].finish_reason == "cancelled"
        assert (await reading)[-1].finish_reason == "cancelled"
        with pytest.raises(EngineError, match="cancelled"):
            await scoring
    assert not engine.ready and not is_alive(engine)
    with pytest.raises(EngineError, match="has been closed"):
        await engine.generate("And")


@in_loop
async def test_a_closed_engine_says_so_of_many_prompts_too(model: fastgen.Generator) -> None:
    engine = AsyncEngine(model)
    await engine.close()
    with pytest.raises(EngineError, match="has been closed"):
        await engine.generate(TEXTS * 50)


def test_a_second_event_loop_is_refused(model: fastgen.Generator) -> None:
    async def use(engine: AsyncEngine) -> None:
        assert await engine.generate("And", max_new_tokens=2)

    async def misuse(engine: AsyncEngine) -> None:
        for refused in every_call(engine):
            with pytest.raises(RuntimeError, match="belongs to the event loop that used it first"):
                await refused
        await engine.close()

    engine = AsyncEngine(model)
    run(use(engine))
    run(misuse(engine))


def test_a_closed_loop_does_not_kill_the_step_thread(model: fastgen.Generator) -> None:
    engine = AsyncEngine(model)

    async def begin() -> AsyncStream:
        stream = engine.stream(TEXTS[0], LONG)
        await stream.open()
        return stream

    with held(model):
        stream = run(begin())
    request = stream.request
    assert request is not None
    wait_until(lambda: request.done)
    assert request.rows[0].finish_reason == "cancelled"
    assert is_alive(engine) and engine.ready
    run(engine.close())


@pytest.mark.parametrize(
    "work",
    [
        lambda engine: engine.generate("x" * 4_000_000),
        lambda engine: engine.stream("x" * 4_000_000).open(),
        lambda engine: engine.score("And it came to pass " * 20_000),
        lambda engine: engine.generate("And", n=9, bad_words=["And it came " * 50_000]),
        lambda engine: engine.generate([""] * 50_000),
    ],
    ids=["generate", "stream", "score", "bad_words", "many"],
)
@in_loop
async def test_what_takes_long_to_encode_does_not_block_the_loop(
    model: fastgen.Generator,
    monkeypatch: pytest.MonkeyPatch,
    work: Callable[[AsyncEngine], Coroutine[Any, Any, Any]],
) -> None:
    """It is encoded on other threads; here it does not go on before the loop has."""
    encode, threads, has_gone_on = tokenizer_of(model).encode, list[int](), threading.Event()
    loops_own = threading.get_ident()

    def held_encode(*args: Any) -> Any:
        threads.append(threading.get_ident())
        assert threads[-1] == loops_own or has_gone_on.wait(WITHIN)
        return encode(*args)

    monkeypatch.setattr(model.tokenizer, "encode", held_encode)
    async with AsyncEngine(model, QueueConfig(max_waiting=0)) as engine:
        task = asyncio.ensure_future(work(engine))
        for _ in range(10):
            await asyncio.sleep(0)
        has_gone_on.set()
        with suppress(ValueError, EngineError):  # too long, or too many
            await task
    assert loops_own not in threads
