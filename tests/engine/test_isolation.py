"""What goes wrong for one row ends that row alone; and rows with a function of the caller's own,
which are drawn on the host while the others are drawn in the decoder.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastgen
from agreement import assert_rows_agree, bundled_reference
from engine_harness import (
    assert_idle,
    greedy,
    make_engine,
    new_tokens,
    random_prompt,
    recorder_of,
    run_all,
)
from fastgen.engine.engine import Engine
from fastgen.engine.requests import Request
from fastgen.sampling.definition import token_logprobs
from poisoned import POISON, save_poisoned
from tolerances import TOLERANCES

RNG = np.random.default_rng(0)
PROMPTS = [random_prompt(RNG, length) for length in (40, 9, 70, 33)]
NO_TOKEN = "the logits were NaN or infinite, or every token had been ruled out"


@pytest.fixture(scope="module", params=["auto", "late"])
def shared_engine(request: pytest.FixtureRequest) -> Engine:
    return make_engine(seats=6, decoder=request.param)


@pytest.fixture
def engine(shared_engine: Engine) -> Iterator[Engine]:
    yield shared_engine
    assert_idle(shared_engine)


class Sink:
    """Of tokens; raises at the n-th, or at the end."""

    stop_reason = None
    text = ""

    def __init__(self, push_fails_at: int = -1, finish_fails: bool = False) -> None:
        self.left, self.finish_fails = push_fails_at, finish_fails

    def push(self, token_id: int) -> bool:
        self.left -= 1
        if self.left == -1:
            raise ValueError("no more")
        return False

    def finish(self) -> None:
        if self.finish_fails:
            raise OSError("cannot end")

    def take(self) -> str:
        return ""


def bystanders(engine: Engine) -> list[Request]:
    sampled = fastgen.SamplingParams(seed=3, max_new_tokens=14, ignore_eos=True, top_k=50)
    return [
        engine.add_request(PROMPTS[0], greedy(max_new_tokens=12, ignore_eos=True)),
        engine.add_request(PROMPTS[1], sampled),
    ]


@pytest.fixture(scope="module")
def undisturbed(shared_engine: Engine) -> list[Request]:
    requests = bystanders(shared_engine)
    run_all(shared_engine, requests)
    return requests


def assert_same(found: list[Request], wanted: list[Request]) -> None:
    for one, other in zip(found, wanted, strict=True):
        [row] = one.rows
        assert row.finish_reason == other.rows[0].finish_reason
        [first], [second] = new_tokens(one), new_tokens(other)
        assert_rows_agree(one.prompt_token_ids, row.params, first, second)


def keep(token_ids: np.ndarray, logits: np.ndarray) -> None:
    pass


def test_a_row_with_a_function_draws_what_it_would_without(engine: Engine) -> None:
    options: dict[str, Any] = {"max_new_tokens": 20, "seed": 5, "ignore_eos": True, "top_p": 0.9}
    for prompt in PROMPTS:
        with_function, without = (
            engine.add_request(prompt, fastgen.SamplingParams(logits_processor=p, **options))
            for p in (keep, None)
        )
        run_all(engine, [with_function, without])
        assert_rows_agree(
            prompt, without.rows[0].params, new_tokens(with_function)[0], new_tokens(without)[0]
        )


def test_the_function_sees_the_row_and_its_logits_and_decides(engine: Engine) -> None:
    seen: list[tuple[np.ndarray, np.ndarray]] = []

    def only_seven(token_ids: np.ndarray, logits: np.ndarray) -> np.ndarray:
        seen.append((token_ids, logits.copy()))
        logits[:] = -np.inf
        logits[7 + len(seen)] = 1
        return logits

    request = engine.add_request(
        PROMPTS[1], greedy(max_new_tokens=4, logits_processor=only_seven, logprobs=2)
    )
    run_all(engine, [request])
    [row] = request.rows
    assert row.new_token_ids == [8, 9, 10, 11]
    assert row.logprobs is not None
    for at, (token_ids, logits) in enumerate(seen):
        assert token_ids.dtype == np.int64 and logits.dtype == np.float32
        assert token_ids.tolist() == [*PROMPTS[1], *row.new_token_ids[:at]]
        expected = bundled_reference().logits(token_ids.tolist())[-1]
        assert np.abs(logits - expected).max() < TOLERANCES["torch_gap"]
        [raw] = token_logprobs(logits[None], [row.new_token_ids[at]], 2)
        assert row.logprobs[at] == raw, "of the raw logits, whatever the function made of them"


def test_only_the_row_with_the_function_pays(engine: Engine) -> None:
    bound: list[int] = []
    bind = engine.decoder.bind

    def bind_and_note(seat: int, *others: Any) -> None:
        bound.append(seat)
        bind(seat, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.decoder, "bind", bind_and_note, raising=False)
        others = bystanders(engine)
        own = engine.add_request(PROMPTS[2], greedy(max_new_tokens=10, logits_processor=keep))
        recorder_of(engine).batches.clear()
        seats = {}
        engine.run(
            lambda: seats.update({r.rows[0].schedule.seat: r for r in (*others, own)}) or own.done
        )
    run_all(engine, others)
    assert len(bound) == 2
    for batch in recorder_of(engine).batches:
        assert (batch.seats < 0).sum() <= 1
        assert set(batch.seats[batch.seats >= 0].tolist()) <= set(bound)


def test_scores_and_functions_share_a_step(engine: Engine) -> None:
    """Rows of logits for the host come in order, whoever they are for."""
    seen: dict[str, list[np.ndarray]] = {"a": [], "b": []}

    def look(name: str) -> Callable[[Any, np.ndarray], None]:
        return lambda token_ids, logits: seen[name].append(logits.copy())

    alone = engine.add_request(PROMPTS[2], greedy(max_new_tokens=1, prompt_logprobs=2))
    run_all(engine, [alone])
    options: dict[str, Any] = {"max_new_tokens": 3, "ignore_eos": True}
    mixed = [
        engine.add_request(PROMPTS[0], greedy(logits_processor=look("a"), **options)),
        engine.add_request(PROMPTS[2], greedy(prompt_logprobs=2, **options)),
        engine.add_request(
            PROMPTS[2], greedy(logits_processor=look("b"), prompt_logprobs=2, **options)
        ),
        engine.add_request(PROMPTS[1], greedy(**options)),
    ]
    run_all(engine, mixed)
    wanted = alone.prompt_logprobs
    for request in mixed[1:3]:
        assert request.prompt_logprobs is not None and wanted is not None
        found = [entry.logprob for entry in request.prompt_logprobs[1:] if entry]
        assert found == pytest.approx([e.logprob for e in wanted[1:] if e], abs=1e-4)
    for name, request in (("a", mixed[0]), ("b", mixed[2])):
        [row] = request.rows
        for at, logits in enumerate(seen[name]):
            expected = bundled_reference().logits(row.token_ids[: row.prompt_len + at])[-1]
            assert np.abs(logits - expected).max() < TOLERANCES["torch_gap"]
    assert_rows_agree(
        PROMPTS[2], mixed[1].rows[0].params, new_tokens(mixed[1])[0], new_tokens(mixed[2])[0]
    )


def raises(token_ids: np.ndarray, logits: np.ndarray) -> None:
    raise KeyError("mine")


def raises_late(token_ids: np.ndarray, logits: np.ndarray) -> None:
    if len(token_ids) == len(PROMPTS[2]) + 4:
        raise RuntimeError("later")


class UnprintableError(Exception):
    def __str__(self) -> str:
        raise ValueError("not even this")


def raises_unprintable(token_ids: np.ndarray, logits: np.ndarray) -> None:
    raise UnprintableError


BAD_FUNCTIONS = {
    "raises": (raises, "KeyError: 'mine'", 0),
    "raises late": (raises_late, "RuntimeError: later", 4),
    "raises what cannot be printed": (raises_unprintable, "UnprintableError: ", 0),
    "too short": (
        lambda ids, logits: logits[:-1],
        "ValueError: logits_processor returned shape",
        0,
    ),
    "a matrix": (lambda ids, logits: logits[None], "ValueError: logits_processor returned", 0),
    "a string": (lambda ids, logits: "x", "ValueError: ", 0),
    "an object": (lambda ids, logits: object(), "TypeError: ", 0),
    "too few arguments": (lambda: None, "TypeError: ", 0),
    "NaN": (lambda ids, logits: logits * np.nan, NO_TOKEN, 0),
    "infinite": (lambda ids, logits: np.full_like(logits, np.inf), NO_TOKEN, 0),
    "all ruled out": (lambda ids, logits: np.full_like(logits, -np.inf), NO_TOKEN, 0),
}


@pytest.mark.parametrize("name", BAD_FUNCTIONS)
def test_a_bad_function_ends_its_row_alone(
    engine: Engine, undisturbed: list[Request], name: str
) -> None:
    function, message, num_before = BAD_FUNCTIONS[name]
    others = bystanders(engine)
    victim = engine.add_request(PROMPTS[2], greedy(max_new_tokens=9, logits_processor=function))
    run_all(engine, [*others, victim])
    [row] = victim.rows
    assert (row.finish_reason, len(row.new_token_ids)) == ("error", num_before)
    assert victim.error is None
    assert row.error is not None
    assert fastgen.errors.message_of(row.error).startswith(message)
    assert_same(others, undisturbed)


@pytest.mark.parametrize("fails", [(0,), (3,), (-1, True), (2, True)])
def test_a_sink_that_fails_ends_its_row_alone(
    engine: Engine, undisturbed: list[Request], fails: tuple[Any, ...]
) -> None:
    others, sink = bystanders(engine), Sink(*fails)
    victims = engine.add_request(
        PROMPTS[3], greedy(max_new_tokens=6, n=3, ignore_eos=True), sinks=[Sink(), sink, Sink()]
    )
    run_all(engine, [*others, victims])
    assert [row.finish_reason for row in victims.rows] == ["length", "error", "length"]
    assert isinstance(victims.rows[1].error, (ValueError, OSError))
    assert victims.error is None
    assert_same(others, undisturbed)


@pytest.mark.parametrize("how", ["cancel", "timeout"])
def test_a_sink_that_cannot_end_is_an_error_when_cancelled(engine: Engine, how: str) -> None:
    sink: Any = Sink(finish_fails=True)
    deadline = 0.0 if how == "timeout" else None
    request = engine.add_request([1, 2], greedy(), sinks=[sink], deadline=deadline)
    if how == "cancel":
        engine.cancel(request)
    run_all(engine, [request])
    assert request.rows[0].finish_reason == "error"
    assert isinstance(request.rows[0].error, OSError)


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_poisoned(tmp_path_factory.mktemp("poisoned"))


@pytest.mark.parametrize("decoder", ["cpu", "torch"])
def test_logits_that_are_nan_end_their_row_and_what_it_computed_is_not_found(
    decoder: str, poisoned: Path
) -> None:
    """Keys and values are NaN as well; the next row with that beginning computes it anew."""
    engine = make_engine(seats=6, decoder=decoder, model=poisoned)
    undisturbed = bystanders(engine)
    run_all(engine, undisturbed)
    prompt = random_prompt(np.random.default_rng(9), 64)
    prompt[40] = POISON
    others = bystanders(engine)
    victim = engine.add_request(prompt, greedy(n=2))
    run_all(engine, [*others, victim])
    assert [row.finish_reason for row in victim.rows] == ["error", "error"]
    assert [str(row.error) for row in victim.rows] == [NO_TOKEN] * 2
    assert_same(others, undisturbed)
    before = engine.stats.reused_tokens
    again = engine.add_request(prompt, greedy(max_new_tokens=1))
    run_all(engine, [again])
    assert again.rows[0].finish_reason == "error"
    assert engine.stats.reused_tokens == before
    assert_idle(engine)


@pytest.mark.parametrize("decoder", ["cpu", "torch"])
def test_scores_that_would_be_nan_are_an_error(decoder: str, poisoned: Path) -> None:
    with fastgen.load(poisoned, decoder=decoder, max_batch_size=2) as model:
        with pytest.raises(fastgen.EngineError, match="scoring failed: the logits were NaN"):
            model.score([[5, 6, POISON, 7]])
        [score] = model.score([[5, 6, 7]])
        assert np.isfinite(score.total_logprob)
        assert_idle(model.engine)


def test_a_function_that_runs_its_own_engine_is_an_error_and_no_deadlock(
    idle_model: fastgen.Generator,
) -> None:
    def recursive(token_ids: np.ndarray, logits: np.ndarray) -> None:
        idle_model("And", max_new_tokens=2)

    [generation] = idle_model.generate("In the", logits_processor=recursive)
    [completion] = generation.completions
    assert completion.finish_reason == "error"
    assert completion.error == "a step cannot wait for the engine that runs it"
    idle_model("x", max_new_tokens=2)  # runs what was queued, too


def test_a_function_may_cancel_its_own_row(engine: Engine) -> None:
    requests: list[Request] = []
    requests.append(
        engine.add_request(
            PROMPTS[1], greedy(logits_processor=lambda ids, logits: engine.cancel(requests[0]))
        )
    )
    run_all(engine, requests)
    assert requests[0].rows[0].finish_reason == "cancelled"
    assert len(requests[0].rows[0].new_token_ids) == 1


def test_a_keyboard_interrupt_in_a_function_reaches_whoever_runs_the_engine(engine: Engine) -> None:
    def leave(token_ids: np.ndarray, logits: np.ndarray) -> None:
        raise KeyboardInterrupt

    request = engine.add_request(PROMPTS[1], greedy(logits_processor=leave))
    with pytest.raises(KeyboardInterrupt):
        run_all(engine, [request])
    assert request.rows[0].finish_reason == "error"
    assert isinstance(request.error, KeyboardInterrupt)


def test_an_exit_in_a_function_is_its_rows_error(engine: Engine) -> None:
    """Whoever runs the step may be another request's thread."""

    def leave(token_ids: np.ndarray, logits: np.ndarray) -> None:
        sys.exit(3)

    requests = [
        engine.add_request(PROMPTS[1], greedy(logits_processor=leave, max_new_tokens=3)),
        engine.add_request(PROMPTS[0], greedy(max_new_tokens=3, ignore_eos=True)),
    ]
    run_all(engine, requests)
    assert isinstance(requests[0].rows[0].error, SystemExit)
    assert len(requests[1].rows[0].new_token_ids) == 3
    assert_idle(engine)


def test_a_row_that_rules_everything_out_evicts_nobodys_prefix(engine: Engine) -> None:
    prompt = [*range(1, 71)]
    for options in ({}, {"suppress_tokens": range(4096)}, {}):
        before = engine.stats.reused_tokens
        run_all(engine, [engine.add_request(prompt, greedy(max_new_tokens=2, **options))])
    assert engine.stats.reused_tokens - before == 69
    assert_idle(engine)
