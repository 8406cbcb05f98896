"""The packed copy of a model's weights: made when first needed, and when they have changed."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import torch
from torch import nn
from transformers.models.gpt2 import modeling_gpt2
from transformers.pytorch_utils import Conv1D

from fastgen.checkpoint import Checkpoint
from fastgen.decoders.choice import build_decoder, plan_decoder
from fastgen.decoders.plan import LoadOptions
from fastgen.engine import Engine
from fastgen.errors import CheckpointError
from fastgen.hf.kv_rows import KvRows
from fastgen.hf.unfit import UnfitError
from fastgen.model_tensors import checkpoint_of_model

_MODULES = (
    modeling_gpt2.GPT2Model,
    modeling_gpt2.GPT2Block,
    modeling_gpt2.GPT2Attention,
    modeling_gpt2.GPT2MLP,
    *(Conv1D, nn.Embedding, nn.Linear, nn.LayerNorm, nn.Dropout, nn.ModuleList),
)
_ACTIVATIONS = ("transformers.activations", "torch.nn.modules.activation")
_CAPTURING = "transformers.utils.output_capturing"
# In 16 bits transformers computes in 16 bits. float16 has no fast arithmetic on a CPU: the decoder
# widens it.
_DTYPES = {"torch.float32": "float32", "torch.bfloat16": "bfloat16", "torch.float16": "auto"}


class PackedModel:
    """fastgen's side of one model. Thread-safe; copies and pickles of the model start without.

    Attributes:
        last_path: which way the last call went, "native", "forward" or "transformers".
        last_reason: why it did not go a faster way; "" if it did.
    """

    def __init__(self) -> None:
        self.last_path, self.last_reason = "", ""
        self._lock = threading.Lock()
        self._state: _State | None = None
        self._kv: KvRows | None = None
        self._refused = ""  # why these weights cannot be run

    def kv_rows(self, model: nn.Module) -> KvRows:
        """The decoder of the model's weights as they are now.

        Raises:
            UnfitError: these are not the modules, or not weights, that fastgen computes exactly.
        """
        with self._lock:
            if self._state is None or not self._state.holds():
                self._pack(model)
            if self._kv is None:
                raise UnfitError(self._refused)
            return self._kv

    def note(self, path: str, reason: object = "") -> None:
        self.last_path, self.last_reason = path, str(reason)

    def __deepcopy__(self, memo: object) -> PackedModel:
        return PackedModel()

    def __reduce__(self) -> Any:
        return PackedModel, ()

    def _pack(self, model: nn.Module) -> None:
        self._state = None
        if self._kv is not None:  # two packed copies at a time would be one too many
            self._kv.engine.close()
            self._kv = None
        state = _State(model)
        self._refused = _why_not(model)
        if not self._refused:
            try:
                self._kv = _packed(model)
            except (CheckpointError, ValueError) as error:
                self._refused = str(error)
        if self._refused:
            warnings.warn(
                f"fastgen leaves this model to transformers: {self._refused}", stacklevel=2
            )
        self._state = state


class _State:
    """What a model was made of: modules, parameters, and how often these had been written.

    Asked before every forward, so it is made to be compared fast: about 0.1 ms for 12 layers.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        self._parts = [_parts(module) for module in self._modules]
        self._parameters = list(model.parameters())
        self._versions = [_version(parameter) for parameter in self._parameters]

    def holds(self) -> bool:
        """Nothing has changed since; weights written through `.data` cannot be seen."""
        return self._parts == [_parts(module) for module in self._modules] and self._versions == [
            _version(parameter) for parameter in self._parameters
        ]


def _parts(module: nn.Module) -> tuple[Any, ...]:
    """A module's children and parameters, by identity, and whether it has hooks.

    `_State` keeps what it saw alive, so that no other object can have the same id.
    """
    return (
        *map(id, module._modules.values()),
        *map(id, module._parameters.values()),
        _is_hooked(module),
    )


def _is_hooked(module: nn.Module) -> bool:
    """transformers' own hooks, which look for hidden states, stay once they have been needed."""
    return bool(
        module._forward_pre_hooks
        or "forward" in module.__dict__
        or any(map(_is_foreign, module._forward_hooks.values()))
    )


def _is_foreign(hook: Any) -> bool:
    return getattr(hook, "__module__", "") != _CAPTURING


def _version(parameter: torch.Tensor) -> tuple[Any, ...]:
    """Changes when the parameter does. Those made in inference mode do not count writes."""
    written = -1 if parameter.is_inference() else parameter._version
    return written, parameter.data_ptr(), parameter.dtype, parameter.device


def _why_not(model: Any) -> str:
    """What makes this model something else than a GPT-2 with a head; "" if nothing does."""
    for name, module in model.named_modules():
        if module is model:
            continue
        kind = type(module)
        if kind not in _MODULES and kind.__module__ not in _ACTIVATIONS:
            return f"{name} is a {kind.__name__}"
        if _is_hooked(module):
            return f"{name} has a forward hook, or a forward of its own"
    if "forward" in model.__dict__:
        return "the model has a forward of its own"
    if model.lm_head.bias is not None:
        return "lm_head has a bias"
    devices = {parameter.device for parameter in model.parameters()}
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if len(devices) != 1 or len(dtypes) != 1:
        return "its parameters are on several devices, or of several dtypes"
    if str(model.dtype) not in _DTYPES:
        return f"its weights are {model.dtype}"
    return ""


def _packed(model: Any) -> KvRows:
    checkpoint: Checkpoint = checkpoint_of_model(model)
    options = LoadOptions(
        device=str(model.device),
        dtype=_DTYPES[str(model.dtype)],
        max_batch_size=1,  # it grows
        num_threads=torch.get_num_threads(),
    )
    decoder = build_decoder(checkpoint, plan_decoder(checkpoint, options))
    vocab_size = checkpoint.config.vocab_size
    return KvRows(Engine(decoder, vocab_size), vocab_size)
