"""SamplingParams: what it takes, what it refuses, and how it says so."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from fastgen import SamplingParams

WRONG = {
    "n max_new_tokens top_k seed logprobs prompt_logprobs": [
        -1, 1.5, "2", True, [1], {}, 2**70, math.nan, math.inf, b"1", object(),
    ],
    "temperature top_p": [
        -0.1, math.nan, math.inf, -math.inf, "1", True, None, [0.5], 10**400, 1j,
    ],
    "n": [0, None],
    "temperature": [1e-9, 1e30],
    "top_p": [0, 1.01],
    "stop": ["", ["a", ""], [b"a"], b"a", [1], 7, {"a": 1}, ["\ud800"], [None]],
    "stop_token_ids": [[-1], [1.0], ["1"], [True], "12", 3, [[1]], [2**40]],
    "include_stop ignore_eos": [0, 1, None, "yes"],
}  # fmt: skip
BAD = [(name, value) for names in WRONG for name in names.split() for value in WRONG[names]]


@pytest.mark.parametrize(("name", "value"), BAD, ids=lambda v: repr(v)[:20])
def test_bad_values_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=name.split("_")[0]) as caught:
        SamplingParams(**{name: value})
    assert type(caught.value) in (TypeError, ValueError)


def test_unknown_options_name_the_nearest() -> None:
    with pytest.raises(TypeError, match="'max_tokens'; did you mean 'max_new_tokens'"):
        SamplingParams(max_tokens=5)
    with pytest.raises(TypeError, match="known options: ignore_eos"):
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
