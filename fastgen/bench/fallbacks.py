"""What makes a model slower than it should be here, without anybody having asked for it."""

from __future__ import annotations

import os
from collections.abc import Iterator

from fastgen.decoders.machine import may_have_gpu
from fastgen.decoders.plan import DecoderPlan, LoadOptions
from fastgen.native import native

_SWITCHES = {  # of the environment, and the value that changes nothing
    "FASTGEN_CUDA_GRAPHS": "1",
    "FASTGEN_PDL": "1",
    "TRITON_INTERPRET": "0",
}
_MULTIPLIES_BFLOAT16 = ("avx512_bf16", "neon_i8mm")  # paths that take it as it is
# Paths with one instruction for four products of int8 and their sum.
_DOT_PRODUCTS = ("avx512_bf16", "avx512_vnni", "avx_vnni", "neon_dotprod", "neon_i8mm")


def fallbacks(plan: DecoderPlan, options: LoadOptions) -> list[str]:
    """One sentence each; none if the model runs as fast as fastgen can."""
    return list(_found(plan, options))


def _found(plan: DecoderPlan, options: LoadOptions) -> Iterator[str]:
    if native is None:
        yield "fastgen's C++ extension was not built: install a C++ compiler, then fastgen again"
    if plan.device == "cpu" and options.device == "auto" and may_have_gpu():
        yield (
            "a GPU seems to be there that PyTorch cannot use: pip install 'fastgen[gpu]', or ask "
            "for --device cpu"
        )
    if plan.decoder == "torch" and options.decoder != "torch":
        yield f"the torch decoder was chosen: {plan.reason}"
    if options.num_threads and plan.num_threads and plan.num_threads < options.num_threads:
        yield f"{options.num_threads} threads were asked for, {plan.num_threads} can be had"
    if plan.decoder == "cpu" and native is not None:
        best, *_ = native.instruction_sets()
        asked = os.environ.get("FASTGEN_ISA") or best
        if asked != best:
            yield f"FASTGEN_ISA={asked} keeps the decoder from {best}, which this processor has"
    if plan.decoder == "cuda":
        for name, harmless in _SWITCHES.items():
            if (value := os.environ.get(name, harmless)) != harmless:
                yield f"{name}={value} slows the CUDA decoder down"


def notes(plan: DecoderPlan) -> list[str]:
    """What limits this model here and is nobody's mistake."""
    if plan.decoder != "cpu" or native is None:
        return []
    found = []
    if plan.weights == "bfloat16" and native.bfloat16_instruction_set() not in _MULTIPLIES_BFLOAT16:
        found.append("products of bfloat16 are widened and made in float32 on this processor")
    if plan.weights == "int8" and native.chosen_instruction_set() not in _DOT_PRODUCTS:
        found.append(
            "products of 8 bits take several instructions: this path has no dot products of them "
            "(VNNI, DotProd)"
        )
    return found
