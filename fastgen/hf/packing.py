"""The packed copy of a model's weights: made when first needed, and when they have changed."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.gpt2 import modeling_gpt2
from transformers.pytorch_utils import Conv1D

from fastgen.checkpoints.checkpoint import Checkpoint
from fastgen.checkpoints.in_memory import checkpoint_of_model
from fastgen.decoders.plan import LoadOptions
from fastgen.decoders.select import build_decoder, plan_decoder
from fastgen.engine.engine import Engine
from fastgen.errors import CheckpointError
from fastgen.hf.cache import BlockCache
from fastgen.hf.checksums import checksums
from fastgen.hf.kv_rows import KvRows
from fastgen.hf.not_native import NotNative

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

    def kv_rows(self, model: nn.Module, *, continues: BlockCache | None = None) -> KvRows:
        """The decoder of the model's weights as they are now.

        Args:
            continues: the call's cache. A call that goes on where another one of the same weights
                ended, as each step of a loop does, trusts PyTorch's counters and a few samples;
                every other reads all weights (`checksums`).

        Raises:
            NotNative: these are not the modules, or not weights, that fastgen computes exactly.
        """
        with self._lock:
            try:
                goes_on = continues is not None and continues.continues(self._kv)
                if self._state is None or not self._state.holds(every_byte=not goes_on):
                    if _drops_out(model.modules()):
                        raise NotNative("dropout is active")
                    self._pack(model)
            except RuntimeError as error:  # of tensors without memory, as torch.func has them
                raise NotNative(str(error)) from error
            if self._kv is None or self._state is None:
                raise NotNative(self._refused)
            if self._state.drops_out():
                raise NotNative("dropout is active")
            return self._kv

    def forget(self) -> None:
        """The weights are being trained: pack them again before they are used."""
        self._state = None

    def note(self, path: str, reason: object = "") -> None:
        self.last_path, self.last_reason = path, str(reason)

    def __deepcopy__(self, memo: object) -> PackedModel:
        return PackedModel()

    def __reduce__(self) -> Any:
        """As None: a model's pickle can be read where there is no fastgen."""
        return type(None), ()

    def _pack(self, model: nn.Module) -> None:
        # Calls that run have their own reference, and end with the weights they began with. If
        # there are none, this frees the memory first: two packed copies would be one too many.
        self._state = self._kv = None
        refused = _why_not(model)
        state = _State(model, summed=not refused)  # what is written from now on is seen later
        if not refused:
            try:
                self._kv = _packed(model)
            except (CheckpointError, ValueError) as error:
                refused = str(error)
        if refused and refused != self._refused:
            warnings.warn(
                f"fastgen leaves this model to transformers, as long as {refused}", stacklevel=2
            )
        self._refused = refused
        self._state = state


def _drops_out(modules: Iterable[nn.Module]) -> bool:
    """Whether a forward is random. Attention asks for its own mode, not for its dropout's."""
    return any(
        module.training
        and (
            (isinstance(module, nn.Dropout) and module.p > 0)
            or (isinstance(module, modeling_gpt2.GPT2Attention) and module.attn_dropout.p > 0)
        )
        for module in modules
    )


class _State:
    """What a model was made of: modules, parameters, how often these had been written, and, for
    what is written past PyTorch's counters, a checksum of all bytes of each and samples.

    All but the checksums is asked before every forward, so it is made to be compared fast: about
    0.5 ms for 12 layers.
    """

    def __init__(self, model: Any, *, summed: bool) -> None:
        self._config, self._attention = model.config, model.config._attn_implementation
        self._modules = list(model.modules())
        self._parts = [_parts(module) for module in self._modules]
        self._parameters = list(model.parameters())
        self._versions = [_version(parameter) for parameter in self._parameters]
        self._places = [_places(parameter) for parameter in self._parameters]
        self._samples = self._sampled()
        self._checksums = self._summed() if summed else None

    def holds(self, *, every_byte: bool) -> bool:
        """Nothing has changed since; `every_byte` reads all weights."""
        return (
            self._attention == self._config._attn_implementation
            and self._parts == [_parts(module) for module in self._modules]
            and self._versions == [_version(parameter) for parameter in self._parameters]
            and torch.equal(self._samples, self._sampled())
            and (
                not every_byte or self._checksums is None or self._checksums == self._summed()
            )
        )

    def drops_out(self) -> bool:
        return _drops_out(self._modules)

    @torch.no_grad()
    def _sampled(self) -> torch.Tensor:
        return torch.cat(self._places).view(torch.uint8)

    def _summed(self) -> list[int]:
        return checksums(self._parameters, torch.get_num_threads())


_SAMPLES = 16  # of each parameter


def _places(parameter: torch.Tensor) -> torch.Tensor:
    """A view of a few of its values, in different columns of a matrix."""
    step = max(1, parameter.numel() // _SAMPLES)
    width = parameter.shape[-1] if parameter.dim() else 1
    if step > width:
        step += width // _SAMPLES + 1 - step % width  # each stands further on in its row
    flat = parameter.detach()
    return flat.view(-1)[::step] if flat.is_contiguous() else flat.new_empty(0)


def _parts(module: nn.Module) -> tuple[Any, ...]:
    """What a module computes with beside its parameters' values: children and parameters by
    identity, numbers, hooks.

    `_State` keeps what it saw alive, so that no other object can have the same id.
    """
    own = module.__dict__
    return (
        *map(id, module._modules.values()),
        *map(id, module._parameters.values()),
        *(own[name] for name in _NUMBERS if name in own),
        _is_hooked(module),
    )


# Of nn.LayerNorm, GPT2Attention:
_NUMBERS = (
    *("eps", "scaling", "scale_attn_weights", "scale_attn_by_inverse_layer_idx"),
    *("reorder_and_upcast_attn", "layer_idx", "num_heads", "head_dim", "is_causal"),
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


def has_global_hooks() -> bool:
    """Hooks that PyTorch calls for every module there is."""
    hooks = torch.nn.modules.module
    return bool(hooks._global_forward_hooks or hooks._global_forward_pre_hooks)


def _version(parameter: torch.Tensor) -> tuple[Any, ...]:
    """Changes when the parameter does. Those made in inference mode do not count writes."""
    written = -1 if parameter.is_inference() else parameter._version
    return written, parameter.data_ptr(), parameter.dtype, parameter.device


def _why_not(model: Any) -> str:
    """What makes this model something else than a GPT-2 with a head; "" if nothing does."""
    activation = type(ACT2FN[model.config.activation_function])
    for name, module in model.named_modules():
        if module is model:
            continue
        kind = type(module)
        if kind not in _MODULES and kind is not activation:
            return f"{name} is a {kind.__name__}"
        if _is_hooked(module):
            return f"{name} has a forward hook, or a forward of its own"
        if isinstance(module, nn.LayerNorm) and module.eps != model.config.layer_norm_epsilon:
            return f"{name} has another epsilon than config.layer_norm_epsilon"
        if isinstance(module, modeling_gpt2.GPT2Attention) and _differs(module, model.config):
            return f"{name} is not what the config says"
    if has_global_hooks():
        return "there are hooks on all modules"
    if model.config.scale_attn_by_inverse_layer_idx and any(
        block.attn.layer_idx != at for at, block in enumerate(model.transformer.h)
    ):
        return "its layers stand in another order than their scales"
    if "forward" in model.__dict__:
        return "the model has a forward of its own"
    if model.lm_head.bias is not None:
        return "lm_head has a bias"
    return _why_not_weights(model)


def _differs(attention: Any, config: Any) -> bool:
    """Whether it computes with other numbers than one made of the config."""
    with torch.device("meta"):
        fresh = modeling_gpt2.GPT2Attention(config, layer_idx=attention.layer_idx)
    return any(getattr(attention, n, None) != getattr(fresh, n, None) for n in _NUMBERS)


def _why_not_weights(model: Any) -> str:
    devices = {parameter.device for parameter in model.parameters()}
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if len(devices) != 1 or len(dtypes) != 1:
        return "its parameters are on several devices, or of several dtypes"
    if model.device.type == "meta":
        return "its weights are on no device"
    if str(model.dtype) not in _DTYPES:
        return f"its weights are {model.dtype}"
    if model.config._attn_implementation not in _ATTENTION:
        return f"its attention is {model.config._attn_implementation!r}"
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
