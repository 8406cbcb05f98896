"""transformers' assisted decoding: what drafts for a call, on fastgen's engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from fastgen.hf.kv_rows import KvRows
from fastgen.hf.not_native import NotNative
from fastgen.hf.packing import Assistant, PackedModel
from fastgen.speculation.draft_model import DraftModelDrafter
from fastgen.speculation.drafter import Drafter
from fastgen.speculation.suffix import SuffixDrafter

# Other ways to draft, which transformers' loop runs.
_OTHER_WAYS = ("assistant_early_exit", "use_mtp", "speculation_type")


def drafter_of_call(
    kv: KvRows,
    config: Any,
    arguments: Mapping[str, Any],
    packed_of: Callable[[nn.Module], PackedModel | None],
) -> Drafter | None:
    """What drafts for a call of assisted decoding; None: what drafts for every row of the engine.

    How many tokens are drafted, the engine decides from what they cost and how often they are
    right.

    Args:
        arguments: of `_assisted_decoding`.
        packed_of: fastgen's side of an assistant; None of a model that it does not run.

    Raises:
        NotNative: transformers' loop has to run it, or to refuse it.
    """
    cached = arguments.get("model_kwargs", {})
    if len(arguments["input_ids"]) != 1 or not cached.get("use_cache"):
        raise NotNative("transformers refuses it")
    if cached.get("past_key_values") is None:
        raise NotNative("there is no cache")
    for way in _OTHER_WAYS:
        if getattr(config, way, None):
            raise NotNative(f"drafts of {way}")
    if getattr(config, "prompt_lookup_num_tokens", None) is not None:
        return None if kv.engine.drafting.drafters else SuffixDrafter()
    assistant = arguments.get("assistant_model")
    if assistant is None:
        raise NotNative("drafts of another kind")
    tokenizers = [arguments.get(name) for name in ("tokenizer", "assistant_tokenizer")]
    if None not in tokenizers:
        raise NotNative("the assistant has another tokenizer")
    own = packed_of(assistant)
    if own is None:
        raise NotNative(f"the assistant is a {type(assistant).__name__}")
    return _drafter(assistant, own.drafts_for.setdefault(kv, Assistant()), kv.vocab_size)


def _drafter(model: nn.Module, assistant: Assistant, vocab_size: int) -> Drafter:
    """Of the assistant's weights as they are now, on a decoder that drafts for one engine alone.

    Raises:
        NotNative: they cannot be run, or their vocabulary is another.
    """
    with assistant.lock:
        kv = assistant.packed.kv_rows(model)
        if kv.vocab_size != vocab_size:
            raise NotNative("the assistant has another vocabulary")
        if assistant.drafter is None or kv is not assistant.kv:
            assistant.kv, assistant.drafter = kv, DraftModelDrafter(kv.decoder)
        return assistant.drafter
