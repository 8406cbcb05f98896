"""Tracers, compilers and fake tensors see transformers' operations, and leave nothing behind."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch._functorch.aot_autograd import aot_export_module, aot_function
from torch._functorch.compilers import nop
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.func import functional_call, functionalize, hessian, jacrev, linearize, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from transformers.exporters.utils import decompose_prefill_decode
from transformers.initialization import no_init_weights

from hf_models import fresh_pair, random_ids, tolerance

Model = Any
Outcome = Any
GREEDY = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 7}
LENGTHS = {name: {1: torch.export.Dim.AUTO} for name in ("ids", "mask")}
ATTENTION = "transformer.h.1.attn.c_attn.bias"


class Logits(torch.nn.Module):
    """Of a model without a cache, as the exporters take one."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(ids, attention_mask=mask, use_cache=False).logits
        return logits


def _weights(model: Model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _loss_of(model: Model, ids: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """The loss as a function of one bias."""
    given = {"labels": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}

    def loss(bias: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = functional_call(model, {ATTENTION: bias}, (ids,), given).loss
        return found

    return loss


def _fake_mode(model: Model, ids: torch.Tensor) -> Outcome:
    with FakeTensorMode(allow_non_fake_inputs=True):
        return model(ids, labels=ids).loss


def _fake_ids(model: Model, ids: torch.Tensor) -> Outcome:
    return model(FakeTensorMode(allow_non_fake_inputs=True).from_tensor(ids)).logits


def _fake_model(model: Model, ids: torch.Tensor) -> Outcome:
    with FakeTensorMode():
        made = type(model)(model.config).eval()
        return made(torch.zeros(2, 7, dtype=torch.long)).logits


def _fake_copy(model: Model, ids: torch.Tensor) -> Outcome:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with FakeCopyMode(mode):
        copied = copy.deepcopy(model)
    with mode:
        return copied(mode.from_tensor(ids)).logits


def _fake_generate(model: Model, ids: torch.Tensor) -> Outcome:
    with FakeTensorMode(allow_non_fake_inputs=True):
        return model.generate(ids, **GREEDY)


def _no_memory(model: Model, ids: torch.Tensor) -> Outcome:
    ids = ids.to("meta")
    return copy.deepcopy(model).to("meta")(ids, labels=ids).loss


def _no_memory_at_first(model: Model, ids: torch.Tensor) -> Outcome:
    with torch.device("meta"), no_init_weights():
        made = type(model)(model.config)
    made.load_state_dict(model.state_dict(), assign=True)
    made.tie_weights()
    return made.eval()(ids).logits


def _make_fx(**options: Any) -> Callable[[Model, torch.Tensor], Outcome]:
    def traced(model: Model, ids: torch.Tensor) -> Outcome:
        model.requires_grad_(False)
        mask = torch.ones_like(ids)
        graph = make_fx(Logits(model), _allow_non_fake_inputs=True, **options)(ids, mask)
        return graph(ids, mask)

    return traced


def _make_fx_of_gradients(model: Model, ids: torch.Tensor) -> Outcome:
    bias = _weights(model)[ATTENTION]
    return make_fx(torch.func.grad(_loss_of(model, ids)))(bias)(bias)


def _make_fx_of_generate(model: Model, ids: torch.Tensor) -> Outcome:
    return make_fx(lambda ids: model.generate(ids, **GREEDY))(ids)(ids)


def _export(**options: Any) -> Callable[[Model, torch.Tensor], Outcome]:
    def exported(model: Model, ids: torch.Tensor) -> Outcome:
        program = torch.export.export(Logits(model), (ids, torch.ones_like(ids)), **options)
        return program.module()(ids, torch.ones_like(ids))

    return exported


def _aot_export(model: Model, ids: torch.Tensor) -> Outcome:
    model.requires_grad_(False)

    class InTuple(Logits):
        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> Any:
            return (super().forward(ids, mask),)

    given = (ids, torch.ones_like(ids))
    graph: Any = aot_export_module(InTuple(model), given, trace_joint=False)[0]
    return [str(node.target) for node in graph.graph.nodes]


def _aot_function(model: Model, ids: torch.Tensor) -> Outcome:
    model.requires_grad_(False)
    return aot_function(Logits(model).forward, nop)(ids, torch.ones_like(ids))


def _functionalized(model: Model, ids: torch.Tensor) -> Outcome:
    return functionalize(Logits(model).forward)(ids, torch.ones_like(ids))


def _functional_tensors(model: Model, ids: torch.Tensor) -> Outcome:
    with FunctionalTensorMode():
        logits = model(FunctionalTensor.to_functional(ids), use_cache=False).logits
        return logits.from_functional()


def _symbolic_trace(model: Model, ids: torch.Tensor) -> Outcome:
    return torch.fx.symbolic_trace(model)(ids)


def _jit_trace(model: Model, ids: torch.Tensor) -> Outcome:
    model.requires_grad_(False)
    given = (ids, torch.ones_like(ids))
    trace: Any = torch.jit.trace
    return trace(Logits(model), given, check_trace=False)(*given)


def _compiled(model: Model, ids: torch.Tensor) -> Outcome:
    return torch.compile(model, backend="eager", fullgraph=True)(ids, use_cache=False).logits


def _compiled_loss(model: Model, ids: torch.Tensor) -> Outcome:
    return torch.compile(model, backend="aot_eager")(ids, labels=ids, use_cache=False).loss


def _compiled_in_place(model: Model, ids: torch.Tensor) -> Outcome:
    copied = copy.deepcopy(model)
    copied.compile(backend="eager")
    return copied.generate(ids, **GREEDY)


def _compiled_generate(model: Model, ids: torch.Tensor) -> Outcome:
    compiled: Any = torch.compile(model, backend="eager")
    return compiled.generate(ids, **GREEDY)


def _compiled_forward(model: Model, ids: torch.Tensor) -> Outcome:
    copied = copy.deepcopy(model)
    copied.forward = torch.compile(copied.forward, backend="eager")
    return copied.generate(ids, **GREEDY)


def _mapped(model: Model, ids: torch.Tensor) -> Outcome:
    return vmap(lambda row: model(row[None], use_cache=False).logits)(ids)


def _mapped_generate(model: Model, ids: torch.Tensor) -> Outcome:
    return vmap(lambda row: model.generate(row[None], **GREEDY))(ids)


def _second_derivatives(model: Model, ids: torch.Tensor) -> Outcome:
    return hessian(_loss_of(model, ids))(_weights(model)[ATTENTION])


def _jacobian(model: Model, ids: torch.Tensor) -> Outcome:
    return jacrev(_loss_of(model, ids))(_weights(model)[ATTENTION])


def _linearized(model: Model, ids: torch.Tensor) -> Outcome:
    bias = _weights(model)[ATTENTION]
    value, derivative = linearize(_loss_of(model, ids), bias)
    return torch.stack([value, derivative(torch.ones_like(bias))])


def _checkpointed(model: Model, ids: torch.Tensor) -> Outcome:
    return checkpoint(
        lambda ids: model(ids, labels=ids, use_cache=False).loss, ids, use_reentrant=False
    )


def _decomposed(model: Model, ids: torch.Tensor) -> Outcome:
    """What transformers' exporters see of a generation: the arguments of each call."""
    copied = copy.deepcopy(model)
    parts = decompose_prefill_decode(
        copied, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    )
    return [
        (name, sorted(key for key, value in given.items() if value is not None))
        for name, (_, given) in parts.items()
    ]


WAYS: dict[str, Callable[[Model, torch.Tensor], Outcome]] = {
    "in FakeTensorMode": _fake_mode,
    "fake ids": _fake_ids,
    "a model of fake tensors": _fake_model,
    "a fake copy": _fake_copy,
    "a fake generation": _fake_generate,
    "on the meta device": _no_memory,
    "first on the meta device": _no_memory_at_first,
    "make_fx": _make_fx(),
    "make_fx, fake": _make_fx(tracing_mode="fake"),
    "make_fx, symbolic": _make_fx(tracing_mode="symbolic"),
    "make_fx, before dispatch": _make_fx(pre_dispatch=True),
    "make_fx of gradients": _make_fx_of_gradients,
    "make_fx of generate": _make_fx_of_generate,
    "export": _export(strict=False),
    "export, strict": _export(strict=True),
    "export, other lengths": _export(strict=False, dynamic_shapes=LENGTHS),
    "AOT export": _aot_export,
    "AOT function": _aot_function,
    "functionalize": _functionalized,
    "functional tensors": _functional_tensors,
    "symbolic trace": _symbolic_trace,
    "torch.jit.trace": _jit_trace,
    "compiled": _compiled,
    "compiled, with a loss": _compiled_loss,
    "compiled in place": _compiled_in_place,
    "compiled, then generate": _compiled_generate,
    "forward compiled": _compiled_forward,
    "vmap": _mapped,
    "vmap of generate": _mapped_generate,
    "hessian": _second_derivatives,
    "jacrev": _jacobian,
    "linearize": _linearized,
    "checkpoint": _checkpointed,
    "transformers' decomposition": _decomposed,
}


LONG = {  # they compile a good deal
    *("compiled, with a loss", "compiled in place", "compiled, then generate", "forward compiled"),
    *("export, strict", "export, other lengths", "make_fx, symbolic", "linearize", "hessian"),
    *("make_fx of gradients", "make_fx, before dispatch"),
}


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=pytest.mark.slow if way in LONG else ()) for way in WAYS]
)
def test_as_with_transformers(way: str) -> None:
    """Before the first call without gradients, and after it with them; plain calls stay fast."""
    theirs, ours = fresh_pair()
    ids = random_ids(theirs, np.random.default_rng(0), 2, 7)
    for model in (theirs, ours):
        model.set_attn_implementation("eager")  # what torch.func can differentiate twice
    with torch.no_grad():
        expected = theirs(ids).logits
    for with_gradients in (False, True):
        torch.set_grad_enabled(with_gradients)
        try:
            first, second = (_outcome(WAYS[way], model, ids) for model in (theirs, ours))
        finally:
            torch.set_grad_enabled(True)
        _assert_same(first, second)
        with torch.no_grad():
            assert (ours(ids).logits - expected).abs().max() < tolerance(expected)
        assert ours.last_path == "forward" and not ours.last_reason


def _outcome(way: Callable[[Model, torch.Tensor], Outcome], model: Model, ids: Any) -> Outcome:
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracers' own, with either model
        try:
            return way(model, ids)
        except Exception as error:
            return error


def _assert_same(theirs: Outcome, ours: Outcome) -> None:
    assert type(ours) is type(theirs), (theirs, ours)
    if type(theirs) is torch.Tensor and not theirs.is_meta:
        assert ours.dtype == theirs.dtype and ours.requires_grad == theirs.requires_grad
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    elif isinstance(theirs, torch.Tensor):
        assert ours.shape == theirs.shape and ours.device == theirs.device
    elif not isinstance(theirs, Exception):
        assert ours == theirs
