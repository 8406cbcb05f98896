"""The packed copy of a model's weights: made when first needed, and when they have changed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from fastgen.checkpoints.checkpoint import Checkpoint
from fastgen.checkpoints.in_memory import checkpoint_of_model
from fastgen.decoders.plan import LoadOptions
from fastgen.decoders.select import build_decoder, plan_decoder
from fastgen.engine.engine import Engine
from fastgen.engine.forks import ForkLock
from fastgen.errors import CheckpointError
from fastgen.hf.cache import BlockCache
from fastgen.hf.checksums import checksums
from fastgen.hf.kv_rows import KvRows
from fastgen.hf.modules import (
    SeenModules,
    settings_of,
    why_not_mode,
    why_not_modules,
    why_not_settings,
)
from fastgen.hf.not_native import NotNative
from fastgen.speculation.drafter import Drafter
from fastgen.speculation.suffix import SuffixDrafter

# Not a warning of Python's: a program that turns those into errors is to run as with transformers.
logger = logging.getLogger("fastgen.hf")

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
        self._lock = ForkLock()
        self._state: _State | None = None
        self._kv: KvRows | None = None
        self._refused = ""  # why these weights cannot be run
        self._logged: set[str] = set()
        # For the engines of other models, whose calls it assists.
        self.drafts_for: WeakKeyDictionary[KvRows, Assistant] = WeakKeyDictionary()

    def kv_rows(self, model: nn.Module, cache: BlockCache | None = None) -> KvRows:
        """The decoder of the model's weights as they are now.

        Args:
            cache: the call's. A call that goes on where another one of the same weights
                ended, as each step of a loop does, trusts PyTorch's counters and a few samples;
                every other reads all weights (`checksums`).

        Raises:
            NotNative: these are not the modules, or not weights, that fastgen computes exactly.
        """
        return self._kv_rows(model, goes_on=lambda: cache is not None and cache.continues(self._kv))

    def why_not(self, model: nn.Module) -> str:
        """Why the model cannot be run; "" if it can. Weights are not read, unless never before."""
        try:
            self._kv_rows(model, goes_on=lambda: True)
        except NotNative as unfit:
            return str(unfit)
        return ""

    def _kv_rows(self, model: nn.Module, *, goes_on: Callable[[], bool]) -> KvRows:
        if reason := why_not_settings(model):
            raise NotNative(reason)
        with self._lock:
            try:
                if self._state is None or not self._state.holds(every_byte=not goes_on()):
                    if reason := why_not_mode(model.modules()):
                        raise NotNative(reason)
                    self._pack(model)
            except RuntimeError as error:  # of tensors without memory, as torch.func has them
                raise NotNative(str(error)) from error
            if self._kv is None or self._state is None:
                raise NotNative(self._refused)
            if reason := self._state.modules.why_not_mode():
                raise NotNative(reason)
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
        refused = why_not_modules(model)
        kept = None
        if not refused and self._state is not None and self._state.has_weights_of(model):
            kept = self._kv
        # Calls that run have their own reference, and end with the weights they began with. If
        # there are none, this frees the memory first: two packed copies would be one too many.
        self._state = self._kv = None
        state = _State(model, refused=bool(refused))  # what is written from now on is seen later
        if not refused:
            try:
                self._kv = kept or _packed(model, self._log_once)
            except (CheckpointError, ValueError) as error:
                refused = str(error)
        self._refused = refused
        self._state = state
        if refused:
            self._log_once(f"fastgen leaves this model to transformers, as long as {refused}")

    def _log_once(self, reason: str) -> None:
        """Say what makes this model slower than its user expects."""
        if reason not in self._logged:
            self._logged.add(reason)
            logger.warning(reason)


class Assistant:
    """A model that drafts for another one, with a decoder of its own.

    `kv`: what `drafter` was made of; of other weights there is another.
    """

    def __init__(self) -> None:
        self.lock, self.packed = ForkLock(), PackedModel()
        self.kv: KvRows | None = None
        self.drafter: Drafter | None = None


class _State:
    """What a model was made of: modules, parameters, how often these had been written, and, for
    what is written past PyTorch's counters, a checksum of all bytes of each and samples.

    All but the checksums is asked before every forward, so it is made to be compared fast: about
    0.5 ms for 12 layers.
    """

    def __init__(self, model: Any, *, refused: bool) -> None:
        self.modules = SeenModules(model)
        self._config, self._refused = model.config, refused
        self._settings = settings_of(model.config)
        self._names = _names(model)
        self._parameters = list(model.parameters())
        self._versions = [_version(parameter) for parameter in self._parameters]
        self._places = [_places(parameter) for parameter in self._parameters]
        self._samples = self._sampled()
        self._checksums = None if refused else self._summed()

    def holds(self, *, every_byte: bool) -> bool:
        """Nothing has changed since; `every_byte` reads all weights."""
        return (
            self.modules.are_the_same()
            # Of a packed model the modules decide; one that is refused may fit the config later.
            and not (self._refused and self._settings != settings_of(self._config))
            and self._has_same_bytes(every_byte=every_byte)
        )

    def has_weights_of(self, model: Any) -> bool:
        """Whether a model, whose modules and config may be others, would be packed the same."""
        return (
            not self._refused
            and self._settings == settings_of(model.config)
            and self._names == _names(model)
            and self._has_same_bytes(every_byte=True)
        )

    def _has_same_bytes(self, *, every_byte: bool) -> bool:
        return (
            self._versions == [_version(parameter) for parameter in self._parameters]
            and torch.equal(self._samples, self._sampled())
            and (not every_byte or self._checksums is None or self._checksums == self._summed())
        )

    @torch.no_grad()
    def _sampled(self) -> torch.Tensor:
        return torch.cat(self._places).view(torch.uint8)

    def _summed(self) -> list[int]:
        return checksums(self._parameters, torch.get_num_threads())


def _names(model: nn.Module) -> dict[str, int]:
    """Of all parameters, each by identity."""
    return {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}


_SAMPLES = 16  # of each parameter


def _places(parameter: torch.Tensor) -> torch.Tensor:
    """A view of a few of its values, in different columns of a matrix."""
    step = max(1, parameter.numel() // _SAMPLES)
    width = parameter.shape[-1] if parameter.dim() else 1
    if step > width:
        step += width // _SAMPLES + 1 - step % width  # each stands further on in its row
    flat = parameter.detach()
    return flat.view(-1)[::step] if flat.is_contiguous() else flat.new_empty(0)


def _version(parameter: torch.Tensor) -> tuple[Any, ...]:
    """Changes when the parameter does. Those made in inference mode do not count writes."""
    written = -1 if parameter.is_inference() else parameter._version
    layout = parameter.shape, parameter.stride(), parameter.dtype, parameter.device
    return written, parameter.data_ptr(), *layout


_PARTS = ("transformer", "lm_head")  # what a model has beside them, its forward does not call


def _packed(model: Any, log: Callable[[str], None]) -> KvRows:
    parameters = model.named_parameters(remove_duplicate=False)
    checkpoint: Checkpoint = checkpoint_of_model(
        model,
        {name: one for name, one in parameters if name.partition(".")[0] in _PARTS},
    )
    options = LoadOptions(
        device=str(model.device),
        dtype=_DTYPES[str(model.dtype)],
        max_batch_size=1,  # it grows
        num_threads=torch.get_num_threads(),
    )
    decoder = build_decoder(checkpoint, plan_decoder(checkpoint, options, warn=log))
    vocab_size = checkpoint.config.vocab_size
    engine = Engine(decoder, vocab_size)
    if decoder.limits.batch_invariant:  # then no token depends on guesses
        engine.drafting.use([SuffixDrafter()])
    return KvRows(engine, vocab_size)
