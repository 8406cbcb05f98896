"""Random alterations of what runs a model: functions, registries and hooks (see `alterations`)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn
from transformers import cache_utils, masking_utils
from transformers.activations import ACT2FN
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface
from transformers.models.gpt2 import modeling_gpt2
from transformers.pytorch_utils import Conv1D

Model = Any
Random = np.random.Generator
Alteration = Callable[[Model, Random, ExitStack], None]

_CLASSES = (
    *(modeling_gpt2.GPT2Model, modeling_gpt2.GPT2Block, modeling_gpt2.GPT2Attention),
    *(modeling_gpt2.GPT2MLP, Conv1D, nn.Embedding, nn.LayerNorm, nn.Linear, nn.Dropout),
)
_FUNCTIONS = (
    *((modeling_gpt2, name) for name in ("create_causal_mask", "eager_attention_forward")),
    *((modeling_gpt2, name) for name in ("slice_logits_to_keep", "DynamicCache")),
    *((masking_utils, name) for name in ("sdpa_mask", "causal_mask_function")),
    *((torch, name) for name in ("addmm", "matmul", "tanh")),
    *((nn.functional, name) for name in ("layer_norm", "linear", "embedding", "softmax", "gelu")),
    (nn.functional, "scaled_dot_product_attention"),
    *((cache_utils.DynamicLayer, name) for name in ("update",)),
)


def pick(rng: Random, items: Any) -> Any:
    items = list(items)
    return items[rng.integers(len(items))]


def block_of(model: Model, rng: Random) -> Any:
    return pick(rng, model.transformer.h)


def layer_of(model: Model, rng: Random) -> Any:
    """Any module within the model."""
    return pick(rng, [module for name, module in model.named_modules() if name])


def _scaled(output: Any, factor: float) -> Any:
    if isinstance(output, torch.Tensor):
        return output * factor if output.is_floating_point() else output
    if isinstance(output, tuple):
        return (_scaled(output[0], factor), *output[1:])
    if hasattr(output, "last_hidden_state"):
        output.last_hidden_state = output.last_hidden_state * factor
    return output


def scaling(function: Callable[..., Any], factor: float) -> Callable[..., Any]:
    def scaled(*args: Any, **kwargs: Any) -> Any:
        return _scaled(function(*args, **kwargs), factor)

    return scaled


def factor_of(rng: Random) -> float:
    return float(rng.choice([0.5, 0.9, 1.5, -1.0]))


# Functions: of instances, classes, modules and registries.


def patch_an_instance(model: Model, rng: Random, stack: ExitStack) -> None:
    module = layer_of(model, rng)
    module.forward = scaling(module.forward, factor_of(rng))


def hide_a_child(model: Model, rng: Random, stack: ExitStack) -> None:
    """An attribute comes before a child of the same name."""
    module = pick(rng, [m for m in model.modules() if m._modules and type(m) is not nn.ModuleList])
    name = pick(rng, module._modules)
    child = getattr(module, name)
    if not isinstance(child, nn.ModuleList):
        vars(module)[name] = scaling(child, factor_of(rng))


def patch_a_class(model: Model, rng: Random, stack: ExitStack) -> None:
    kind = pick(rng, _CLASSES)
    name = pick(rng, ("forward", "forward", "__call__"))
    stack.enter_context(mock.patch.object(kind, name, scaling(getattr(kind, name), factor_of(rng))))


def patch_all_modules(model: Model, rng: Random, stack: ExitStack) -> None:
    name = pick(rng, ("__call__", "_call_impl"))
    call, factor = getattr(nn.Module, name), factor_of(rng)

    def patched(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = call(self, *args, **kwargs)
        return _scaled(output, factor) if isinstance(self, modeling_gpt2.GPT2MLP) else output

    stack.enter_context(mock.patch.object(nn.Module, name, patched))


def patch_code(model: Model, rng: Random, stack: ExitStack) -> None:
    function = Conv1D.forward
    stack.callback(setattr, function, "__code__", function.__code__)

    def forward(self: Any, x: Any) -> Any:
        size_out = (*x.size()[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight * 0.9).view(size_out)

    function.__code__ = forward.__code__


def add_a_property(model: Model, rng: Random, stack: ExitStack) -> None:
    """It comes before what instances have."""
    kind, name, value = pick(
        rng,
        (
            (modeling_gpt2.GPT2Attention, "scaling", 0.3),
            (nn.LayerNorm, "eps", 0.2),
            (modeling_gpt2.GPT2MLP, "act", torch.tanh),
            (modeling_gpt2.GPT2Block, "mlp", lambda x: x * 0.1),
        ),
    )
    stack.enter_context(mock.patch.object(kind, name, property(lambda self: value), create=True))


def patch_a_function(model: Model, rng: Random, stack: ExitStack) -> None:
    owner, name = pick(rng, _FUNCTIONS)
    function, factor = getattr(owner, name), factor_of(rng)
    stack.enter_context(mock.patch.object(owner, name, scaling(function, factor)))


def no_mask(model: Model, rng: Random, stack: ExitStack) -> None:
    every = lambda *args, **kwargs: None  # noqa: E731
    owner, name = pick(rng, ((modeling_gpt2, "create_causal_mask"),))
    stack.enter_context(mock.patch.object(owner, name, every))


def register_attention(model: Model, rng: Random, stack: ExitStack) -> None:
    kind = pick(rng, ("sdpa", "eager", "other"))
    function = scaling(modeling_gpt2.eager_attention_forward, factor_of(rng))
    where = pick(rng, (AttentionInterface._global_mapping, ALL_ATTENTION_FUNCTIONS._local_mapping))
    stack.enter_context(mock.patch.dict(where, {kind: function}))
    if kind == "other" and rng.random() < 0.5:
        model.config._attn_implementation = kind


def register_mask(model: Model, rng: Random, stack: ExitStack) -> None:
    kind = pick(rng, ("sdpa", "eager"))
    function = lambda *args, **kwargs: None  # noqa: E731
    where = ALL_MASK_ATTENTION_FUNCTIONS._local_mapping
    stack.enter_context(mock.patch.dict(where, {kind: function}))


def set_attention(model: Model, rng: Random, stack: ExitStack) -> None:
    model.set_attn_implementation(pick(rng, ("eager", "sdpa")))


def other_activation(model: Model, rng: Random, stack: ExitStack) -> None:
    block_of(model, rng).mlp.act = ACT2FN[pick(rng, ("gelu", "gelu_python", "relu", "quick_gelu"))]


# Hooks.


def add_a_hook(model: Model, rng: Random, stack: ExitStack) -> None:
    module, factor = layer_of(model, rng), factor_of(rng)
    if isinstance(module, nn.ModuleList):
        return
    if rng.random() < 0.5:
        handle = module.register_forward_hook(lambda m, args, output: _scaled(output, factor))
    else:
        handle = module.register_forward_pre_hook(
            lambda m, args, kwargs: (tuple(_scaled(a, factor) for a in args), kwargs),
            with_kwargs=True,
        )
    if rng.random() < 0.2:
        handle.remove()


def add_a_global_hook(model: Model, rng: Random, stack: ExitStack) -> None:
    factor = factor_of(rng)

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        return _scaled(output, factor) if isinstance(module, Conv1D) else None

    handle = nn.modules.module.register_module_forward_hook(hook)
    stack.callback(handle.remove)
    if rng.random() < 0.2:
        handle.remove()


def add_a_state_dict_hook(model: Model, rng: Random, stack: ExitStack) -> None:
    """It changes what `state_dict()` says, and not the weights."""

    def hook(module: nn.Module, state: dict[str, Any], *rest: Any) -> None:
        for key in state:
            state[key] = state[key] * 2

    block_of(model, rng)._register_state_dict_hook(hook)


PATCHES: tuple[Alteration, ...] = (
    *(patch_an_instance, hide_a_child, patch_a_class, patch_all_modules, patch_code),
    *(add_a_property, patch_a_function, no_mask, register_attention, register_mask),
    *(set_attention, other_activation, add_a_hook, add_a_global_hook, add_a_state_dict_hook),
)
