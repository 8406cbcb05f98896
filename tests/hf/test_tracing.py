"""torch.func, modes and tensors of other classes: they see transformers' own operations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from hf_models import fresh_pair, random_ids, tolerance

Tensors = dict[str, torch.Tensor]


@pytest.fixture(params=["before the first call", "after it"])
def models(request: pytest.FixtureRequest) -> tuple[Any, Any, torch.Tensor]:
    """transformers' and fastgen's, in evaluation mode, and ids (2, 7)."""
    theirs, ours = fresh_pair()
    for model in (theirs, ours):
        model.set_attn_implementation("eager")
    ids = random_ids(theirs, np.random.default_rng(0), 2, 7)
    if request.param == "after it":
        with torch.no_grad():
            ours(ids)
    return theirs, ours, ids


def _weights(model: Any) -> Tensors:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _loss(model: Any, weights: Tensors, ids: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = functional_call(
        model, weights, (ids,), {"labels": ids, "use_cache": False}
    ).loss
    return loss


def _assert_same(theirs: Tensors, ours: Tensors) -> None:
    assert theirs.keys() == ours.keys()
    for name, one in theirs.items():
        assert torch.allclose(ours[name], one, rtol=1e-4, atol=1e-6), name


def test_grad(models: Any) -> None:
    *pair, ids = models
    _assert_same(*(grad(lambda w, m=m: _loss(m, w, ids))(_weights(m)) for m in pair))
    assert pair[1].last_path == "transformers" and "torch.func" in pair[1].last_reason


def test_vjp(models: Any) -> None:
    *pair, ids = models
    found = []
    for model in pair:
        loss, pull, *_ = vjp(lambda w, m=model: _loss(m, w, ids), _weights(model))
        found.append({"loss": loss, **pull(torch.ones_like(loss))[0]})
    _assert_same(*found)


def test_gradients_of_each_row(models: Any) -> None:
    *pair, ids = models
    each = [
        vmap(grad(lambda w, row, m=m: _loss(m, w, row[None])), (None, 0), randomness="same")(
            _weights(m), ids
        )
        for m in pair
    ]
    _assert_same(*each)


def test_an_ensemble(models: Any) -> None:
    *pair, ids = models
    found = []
    for model in pair:
        stacked = {name: torch.stack([w, 1.1 * w]) for name, w in _weights(model).items()}
        found.append(vmap(lambda w, m=model: _loss(m, w, ids), randomness="same")(stacked))
    assert found[0].shape == (2,) and torch.allclose(found[0], found[1], rtol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # PyTorch's own use
def test_forward_mode(models: Any) -> None:
    *pair, ids = models
    found = []
    for model in pair:
        weights = _weights(model)
        directions = {name: torch.full_like(w, 0.01) for name, w in weights.items()}
        found.append(jvp(lambda w, m=model: _loss(m, w, ids), (weights,), (directions,)))
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


def test_modes_see_the_operations(models: Any) -> None:
    *pair, ids = models
    counts = []
    with torch.no_grad():
        for model in pair:
            with FlopCounterMode(display=False) as counter:
                model(ids)
            counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
    _, ours = pair

    class Seeing(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    class SeeingFunctions(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    modes: list[tuple[Any, str]] = [
        (Seeing(), "aten.addmm.default"),  # type: ignore[no-untyped-call]
        (SeeingFunctions(), "addmm"),
    ]
    for mode, name in modes:
        seen: list[str] = []
        with mode, torch.no_grad():
            ours(ids)
        assert name in seen
        seen.clear()
        with mode:
            ours.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=7)
        assert name in seen


def test_a_default_device_changes_nothing(models: Any) -> None:
    theirs, ours, ids = models
    with torch.no_grad(), torch.device("cpu"):
        expected = theirs(ids).logits
        assert (ours(ids).logits - expected).abs().max() < tolerance(expected)
    assert ours.last_path == "forward"


def test_ids_of_another_class(models: Any) -> None:
    theirs, ours, ids = models

    class Tagged(torch.Tensor):
        pass

    tagged = ids.as_subclass(Tagged)
    with torch.no_grad():
        one, other = (model(tagged).logits for model in (theirs, ours))
    assert type(one) is type(other) and torch.equal(one, other)
    assert ours.last_path == "transformers" and "Tagged" in ours.last_reason
