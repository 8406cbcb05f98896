"""The engine starts a step while the one before it is under way, where the decoder allows that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastgen
from decoder_names import DECODERS as BUILT
from decoder_names import INTERPRETED
from drafters import KnowingDrafter, drafted_by
from engine_harness import (
    assert_idle,
    greedy,
    make_engine,
    new_tokens,
    recorder_of,
    run_all,
    scheduler_of,
    steps_under_way,
)
from fastgen.decoders.interface import StepBatch
from fastgen.engine.engine import Engine
from fastgen.frontends.stream import Stream

PROMPTS = [np.random.default_rng(at).integers(1, 200, 9 + 4 * at).tolist() for at in range(4)]
DECODERS = [*["late"] * (not INTERPRETED), *["cuda"] * ("cuda" in BUILT)]


@pytest.fixture(scope="module", params=DECODERS)
def shared_engine(request: pytest.FixtureRequest, variant: Callable[[str], Path]) -> Engine:
    return make_engine(max_seq_len=64, decoder=request.param, model=variant("one_layer"))


@pytest.fixture
def engine(shared_engine: Engine) -> Any:
    yield shared_engine
    assert not steps_under_way(shared_engine)
    assert_idle(shared_engine)


def fed_back(batches: list[StepBatch]) -> int:
    """How many steps took a token that the host had not seen."""
    return sum(bool((batch.token_ids < 0).any()) for batch in batches)


def run_to(engine: Engine, request: Any, count: int) -> None:
    engine.run(lambda: len(request.rows[0].new_token_ids) >= count)


def test_tokens_are_those_of_steps_that_are_waited_for(engine: Engine) -> None:
    """With options that need logits or the host, whose steps are waited for, in between."""
    options: list[dict[str, Any]] = [
        {"temperature": 0},
        {"seed": 5, "top_k": 20},
        {"seed": 6, "repetition_penalty": 1.3, "presence_penalty": 0.5},
        {"temperature": 0, "logprobs": 1, "max_new_tokens": 2},
    ]
    found = []
    for num_at_once in (4, 1):
        before = len(recorder_of(engine).batches)
        requests = []
        for prompt, own in zip(PROMPTS, options, strict=True):
            params = fastgen.SamplingParams(**{"max_new_tokens": 7, "ignore_eos": True, **own})
            requests.append(engine.add_request(prompt, params))
            if num_at_once == 1:
                run_all(engine, requests)
        run_all(engine, requests)
        found.append([new_tokens(request) for request in requests])
        assert fed_back(recorder_of(engine).batches[before:]) > 2, "no step was started ahead"
    assert found[0] == found[1]


def test_a_row_that_ends_by_itself_leaves_nothing_behind(engine: Engine) -> None:
    """Its next step has been started when its last token is seen."""
    first = engine.add_request(PROMPTS[0], greedy(max_new_tokens=12, ignore_eos=True))
    run_all(engine, [first])
    [tokens] = new_tokens(first)
    stop = tokens[5]
    again = engine.add_request(PROMPTS[0], greedy(max_new_tokens=12, stop_token_ids=[stop]))
    other = engine.add_request(PROMPTS[1], greedy(max_new_tokens=3, ignore_eos=True))
    run_all(engine, [again, other])
    assert new_tokens(again) == [tokens[: tokens.index(stop) + 1]]
    assert again.rows[0].stop_reason == stop
    assert engine.num_free_blocks == engine.decoder.limits.num_blocks


def test_cancelled_while_nobody_drives_and_a_step_is_under_way(engine: Engine) -> None:
    request = engine.add_request(PROMPTS[2], greedy(max_new_tokens=30, ignore_eos=True))
    run_to(engine, request, 3)
    assert steps_under_way(engine), "a step should be under way"
    engine.cancel(request)
    assert request.done and request.rows[0].finish_reason == "cancelled"
    assert len(request.rows[0].new_token_ids) == 3


def test_a_stream_that_is_closed_frees_its_row(engine: Engine) -> None:
    request = engine.add_request(PROMPTS[1], greedy(max_new_tokens=30, ignore_eos=True))
    with Stream(engine, request) as stream:
        assert [len(next(stream).token_ids) for _ in range(3)] == [1, 1, 1]
        assert steps_under_way(engine)


def test_between_steps_nothing_is_under_way(engine: Engine) -> None:
    request = engine.add_request(PROMPTS[0], greedy(max_new_tokens=10, ignore_eos=True))
    run_to(engine, request, 2)
    with engine.between_steps():
        assert not steps_under_way(engine)
        seen = len(request.rows[0].new_token_ids)
    assert seen == 3
    run_all(engine, [request])
    assert len(request.rows[0].new_token_ids) == 10


@pytest.mark.parametrize("fails_at", [0, 1, 2])
def test_a_step_that_cannot_be_started_fails_those_in_it(engine: Engine, fails_at: int) -> None:
    ending = engine.add_request(PROMPTS[0], greedy(max_new_tokens=1 + fails_at, ignore_eos=True))
    staying = engine.add_request(PROMPTS[1], greedy(max_new_tokens=12, ignore_eos=True))
    left = [fails_at]

    def fail(batch: StepBatch) -> None:
        left[0] -= 1
        if left[0] == -1:
            raise RuntimeError("injected")

    recorder_of(engine).before_step = fail
    try:
        run_all(engine, [ending, staying], may_fail=True)
    finally:
        recorder_of(engine).before_step = lambda batch: None
    assert staying.rows[0].finish_reason == "error" and isinstance(staying.error, RuntimeError)
    assert (ending.rows[0].finish_reason == "error") == (ending.error is not None)
    again = engine.add_request(PROMPTS[1], greedy(max_new_tokens=2, ignore_eos=True))
    run_all(engine, [again])
    assert again.rows[0].finish_reason == "length"


def test_a_step_that_fails_while_it_is_under_way(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows end, those in the step behind it too; a row that only joins there goes on."""
    hurt = engine.add_request(PROMPTS[0], greedy(max_new_tokens=12, ignore_eos=True))
    run_to(engine, hurt, 2)
    [step] = steps_under_way(engine)
    joining = engine.add_request(PROMPTS[1], greedy(max_new_tokens=4, ignore_eos=True))

    def fail(self: Any) -> Any:
        if self is step:
            raise RuntimeError("injected")
        return original(self)

    original = type(step).wait
    monkeypatch.setattr(type(step), "wait", fail)
    if hasattr(step, "waited"):
        step.waited = True  # to LateDecoder
    run_all(engine, [hurt, joining], may_fail=True)
    assert isinstance(hurt.error, RuntimeError) and hurt.rows[0].finish_reason == "error"
    assert joining.error is None and len(joining.rows[0].new_token_ids) == 4


def test_rows_give_back_what_they_had_whatever_happens_to_another(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [
        engine.add_request(prompt, greedy(max_new_tokens=3, ignore_eos=True)) for prompt in PROMPTS
    ]
    release, failed = engine.decoder.release, list[int]()

    def fail_once(seat: int) -> None:
        release(seat)
        if not failed:
            failed.append(seat)
            raise RuntimeError("injected")

    monkeypatch.setattr(engine.decoder, "release", fail_once, raising=False)
    run_all(engine, requests, may_fail=True)
    assert failed and all(request.done for request in requests)
    assert [row.finish_reason for r in requests for row in r.rows] == ["length"] * 4


def test_a_row_that_ended_well_gets_no_error_of_a_later_step(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = engine.add_request(PROMPTS[0], greedy(max_new_tokens=12, ignore_eos=True))
    run_all(engine, [first])
    [tokens] = new_tokens(first)
    ending = engine.add_request(PROMPTS[0], greedy(max_new_tokens=12, stop_token_ids=[tokens[3]]))
    staying = engine.add_request(PROMPTS[1], greedy(max_new_tokens=12, ignore_eos=True))
    engine.run(lambda: ending.rows[0].finish_reason is not None)
    assert not ending.done, "a step should be under way with it"
    scheduler = scheduler_of(engine)
    schedule = scheduler.schedule

    def fail(make_drafts: object) -> None:
        monkeypatch.setattr(scheduler, "schedule", schedule)
        raise MemoryError("injected")

    monkeypatch.setattr(scheduler, "schedule", fail)
    run_all(engine, [ending, staying], may_fail=True)
    assert ending.error is None and ending.rows[0].finish_reason == "stop"
    assert isinstance(staying.error, MemoryError)


def test_close_waits_for_the_step_under_way(variant: Callable[[str], Path]) -> None:
    engine = make_engine(max_seq_len=64, decoder=DECODERS[0], model=variant("one_layer"))
    request = engine.add_request(PROMPTS[3], greedy(max_new_tokens=30, ignore_eos=True))
    run_to(engine, request, 2)
    engine.close()
    assert request.done and not steps_under_way(engine)


@pytest.mark.parametrize("kind", ["spoiled", "wrong", "none"])
def test_drafts_and_steps_that_run_ahead_give_the_same_tokens(engine: Engine, kind: str) -> None:
    """A step with drafts is waited for; a text without any soon runs ahead."""
    options: list[dict[str, Any]] = [{"temperature": 0}, {"top_k": 20}, {"presence_penalty": 0.5}]
    params = [
        fastgen.SamplingParams(max_new_tokens=20, ignore_eos=True, seed=seed, **own)
        for seed, own in enumerate(options)
    ]
    plain = [engine.add_request(*each) for each in zip(PROMPTS, params, strict=False)]
    run_all(engine, plain)
    known: Any = {
        (request.prompt_token_ids, row.params.seed): tuple(row.new_token_ids)
        for request in plain
        for row in request.rows
    }
    before = engine.stats.drafted_tokens, engine.stats.accepted_tokens
    start = len(recorder_of(engine).batches)
    with drafted_by(engine, KnowingDrafter(known, 200, kind)):
        drafted = [engine.add_request(*each) for each in zip(PROMPTS, params, strict=False)]
        run_all(engine, drafted)
    assert list(map(new_tokens, drafted)) == list(map(new_tokens, plain))
    num_drafted = engine.stats.drafted_tokens - before[0]
    num_accepted = engine.stats.accepted_tokens - before[1]
    assert (num_drafted > 0, num_accepted > 0) == (kind != "none", kind == "spoiled")
    ahead = fed_back(recorder_of(engine).batches[start:])
    assert ahead == 0 if kind != "none" else ahead > 4
