"""RequestLimits: every bound, at its edge and above; and that an engine holds to them."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

import fastgen
from engine_harness import assert_idle, make_counting_engine, run_all
from fastgen import RequestLimits, SamplingParams

# bound: (its value, options at the edge, options above, what the message names)
CASES: dict[str, list[tuple[float, dict[str, Any], dict[str, Any], str]]] = {
    "n": [(3, {"n": 3}, {"n": 4}, "n: 4")],
    "best_of": [(3, {"best_of": 3}, {"best_of": 4}, "best_of: 4")],
    "max_new_tokens": [(5, {"max_new_tokens": 5}, {"max_new_tokens": 6}, "max_new_tokens: 6")],
    "stop": [(2, {"stop": ["a", "b"]}, {"stop": ["a", "b", "c"]}, "stop: 3")],
    "stop_bytes": [(4, {"stop": ["éé", "abcd"]}, {"stop": ["a", "ééa"]}, "string in stop: 5")],
    "stop_token_ids": [(1, {"stop_token_ids": [1]}, {"stop_token_ids": [1, 2]}, "token_ids: 2")],
    "logprobs": [(2, {"logprobs": 2}, {"logprobs": 3}, "logprobs: 3")],
    "prompt_logprobs": [(2, {"prompt_logprobs": 2}, {"prompt_logprobs": 3}, "prompt_logprobs: 3")],
    "logit_bias": [
        (1, {"logit_bias": {3: 1}}, {"logit_bias": {3: 1, 4: 1}}, "logit_bias: 2"),
        (2, {"sequence_bias": {(3, 4): 1}}, {"sequence_bias": {(3, 4, 5): 1}}, "sequence_bias: 3"),
    ],
    "logit_bias_value": [
        (10, {"logit_bias": {3: -10}}, {"logit_bias": {3: 1, 4: -10.5}}, "logit_bias: 10.5"),
    ],
    "bad_words": [(2, {"bad_words": [[1, 2]]}, {"bad_words": [[1], [2, 3]]}, "bad_words: 3")],
    "allowed_token_ids": [
        (2, {"allowed_token_ids": [1, 2]}, {"allowed_token_ids": [1, 2, 3]}, "token_ids: 3"),
    ],
    "suppress_tokens": [
        (1, {"suppress_tokens": [1]}, {"suppress_tokens": [1, 2]}, "in suppress_tokens: 2"),
        (1, {"begin_suppress_tokens": [1]}, {"begin_suppress_tokens": [1, 2]}, "begin_suppress"),
    ],
    "temperature": [(1.5, {"temperature": 1.5}, {"temperature": 1.6}, "temperature: 1.6")],
    "penalty": [
        (2, {"presence_penalty": -2}, {"presence_penalty": -2.1}, "presence_penalty: 2.1"),
        (2, {"frequency_penalty": 2}, {"frequency_penalty": 2.1}, "frequency_penalty: 2.1"),
    ],
}
FLAT = [(name, *case) for name, cases in CASES.items() for case in cases]


def test_every_bound_is_tried() -> None:
    assert {*CASES, "prompt_tokens"} == {field.name for field in fields(RequestLimits)}


@pytest.mark.parametrize(("name", "bound", "edge", "above", "message"), FLAT)
def test_a_bound_takes_its_edge_and_no_more(
    name: str, bound: Any, edge: dict[str, Any], above: dict[str, Any], message: str
) -> None:
    limits = RequestLimits(**{name: bound})
    limits.check(10**6, SamplingParams(**edge))
    with pytest.raises(ValueError, match=message) as caught:
        limits.check(1, SamplingParams(**above))
    assert str(caught.value).endswith(f"exceeds the limit of {limits.__dict__[name]}")
    RequestLimits().check(10**6, SamplingParams(**above))


def test_long_prompts() -> None:
    RequestLimits(prompt_tokens=5).check(5, SamplingParams())
    with pytest.raises(ValueError, match="prompt_tokens: 6 exceeds the limit of 5"):
        RequestLimits(prompt_tokens=5).check(6, SamplingParams())


@pytest.mark.parametrize("field", fields(RequestLimits), ids=lambda field: field.name)
@pytest.mark.parametrize("bound", [-1, "3", True, float("nan"), [1]])
def test_bounds_are_numbers(field: Any, bound: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=field.name):
        RequestLimits(**{field.name: bound})


def test_bounds_are_named_and_frozen() -> None:
    with pytest.raises(TypeError):
        RequestLimits(3)  # type: ignore[call-arg]
    with pytest.raises(AttributeError):
        RequestLimits().n = 3  # type: ignore[misc]


def test_an_engine_refuses_before_it_makes_anything() -> None:
    engine = make_counting_engine()
    engine.limits = RequestLimits(n=4)
    with pytest.raises(ValueError, match="n: 60000 exceeds the limit of 4"):
        engine.add_request([1], SamplingParams(n=60_000))
    assert_idle(engine)
    run_all(engine, [engine.add_request([1], SamplingParams(n=4, max_new_tokens=2))])
    engine.limits = RequestLimits()
    run_all(engine, [engine.add_request([1], SamplingParams(n=5, max_new_tokens=2))])


def test_generate_names_the_prompt_and_runs_nothing(idle_model: fastgen.Generator) -> None:
    idle_model.engine.limits = RequestLimits(prompt_tokens=3)
    before = idle_model.engine.stats.steps
    with pytest.raises(ValueError, match="prompt 1: prompt_tokens: 4 exceeds the limit of 3"):
        idle_model.generate([[1, 2, 3], [1, 2, 3, 4]], max_new_tokens=2)
    assert idle_model.engine.stats.steps == before
    idle_model.engine.limits = RequestLimits()


def test_what_servers_allow() -> None:
    limits = RequestLimits.for_serving()
    assert (limits.n, limits.best_of, limits.stop, limits.stop_bytes) == (128, 20, 4, 256)
    assert (limits.stop_token_ids, limits.logprobs, limits.prompt_logprobs) == (128, 20, 5)
    assert (limits.logit_bias, limits.logit_bias_value) == (1024, 100)
    assert (limits.temperature, limits.penalty) == (2, 2)
    limits.check(1024, SamplingParams())
