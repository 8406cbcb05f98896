"""How the torch decoder is set up for one checkpoint on one machine."""

from __future__ import annotations

from dataclasses import replace

import torch

from fastgen.checkpoints.checkpoint import Checkpoint
from fastgen.checkpoints.config import GPT2Config
from fastgen.decoders.machine import free_memory, granted_cores
from fastgen.decoders.memory import BLOCK_SIZE, plan_memory
from fastgen.decoders.plan import SAMPLING_BYTES, DecoderPlan, LoadOptions
from fastgen.decoders.torch.decoder import TorchDecoder
from fastgen.decoders.torch.weights import Weights, weight_bytes
from fastgen.errors import OptionError
from fastgen.native import native
from fastgen.sampling.definition import SCORED_AT_ONCE

_STEP_TOKENS = {"cpu": 256}  # a step's tokens: longer chunks are no faster there
_STEP_TOKENS_GPU = 2048


def plan_torch(
    checkpoint: Checkpoint, options: LoadOptions, reason: str, beside: int = 0
) -> DecoderPlan:
    config = checkpoint.config
    device = chosen_device(options.device)
    dtype = chosen_dtype(options.dtype_name, device, checkpoint)
    step_tokens = _STEP_TOKENS.get(device.type, _STEP_TOKENS_GPU)
    limits = options.limits(config, step_tokens, batch_invariant=False)
    seats, max_seq_len = limits.num_seats, limits.max_seq_len
    num_threads = _num_threads(options.num_threads, device)
    block_bytes = config.num_layers * BLOCK_SIZE * 2 * config.hidden_size * dtype.itemsize
    memory = plan_memory(
        weights=weight_bytes(checkpoint, device, dtype),
        scratch=_scratch_bytes(config, dtype, limits.max_tokens, limits.max_logits)
        + _sampler_bytes(config, device, seats, max_seq_len, num_threads)
        + (beside if device.type == "cpu" else 0),
        block_bytes=block_bytes,
        max_batch_size=seats,
        max_seq_len=max_seq_len,
        free=free_device_memory(device),
        max_memory=options.max_memory,
    )
    return DecoderPlan(
        decoder="torch",
        reason=reason,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        weights=str(dtype).removeprefix("torch."),
        num_threads=num_threads,
        limits=replace(limits, num_blocks=memory.num_blocks),
        memory=memory,
    )


def build_torch(checkpoint: Checkpoint, plan: DecoderPlan) -> TorchDecoder:
    weights = Weights(checkpoint, torch.device(plan.device), getattr(torch, plan.dtype))
    return TorchDecoder(
        checkpoint.config, weights, plan.limits, plan.memory, num_threads=plan.num_threads
    )


def chosen_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).tolist()  # a "meta" tensor holds nothing to bring back
    except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch without CUDA
        cause = str(error).splitlines()[0]
        problem = f"cannot be used: {cause}"
        raise OptionError(f"device={name!r} {problem}", "device", problem) from error
    return device


def chosen_dtype(name: str, device: torch.device, checkpoint: Checkpoint) -> torch.dtype:
    """On a CPU, 16-bit weights are widened: float32 arithmetic is what the checkpoint means."""
    if name == "auto":
        name = "float32" if device.type == "cpu" else checkpoint.dtype
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _num_threads(asked: int | None, device: torch.device) -> int | None:
    if device.type != "cpu":
        return None
    return asked or min(torch.get_num_threads(), granted_cores())


def free_device_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_memory()


def _scratch_bytes(config: GPT2Config, dtype: torch.dtype, max_tokens: int, max_logits: int) -> int:
    """Upper bound of what one forward, and the scoring of its prompts, hold at a time."""
    per_token = 8 * config.hidden_size + 2 * config.inner_size
    row = config.max_positions * 2 * config.hidden_size * (4 + dtype.itemsize)  # KV, gathered
    mask = max_tokens * config.max_positions * 5  # bool, and as the float32 it becomes
    logits = max_logits * config.vocab_size * (8 + dtype.itemsize)  # and a copy in float32
    scoring = SCORED_AT_ONCE * config.vocab_size * SAMPLING_BYTES
    return max_tokens * per_token * dtype.itemsize + row + mask + logits + scoring


def _sampler_bytes(
    config: GPT2Config, device: torch.device, seats: int, max_seq_len: int, num_threads: int | None
) -> int:
    if native is not None and device.type == "cpu":
        threads = num_threads or granted_cores()
        return int(native.sampler_bytes(seats, config.vocab_size, max_seq_len, threads))
    return seats * config.vocab_size * SAMPLING_BYTES
