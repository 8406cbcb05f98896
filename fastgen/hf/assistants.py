"""transformers' assisted decoding: what drafts for a call, on fastgen's engine."""

from __future__ import annotations

from collections.abc import Collection, Mapping
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
    packed: PackedModel,
    kv: KvRows,
    config: Any,
    arguments: Mapping[str, Any],
    known: Collection[type],
) -> Drafter | None:
    """What drafts for a call of assisted decoding; None: what drafts for every row of the engine.

    How many tokens are drafted, the engine decides from what they cost and how often they are
    right.

    Args:
        arguments: of `_assisted_decoding`.
        known: classes of assistants that fastgen runs.

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
        return None if kv.engine.drafting.is_on else SuffixDrafter()
    assistant = arguments.get("assistant_model")
    if assistant is None:
        raise NotNative("drafts of another kind")
    tokenizers = [arguments.get(name) for name in ("tokenizer", "assistant_tokenizer")]
    if None not in tokenizers:
        raise NotNative("the assistant has another tokenizer")
    return _drafter(packed, assistant, kv.vocab_size, known)


def _drafter(
    packed: PackedModel, assistant: nn.Module, vocab_size: int, known: Collection[type]
) -> Drafter:
    """Of the assistant's weights as they are now, on a decoder that drafts for this model alone.

    Raises:
        NotNative: it is no model that fastgen runs, or has another vocabulary.
    """
    if type(assistant) not in known:
        raise NotNative(f"the assistant is a {type(assistant).__name__}")
    drafts = packed.assistants.setdefault(assistant, Assistant())
    with drafts.lock:
        kv = drafts.packed.kv_rows(assistant)
        if kv.vocab_size != vocab_size:
            raise NotNative("the assistant has another vocabulary")
        if drafts.drafter is None or kv is not drafts.kv:
            drafts.kv, drafts.drafter = kv, DraftModelDrafter(kv.decoder)
        return drafts.drafter
