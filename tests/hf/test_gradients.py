"""Gradients in evaluation mode: hooks run as often as with transformers' own class, and the call
that was made is differentiated."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from hf_models import fresh_pair, random_ids

Model = Any


@pytest.fixture
def models() -> tuple[Model, Model, torch.Tensor]:
    theirs, ours = fresh_pair()
    return theirs, ours, random_ids(theirs, np.random.default_rng(0), 2, 9)


def _loss(model: Model, ids: torch.Tensor) -> Any:
    return model(ids, labels=ids).loss


def _assert_same_gradients(theirs: Model, ours: Model) -> None:
    for one, other in zip(theirs.parameters(), ours.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            size = float(one.grad.abs().max())
            assert (one.grad - other.grad).abs().max() <= 1e-4 * size + 1e-6


@pytest.mark.parametrize("when", ["before the forward", "after it"])
def test_hooks_on_parameters_run_once(models: Any, when: str) -> None:
    """What they scale is scaled once; those after the accumulation see the gradient once."""
    *pair, ids = models
    calls: list[list[str]] = [[], []]
    for model, seen in zip(pair, calls, strict=True):

        def scale(grad: torch.Tensor, seen: list[str] = seen) -> torch.Tensor:
            seen.append("hook")
            return 3 * grad

        def after(parameter: torch.Tensor, seen: list[str] = seen) -> None:
            seen.append("accumulated")

        def register(model: Model = model, scale: Any = scale, after: Any = after) -> None:
            for parameter in model.parameters():
                parameter.register_hook(scale)
                parameter.register_post_accumulate_grad_hook(after)

        if when == "before the forward":
            register()
        loss = _loss(model, ids)
        if when == "after it":
            register()
        loss.backward()
    assert sorted(calls[0]) == sorted(calls[1])
    assert calls[1].count("hook") == len(list(pair[1].parameters()))
    assert pair[1].last_path == "forward"
    _assert_same_gradients(*pair)


def test_functional_calls_with_other_parameters(models: Any) -> None:
    """The gradients are those of what was called with, which is gone from the model by then."""
    *pair, ids = models
    found = []
    for model in pair:
        factor = torch.tensor(0.5, requires_grad=True)
        leaf = (1.5 * model.transformer.h[0].mlp.c_fc.weight).detach().requires_grad_()
        weights = {
            **{name: factor * w.detach() for name, w in model.named_parameters()},
            "transformer.h.0.mlp.c_fc.weight": leaf,
        }
        functional_call(model, weights, (ids,), {"labels": ids}).loss.backward()
        assert factor.grad is not None and leaf.grad is not None
        found.append((factor.grad, leaf.grad))
        assert all(parameter.grad is None for parameter in model.parameters())
    for one, other in zip(*found, strict=True):
        assert float(one.abs().max()) > 1e-4
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-6)


def _replace(model: Model) -> None:
    model.transformer.h[1] = torch.nn.Identity()


def _reparametrize(model: Model) -> None:
    weight = model.transformer.h[1].mlp.c_fc.weight
    model.transformer.h[1].mlp.c_fc.weight = torch.nn.Parameter(2 * weight.detach())


def _train(model: Model) -> None:
    model.train()


def _hook_a_module(model: Model) -> None:
    model.transformer.h[1].register_forward_hook(lambda module, args, output: 2 * output)


@pytest.mark.parametrize("change", [_replace, _reparametrize, _train, _hook_a_module])
def test_a_model_that_changes_before_backward(models: Any, change: Callable[[Model], Any]) -> None:
    *pair, ids = models
    parameters = [list(model.parameters()) for model in pair]
    for model in pair:
        loss = _loss(model, ids)
        change(model)
        modes = [module.training for module in model.modules()]
        loss.backward()
        assert modes == [module.training for module in model.modules()]
    for one, other in zip(*parameters, strict=True):
        assert (one.grad - other.grad).abs().max() <= 1e-4 * float(one.grad.abs().max()) + 1e-6


def test_frozen_parts_and_chosen_inputs(models: Any) -> None:
    *pair, ids = models
    for model in pair:
        model.transformer.wte.requires_grad_(False)
        model.transformer.h[0].requires_grad_(False)
        _loss(model, ids).backward()
    _assert_same_gradients(*pair)
    chosen = []
    for model in pair:
        weight = model.transformer.h[2].attn.c_proj.weight
        chosen.append(torch.autograd.grad(_loss(model, ids), [weight])[0])
    assert torch.allclose(chosen[0], chosen[1], rtol=1e-3, atol=1e-6)


def test_a_graph_is_used_twice_only_if_it_is_kept(models: Any) -> None:
    *pair, ids = models
    for model in pair:
        loss = _loss(model, ids)
        loss.backward(retain_graph=True)
        loss.backward()
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
    _assert_same_gradients(*pair)


def test_hooks_on_modules(models: Any) -> None:
    """Full backward hooks see gradients, and may change them; on all modules, too."""
    *pair, ids = models
    seen: list[list[str]] = [[], []]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for model, names in zip(pair, seen, strict=True):
            for name, module in model.transformer.h.named_modules():
                if not list(module.children()) and name:
                    module.register_full_backward_hook(
                        lambda module, into, out, names=names, name=name: names.append(name)
                    )
            _loss(model, ids).backward()
    assert seen[0] == seen[1] and seen[0]
    _assert_same_gradients(*pair)


def test_anomaly_mode_has_the_graph_of_the_forward(models: Any) -> None:
    *pair, ids = models
    for model in pair:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with torch.autograd.detect_anomaly():
                _loss(model, ids).backward()
    assert pair[1].last_path == "transformers" and "anomalies" in pair[1].last_reason
    _assert_same_gradients(*pair)


def test_autocast(models: Any) -> None:
    *pair, ids = models
    for model in pair:
        with torch.autocast("cpu", torch.bfloat16):
            loss = _loss(model, ids)
        loss.backward()
    assert pair[1].last_path == "transformers" and "autocast" in pair[1].last_reason
    for one, other in zip(*(model.parameters() for model in pair), strict=True):
        assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_calls(models: Any, reentrant: bool) -> None:
    *pair, ids = models
    for model in pair:
        start = torch.ones((), requires_grad=True)
        loss = checkpoint(
            lambda scale, m=model: scale * _loss(m, ids), start, use_reentrant=reentrant
        )
        loss.backward()
        assert start.grad is not None
    _assert_same_gradients(*pair)


def test_what_is_saved_goes_through_hooks(models: Any) -> None:
    *pair, ids = models
    counts = []
    for model in pair:
        packed: list[Any] = []

        def pack(tensor: torch.Tensor, packed: list[Any] = packed) -> torch.Tensor:
            packed.append(tensor.shape)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(ids).logits.sum()
        loss.backward()
        counts.append(len(packed))
    assert counts[0] == counts[1] > 10


def test_hooks_in_double_backward(models: Any) -> None:
    *pair, ids = models
    found = []
    for model in pair:
        model.set_attn_implementation("eager")
        weight = model.transformer.h[0].mlp.c_fc.weight
        weight.register_hook(lambda grad: 3 * grad)
        loss = model(ids).logits.square().mean()
        [grad] = torch.autograd.grad(loss, [weight], create_graph=True)
        model.zero_grad()
        torch.autograd.backward(grad.square().sum())
        found.append((grad.detach(), weight.grad))
    for one, other in zip(*found, strict=True):
        size = float(one.abs().max())
        assert size > 1e-6 and (one - other).abs().max() < 1e-3 * size
