"""SamplingParams: what it takes, what it refuses, and how it says so."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from fastgen import SamplingParams
from fastgen.errors import OptionError, OptionTypeError
from fastgen.sampling.options import OPTIONS

NOT_NUMBERS = ["1", None, [0.5], {}, b"1", object(), 1j, True]
NOT_FINITE = [math.nan, math.inf, -math.inf, 10**400, -(10**400)]
NOT_COUNTS = [-1, 1.5, "2", True, [1], {}, 2**70, math.nan, math.inf, b"1", object(), 10**5000]
NOT_IDS = [
    [-1], [1.0], ["1"], [True], "12", b"12", 3, [[1]], [[[1]]], [2**40], [None], [math.nan], {1: 2},
]  # fmt: skip
WRONG: dict[str, list[Any]] = {
    "n max_new_tokens min_new_tokens top_k no_repeat_ngram_size": [*NOT_COUNTS, None],
    "best_of seed logprobs prompt_logprobs": NOT_COUNTS,
    "n best_of": [0, 2**17],
    "temperature top_p min_p typical_p epsilon_cutoff eta_cutoff repetition_penalty top_n_sigma": [
        *NOT_NUMBERS, *NOT_FINITE, -0.1,
    ],
    "frequency_penalty presence_penalty": [*NOT_NUMBERS, *NOT_FINITE, 1e7, -1e7, 1e308],
    "temperature": [1e-9, 1e30, np.float32(np.nan)],
    "top_p typical_p": [0, 1.01],
    "top_h": ["1", [0.5], True, *NOT_FINITE, 0, -0.1, 1.01],
    "min_p": [1.01],
    "epsilon_cutoff eta_cutoff": [1, 1.01],
    "repetition_penalty": [0, 1e-9, 1e9],
    "stop": ["", ["a", ""], [b"a"], b"a", [1], 7, {"a": 1}, ["\ud800"], [None], [["a"]]],
    "stop_token_ids suppress_tokens begin_suppress_tokens": NOT_IDS,
    "allowed_token_ids": [*NOT_IDS, []],
    "bad_words": [
        *([""], ["a", ""], b"a", [b"a"], 7, [7], [[]], [[-1]], [[1.0]], [[True]], [[[1]]]),
        *([[2**40]], {"a": 1}, ["\ud800"], [None], [["a"]]),
    ],
    "logit_bias": [
        *({-1: 1.0}, {1.0: 1.0}, {"1": 1.0}, {True: 1.0}, {2**40: 1.0}, {(1,): 1.0}),
        *({1: "1"}, {1: None}, {1: True}, {1: math.nan}, {1: math.inf}, {1: -math.inf}),
        *({1: 1e11}, {1: 10**400}, [1, 2], [(1,)], [(1, 2, 3)], "12", 5, [[1, 2.0]]),
    ],
    "sequence_bias": [
        *({(-1,): 1.0}, {(1.0,): 1.0}, {("1",): 1.0}, {1: 1.0}, {(): 1.0}, {((1,),): 1.0}),
        *({(1, 2): "1"}, {(1,): None}, {(1,): math.nan}, {(1,): -math.inf}, {(1,): 1e11}),
        *([1, 2], [((1,),)], "12", 5, [[(1,), 2.0]]),
    ],
    "exponential_decay_length_penalty": [
        *((1,), (1, 2, 3), 1.5, "ab", (-1, 1.1), (1.5, 1.1), (True, 1.1), (1, 0), (1, -1.0)),
        *((1, math.nan), (1, math.inf), (1, "1"), (1, None), (1, 1e9), [[1, 1.1]], {}),
    ],
    "rank logits_processor": [1, "f", [], [len], {}],
    "include_stop ignore_eos speculate": [0, 1, None, "yes"],
}  # fmt: skip
BAD = [(name, value) for names in WRONG for name in names.split() for value in WRONG[names]]


def shown(value: Any) -> str:
    """A short name for a case; Python does not print numbers of thousands of digits."""
    return "huge" if isinstance(value, int) and value > 10**400 else repr(value)[:20]


@pytest.mark.parametrize(("name", "value"), BAD, ids=shown)
def test_bad_values_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises((OptionTypeError, OptionError), match=name) as caught:
        SamplingParams(**{name: value})
    assert len(str(caught.value)) < 200
    assert type(caught.value) in (OptionTypeError, OptionError)
    assert isinstance(caught.value, (OptionError, OptionTypeError))
    assert caught.value.option == name


def test_unknown_options_name_the_nearest() -> None:
    with pytest.raises(
        OptionTypeError, match="'max_tokens'; did you mean 'max_new_tokens'"
    ) as caught:
        SamplingParams(max_tokens=5)
    assert caught.value.option == "max_tokens"
    with pytest.raises(
        OptionTypeError, match="'do_sample'; here it is temperature: 0 is greedy"
    ) as caught:
        SamplingParams(do_sample=True)
    assert caught.value.option == "do_sample"
    with pytest.raises(ValueError, match="0, which keeps all"):
        SamplingParams(top_k=-1)
    with pytest.raises(TypeError, match="known options: allowed_token_ids, bad_words"):
        SamplingParams(zzz=1)
    with pytest.raises(TypeError, match="keyword"):
        SamplingParams(1)


def test_values_are_normalized_to_plain_python() -> None:
    params = SamplingParams(
        n=np.int64(2),
        temperature=1,
        top_p=np.float32(0.5),
        stop="a",
        stop_token_ids=[3, 3, np.int32(4)],
    )
    assert (type(params.n), type(params.temperature), type(params.top_p)) == (int, float, float)
    words = SamplingParams(sequence_bias={(np.int64(3), 4): 1, (5,): -2.5})
    assert words.sequence_bias == (((3, 4), 1.0), ((5,), -2.5))
    assert SamplingParams(logit_bias={np.int64(3): 1, 4: -2}).logit_bias == ((3, 1.0), (4, -2.0))
    assert SamplingParams(bad_words=["a", [1, 2], (1, 2)]).bad_words == ("a", (1, 2))
    assert SamplingParams(bad_words="a").bad_words == ("a",)
    assert SamplingParams(exponential_decay_length_penalty=[3, 2]) == SamplingParams(
        exponential_decay_length_penalty=(3, 2.0)
    )
    assert params.stop == ("a",)
    assert params.stop_token_ids == (3, 4)
    assert SamplingParams(stop=None).stop == ()
    assert SamplingParams(seed=2**64 - 1).seed == 2**64 - 1


def test_frozen_and_hashable() -> None:
    params = SamplingParams(stop=["x"], seed=1)
    with pytest.raises(AttributeError):
        params.n = 2  # type: ignore[misc]
    assert params == SamplingParams(stop=("x",), seed=1)
    assert len({params, SamplingParams(stop="x", seed=1)}) == 1


def test_nothing_to_generate_needs_something_to_score() -> None:
    with pytest.raises(ValueError, match="prompt_logprobs"):
        SamplingParams(max_new_tokens=0)
    assert SamplingParams(max_new_tokens=0, prompt_logprobs=0).max_new_tokens == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens=9 exceeds"),
        ({"n": 3, "best_of": 2}, "best_of=2 is less than n=3"),
        ({"rank": len}, "needs best_of"),
        ({"allowed_token_ids": [1, 2], "suppress_tokens": [2, 1, 3]}, "allowed_token_ids"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message) as caught:
        SamplingParams(**options)
    assert caught.value.option in options


def test_a_copy_with_another_seed_is_equal_but_for_it() -> None:
    params = SamplingParams(n=3, logit_bias={1: 2}, best_of=4, top_h=0.5, seed=8)
    copy = params.with_seed(9)
    assert (params.seed, copy.seed, copy.num_rows) == (8, 9, 4)
    assert copy == SamplingParams(n=3, logit_bias={1: 2}, best_of=4, top_h=0.5, seed=9)


def test_every_field_has_bad_values_here() -> None:
    """What ids may be is for the engine to say: test_request_checks.py."""
    assert {name for name, _ in BAD} == {field.name for field in dataclasses.fields(SamplingParams)}


def test_the_fields_are_the_table_of_options() -> None:
    """In its order, with its defaults: each option is declared once, with all that follows."""
    fields = dataclasses.fields(SamplingParams)
    assert [(f.name, f.default) for f in fields] == [(one.name, one.default) for one in OPTIONS]
