"""GPT2LMHeadModel: transformers' own class, with fastgen's decoder and engine inside."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import transformers
from transformers import DynamicCache
from transformers.generation import GenerationMixin
from transformers.utils.generic import can_return_tuple

from fastgen.hf.assistants import drafter_of_call
from fastgen.hf.beams import beam_call, search_beams
from fastgen.hf.cache import BlockCache
from fastgen.hf.forward import fast_forward, new_cache
from fastgen.hf.functions import LOOPS
from fastgen.hf.modules import has_global_hooks
from fastgen.hf.not_native import NotNative
from fastgen.hf.packing import PackedModel
from fastgen.hf.sampling import generate_natively, native_call
from fastgen.hf.streamers import RowStreamers, as_streamer, readers_told_of_errors
from fastgen.hf.tracing import why_not_plain

_Own = transformers.GPT2LMHeadModel
_Method = TypeVar("_Method", bound=Callable[..., Any])
_FORWARD = tuple(inspect.signature(_Own.forward).parameters)[1:]
# What transformers' loops call: somebody may have put something else in its place.
_EACH_STEP = (
    *("__call__", "forward", "prepare_inputs_for_generation"),
    *(name for name in vars(GenerationMixin) if name in LOOPS.read and not name.endswith("__")),
)
_ASSISTED = inspect.signature(_Own._assisted_decoding)
_GENERATE = tuple(inspect.signature(_Own.generate).parameters)[1:]


def _in_place_of(method: Callable[..., Any]) -> Callable[[_Method], _Method]:
    """functools.wraps(method); for type checkers, what is decorated keeps its own type."""
    return cast("Callable[[_Method], _Method]", functools.wraps(method))


class GPT2LMHeadModel(_Own, GenerationMixin):  # type: ignore[misc, valid-type]
    """Use it as transformers' class of this name: the same calls, results, warnings and errors.

    It holds two copies of the weights: PyTorch's, and one packed for the decoder, made before the
    first call and again when weights have changed. KV blocks are added for as many rows as run at
    the same time. docs/transformers.md says which calls go which way.

    Attributes:
        last_path: which way the last call of `generate` or `forward` went: "native" (fastgen's
            engine), "forward" (transformers' loop on fastgen's decoder, or one forward of that), or
            "transformers" (its own forward).
        last_reason: why it did not go a faster way; "" if it did.
    """

    @classmethod
    def is_custom_code(cls) -> bool:
        """transformers initializes what a checkpoint lacks otherwise for classes defined elsewhere
        than in its own modules. This one stands for its own; a subclass is custom, as one of its.
        """
        found = cls.is_remote_code() if cls is GPT2LMHeadModel else super().is_custom_code()
        return bool(found)

    @property
    def last_path(self) -> str:
        return self._packed.last_path

    @property
    def last_reason(self) -> str:
        return self._packed.last_reason

    @can_return_tuple  # type: ignore[untyped-decorator]
    @_in_place_of(_Own.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # a trace is to hold transformers' operations
            return super().forward(*args, **kwargs)
        arguments = {**dict(zip(_FORWARD, args, strict=False)), **kwargs}
        try:
            output = fast_forward(self, self._packed, self._own_forward, arguments)
        except NotNative as unfit:
            reason = str(unfit)
        else:
            self._packed.note("forward")
            return output
        # Not in the handler: an error of transformers' is to have no other as its context.
        self._packed.note("transformers", reason)
        return super().forward(**arguments)

    @_in_place_of(_Own.generate)
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        arguments = {**dict(zip(_GENERATE, args, strict=False)), **kwargs}
        if arguments.get("streamer") is not None:
            arguments["streamer"] = as_streamer(arguments["streamer"])
        self._packed.note("")
        with readers_told_of_errors(arguments.get("streamer")):
            return super().generate(**arguments)

    def _sample(
        self,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        if isinstance(streamer, RowStreamers) and generation_config._eos_token_tensor is not None:
            streamer.eos_ids = frozenset(generation_config._eos_token_tensor.flatten().tolist())
        options = (logits_processor, stopping_criteria, generation_config)

        def native() -> Any:
            call = native_call(input_ids, *options, streamer, model_kwargs)
            return generate_natively(self._packed.kv_rows(self), call)

        def theirs() -> Any:
            own = super(GPT2LMHeadModel, self)._sample
            return own(input_ids, *options, synced_gpus, streamer, **model_kwargs)

        return self._first_way(native, theirs, synced_gpus, generation_config, model_kwargs)

    def _beam_search(
        self,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        **model_kwargs: Any,
    ) -> Any:
        options = (logits_processor, stopping_criteria, generation_config)

        def native() -> Any:
            call = beam_call(input_ids, *options, model_kwargs)
            return search_beams(self, self._packed.kv_rows(self), call)

        def theirs() -> Any:
            own = super(GPT2LMHeadModel, self)._beam_search
            return own(input_ids, *options, synced_gpus, **model_kwargs)

        return self._first_way(native, theirs, synced_gpus, generation_config, model_kwargs)

    @_in_place_of(_Own._assisted_decoding)
    def _assisted_decoding(self, *args: Any, **kwargs: Any) -> Any:
        arguments = _ASSISTED.bind(self, *args, **kwargs).arguments
        config, model_kwargs = arguments["generation_config"], arguments.get("model_kwargs", {})

        def native() -> Any:
            call = native_call(
                arguments["input_ids"], arguments["logits_processor"],
                arguments["stopping_criteria"], config, arguments.get("streamer"), model_kwargs,
            )  # fmt: skip
            kv = self._packed.kv_rows(self)
            drafter = drafter_of_call(kv, config, arguments, _packed_of)
            return generate_natively(kv, call, drafter)

        def theirs() -> Any:
            return super(GPT2LMHeadModel, self)._assisted_decoding(*args, **kwargs)

        synced_gpus = arguments.get("synced_gpus", False)
        return self._first_way(native, theirs, synced_gpus, config, model_kwargs)

    def _check_unseen(self, synced_gpus: bool) -> None:
        """fastgen's loops do not call the model: nobody may count on seeing each call."""
        if reason := why_not_plain(self.parameters()) or LOOPS.why_not():
            raise NotNative(reason)
        hooked = self._forward_hooks or self._forward_pre_hooks or has_global_hooks()
        changed = any(
            name in self.__dict__ or getattr(type(self), name) is not getattr(GPT2LMHeadModel, name)
            for name in _EACH_STEP
        )
        if synced_gpus or hooked or changed:
            raise NotNative("each forward has to be seen from outside")

    def _first_way(
        self,
        native: Callable[[], Any],
        theirs: Callable[[], Any],
        synced_gpus: bool,
        generation_config: Any,
        model_kwargs: dict[str, Any],
    ) -> Any:
        """fastgen's loop, or transformers' where that is not for this call."""
        try:
            self._check_unseen(synced_gpus)
            if why_not := self._packed.why_not(self):  # first: the caches of such a model differ
                raise NotNative(why_not)
            output = native()
        except NotNative as unfit:
            reason = str(unfit)
        else:
            self._packed.note("native")
            return output
        if isinstance(model_kwargs.get("past_key_values"), BlockCache):
            # the decoder cuts prompts itself; transformers' pieces may be padding in some rows
            generation_config.prefill_chunk_size = None
        try:
            return theirs()
        finally:
            self._packed.note(self.last_path, reason)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """transformers' choice; where that is the plain cache, and is new, blocks instead."""
        given = model_kwargs.get("past_key_values")
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        made: Any = model_kwargs.get("past_key_values")
        if given is not None or type(made) is not DynamicCache or made.offloading:
            return
        needs_tensors = any(
            model_kwargs.get(key) is not None for key in ("inputs_embeds", "token_type_ids")
        )
        if not (
            needs_tensors
            or generation_config.output_attentions
            or generation_config.output_hidden_states
            or self._packed.why_not(self)
        ):
            model_kwargs["past_key_values"] = new_cache(self, self._own_forward)

    def _own_forward(self, **kwargs: Any) -> Any:
        return super().forward(**kwargs)

    @property
    def _packed(self) -> PackedModel:
        packed: PackedModel | None = self.__dict__.get("_fastgen")
        if packed is None:  # at first, and after it was unpickled
            packed = self.__dict__["_fastgen"] = PackedModel()
        return packed


def _packed_of(model: Any) -> PackedModel | None:
    """fastgen's side of a model of a class that it runs."""
    return accelerate(model)._packed if type(model) in (GPT2LMHeadModel, _Own) else None


def accelerate(model: Any) -> GPT2LMHeadModel:
    """The fastgen model of a transformers GPT2LMHeadModel in memory: the same modules, weights,
    settings and mode, now and later. `model` itself stays what it is.

    Raises:
        TypeError: it is another kind of model, or a subclass, which may compute something else.
    """
    if isinstance(model, GPT2LMHeadModel):
        return model
    if type(model) is not _Own:
        raise TypeError(
            "accelerate takes a model whose class is transformers.GPT2LMHeadModel itself, not "
            f"{type(model).__name__}"
        )
    twin = GPT2LMHeadModel.__new__(GPT2LMHeadModel)
    object.__setattr__(twin, "__dict__", model.__dict__)  # one and the same
    return twin
