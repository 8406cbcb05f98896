"""How the CUDA decoder is set up for one checkpoint on one device."""

from __future__ import annotations

import os
from dataclasses import replace

import torch

from fastgen.checkpoints.checkpoint import Checkpoint
from fastgen.checkpoints.config import GPT2Config
from fastgen.decoders.cuda.decoder import CudaDecoder
from fastgen.decoders.cuda.inputs import inputs_size
from fastgen.decoders.cuda.sampler import sampler_bytes
from fastgen.decoders.cuda.weights import CudaWeights, weight_bytes
from fastgen.decoders.interface import Capacity
from fastgen.decoders.memory import BLOCK_SIZE, plan_memory
from fastgen.decoders.plan import SAMPLING_BYTES, DecoderPlan, LoadOptions, unmet
from fastgen.decoders.torch.plan import chosen_device, chosen_dtype, free_device_memory
from fastgen.kernels.launch import INTERPRETED, SHARED_MEMORY, Settings

MOST_HEAD_DIM = 128
_STEP_TOKENS = 8192
_CAPABILITY = (8, 0)  # compute capability: what bfloat16 needs
_PDL_CAPABILITY = (9, 0)
_BESIDE_TILES = 32 * 1024  # bytes


def why_not_cuda(config: GPT2Config, options: LoadOptions) -> str | None:
    """What keeps the CUDA decoder from running this; None if it can."""
    if config.head_dim > MOST_HEAD_DIM:
        return f"heads of {config.head_dim} dimensions (at most {MOST_HEAD_DIM})"
    if INTERPRETED:  # NumPy, which it computes with, knows no bfloat16
        return "Triton's interpreter has no bfloat16" if options.dtype_name == "bfloat16" else None
    if torch.version.cuda is None:
        return f"this PyTorch ({torch.__version__}) is built without CUDA"
    device = chosen_device(options.device)
    if device.type != "cuda":
        return f"device {device} is no NVIDIA GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < _CAPABILITY:
        name, version = torch.cuda.get_device_name(device), ".".join(map(str, capability))
        return f"{name} has compute capability {version} (8.0 is needed)"
    return None


def plan_cuda(checkpoint: Checkpoint, options: LoadOptions) -> DecoderPlan:
    """See fastgen.decoders.select.plan_decoder."""
    config = checkpoint.config
    if reason := why_not_cuda(config, options):
        raise unmet("decoder", "cuda", reason)
    device = _device(options)
    dtype = chosen_dtype(options.dtype_name, device, checkpoint)
    if options.quantize is not None and options.dtype_name == "auto" and not INTERPRETED:
        dtype = torch.bfloat16
    limits = options.limits(config, _STEP_TOKENS, batch_invariant=bool(options.batch_invariant))
    int8_kv = options.kv_dtype == "int8"
    token = 2 * config.hidden_size * (1 if int8_kv else dtype.itemsize)
    token += 2 * config.num_heads * 4 if int8_kv else 0  # scales
    block_bytes = config.num_layers * BLOCK_SIZE * token
    memory = plan_memory(
        weights=weight_bytes(checkpoint, dtype, quantized=options.quantize is not None),
        scratch=_scratch_bytes(config, dtype, limits) + block_bytes,  # and the spare block
        block_bytes=block_bytes,
        max_batch_size=limits.num_seats,
        max_seq_len=limits.max_seq_len,
        free=free_device_memory(device),
        max_memory=options.max_memory,
    )
    return DecoderPlan(
        decoder="cuda",
        reason="it was asked for" if options.decoder == "cuda" else "the fastest on this GPU",
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        weights=options.quantize or str(dtype).removeprefix("torch."),
        num_threads=None,
        limits=replace(limits, num_blocks=memory.num_blocks),
        memory=memory,
        kv_dtype="int8" if int8_kv else str(dtype).removeprefix("torch."),
    )


def build_cuda(checkpoint: Checkpoint, plan: DecoderPlan) -> CudaDecoder:
    device, dtype = torch.device(plan.device), getattr(torch, plan.dtype)
    quantized, int8_kv = plan.weights == "int8", plan.kv_dtype == "int8"
    weights = CudaWeights(checkpoint, device, dtype, quantized=quantized, int8_kv=int8_kv)
    settings = Settings(
        dtype=dtype,
        tf32=_allows_tf32(),
        pdl=_has_pdl(device),
        batch_invariant=plan.limits.batch_invariant,
        shared_memory=_shared_memory(device),
    )
    return CudaDecoder(
        checkpoint.config,
        weights,
        settings,
        plan.limits,
        plan.memory,
        device,
        int8_kv=int8_kv,
    )


def _device(options: LoadOptions) -> torch.device:
    """With its index, since each thread has a current one of its own."""
    if INTERPRETED:
        return torch.device("cpu")
    device = chosen_device(options.device)
    return device if device.index is not None else torch.device("cuda", torch.cuda.current_device())


def _allows_tf32() -> bool:
    """By either of PyTorch's switches; after the newer one was used, the older cannot be read."""
    try:
        return bool(torch.backends.cuda.matmul.allow_tf32)
    except RuntimeError:
        return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


def _shared_memory(device: torch.device) -> int:
    """For tiles of a product: what a block can have, less what a kernel needs beside them."""
    if device.type != "cuda":
        return int(SHARED_MEMORY)
    own = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)
    return max(int(SHARED_MEMORY), int(own) - _BESIDE_TILES)


def _has_pdl(device: torch.device) -> bool:
    if device.type != "cuda" or os.environ.get("FASTGEN_PDL", "1") == "0":
        return False
    return torch.cuda.get_device_capability(device) >= _PDL_CAPABILITY


def _scratch_bytes(config: GPT2Config, dtype: torch.dtype, limits: Capacity) -> int:
    """What a step works in: activations, a step's integers, logits and what is made of them."""
    per_token = (
        4 * config.hidden_size + 4 + (3 * config.hidden_size + config.inner_size) * (dtype.itemsize)
    )
    sampling = sampler_bytes(limits.num_seats, limits.max_logits, config.vocab_size)
    logprobs = limits.num_seats * config.vocab_size * SAMPLING_BYTES
    return limits.max_tokens * per_token + 4 * inputs_size(limits) + sampling + logprobs
