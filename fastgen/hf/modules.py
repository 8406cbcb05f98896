"""What a model must be to be run from packed weights: GPT-2's own modules, each in its place.

The modules decide, not the config. A model is run from packed weights only if all of this holds;
whatever else it is, transformers' own forward runs it.

Before every call:

- functions: those that transformers' forward runs are its own (`functions.py`), those of the
  registries of attention and masks too;
- hooks: there are none for all modules (`has_global_hooks`), nor on any module;
- the config says what is run: the number of layers, causal attention of all tokens (`_SETTINGS`);
- every module is as it was when the weights were packed: its class, its children, parameters,
  buffers, and all attributes (`SeenModules`);
- the parameters' values, shapes, strides, dtypes and devices too (`packing.py`);
- the tensors are plain, and nothing watches PyTorch's operations (`tracing.py`);
- the arguments have forms and values that are known (`forward.py`, `sampling.py`).

When weights are packed (`why_not_modules`):

- at each place, in order, stands a module of just the class that transformers puts there, and
  there is no other place;
- its attributes are those that transformers would set for this config, and none besides has a name
  that a forward reads;
- its parameters have the names and shapes that belong there, and it has no buffers;
- the parameters lie in memory, on one device, in one of `DTYPES`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config
from transformers.models.gpt2 import modeling_gpt2

from fastgen.hf.functions import ACTIVATIONS, ATTENTION, FORWARD, LAYERS, why_not_registered

DTYPES = ("torch.float32", "torch.bfloat16", "torch.float16")
_CAPTURING = "transformers.utils.output_capturing"

# What every module has for PyTorch's own use; of it, parameters, buffers, children and hooks are
# compared for themselves.
_MACHINERY = frozenset(vars(nn.Module()))
# Attributes that transformers sets later. The first two are read in training mode only, of which
# `why_not_mode` speaks; the third says that there are hooks which look for hidden states.
_LATER = frozenset(
    {
        *("gradient_checkpointing", "_gradient_checkpointing_func"),
        "_output_capturing_hooks_installed",
    }
)
_PLAIN = (type(None), bool, int, float, str, tuple)
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
    children = model._modules
    if transformer is not children.get("transformer") or model.lm_head is not children["lm_head"]:
        return "an attribute hides the transformer or the head"
    if type(transformer) is not modeling_gpt2.GPT2Model or transformer.config is not config:
        return "the transformer is not one of this config"
    if config.num_hidden_layers != len(transformer.h):
        return f"n_layer is {config.num_hidden_layers}, but there are {len(transformer.h)} layers"
    for key, allowed in _SETTINGS:
        if not any(getattr(config, key, None) is value for value in allowed):
            return f"config.{key} is set"
    if reason := FORWARD.why_not():
        return reason
    kind = config._attn_implementation  # another than these is found when weights are packed
    return why_not_registered(kind) if kind in ATTENTION else ""


def settings_of(config: Any) -> tuple[Any, ...]:
    """All that `why_not_modules` reads of a config."""
    return tuple(getattr(config, key, None) for key in _SIZES)


class SeenModules:
    """A model's modules as they were, made to be compared fast. It keeps them alive.

    Of the model itself only children, parameters and hooks are compared: what its forward reads
    beside them, `fast_forward` reads too.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = list(model.modules())
        self._parts = [_parts_of(module) for module in self.modules]
        self._values = [dict(module.__dict__) for module in self.modules]
        self._values[0] = {}
        configs = [(module, module.__dict__.get("config")) for module in self.modules]
        self._configs = [(module, config) for module, config in configs if config is not None]
        self._attention = self._kinds()

    def are_the_same(self) -> bool:
        return (
            self._parts == [_parts_of(module) for module in self.modules]
            and all(map(_has_values, self.modules, self._values))
            and all(module.__dict__.get("config") is config for module, config in self._configs)
            and self._attention == self._kinds()
        )

    def why_not_mode(self) -> str:
        """What training mode does in a forward; "" if it does nothing, or there is none."""
        return why_not_mode(self.modules)

    def _kinds(self) -> list[Any]:
        return [config._attn_implementation for _, config in self._configs]


def _parts_of(module: nn.Module) -> tuple[Any, ...]:
    """Its class, children and parameters by identity, and whether it has hooks and buffers."""
    own = module.__dict__
    return (
        type(module),
        *map(id, own["_modules"].values()),
        *map(id, own["_parameters"].values()),
        _is_hooked(own),
        not own["_buffers"],
    )


def _has_values(module: nn.Module, values: dict[str, Any]) -> bool:
    """Whether a module's attributes are still these; "training" may change, and is noted."""
    own = module.__dict__
    try:
        if not values or own == values:  # by identity, and in C
            return True
    except (RuntimeError, ValueError):  # of tensors, which a refused model may have
        pass
    if own.keys() != values.keys():
        return False
    values["training"] = own["training"]
    return all(_is_same(value, values[name]) for name, value in own.items())


def _is_same(value: Any, other: Any) -> bool:
    """Tensors, which only a refused model has as attributes, are all the same."""
    if value is other or isinstance(value, Tensor):
        return value is other or isinstance(other, Tensor)
    return isinstance(value, _PLAIN) and type(value) is type(other) and bool(value == other)


def why_not_mode(modules: Iterable[nn.Module]) -> str:
    """Why modules in training mode compute something else; "" if they do not.

    Attention asks for its own mode, not for its dropout's.
    """
    for module in modules:
        if not module.training:
            continue
        if isinstance(module, nn.Dropout) and module.p > 0:
            return "dropout is active"
        if isinstance(module, modeling_gpt2.GPT2Attention) and module.attn_dropout.p > 0:
            return "dropout is active"
        if getattr(module, "gradient_checkpointing", False):
            return "gradient checkpointing goes without a cache"
    return ""


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
    if "forward" in vars(found.pop("")):  # its hooks are called around `fast_forward`
        return "the model has a forward of its own"
    for name, module in found.items():
        if reason := _why_not_module(name, module, expected.get(name)):
            return reason
    if missing := expected.keys() - found.keys():
        return f"{min(missing)} is missing"
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
        for name, child in module.named_modules(prefix=f"transformer.{part}"):
            activation = ACTIVATIONS.get(config.activation_function, type(child))
            known = (activation,) if name.endswith(".mlp.act") else LAYERS
            if type(child) not in known:
                raise TypeError(f"{name} would be a {type(child).__name__}")
            yield name, child


def _why_not_module(name: str, module: nn.Module, expected: nn.Module | None) -> str:
    """What is wrong with one of a model's modules; "" if nothing is."""
    kind, own = type(module), vars(module)
    if name == "transformer":
        fits = kind is modeling_gpt2.GPT2Model
    elif expected is not None:
        fits = kind is type(expected)
    else:  # what a model has beside GPT-2's modules, its forward does not call
        fits = kind in LAYERS and not name.startswith(("transformer.", "lm_head."))
    if not fits:
        return f"{name} is a {kind.__name__}"
    if _is_hooked(own):
        return f"{name} has a forward hook, or a forward of its own"
    if name == "transformer":
        if own["_buffers"] or own["_parameters"]:
            return f"{name} has buffers, or parameters"
        return _why_not_attributes(name, own, _transformers_own())
    if expected is None:
        return ""
    if own.get("eps") != vars(expected).get("eps"):
        return f"{name} has another epsilon than config.layer_norm_epsilon"
    if list(own["_modules"]) != list(expected._modules):
        return f"the modules of {name} are others, or in another order"
    return _why_not_parameters(name, own, vars(expected)) or _why_not_attributes(
        name, own, vars(expected), same=True
    )


def _why_not_parameters(name: str, own: dict[str, Any], expected: dict[str, Any]) -> str:
    if own["_buffers"]:
        return f"{name} has buffers"
    found, wanted = own["_parameters"], expected["_parameters"]
    for key in {**wanted, **found}:
        parameter, standard = found.get(key), wanted.get(key)
        if key not in found or (parameter is None) != (standard is None):
            return f"{name} has {'no' if parameter is None else 'a'} {key}"
        if parameter is not None and parameter.shape != standard.shape:
            shape = tuple(parameter.shape)
            return f"{name} is not what the config says: {key} is {shape}"
    return ""


def _why_not_attributes(
    name: str, own: dict[str, Any], expected: dict[str, Any], *, same: bool = False
) -> str:
    """Attributes that a forward may read, and that are not the expected ones."""
    for key in (own.keys() | expected.keys()) - _MACHINERY - _LATER:
        if key not in expected and key in FORWARD.read:
            return f"{name} has an attribute {key} of its own"
        if not same or key not in expected or key == "config":
            continue
        if key not in own or not _do_the_same(own[key], expected[key]):
            return f"{name} is not what the config says: {key} differs"
    return ""


@functools.cache
def _transformers_own() -> dict[str, Any]:
    """The attributes of a new GPT2Model."""
    config = GPT2Config(n_layer=0, n_embd=1, n_head=1)
    with torch.device("meta"):
        return dict(vars(modeling_gpt2.GPT2Model(config)))


def _do_the_same(value: Any, other: Any) -> bool:
    """Functions of two modules are the same if they do the same."""
    if type(value) is not type(other):
        return False
    if isinstance(value, functools.partial):
        return (value.func, value.args, value.keywords) == (other.func, other.args, other.keywords)
    return bool(getattr(value, "__func__", value) == getattr(other, "__func__", other))


def _is_hooked(own: dict[str, Any]) -> bool:
    """Of a module's attributes. transformers' own hooks, which look for hidden states, stay once
    they have been needed."""
    return bool(
        own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
        or (own["_forward_hooks"] and any(map(_is_foreign, own["_forward_hooks"].values())))
    )


def _is_foreign(hook: Any) -> bool:
    return getattr(hook, "__module__", "") != _CAPTURING


def _why_not_weights(model: Any, modules: list[nn.Module]) -> str:
    parameters = list(model.parameters())
    devices = {parameter.device for parameter in parameters}
    dtypes = {parameter.dtype for parameter in parameters}
    if len(devices) != 1 or len(dtypes) != 1:
        return "its parameters are on several devices, or of several dtypes"
    if model.device.type == "meta":
        return "its weights are on no device"
    if str(model.dtype) not in DTYPES:
        return f"its weights are {model.dtype}"
    if any(p.layout is not torch.strided or p.is_neg() or p.is_conj() for p in parameters):
        return "its weights do not lie in memory as they are"
    configs = [vars(module).get("config") for module in modules]
    kinds = {config._attn_implementation for config in (model.config, *configs) if config}
    if len(kinds) > 1:
        return "its layers have several kinds of attention"
    return why_not_registered(*kinds)
