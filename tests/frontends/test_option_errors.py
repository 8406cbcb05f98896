"""Errors in options and arguments name what is wrong, in every call, and survive a pickle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

import fastgen
from engine_harness import assert_pickles, greedy
from fastgen import OptionError, OptionTypeError, RequestLimits
from fastgen.frontends.threaded_engine import ThreadedEngine
from fastgen.native import native

SHORT = greedy(max_new_tokens=3, ignore_eos=True)
SEVERAL: Any = ["A", "B"]
Model = fastgen.Generator


@pytest.fixture(scope="module")
def shared() -> Iterator[Model]:
    with fastgen.load(max_batch_size=4, max_seq_len=256) as loaded:
        yield loaded


def check_size(model: Model) -> None:
    with ThreadedEngine(model) as engine:
        engine.thread.check_size(9999)


WRONG: list[tuple[Callable[[Model], Any], type[Exception], str | None]] = [
    (lambda model: model.generate("And", n=0), OptionError, "n"),
    (lambda model: model.generate("And", top_p="x"), OptionTypeError, "top_p"),
    (lambda model: model.generate("And", temprature=1), OptionTypeError, "temprature"),
    (lambda model: model.generate("And", SHORT, n=2), OptionTypeError, "params"),
    (lambda model: model.generate(["A", "B"], [SHORT]), OptionError, "params"),
    (lambda model: model.generate(5), OptionTypeError, "prompt"),
    (lambda model: model.generate([[1], [4096]]), OptionError, "prompt"),
    (lambda model: model.generate(["A", "\ud800"]), OptionError, "prompt"),
    (lambda model: model.generate([1] * 256), OptionError, "prompt"),
    (lambda model: model.generate("A", bad_words=["\ud800"]), OptionError, "bad_words"),
    (lambda model: model.generate("A", logit_bias={4096: 1}), OptionError, "logit_bias"),
    (lambda model: model.generate("A", timeout=-1), OptionError, "timeout"),
    (lambda model: model.generate("A", priority=5000), OptionError, "priority"),
    (lambda model: model.stream(SEVERAL), OptionTypeError, "prompt"),
    (lambda model: model.stream("A", best_of=2), OptionError, "best_of"),
    (lambda model: model.score([[1], [4096]]), OptionError, "text"),
    (lambda model: model.score("\ud800"), OptionError, "text"),
    (lambda model: RequestLimits(n=2).check(1, greedy(n=3)), OptionError, "n"),
    (lambda model: RequestLimits(stop_bytes=1).check(1, greedy(stop="ab")), OptionError, "stop"),
    (lambda model: RequestLimits(prompt_tokens=1).check(2, SHORT), OptionError, "prompt"),
    (check_size, OptionError, None),
]


@pytest.mark.parametrize(("call", "kind", "option"), WRONG)
def test_an_error_in_an_option_names_it(
    shared: Model, call: Callable[[Model], Any], kind: type[Exception], option: str | None
) -> None:
    with pytest.raises(kind) as caught:
        call(shared)
    assert type(caught.value) is kind and getattr(caught.value, "option") == option  # noqa: B009
    assert_pickles(caught.value)


LOAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"model": 5}, OptionTypeError, "model"),
    ({"dtyp": "float32"}, OptionTypeError, "dtyp"),
    ({"device": 5}, OptionTypeError, "device"),
    ({"device": "nowhere"}, OptionError, "device"),
    ({"device": "meta", "decoder": "cpu"}, OptionError, "device"),
    ({"dtype": "float8"}, OptionError, "dtype"),
    ({"dtype": "float16", "quantize": "int8"}, OptionError, "dtype"),
    ({"quantize": "int3"}, OptionError, "quantize"),
    ({"quantize": "int8", "decoder": "torch"}, OptionError, "quantize"),
    ({"kv_dtype": "fp8"}, OptionError, "kv_dtype"),
    ({"kv_dtype": "int8", "decoder": "torch"}, OptionError, "kv_dtype"),
    ({"decoder": "tpu"}, OptionError, "decoder"),
    ({"decoder": "cuda", "device": "cpu"}, OptionError, "decoder"),
    ({"max_batch_size": 0}, OptionError, "max_batch_size"),
    ({"max_batch_size": None}, OptionTypeError, "max_batch_size"),
    ({"num_threads": True}, OptionTypeError, "num_threads"),
    ({"max_seq_len": 1025}, OptionError, "max_seq_len"),
    ({"max_seq_len": 1.5}, OptionTypeError, "max_seq_len"),
    ({"max_memory": 1}, OptionError, "max_memory"),
    ({"batch_invariant": "yes"}, OptionTypeError, "batch_invariant"),
    ({"batch_invariant": True, "decoder": "torch"}, OptionError, "batch_invariant"),
    ({"speculate": "fast"}, OptionError, "speculate"),
    ({"speculate": False}, OptionTypeError, "speculate"),
    ({"draft_model": 5}, OptionTypeError, "draft_model"),
    ({"speculate": "off", "draft_model": fastgen.BUNDLED_MODEL}, OptionError, "draft_model"),
    ({"speculate": max, "draft_model": fastgen.BUNDLED_MODEL}, OptionError, "draft_model"),
    ({"cache": 1}, OptionTypeError, "cache"),
    ({"cache": None}, OptionTypeError, "cache"),
    ({"cache": ""}, OptionError, "cache"),
    ({"share_weights": 1}, OptionTypeError, "share_weights"),
    ({"share_weights": True, "cache": False}, OptionError, "share_weights"),
    ({"share_weights": True, "decoder": "torch", "cache": "x"}, OptionError, "share_weights"),
]


@pytest.mark.skipif(native is None, reason="the CPU decoder was not built")
@pytest.mark.parametrize(("options", "kind", "option"), LOAD)
def test_an_error_in_an_option_of_load_names_it(
    options: dict[str, Any], kind: type[Exception], option: str
) -> None:
    with pytest.raises(kind) as caught:
        fastgen.load(**options)
    assert type(caught.value) is kind and getattr(caught.value, "option") == option  # noqa: B009
    assert_pickles(caught.value)


def test_an_error_in_one_of_several_prompts_says_in_which(shared: Model) -> None:
    shared.engine.limits = RequestLimits(max_new_tokens=2)
    try:
        with pytest.raises(OptionError, match=r"^prompt 0: max_new_tokens: 3 exceeds") as caught:
            shared.generate(["A", "B"], SHORT)
    finally:
        shared.engine.limits = RequestLimits()
    assert caught.value.option == "max_new_tokens"
    assert caught.value.problem == "prompt 0: 3 exceeds the limit of 2"


def test_an_error_of_a_file_pickles() -> None:
    assert_pickles(fastgen.CheckpointError("config.json: no such file"))
