"""Models that are altered at random, before and between calls: fastgen computes what transformers'
class computes with the same modules, or raises the same.

Each case has a seed of its own, which a failure names: `check_case(seed)` runs it again.
"""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import fastgen
from alterations import ALTERATIONS, CONFIG, VOCAB
from hf_models import generated, tolerance

_BATCHES = 8  # so that several processes may share the work
# What an alteration raises that cannot be made after others: an index of a layer that is gone, a
# function where a module stood.
CANNOT_BE = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"activation_function": "gelu", "tie_word_embeddings": False},
    {"scale_attn_by_inverse_layer_idx": True, "n_inner": 48, "activation_function": "relu"},
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Of small models more threads make nothing faster."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.mark.parametrize("alteration", ALTERATIONS)
def test_each_alteration(alteration: str) -> None:
    for seed in _fresh_seeds(4):
        check_case(seed, alteration)


@pytest.mark.parametrize("batch", range(_BATCHES))
def test_random_alterations(batch: int) -> None:
    for seed in _fresh_seeds(12):
        check_case(seed)


@pytest.mark.slow
@pytest.mark.parametrize("batch", range(_BATCHES))
def test_many_random_alterations(batch: int) -> None:
    for seed in _fresh_seeds(125):
        check_case(seed)


def _fresh_seeds(count: int) -> list[int]:
    return [secrets.randbelow(2**31) for _ in range(count)]


def check_case(seed: int, first: str | None = None) -> None:
    """Alter a model one to three times, and compare results after each, and when all that is not
    the model's own has been undone."""
    rng = np.random.default_rng(seed)
    theirs = _model(int(rng.integers(len(VARIANTS))))
    ours = fastgen.accelerate(theirs)  # the same modules
    done: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with ExitStack() as stack:
            if rng.random() < 0.7:
                _compare(theirs, ours, rng, (seed, first, done))
            for _ in range(int(rng.integers(1, 4))):
                name = (
                    first
                    if first and not done
                    else list(ALTERATIONS)[rng.integers(len(ALTERATIONS))]
                )
                done.append(name)
                try:
                    ALTERATIONS[name](theirs, rng, stack)
                except CANNOT_BE as error:
                    done.append(f"({type(error).__name__}: {error})")  # after others it cannot be
                for _ in range(2):
                    _compare(theirs, ours, rng, (seed, first, done))
        _compare(theirs, ours, rng, (seed, first, [*done, "undone"]))


@cache
def _state(variant: int) -> tuple[Any, dict[str, torch.Tensor]]:
    config = transformers.GPT2Config(**CONFIG, **VARIANTS[variant])
    torch.manual_seed(variant)
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return config, model.state_dict()


def _model(variant: int) -> Any:
    config, state = _state(variant)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config.to_diff_dict()))
    model.load_state_dict(state)
    return model.eval()


@contextmanager
def _same_weights(model: Any) -> Iterator[None]:
    """A forward with `max_norm` writes: the next one is to begin with the same weights."""
    writes = any(getattr(module, "max_norm", None) for module in model.modules())
    before = [(p, p.detach().clone()) for p in model.parameters()] if writes else []
    yield
    with torch.no_grad():
        for parameter, values in before:
            parameter.copy_(values)


def _compare(theirs: Any, ours: Any, rng: np.random.Generator, case: Any) -> None:
    if rng.random() < 0.2:
        ids = torch.from_numpy(rng.integers(4, VOCAB, (int(rng.integers(1, 3)), 5)))
        _compare_generated(theirs, ours, ids, case)
        return
    call = _call(rng)
    expected, got = (_outcome(model, call) for model in (theirs, ours))
    case = (*case, list(call), ours.last_path, ours.last_reason)
    if isinstance(expected, Exception) or isinstance(got, Exception):
        assert type(got) is type(expected), (case, expected, got)
        return
    assert got.shape == expected.shape and got.dtype == expected.dtype, case
    finite = expected.isfinite()
    assert torch.equal(finite, got.isfinite()), case
    if finite.any():
        worst = (got - expected)[finite].abs().max().item()
        assert worst <= tolerance(expected), (worst, case)


def _call(rng: np.random.Generator) -> dict[str, Any]:
    """Arguments of a forward, sometimes unusual ones."""
    ids = torch.from_numpy(rng.integers(4, VOCAB, (2, int(rng.integers(1, 9)))))
    length = ids.shape[1]
    call: dict[str, Any] = {"input_ids": ids}
    if rng.random() < 0.6:
        call["use_cache"] = bool(rng.integers(2))
    unusual: list[tuple[str, Any]] = [
        ("attention_mask", torch.ones_like(ids)),
        ("attention_mask", (torch.arange(length) >= torch.tensor([[0], [length - 1]])).float()),
        ("attention_mask", torch.ones(2, 1, length, length, dtype=torch.bool)),
        ("position_ids", torch.arange(length)[None] + 3),
        ("position_ids", torch.arange(length)[None].float()),
        ("position_ids", torch.arange(length, dtype=torch.int16)[None]),
        ("position_ids", torch.arange(length)[None] // 2),
        ("logits_to_keep", 1),
        ("logits_to_keep", torch.tensor([0])),
        ("logits_to_keep", torch.tensor([1, 0], dtype=torch.uint8)),
        ("logits_to_keep", 2.0),
        ("logits_to_keep", -1),
        ("is_causal", False),
        ("is_causal", True),
        ("output_attentions", False),
        ("output_hidden_states", None),
        ("unknown", None),
        ("softcap", None),
        ("scaling", None),
        ("token_type_ids", None),
        ("token_type_ids", torch.zeros_like(ids)),
        ("labels", ids),
    ]
    if rng.random() < 0.4:
        key, value = unusual[rng.integers(len(unusual))]
        call[key] = value
    return call


def _outcome(model: Any, call: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    with _same_weights(model), torch.no_grad():
        try:
            return model(**call).logits
        except Exception as error:
            return error


def _compare_generated(theirs: Any, ours: Any, ids: torch.Tensor, case: Any) -> None:
    """Greedy tokens, up to where the best two logits are as good as equal."""
    found = []
    for model in (theirs, ours):
        with _same_weights(model):
            found.append(generated(model, input_ids=ids, max_new_tokens=4, do_sample=False))
    expected, got = found
    case = (*case, "generate", ours.last_path, ours.last_reason)
    if isinstance(expected, Exception) or isinstance(got, Exception):
        assert type(got) is type(expected), (case, expected, got)
        return
    for one, other in zip(expected, got, strict=True):
        if torch.equal(one, other):
            continue
        at = int((one[: len(other)] != other[: len(one)]).nonzero()[0])
        with torch.no_grad():
            logits = theirs(one[None, :at]).logits[0, -1]
        assert abs(logits[one[at]] - logits[other[at]]) < 2 * tolerance(logits), case
