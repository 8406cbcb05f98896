"""Where the tests of Triton kernels run: on an NVIDIA GPU, or in Triton's interpreter on the CPU.
Importing this skips a test module where neither is to be had.

The interpreter is chosen by TRITON_INTERPRET=1 before Triton is imported, so it has a run of its
own in `make test`. Its bfloat16 arithmetic is wrong, so it is not tested there.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from decoder_names import DECODERS
from decoder_names import INTERPRETED as INTERPRETED
from tolerances import TOLERANCES

if "cuda" not in DECODERS:
    pytest.skip(
        "needs an NVIDIA GPU and Triton, or its interpreter (make test)",
        allow_module_level=True,
    )
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
# NumPy, which is the interpreter, warns of what floating point has infinities for.
quiet = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])


def random(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    """Normal values on the device; seeded by the tests' own torch.manual_seed."""
    return (torch.randn(shape) * scale).to(dtype).to(DEVICE)


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What a kernel is to fill: every element that it leaves is seen."""
    value: Any = float("nan") if dtype.is_floating_point else 77
    return torch.full(shape, value, dtype=dtype, device=DEVICE)


def assert_near(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Every element, within the rounding of `dtype`, relative to the largest expected one."""
    rounding = TOLERANCES["kernels"][str(dtype).removeprefix("torch.")]
    found, expected = found.double().cpu(), expected.double().cpu()
    assert found.shape == expected.shape
    gap = (found - expected).abs().max().item()
    assert gap <= rounding * expected.abs().max().item(), gap  # NaN fails
