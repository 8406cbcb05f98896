"""Gradients of logits that the decoder made: backward runs transformers' own forward then."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn

Again = Callable[[Any], Tensor]  # (a model of transformers' class) -> the logits, with their graph

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def differentiable(model: nn.Module, logits: Tensor, again: Again) -> Tensor:
    """The logits, with a backward that computes them again with `again`.

    The model that it gets has the modules and parameters of this moment, in evaluation mode,
    whatever happens to `model` until then. Parameters written since raise RuntimeError.
    """
    snapshot = _copied(model, {})
    result: Tensor = _Recomputed.apply(  # type: ignore[no-untyped-call]
        logits, snapshot, again, *snapshot.parameters()
    )
    return result


class _Recomputed(torch.autograd.Function):
    """Identity of logits that were made without a graph; backward makes the graph."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, snapshot: nn.Module, again: Again, *parameters: Tensor
    ) -> Tensor:
        ctx.snapshot, ctx.again = snapshot, again
        ctx.save_for_backward(*parameters)  # so that backward refuses weights changed since
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors
        was_enabled = torch.is_grad_enabled()
        with torch.enable_grad():
            # Stand-ins: hooks on the parameters run once, when their gradients have been returned.
            parameters = list(ctx.snapshot.parameters())
            stand_ins = {id(parameter): parameter.view_as(parameter) for parameter in parameters}
            logits = ctx.again(_copied(ctx.snapshot, stand_ins))
            wanted = [at for at, needed in enumerate(ctx.needs_input_grad[3:]) if needed]
            grads = torch.autograd.grad(
                logits,
                [stand_ins[id(parameters[at])] for at in wanted],
                grad,
                allow_unused=True,
                create_graph=was_enabled,
            )
        result: list[Tensor | None] = [None] * len(parameters)
        for at, found in zip(wanted, grads, strict=True):
            result[at] = found
        return None, None, None, *result


def _copied(model: nn.Module, parameters: Mapping[int, Tensor]) -> nn.Module:
    """A model of transformers' class: copies of all modules, in evaluation mode and without hooks.

    Args:
        parameters: by `id`, what takes the place of a parameter; the others are shared.
    """
    copies: dict[int, nn.Module] = {}

    def copied(module: nn.Module, kind: type[nn.Module]) -> nn.Module:
        if id(module) in copies:
            return copies[id(module)]
        twin = copies[id(module)] = kind.__new__(kind)
        fields = {
            **vars(module),
            **{name: OrderedDict() for name in _HOOKS},
            "training": False,
            "_parameters": {
                name: parameters.get(id(value), value) for name, value in module._parameters.items()
            },
            "_modules": {
                name: None if child is None else copied(child, type(child))
                for name, child in module._modules.items()
            },
        }
        fields.pop("forward", None)
        object.__setattr__(twin, "__dict__", fields)
        return twin

    return copied(model, transformers.GPT2LMHeadModel)
