"""An NVIDIA GPU's peaks, measured with PyTorch: bytes moved and multiply-adds a second."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fastgen.bench.peaks import Peak

COPY_BYTES = 2**32
SIZE = 8192  # of the square matrices that are multiplied


@contextmanager
def cuda_peaks(device: str, kinds: tuple[str, ...]) -> Iterator[dict[str, Peak]]:
    """Reading ("read") by copying 4 GB, and products of large matrices in each of these dtypes."""
    peaks = {"read": _copy(device), **{kind: _product(device, kind) for kind in kinds}}
    try:
        yield peaks
    finally:
        peaks.clear()
        torch.cuda.empty_cache()


def peak_bytes(device: str) -> int:
    """The most that PyTorch had allocated there."""
    return int(torch.cuda.max_memory_allocated(device))


def _copy(device: str) -> Peak:
    free, _ = torch.cuda.mem_get_info(device)
    num_bytes = min(COPY_BYTES, int(free) // 4)
    source = torch.randn(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    seconds = _until_done(device, lambda: target.copy_(source))
    return Peak("copy", 2.0 * source.nbytes, seconds)


def _product(device: str, kind: str) -> Peak:
    """Of random numbers: a GPU draws less power, and runs faster, with zeros."""
    a, b = (torch.randn(SIZE, SIZE, device=device, dtype=getattr(torch, kind)) for _ in range(2))
    return Peak("torch.matmul", float(SIZE) ** 3, _until_done(device, lambda: a @ b))


def _until_done(device: str, run: Callable[[], Any]) -> Callable[[], float]:
    def seconds() -> float:
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        torch.cuda.synchronize(device)
        return time.perf_counter() - start

    for _ in range(3):
        seconds()
    return seconds
