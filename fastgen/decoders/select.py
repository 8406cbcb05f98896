"""Which decoder runs a model: selected once, at load, with the reason."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable

from fastgen.checkpoints.checkpoint import Checkpoint
from fastgen.decoders.cpu.plan import build_cpu, plan_cpu
from fastgen.decoders.interface import Decoder
from fastgen.decoders.machine import may_have_gpu
from fastgen.decoders.plan import DecoderPlan, LoadOptions, unmet
from fastgen.native import native

INSTALL_TORCH = "PyTorch is not installed: pip install 'fastgen[torch]'"
_NO_TRITON = "Triton is not installed (pip install 'fastgen[gpu]')"


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=5)


def plan_decoder(
    checkpoint: Checkpoint,
    options: LoadOptions,
    beside: int = 0,
    *,
    warn: Callable[[str], None] = _warn,
) -> DecoderPlan:
    """Choose a decoder and plan its memory; nothing is loaded.

    Args:
        beside: bytes of the host's memory that are needed beside the decoder.
        warn: is told what makes the model slower than it could be.

    Raises:
        OptionError: an option that cannot be met, with what can.
        ModuleNotFoundError: no decoder is installed that can do this.
    """
    if checkpoint.packed is not None and options.decoder not in ("auto", "cpu"):
        raise unmet("decoder", options.decoder, "packed weights are the CPU decoder's")
    if (
        options.decoder == "cpu"
        or checkpoint.packed is not None
        or (options.decoder == "auto" and _cpu_decoder_fits(options))
    ):
        return plan_cpu(checkpoint, options, beside)
    if importlib.util.find_spec("torch") is None:
        raise ModuleNotFoundError(INSTALL_TORCH)
    if options.share_weights:
        raise unmet("share_weights", True, "only the CPU decoder can do this")
    why = _why(options)
    if options.decoder == "cuda" or (options.decoder == "auto" and not _is_for_cpu(options)):
        missing = _missing_for_cuda(checkpoint, options, warn)
        if missing is None:
            from fastgen.decoders.cuda.plan import plan_cuda

            return plan_cuda(checkpoint, options)
        if options.decoder == "cuda":
            raise unmet("decoder", "cuda", missing)
        why = f"{why}, and the CUDA decoder cannot be used: {missing}"
    for option, off in (("quantize", None), ("batch_invariant", None), ("kv_dtype", "auto")):
        value = getattr(options, option)
        if value and value != off:
            raise unmet(option, value, f"the torch decoder cannot do this; {why}")
    from fastgen.decoders.torch.plan import plan_torch

    return plan_torch(checkpoint, options, why, beside)


def build_decoder(checkpoint: Checkpoint, plan: DecoderPlan) -> Decoder:
    """Read the weights and allocate all memory, as planned."""
    if plan.decoder == "cpu":
        return build_cpu(checkpoint, plan)
    if plan.decoder == "cuda":
        from fastgen.decoders.cuda.plan import build_cuda

        return build_cuda(checkpoint, plan)
    from fastgen.decoders.torch.plan import build_torch

    return build_torch(checkpoint, plan)


def _missing_for_cuda(
    checkpoint: Checkpoint, options: LoadOptions, warn: Callable[[str], None]
) -> str | None:
    """What keeps the CUDA decoder from being used."""
    if importlib.util.find_spec("triton") is None:
        if options.decoder == "auto" and options.device.partition(":")[0] in ("auto", "cuda"):
            warn(f"{_NO_TRITON}; without it models run more slowly")
        return _NO_TRITON
    from fastgen.decoders.cuda.plan import why_not_cuda

    return why_not_cuda(checkpoint.config, options)


def _is_for_cpu(options: LoadOptions) -> bool:
    return options.is_cpu or (options.device == "auto" and not _has_gpu())


def _cpu_decoder_fits(options: LoadOptions) -> bool:
    return native is not None and _is_for_cpu(options)


def _has_gpu() -> bool:
    """Whether PyTorch can use one; PyTorch is only asked where there may be one."""
    if not may_have_gpu() or importlib.util.find_spec("torch") is None:
        return False
    import torch

    return bool(torch.cuda.is_available())


def _why(options: LoadOptions) -> str:
    """The reason for the torch decoder."""
    if options.decoder == "torch":
        return "the torch decoder was asked for"
    if native is None:
        return "the C++ extension was not built"
    if options.device == "auto":
        return "the model is to run on a GPU"
    return f"device={options.device!r} was asked for"
