"""What a model must be to be run from packed weights: GPT-2's own modules, each in its place.

The modules decide, not the config. Whatever is not exactly what transformers would make of this
config now is left to transformers' own forward.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from transformers.models.gpt2 import modeling_gpt2
from transformers.pytorch_utils import Conv1D

_MODULES = (
    modeling_gpt2.GPT2Model,
    modeling_gpt2.GPT2Block,
    modeling_gpt2.GPT2Attention,
    modeling_gpt2.GPT2MLP,
    *(Conv1D, nn.Embedding, nn.Linear, nn.LayerNorm, nn.Dropout, nn.ModuleList),
)
# All of them compute the same; others may have been registered.
_ATTENTION = (
    *(None, "eager", "sdpa", "flex_attention"),
    *("flash_attention_2", "flash_attention_3", "flash_attention_4"),
)
DTYPES = ("torch.float32", "torch.bfloat16", "torch.float16")
_CAPTURING = "transformers.utils.output_capturing"

# The values that modules compute with beside their parameters.
_ATTENTION_VALUES = (
    *("scaling", "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "layer_idx"),
    *("reorder_and_upcast_attn", "num_heads", "head_dim", "embed_dim", "split_size"),
    *("is_causal", "is_cross_attention"),
)
_OTHER_VALUES = (
    *("eps", "normalized_shape", "elementwise_affine"),  # LayerNorm
    *("max_norm", "norm_type", "padding_idx", "scale_grad_by_freq", "sparse"),  # Embedding
    *("nf", "act", "approximate"),  # Conv1D, activations
)
_VALUES = (*_ATTENTION_VALUES, *_OTHER_VALUES)
# Settings that change how transformers' forward runs the modules, and what must hold of each.
_SETTINGS: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("add_cross_attention", (None, False)),
    ("is_causal", (None, True)),
    ("sliding_window", (None,)),
    ("attention_chunk_size", (None,)),
    ("layer_types", (None,)),
)
_SIZES = (
    *("vocab_size", "n_positions", "n_embd", "n_head", "n_layer", "n_inner", "activation_function"),
    *("layer_norm_epsilon", "scale_attn_weights", "scale_attn_by_inverse_layer_idx"),
    *("reorder_and_upcast_attn", "tie_word_embeddings"),
)


def why_not_settings(model: Any) -> str:
    """Why a call with the config as it is now is not one of the packed weights; "" if it is one.

    Asked before every call, because transformers itself sets some of them for a while.
    """
    if has_global_hooks():
        return "there are hooks on all modules"
    config, transformer = model.config, model.transformer
    if type(transformer) is not modeling_gpt2.GPT2Model or transformer.config is not config:
        return "the transformer is not one of this config"
    if config.num_hidden_layers != len(transformer.h):
        return f"n_layer is {config.num_hidden_layers}, but there are {len(transformer.h)} layers"
    if transformer.training and transformer.gradient_checkpointing:
        return "gradient checkpointing goes without a cache"
    for key, allowed in _SETTINGS:
        if not any(getattr(config, key, None) is value for value in allowed):
            return f"config.{key} is set"
    return ""


def settings_of(config: Any) -> tuple[Any, ...]:
    """All that `why_not_modules` reads of a config."""
    return tuple(getattr(config, key, None) for key in _SIZES)


def attention_kinds(modules: Iterable[nn.Module]) -> list[Any]:
    """The implementations that the modules ask their configs for."""
    configs = {id(c): c for c in (vars(module).get("config") for module in modules) if c}
    return [config._attn_implementation for config in configs.values()]


def parts_of(module: nn.Module) -> tuple[Any, ...]:
    """What a module computes with beside its parameters' values: its class, children and parameters
    by identity, its values and hooks.

    Whoever compares it keeps what it saw alive, so that no other object can have the same id.
    """
    own = module.__dict__
    return (
        type(module),
        *map(id, module._modules.values()),
        *map(id, module._parameters.values()),
        id(own.get("config")),
        *(own[name] for name in _VALUES if name in own),
        _is_hooked(module),
    )


def drops_out(modules: Iterable[nn.Module]) -> bool:
    """Whether a forward is random. Attention asks for its own mode, not for its dropout's."""
    return any(
        module.training
        and (
            (isinstance(module, nn.Dropout) and module.p > 0)
            or (isinstance(module, modeling_gpt2.GPT2Attention) and module.attn_dropout.p > 0)
        )
        for module in modules
    )


def has_global_hooks() -> bool:
    """Hooks that PyTorch calls for every module there is."""
    hooks = torch.nn.modules.module
    return bool(
        hooks._global_forward_hooks
        or hooks._global_forward_pre_hooks
        or hooks._global_backward_hooks
        or hooks._global_backward_pre_hooks
    )


def why_not_modules(model: Any) -> str:
    """What makes this model something else than a GPT-2 with a head; "" if nothing does."""
    try:
        expected = dict(_expected(model.config))
    except (KeyError, TypeError, ValueError) as error:
        return f"no model can be made of its config: {error}"
    found = dict(model.named_modules(remove_duplicate=False))
    del found[""]
    for name, module in found.items():
        if reason := _why_not_module(name, module, expected.get(name)):
            return reason
    if missing := expected.keys() - found.keys():
        return f"{min(missing)} is missing"
    if "forward" in model.__dict__:
        return "the model has a forward of its own"
    if model.lm_head.bias is not None:
        return "lm_head has a bias"
    return _why_not_weights(model, list(found.values()))


def _expected(config: Any) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of all that transformers makes of a config; they have no memory."""
    size = config.hidden_size
    with torch.device("meta"):
        blocks = [
            modeling_gpt2.GPT2Block(config, layer_idx=at) for at in range(config.num_hidden_layers)
        ]
        parts = {
            "wte": nn.Embedding(config.vocab_size, size),
            "wpe": nn.Embedding(config.max_position_embeddings, size),
            "drop": nn.Dropout(config.embd_pdrop),
            "h": nn.ModuleList(blocks),
            "ln_f": nn.LayerNorm(size, eps=config.layer_norm_epsilon),
        }
        yield "lm_head", nn.Linear(size, config.vocab_size, bias=False)
    for part, module in parts.items():
        yield from module.named_modules(prefix=f"transformer.{part}")


def _why_not_module(name: str, module: nn.Module, expected: nn.Module | None) -> str:
    """What is wrong with one of a model's modules; "" if nothing is."""
    kind = type(module)
    if name == "transformer":
        fits = kind is modeling_gpt2.GPT2Model
    elif expected is not None:
        fits = kind is type(expected)
    else:  # what a model has beside GPT-2's modules, its forward does not call
        fits = kind in _MODULES and not name.startswith(("transformer.", "lm_head."))
    if not fits:
        return f"{name} is a {kind.__name__}"
    if _is_hooked(module):
        return f"{name} has a forward hook, or a forward of its own"
    if expected is None:
        return ""
    if vars(module).get("eps") != vars(expected).get("eps"):
        return f"{name} has another epsilon than config.layer_norm_epsilon"
    for key in _VALUES:
        if _comparable(vars(module).get(key)) != _comparable(vars(expected).get(key)):
            return f"{name} is not what the config says: {key} differs"
    return ""


def _comparable(value: Any) -> Any:
    """Functions of two modules are the same if they do the same."""
    if isinstance(value, functools.partial):
        return value.func, value.args, value.keywords
    return getattr(value, "__func__", value)


def _is_hooked(module: nn.Module) -> bool:
    """transformers' own hooks, which look for hidden states, stay once they have been needed."""
    return bool(
        module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or any(map(_is_foreign, module._forward_hooks.values()))
    )


def _is_foreign(hook: Any) -> bool:
    return getattr(hook, "__module__", "") != _CAPTURING


def _why_not_weights(model: Any, modules: list[nn.Module]) -> str:
    devices = {parameter.device for parameter in model.parameters()}
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if len(devices) != 1 or len(dtypes) != 1:
        return "its parameters are on several devices, or of several dtypes"
    if model.device.type == "meta":
        return "its weights are on no device"
    if str(model.dtype) not in DTYPES:
        return f"its weights are {model.dtype}"
    for kind in attention_kinds([model, *modules]):
        if kind not in _ATTENTION:
            return f"its attention is {kind!r}"
    if len(set(attention_kinds([model, *modules]))) > 1:
        return "its layers have several kinds of attention"
    return ""
