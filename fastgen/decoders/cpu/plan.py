"""How the CPU decoder is set up for one checkpoint on one machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from fastgen.checkpoints.checkpoint import Checkpoint
from fastgen.checkpoints.packed import PackedHeader
from fastgen.checkpoints.tensor_names import EMBEDDING, HEAD
from fastgen.decoders.cpu.decoder import CpuDecoder
from fastgen.decoders.cpu.weights import CpuWeights, cache_key
from fastgen.decoders.machine import free_memory, granted_cores
from fastgen.decoders.memory import plan_memory
from fastgen.decoders.pack_cache import PackCache, chosen_folder
from fastgen.decoders.plan import (
    QUANTIZATIONS,
    SAMPLING_BYTES,
    DecoderPlan,
    LoadOptions,
    unmet,
)
from fastgen.native import native
from fastgen.sampling.definition import SCORED_AT_ONCE

_STEP_TOKENS = 256  # weights are read once a step: for more tokens that no longer matters
_MOST_INT8_INPUTS = 2**31 // (255 * 127)  # whose products' sum fits 32 bits


def plan_cpu(checkpoint: Checkpoint, options: LoadOptions, beside: int = 0) -> DecoderPlan:
    """See fastgen.decoders.select.plan_decoder."""
    _check(checkpoint, options)
    config = checkpoint.config
    limits = options.limits(config, _STEP_TOKENS, batch_invariant=True)
    seats, max_seq_len = limits.num_seats, limits.max_seq_len
    granted = granted_cores()
    num_threads = min(options.num_threads or granted, granted)
    dtype, weights = arithmetic_of(checkpoint, options)
    kv_dtype = dtype if options.kv_dtype == "auto" else options.kv_dtype
    shape = decoder_shape(
        checkpoint, dtype, weights, limits.max_tokens, limits.max_logits, kv_dtype=kv_dtype
    )
    weight_bytes, scratch_bytes, block_bytes = native.decoder_bytes(shape)
    scratch_bytes += native.sampler_bytes(seats, config.vocab_size, max_seq_len, num_threads)
    scratch_bytes += SCORED_AT_ONCE * config.vocab_size * SAMPLING_BYTES + beside
    memory = plan_memory(
        weights=weight_bytes,
        scratch=scratch_bytes,
        block_bytes=block_bytes,
        max_batch_size=seats,
        max_seq_len=max_seq_len,
        free=free_memory(),
        max_memory=options.max_memory,
    )
    return DecoderPlan(
        decoder="cpu",
        reason="it was asked for" if options.decoder == "cpu" else "the fastest on a CPU",
        device="cpu",
        dtype=dtype,
        weights=weights,
        num_threads=num_threads,
        limits=replace(limits, num_blocks=memory.num_blocks),
        memory=memory,
        kv_dtype=kv_dtype,
        cache=_cache(checkpoint, options),
        share_weights=options.share_weights,
    )


def build_cpu(checkpoint: Checkpoint, plan: DecoderPlan) -> CpuDecoder:
    """Take the weights from where they are packed, or read and pack them, a tensor at a time."""
    limits, num_threads = plan.limits, plan.num_threads or 1
    shape = decoder_shape(
        checkpoint,
        plan.dtype,
        plan.weights,
        limits.max_tokens,
        limits.max_logits,
        kv_dtype=plan.kv_dtype,
    )
    weights = CpuWeights(
        checkpoint,
        shape,
        num_blocks=limits.num_blocks,
        num_threads=num_threads,
        cache=plan.cache,
        share=plan.share_weights,
    )
    config = checkpoint.config
    return CpuDecoder(weights.decoder(), config, limits, plan.memory, num_threads=num_threads)


def is_cached(checkpoint: Checkpoint, plan: DecoderPlan) -> bool:
    """Whether the cache has a file for this model; it is not read.

    Raises:
        OSError: the cache's folder cannot be read, or may be another user's.
    """
    identity = None if plan.cache is None else checkpoint.identity()
    if plan.cache is None or identity is None:
        return False
    key = cache_key(identity, decoder_shape(checkpoint, plan.dtype, plan.weights, 1, 1))
    return any(entry.key == key for entry in PackCache(Path(plan.cache)).entries())


def write_packed_weights(checkpoint: Checkpoint, options: LoadOptions, file: int) -> None:
    """Pack the weights as these options of `load` say, and write them to a descriptor.

    Raises:
        OptionError: an option that cannot be met. CheckpointError: the checkpoint cannot be read,
            or holds values too large for the format. OSError: the file cannot be written.
    """
    _check(checkpoint, options)
    granted = granted_cores()
    num_threads = min(options.num_threads or granted, granted)
    shape = decoder_shape(checkpoint, *arithmetic_of(checkpoint, options), 1, 1)
    CpuWeights(checkpoint, shape, num_blocks=1, num_threads=num_threads).write(file)


def decoder_shape(
    checkpoint: Checkpoint,
    dtype: str,
    weights: str,
    max_tokens: int,
    max_logits: int,
    *,
    kv_dtype: str | None = None,
) -> dict[str, Any]:
    """The model's shape as the C++ decoder takes it; `kv_dtype` is of a DecoderPlan."""
    config = checkpoint.config
    layers = range(config.num_layers)
    return {
        "vocab_size": config.vocab_size,
        "max_positions": config.max_positions,
        "hidden_size": config.hidden_size,
        "num_layers": config.num_layers,
        "num_heads": config.num_heads,
        "inner_size": config.inner_size,
        "activation": config.activation,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "attention_scales": [config.attention_scale(layer) for layer in layers],
        "dtype": dtype,
        "weights": weights,
        "kv_dtype": kv_dtype or dtype,
        "tied": checkpoint.tied,
        "max_tokens": max_tokens,
        "max_logits": max_logits,
    }


def _check(checkpoint: Checkpoint, options: LoadOptions) -> None:
    config = checkpoint.config
    if native is None:
        raise unmet("decoder", "cpu", "fastgen's C++ extension was not built; use 'torch'")
    if not (options.is_cpu or options.device == "auto"):
        raise unmet("device", options.device, "decoder='cpu' runs on the CPU only")
    if options.quantize is None:
        return
    if options.dtype_name == "float16":
        raise unmet("dtype", "float16", "with quantize='int8' it is bfloat16 or float32")
    if max(config.hidden_size, config.inner_size) > _MOST_INT8_INPUTS:
        raise unmet("quantize", "int8", f"layers of more than {_MOST_INT8_INPUTS} inputs")


def arithmetic_of(checkpoint: Checkpoint, options: LoadOptions) -> tuple[str, str]:
    """The dtype of activations (and of KV, if nothing else is asked for), and how weights are kept.
    Both 16-bit kinds widen to float32 exactly.

    Raises:
        OptionError: the weights are packed already, and in another way.
    """
    name, packed = options.dtype_name, checkpoint.packed
    if packed is not None:
        return _packed_arithmetic(packed.header, options)
    if options.quantize is not None:
        return _named(name, options.quantize)
    if name == "auto":
        matrices = {
            info.dtype
            for key, info in checkpoint.tensors()
            if key in (EMBEDDING, HEAD) or (len(info.shape) == 2 and key.startswith("h."))
        }
        return "float32", checkpoint.dtype if len(matrices) == 1 else "float32"
    return _named(name, None)


def _packed_arithmetic(header: PackedHeader, options: LoadOptions) -> tuple[str, str]:
    """As the weights are packed, if nothing else was asked for."""
    found = header.dtype, header.weights
    quantize = header.weights if header.weights in QUANTIZATIONS else None
    told = f"{header.name} was packed with {_told(*found)}; pack it again for this"
    if options.quantize not in (None, quantize):
        raise unmet("quantize", options.quantize, told)
    if options.dtype_name != "auto" and _named(options.dtype_name, quantize) != found:
        raise unmet("dtype", options.dtype_name, told)
    return found


def _told(dtype: str, weights: str) -> str:
    return f"dtype={dtype!r}" if dtype == weights else f"{weights} weights and dtype={dtype!r}"


def _named(dtype: str, quantize: str | None) -> tuple[str, str]:
    """What the name of a dtype says of activations and weights."""
    if quantize is not None:
        return ("bfloat16" if dtype == "auto" else dtype), quantize
    return ("float32", dtype) if dtype == "float16" else (dtype, dtype)


def _cache(checkpoint: Checkpoint, options: LoadOptions) -> str | None:
    """The folder of the cache, if there is one and it is of use.

    Raises:
        OptionError: weights are to be shared, and there is no file that could be.
    """
    if checkpoint.packed is not None:
        return None
    folder = chosen_folder(options.cache)
    if options.share_weights and checkpoint.folder is None:
        raise unmet("share_weights", True, "the model is in memory, not in a file")
    if options.share_weights and folder is None:
        raise unmet("share_weights", True, "processes share a file of the cache, and there is none")
    return None if folder is None else str(folder)
