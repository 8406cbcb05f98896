"""What fastgen says of a model that is slower than its user expects: once, in the log."""

from __future__ import annotations

import copy
import importlib.util
import logging
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import processes
from fastgen import BUNDLED_MODEL
from fastgen.decoders import select
from hf_models import fresh_pair, generated, kv_rows_of, random_ids, tolerance

Model = Any
Log = pytest.LogCaptureFixture


def _hook(model: Model) -> None:
    model.transformer.h[1].register_forward_hook(lambda module, args, output: output)


def _other_activation(model: Model) -> None:
    model.transformer.h[0].mlp.act = nn.ReLU()


def _appended(model: Model) -> None:
    model.transformer.h.append(copy.deepcopy(model.transformer.h[0]))
    model.config.n_layer += 1
    model.transformer.h[1].attn.num_heads = 2


def _half_and_half(model: Model) -> None:
    model.transformer.wpe.to(torch.float64)


def _not_finite(model: Model) -> None:
    with torch.no_grad():
        model.transformer.wte.weight[0, 0] = torch.nan


def _a_buffer(model: Model) -> None:
    model.transformer.register_buffer("mean", torch.zeros(3))


SLOWER: dict[str, Callable[[Model], None]] = {
    "a hook": _hook,
    "another activation": _other_activation,
    "other heads": _appended,
    "several dtypes": _half_and_half,
    "not finite": _not_finite,
    "a tensor that GPT-2 has not": _a_buffer,
}
BESIDE: dict[str, Callable[[], Any]] = {
    "a value head": lambda: nn.Linear(32, 1),
    "another module": lambda: nn.Linear(32, 5),
    "a parameter": lambda: nn.Parameter(torch.zeros(3)),
}


def _messages(log: Log) -> list[str]:
    assert all(record.levelno == logging.WARNING for record in log.records)
    return [record.getMessage() for record in log.records if record.name.startswith("fastgen")]


@pytest.fixture(autouse=True)
def _warnings_are_errors() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("change", SLOWER)
def test_a_model_that_is_left_to_transformers(change: str, caplog: Log) -> None:
    """Told once, however often it is called; the numbers are transformers'."""
    theirs, ours = fresh_pair()
    ids = random_ids(theirs, np.random.default_rng(0), 2, 6) % 90 + 1
    for model in (theirs, ours):
        SLOWER[change](model)
    with torch.no_grad():
        outcomes = [_outcomes(model, ids) for model in (theirs, ours)]
    for one, other in zip(*outcomes, strict=True):
        assert type(one) is type(other)
        if isinstance(one, torch.Tensor):
            assert torch.equal(torch.nan_to_num(one), torch.nan_to_num(other))
    assert ours.last_path == "transformers"
    [message] = _messages(caplog)
    assert message == f"fastgen leaves this model to transformers, as long as {ours.last_reason}"


def _outcomes(model: Model, ids: torch.Tensor) -> list[Any]:
    found: list[Any] = []
    calls: list[Callable[[], Any]] = [
        lambda: model(ids).logits,
        lambda: generated(model, input_ids=ids, max_new_tokens=4, do_sample=False),
    ]
    for _ in range(2):
        for call in calls:
            try:
                found.append(call())
            except Exception as error:
                found.append(error)
    return found


def test_each_reason_is_told_once(caplog: Log) -> None:
    """The model runs fast again when the reason has gone, and says nothing when it comes back."""
    theirs, ours = fresh_pair()
    ids = random_ids(theirs, np.random.default_rng(1), 1, 6)
    activation = ours.transformer.h[0].mlp.act
    with torch.no_grad():
        expected = theirs(ids).logits
        for _ in range(2):
            handle = ours.transformer.ln_f.register_forward_hook(lambda *given: None)
            assert torch.equal(ours(ids).logits, expected) and ours.last_path == "transformers"
            handle.remove()
            ours.transformer.h[0].mlp.act = nn.ReLU()
            ours(ids)
            ours.transformer.h[0].mlp.act = activation
            assert (ours(ids).logits - expected).abs().max() < tolerance(expected)
            assert ours.last_path == "forward"
    first, second = _messages(caplog)
    assert "ln_f has a forward hook" in first and "mlp.act is a ReLU" in second
    caplog.clear()
    other = copy.deepcopy(ours)
    other.transformer.h[0].mlp.act = nn.ReLU()
    with torch.no_grad():
        other(ids)
    assert len(_messages(caplog)) == 1


@pytest.mark.parametrize("beside", BESIDE)
def test_what_stands_beside_gpt2_is_not_spoken_of(beside: str, caplog: Log) -> None:
    theirs, ours = fresh_pair()
    ids = random_ids(theirs, np.random.default_rng(2), 2, 6)
    name = "v_head" if "value" in beside else "probe"
    setattr(ours, name, BESIDE[beside]())
    with torch.no_grad():
        expected = theirs(ids).logits
        assert (ours(ids).logits - expected).abs().max() < tolerance(expected)
    assert ours.last_path == "forward" and not _messages(caplog)


def test_calls_that_take_a_slower_path_say_nothing(caplog: Log) -> None:
    """Those are the user's choice: `last_reason` has it."""
    theirs, ours = fresh_pair()
    ids = random_ids(theirs, np.random.default_rng(3), 1, 6)
    ours(ids, output_attentions=True)
    ours.generate(ids, max_new_tokens=2, do_sample=False, prompt_lookup_num_tokens=2)
    ours.train()(ids, labels=ids).loss.backward()
    assert ours.last_path == "transformers" and not _messages(caplog)


def test_a_gpu_without_triton_is_told_once_a_model(
    caplog: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as can be seen without a GPU: the device is only looked at after the choice."""
    monkeypatch.setattr(select, "_has_gpu", lambda: True)
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "triton" else real(name)
    )

    def planned(checkpoint: Any, options: Any, *, warn: Callable[[str], None]) -> Any:
        return select.plan_decoder(checkpoint, replace(options, device="auto"), warn=warn)

    monkeypatch.setattr("fastgen.hf.packing.plan_decoder", planned)
    _, ours = fresh_pair()
    for _ in range(2):
        with torch.no_grad():
            ours.transformer.wpe.weight.mul_(1.1)
        kv_rows_of(ours)
    [message] = _messages(caplog)
    assert message.startswith("Triton is not installed")


_STRICT = """
import sys
import torch, transformers
import fastgen
theirs = transformers.GPT2LMHeadModel.from_pretrained(sys.argv[1], dtype=torch.float32)
ours = fastgen.GPT2LMHeadModel.from_pretrained(sys.argv[1], dtype=torch.float32)
ids = torch.arange(12).reshape(2, 6)
call = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
def check(path):
    assert torch.equal(ours.generate(ids, **call), theirs.generate(ids, **call))
    assert (ours(ids).logits - theirs(ids).logits).abs().max() < 1e-3
    assert ours.last_path == path, (ours.last_path, ours.last_reason)
check("forward")
handle = ours.transformer.h[0].register_forward_hook(lambda module, args, output: output)
for _ in range(2):
    check("transformers")
handle.remove()
ours.score = torch.nn.Linear(4, 2)
check("forward")
ours(ids, labels=ids).loss.backward()
ours.transformer.ln_f.eps = theirs.transformer.ln_f.eps = 0.1
check("transformers")
"""


def test_a_program_that_turns_warnings_into_errors() -> None:
    """Its standard error shows each reason once."""
    process = processes.run([sys.executable, "-W", "error", "-c", _STRICT, BUNDLED_MODEL])
    assert process.returncode == 0, process.stderr
    lines = [line for line in process.stderr.splitlines() if "fastgen leaves" in line]
    assert ["forward hook" in line for line in lines] == [True, False] and "epsilon" in lines[1]
