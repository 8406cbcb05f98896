"""How the CPU decoder is set up for one checkpoint on one machine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastgen.checkpoints.checkpoint import Checkpoint
from fastgen.checkpoints.config import GPT2Config
from fastgen.checkpoints.tensor_names import EMBEDDING, HEAD
from fastgen.decoders.cpu.decoder import CpuDecoder
from fastgen.decoders.machine import free_memory, granted_cores
from fastgen.decoders.memory import plan_memory
from fastgen.decoders.plan import SAMPLING_BYTES, DecoderPlan, LoadOptions, unmet
from fastgen.native import native
from fastgen.sampling.definition import SCORED_AT_ONCE

_STEP_TOKENS = 256  # weights are read once a step: for more tokens that no longer matters
_MOST_INT8_INPUTS = 2**31 // (255 * 127)  # whose products' sum fits 32 bits


def plan_cpu(checkpoint: Checkpoint, options: LoadOptions, beside: int = 0) -> DecoderPlan:
    """See fastgen.decoders.select.plan_decoder."""
    _check(checkpoint.config, options)
    config = checkpoint.config
    limits = options.limits(config, _STEP_TOKENS, batch_invariant=True)
    seats, max_seq_len = limits.num_seats, limits.max_seq_len
    granted = granted_cores()
    num_threads = min(options.num_threads or granted, granted)
    dtype, weights = _dtypes(checkpoint, options)
    shape = decoder_shape(checkpoint, dtype, weights, limits.max_tokens, limits.max_logits)
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
    )


def build_cpu(checkpoint: Checkpoint, plan: DecoderPlan) -> CpuDecoder:
    """Read and pack the weights, one tensor at a time."""
    limits = plan.limits
    shape = decoder_shape(
        checkpoint, plan.dtype, plan.weights, limits.max_tokens, limits.max_logits
    )
    return CpuDecoder(checkpoint, shape, limits, plan.memory, num_threads=plan.num_threads or 1)


def decoder_shape(
    checkpoint: Checkpoint, dtype: str, weights: str, max_tokens: int, max_logits: int
) -> dict[str, Any]:
    """The model's shape as the C++ decoder takes it."""
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
        "tied": checkpoint.tied,
        "max_tokens": max_tokens,
        "max_logits": max_logits,
    }


def _check(config: GPT2Config, options: LoadOptions) -> None:
    if native is None:
        raise unmet("decoder", "cpu", "fastgen's C++ extension was not built; use 'torch'")
    if not (options.is_cpu or options.device == "auto"):
        raise unmet("device", options.device, "decoder='cpu' runs on the CPU only")
    if options.kv_dtype != "auto":
        raise unmet(
            "kv_dtype",
            options.kv_dtype,
            "the CPU decoder keeps keys and values as activations are; only the CUDA decoder "
            "(device='cuda') can do this",
        )
    if options.quantize is None:
        return
    if options.dtype_name == "float16":
        raise unmet("dtype", "float16", "with quantize='int8' it is bfloat16 or float32")
    if max(config.hidden_size, config.inner_size) > _MOST_INT8_INPUTS:
        raise unmet("quantize", "int8", f"layers of more than {_MOST_INT8_INPUTS} inputs")


def _dtypes(checkpoint: Checkpoint, options: LoadOptions) -> tuple[str, str]:
    """Of activations and KV, and of weights. Both 16-bit kinds widen to float32 exactly."""
    name = options.dtype_name
    if options.quantize is not None:
        return ("bfloat16" if name == "auto" else name), options.quantize
    if name == "auto":
        matrices = {
            info.dtype
            for key, info in checkpoint.tensors()
            if key in (EMBEDDING, HEAD) or (len(info.shape) == 2 and key.startswith("h."))
        }
        return "float32", checkpoint.dtype if len(matrices) == 1 else "float32"
    return ("float32", name) if name == "float16" else (name, name)
