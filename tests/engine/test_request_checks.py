"""Wrong requests: the field is named, whoever calls; the engine has not noticed, and goes on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import numpy as np
import pytest

import fastgen
from data_files import GREEDY_100
from engine_harness import (
    CountingDecoder,
    assert_idle,
    assert_inbox_empty,
    counting_decoder_of,
    greedy,
    make_counting_engine,
    run_all,
)
from fastgen import SamplingParams
from fastgen.engine.engine import Engine
from fastgen.errors import OptionError, OptionTypeError

NOT_INTEGERS: list[Any] = [1.5, "2", True, [1], {}, math.nan, math.inf, b"1", object()]
NOT_NUMBERS: list[Any] = ["1", True, None, [0.5], 1j, math.nan, math.inf, -math.inf, 10**400]
NOT_IDS: list[Any] = [[-1], [1.0], ["1"], [True], "12", 3, [[1]], [2**40], b"12", {1: 2}]
NOT_FLAGS: list[Any] = [0, 1, None, "yes"]

BAD: dict[str, list[Any]] = {
    "n": [*NOT_INTEGERS, None, 0, -1, 2**16 + 1, 2**31, 2**63],
    "best_of": [*NOT_INTEGERS, 0, -1, 2**16 + 1],
    "speculate": [*NOT_FLAGS, "off"],
    "rank": [3, "max", [len]],
    "max_new_tokens": [*NOT_INTEGERS, None, -1, 2**31, 0],  # 0 generates nothing
    "min_new_tokens": [*NOT_INTEGERS, None, -1, 129],  # more than max_new_tokens
    "logit_bias": [
        3, "1", [1], [(1,)], [(1, 2, 3)], {"1": 2}, {1.0: 2}, {True: 1}, {-1: 1}, {1: math.nan},
        {1: math.inf}, {1: "2"}, {1: 1e11}, {2**40: 1},
    ],
    "sequence_bias": [3, "1", [1], [((1,),)], {1: 2}, {(): 1}, {(-1,): 1}, {(1,): math.inf}],
    "repetition_penalty": [*NOT_NUMBERS, 0, -1, 1e7],
    "frequency_penalty": [*NOT_NUMBERS, 1e7, -1e7],
    "presence_penalty": [*NOT_NUMBERS, 1e7, -1e7],
    "no_repeat_ngram_size": [*NOT_INTEGERS, None, -1, 2**31],
    "bad_words": [3, [""], [[]], [3], [[-1]], [[1.5]], [["a"]], "\ud800"],
    "allowed_token_ids": [*NOT_IDS, []],
    "exponential_decay_length_penalty": [
        3, "ab", (1,), (1, 2, 3), (-1, 1.1), (1.5, 1.1), (1, 0), (1, math.nan), (1, 1e7), (1, "2"),
    ],
    "suppress_tokens": NOT_IDS,
    "begin_suppress_tokens": NOT_IDS,
    "logits_processor": [3, "x", [len]],
    "temperature": [*NOT_NUMBERS, -0.1, 1e-9, 1e30],
    "top_h": [v for v in NOT_NUMBERS if v is not None] + [0, 1.01, -1],
    "top_k": [*NOT_INTEGERS, None, -1, 2**31],
    "top_n_sigma": [*NOT_NUMBERS, -1, 1e7],
    "top_p": [*NOT_NUMBERS, 0, 1.01, -1],
    "min_p": [*NOT_NUMBERS, -0.01, 1.01],
    "typical_p": [*NOT_NUMBERS, 0, 1.01],
    "epsilon_cutoff": [*NOT_NUMBERS, 1, -0.1],
    "eta_cutoff": [*NOT_NUMBERS, 1, -0.1],
    "stop": ["", ["a", ""], [b"a"], b"a", [1], 7, {"a": 1}, ["\ud800"], [None]],
    "stop_token_ids": NOT_IDS,
    "include_stop": NOT_FLAGS,
    "ignore_eos": NOT_FLAGS,
    "seed": [*NOT_INTEGERS, -1, 2**64],
    "logprobs": [*NOT_INTEGERS, -1, 2**31],
    "prompt_logprobs": [*NOT_INTEGERS, -1, 2**31],
}  # fmt: skip


def beyond(vocab_size: int) -> dict[str, list[Any]]:
    """What is too high for a vocabulary, whatever SamplingParams makes of it."""
    ids = [[vocab_size], [1, 2**31 - 1]]
    return {
        "logit_bias": [{vocab_size: 1}, {1: 1, 2**31 - 1: 1}],
        "sequence_bias": [{(vocab_size,): 1}, {(1, vocab_size, 2): 1}],
        "bad_words": [[[vocab_size]], [[1], [2, vocab_size]]],
        "allowed_token_ids": ids,
        "suppress_tokens": ids,
        "begin_suppress_tokens": ids,
        "stop_token_ids": ids,
        "logprobs": [vocab_size + 1],
        "prompt_logprobs": [vocab_size + 1],
    }


def test_every_field_is_tried() -> None:
    assert set(BAD) == {field.name for field in fields(SamplingParams)}


@pytest.fixture(scope="module")
def shared_engine() -> Engine:
    return make_counting_engine()


@pytest.fixture
def engine(shared_engine: Engine) -> Iterator[Engine]:
    """Afterwards nothing is left in it, not even half, and a next request is exact."""
    steps = shared_engine.stats.steps
    yield shared_engine
    assert_idle(shared_engine)
    assert shared_engine.stats.steps == steps, "something was run"
    assert_inbox_empty(shared_engine)
    assert counting_decoder_of(shared_engine).params == {}
    canary = shared_engine.add_request([5, 6], greedy(max_new_tokens=3))
    run_all(shared_engine, [canary])
    first = (31 * 6 + 7 + 11) % 97
    second = (31 * first + 14 + 11) % 97
    assert canary.rows[0].new_token_ids[:2] == [first, second]


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_refused_by_the_engine(engine: Engine, name: str) -> None:
    for value in [*BAD[name], *beyond(CountingDecoder.vocab_size).get(name, ())]:
        with pytest.raises((TypeError, ValueError), match=name) as caught:
            engine.add_request([1, 2], SamplingParams(**{name: value}))
        assert type(caught.value) in (OptionTypeError, OptionError), value


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_refused_by_generate(idle_model: fastgen.Generator, name: str) -> None:
    before = idle_model.engine.stats.steps
    for value in [*BAD[name], *beyond(idle_model.config.vocab_size).get(name, ())]:
        for call in (idle_model.generate, idle_model.stream):
            with pytest.raises((TypeError, ValueError), match=name):
                call("In the beginning", **{name: value})
    assert idle_model.engine.stats.steps == before
    canary = idle_model("And it came to pass", temperature=0, max_new_tokens=4)
    assert canary and GREEDY_100.read_text().startswith(canary)


@pytest.mark.parametrize(
    ("token_ids", "error", "message"),
    [
        ([], ValueError, "empty"),
        ([97], ValueError, "prompt holds token id 97, outside the vocabulary of 97"),
        ([1, -1], ValueError, "-1"),
        ([2**63], ValueError, "outside the vocabulary"),
        ([1.0], TypeError, "1.0"),
        ([True], TypeError, "True"),
        ("ab", TypeError, "'a'"),
        ([[1]], TypeError, "integer"),
        ([math.nan], TypeError, "nan"),
        (np.array([[1, 2]]), TypeError, "integer"),
        (np.array([1.0]), TypeError, "integer"),
        ([1] * 128, ValueError, "128 tokens"),
        (itertools.count(), TypeError, "count"),
        (None, TypeError, "NoneType"),
        (7, TypeError, "int"),
    ],
)
def test_bad_prompts_are_refused(
    engine: Engine, token_ids: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        engine.add_request(token_ids, greedy())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"params": {"n": 1}}, TypeError, "params must be SamplingParams, not dict"),
        ({"params": None}, TypeError, "params must be SamplingParams, not NoneType"),
        ({"params": greedy(bad_words=["a"])}, ValueError, "'a'; the engine takes token ids"),
        ({"params": greedy(stop=["a"])}, ValueError, "TextSink"),
        ({"params": greedy(n=2), "sinks": [None]}, ValueError, "1 sinks .* 2 rows"),
        ({"params": greedy(best_of=3), "sinks": [None]}, ValueError, "1 sinks .* 3 rows"),
        ({"sinks": []}, ValueError, "0 sinks .* 1 rows"),
        ({"sinks": 3}, TypeError, "len"),
        ({"priority": 1001}, ValueError, "priority must be between -1000 and 1000, not 1001"),
        ({"priority": -1001}, ValueError, "priority"),
        ({"priority": 0.5}, TypeError, "priority must be an integer"),
        ({"priority": True}, TypeError, "priority"),
        ({"priority": None}, TypeError, "priority"),
        ({"deadline": math.nan}, ValueError, "deadline must be finite"),
        ({"deadline": math.inf}, ValueError, "deadline must be finite"),
        ({"deadline": "5"}, TypeError, "deadline must be a number"),
        ({"deadline": True}, TypeError, "deadline"),
        ({"cache_salt": b"a"}, TypeError, "cache_salt must be a string"),
        ({"cache_salt": 3}, TypeError, "cache_salt"),
        ({"cache_salt": ""}, ValueError, "cache_salt"),
        ({"cache_salt": "\ud800"}, ValueError, "cache_salt"),
    ],
)
def test_bad_arguments_are_refused(
    engine: Engine, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    params = options.pop("params", greedy())
    with pytest.raises(error, match=message):
        engine.add_request([1], params, **options)


@pytest.mark.parametrize("timeout", [-1, math.nan, math.inf, "1", True, [1]])
def test_bad_timeouts_are_refused(idle_model: fastgen.Generator, timeout: Any) -> None:
    for call in (idle_model.generate, idle_model.stream):
        with pytest.raises((TypeError, ValueError), match="timeout"):
            call("x", timeout=timeout)


def test_what_never_fits_is_refused_with_the_figures() -> None:
    engine = make_counting_engine(num_blocks=2)
    with pytest.raises(
        ValueError, match=r"60 tokens and 6 .* 3 KV blocks of 32 tokens; there are 2"
    ):
        engine.add_request([1] * 60, greedy(max_new_tokens=6))
    at_the_edge = engine.add_request([1] * 60, greedy(max_new_tokens=5))  # the last is never fed
    run_all(engine, [at_the_edge])
    assert_idle(engine)


def test_all_is_checked_before_rows_are_made(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """65,536 rows are some hundred MB: not for a request that is refused."""

    def made(*args: Any) -> None:
        raise AssertionError("rows were made")

    monkeypatch.setattr("fastgen.engine.requests.Request.make_rows", made)
    for options in (
        {"sinks": [None]},
        {"deadline": math.nan},
        {"cache_salt": 1},
        {"priority": 2000},
    ):
        with pytest.raises((TypeError, ValueError)):
            engine.add_request([1], greedy(n=2**16), **options)
    for bad in ({"suppress_tokens": [97]}, {"logprobs": 98}):
        with pytest.raises(ValueError):
            engine.add_request([1], greedy(n=2**16, **bad))
    monkeypatch.undo()


def test_all_65536_samples_run() -> None:
    engine = make_counting_engine()
    request = engine.add_request([1], SamplingParams(n=2**16, max_new_tokens=1))
    assert (len(request.rows), engine.num_unfinished) == (2**16, 2**16)
    engine.run(lambda: request.num_ended >= 8)
    engine.cancel(request)
    assert request.done
    assert_idle(engine)


def test_the_edges_are_taken(engine: Engine) -> None:
    last = CountingDecoder.vocab_size - 1
    options: dict[str, Any] = {
        "logprobs": last + 1,
        "stop_token_ids": [last],
        "bad_words": [[last]],
    }
    engine.check_request([last], greedy(logit_bias={last: 1}, allowed_token_ids=[last], **options))
