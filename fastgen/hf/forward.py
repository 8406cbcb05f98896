"""GPT2LMHeadModel.forward on fastgen's decoder.

Shapes: B rows, T new tokens, S tokens in the cache, K tokens whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions

from fastgen.hf.cache import BlockCache, Bools, Compute
from fastgen.hf.gradients import Again, differentiable
from fastgen.hf.kv_rows import Ints
from fastgen.hf.not_native import NotNative, check_known
from fastgen.hf.packing import PackedModel
from fastgen.hf.tracing import why_no_later_graph, why_not_plain

OwnForward = Callable[..., Any]

ID_DTYPES = (torch.int64, torch.int32)  # what an embedding takes
_KNOWN = {
    *("input_ids", "past_key_values", "attention_mask", "position_ids", "labels", "use_cache"),
    *("logits_to_keep", "return_dict", "num_items_in_batch", "cache_position", "shift_labels"),
    *("tokenizer", "assistant_tokenizer"),  # generate passes them on
}
# Arguments that mean nothing with these values; others with the same values may mean something.
UNSET = {
    **dict.fromkeys(("token_type_ids", "inputs_embeds"), (None,)),
    **dict.fromkeys(("encoder_hidden_states", "encoder_attention_mask"), (None,)),
    **dict.fromkeys(("output_attentions", "output_hidden_states"), (None, False)),
}


@dataclass(slots=True)
class ForwardCall:
    """The arguments of one call, checked and on the host."""

    token_ids: Ints  # (B, T)
    mask: Bools | None  # (B, S + T)
    positions: Ints  # (B, T)
    columns: Ints  # (K,) of the T
    cache: BlockCache
    use_cache: bool

    @property
    def num_computed(self) -> int:
        """Of the last T tokens, those whose logits are computed."""
        return int(self.token_ids.shape[1] - self.columns.min())


def fast_forward(
    model: Any, packed: PackedModel, own: OwnForward, arguments: Mapping[str, Any]
) -> CausalLMOutputWithCrossAttentions:
    """What transformers' forward returns for these arguments.

    Raises:
        NotNative: that forward has to do it; no argument has changed.
        IndexError: a token or position is not in the model's tables, as transformers raises.
    """
    parameters = list(model.parameters())
    needs_grad = torch.is_grad_enabled() and any(p.requires_grad for p in parameters)
    if needs_grad and model.training:
        packed.forget()
        raise NotNative("training with gradients")
    given = [value for value in arguments.values() if isinstance(value, Tensor)]
    reason = why_not_plain([*parameters, *given])
    if not reason and any(tensor.is_meta for tensor in (*parameters, *given)):
        reason = "there are tensors without memory"
    if needs_grad and not reason:
        reason = why_no_later_graph(model.device.type)
    if reason:
        raise NotNative(reason)
    call = _call(model, own, arguments)
    kv = packed.kv_rows(model, call.cache)
    check_tokens(call.token_ids, kv.vocab_size)
    check_positions(call.positions, kv.num_positions)
    past = call.cache.get_seq_length()
    computed = call.cache.extend(
        kv, call.token_ids, call.mask, call.positions, call.num_computed
    )  # (B, n, V)
    logits = torch.from_numpy(computed)
    first = call.token_ids.shape[1] - call.num_computed
    if call.columns.tolist() != list(range(first, call.token_ids.shape[1])):
        logits = logits[:, torch.from_numpy(call.columns - first)]
    logits = logits.to(device=model.device, dtype=_output_dtype(model))  # (B, K, V)
    if not needs_grad and call.cache.num_constant >= past:
        call.cache.num_constant = call.cache.get_seq_length()
    if needs_grad:
        logits = differentiable(model, logits, _again(call, logits))
    loss, labels = None, arguments.get("labels")
    if labels is not None:
        extra = {
            key: arguments[key]
            for key in ("num_items_in_batch", "shift_labels")
            if key in arguments
        }
        loss = model.loss_function(logits, labels, vocab_size=model.config.vocab_size, **extra)
    return CausalLMOutputWithCrossAttentions(
        loss=loss, logits=logits, past_key_values=call.cache if call.use_cache else None
    )


def _output_dtype(model: Any) -> torch.dtype:
    kind = model.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    dtype: torch.dtype = model.dtype
    return dtype


def _call(model: Any, own: OwnForward, arguments: Mapping[str, Any]) -> ForwardCall:
    input_ids = arguments.get("input_ids")
    check_known(arguments, _KNOWN, UNSET)
    for key in ("output_attentions", "output_hidden_states"):
        if getattr(model.config, key, False):
            raise NotNative(f"config.{key} is set")
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or not input_ids.numel():
        raise NotNative("input_ids is not a tensor (B, T)")
    if input_ids.dtype not in ID_DTYPES:
        raise NotNative("input_ids are no ids")
    cache = arguments.get("past_key_values")
    use_cache = arguments.get("use_cache")
    use_cache = model.config.use_cache if use_cache is None else bool(use_cache)
    if cache is None:
        if not use_cache and arguments.get("attention_mask") is None:
            _check_unpacked(arguments.get("position_ids"))
        cache = new_cache(model, own)
    elif type(cache) is not BlockCache or cache.has_tensors:
        raise NotNative("past_key_values is another kind of cache")
    past, (batch_size, length) = cache.get_seq_length(), input_ids.shape
    if model.transformer is not model._modules.get("transformer"):
        raise NotNative("an attribute hides the transformer")
    if past == 0:
        model.transformer.warn_if_padding_and_no_attention_mask(
            input_ids, arguments.get("attention_mask")
        )
    mask = _mask(arguments.get("attention_mask"), batch_size, past + length)
    columns = _columns(arguments.get("logits_to_keep", 0), length)
    if mask is not None and not mask[:, past:][:, columns.min() :].all():
        raise NotNative("logits of padding are wanted")
    positions = _positions(arguments.get("position_ids"), batch_size, past, length)
    if model.config._attn_implementation not in (None, "eager", "sdpa"):
        _check_consecutive(positions)  # others may read packed sequences out of them at any time
    return ForwardCall(
        token_ids=input_ids.cpu().numpy().astype(np.int64),
        mask=mask,
        positions=positions,
        columns=columns,
        cache=cache,
        use_cache=use_cache,
    )


def new_cache(model: Any, own: OwnForward) -> BlockCache:
    """An empty one, whose tensors, if wanted, are made by transformers' own forward."""
    return BlockCache(computing_cache(model, own))


def computing_cache(model: Any, own: OwnForward) -> Compute:
    """A function that makes transformers' own cache of tokens, without gradients."""

    def compute(token_ids: Tensor, mask: Tensor, positions: Tensor) -> Any:
        tensors = DynamicCache(config=model.config)
        if token_ids.numel():
            ids, mask, positions = (each.to(model.device) for each in (token_ids, mask, positions))
            with torch.no_grad():
                own(
                    input_ids=ids,
                    attention_mask=mask.long(),
                    position_ids=positions,
                    past_key_values=tensors,
                    use_cache=True,
                    logits_to_keep=1,
                )
        return tensors

    return compute


def check_tokens(token_ids: Ints, vocab_size: int) -> None:
    """Raise what the embedding would."""
    if token_ids.min() < 0 or token_ids.max() >= vocab_size:
        wrong = token_ids[(token_ids < 0) | (token_ids >= vocab_size)].flat[0]
        raise IndexError(
            f"index out of range in self: token id {wrong}, of a vocabulary of {vocab_size}"
        )


def check_positions(positions: Ints, num_positions: int) -> None:
    """Raise what the position embedding would."""
    if positions.min() < 0 or positions.max() >= num_positions:
        wrong = positions.max() if positions.min() >= 0 else positions.min()
        raise IndexError(
            f"index out of range in self: position {wrong}, of a model with {num_positions}"
        )


def _mask(mask: Any, batch_size: int, length: int) -> Bools | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise NotNative("attention_mask is not a tensor (B, S + T)")
    if mask.shape != (batch_size, length):
        raise NotNative("attention_mask is not as long as cache and input together")
    attended: Bools = (mask != 0).cpu().numpy()
    return attended


def _columns(logits_to_keep: Any, length: int) -> Ints:
    if isinstance(logits_to_keep, Tensor):
        if logits_to_keep.dtype not in (*ID_DTYPES, torch.bool):
            raise NotNative("logits_to_keep is of another dtype than indices have")
        columns: Ints = np.arange(length)[logits_to_keep.cpu().numpy()]
    else:
        if not isinstance(logits_to_keep, int):
            raise NotNative("logits_to_keep is not a number")
        columns = np.arange(length)[-logits_to_keep:]
    if columns.ndim != 1 or not len(columns):
        raise NotNative("logits_to_keep keeps nothing, or is not a list")
    return columns


def _positions(position_ids: Any, batch_size: int, past: int, length: int) -> Ints:
    if position_ids is None:
        return np.broadcast_to(np.arange(past, past + length), (batch_size, length))
    if not isinstance(position_ids, Tensor) or position_ids.shape not in (
        (length,),
        (1, length),
        (batch_size, length),
    ):
        raise NotNative("position_ids are not (B, T)")
    if position_ids.dtype not in ID_DTYPES:
        raise NotNative("position_ids are no integers that an embedding takes")
    return np.broadcast_to(position_ids.cpu().numpy().astype(np.int64), (batch_size, length))


def _check_unpacked(position_ids: Any) -> None:
    """Without a mask and a cache, positions that do not count up by 1 begin another sequence in the
    same row for transformers (`find_packed_sequence_indices`); it does not see the one before."""
    if isinstance(position_ids, Tensor):
        if position_ids.dim() != 2:
            raise NotNative("position_ids are not (B, T)")
        _check_consecutive(position_ids.cpu().numpy())


def _check_consecutive(positions: Ints) -> None:
    if (np.diff(positions, axis=1) != 1).any():
        raise NotNative("position_ids are of packed sequences")


def _again(call: ForwardCall, logits: Tensor) -> Again:
    """A function that computes a call's logits with transformers' forward."""
    cache, device, constant = call.cache, logits.device, call.cache.num_constant
    ids, mask, positions = (
        torch.from_numpy(np.ascontiguousarray(array)).to(device)
        for array in (cache.token_ids, cache.mask, cache.positions)
    )
    columns = torch.from_numpy(call.columns).to(device) + ids.shape[1] - call.token_ids.shape[1]

    def again(model: Any) -> Tensor:
        beginning = (array[:, :constant] for array in (ids, mask, positions))
        compute = computing_cache(model, model.forward)
        output = model.forward(
            input_ids=ids[:, constant:],
            attention_mask=mask.long(),
            position_ids=positions[:, constant:],
            past_key_values=compute(*beginning) if constant else None,
            use_cache=constant > 0,
            logits_to_keep=columns - constant,
            return_dict=True,
        )
        tensor: Tensor = output.logits.to(logits.dtype)
        return tensor

    return again
