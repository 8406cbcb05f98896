"""How kernels are started: one place, so that settings reach all of them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

# Triton's interpreter runs kernels on the CPU; it is chosen by the environment, before any import.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

SHARED_MEMORY = 96 * 1024  # bytes; the smallest devices of compute capability 8 give 99 KB

TRITON_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@dataclass(frozen=True, slots=True)
class Settings:
    """What holds for all kernels of a decoder.

    Attributes:
        dtype: of activations and products.
        tf32: float32 products may drop mantissa bits.
        pdl: programmatic dependent launch: a kernel's blocks start, and fetch their weights, while
            the kernel before it ends. compute capability 9.0 or newer.
        batch_invariant: tiles, and so the order of every sum, never depend on the batch.
        shared_memory: bytes that tiles of a product may take of it.
    """

    dtype: torch.dtype
    tf32: bool = False
    pdl: bool = False
    batch_invariant: bool = False
    shared_memory: int = SHARED_MEMORY

    @property
    def product(self) -> dict[str, Any]:
        """Constants of kernels that multiply matrices."""
        return {"DTYPE": TRITON_DTYPES[self.dtype], "PRECISION": "tf32" if self.tf32 else "ieee"}


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """After this, what earlier kernels wrote can be read, and what they read can be written.

    Every kernel calls it before it touches what a step computes: a later kernel relies on this one
    having waited for those before it.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def prefetch(pointers):
    """Ask for the lines that hold these addresses, into the second-level cache."""
    tl.inline_asm_elementwise(
        "{ prefetch.global.L2 [$1]; mov.u32 $0, 0; }",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


def run(
    kernel: Any,
    grid: tuple[int, ...],
    settings: Settings,
    arguments: Mapping[str, Any],
    *,
    num_warps: int = 4,
    num_stages: int = 1,
    fuse: bool = True,
) -> None:
    """Start one kernel on the current stream.

    Args:
        kernel: a triton.jit function with a constant PDL.
        grid: its number of programs, in up to three dimensions; nothing is started for none.
        arguments: by parameter: tensors and numbers, and constants, whose names are upper-case.
        fuse: a product and the sum after it may be rounded once instead of twice.
    """
    if 0 in grid:
        return
    options: dict[str, Any] = {"num_warps": num_warps, "num_stages": num_stages}
    if settings.pdl:
        options["launch_pdl"] = True
    kernel[grid](**arguments, PDL=settings.pdl, enable_fp_fusion=fuse, **options)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(value: int, least: int = 1) -> int:
    """The lowest that is not below either."""
    return max(least, 1 << (value - 1).bit_length())
