"""64-bit checksums of tensors' memory: whether it was written, however that was done.

Each depends on every byte and on its place. On the host they are XXH64's, by all threads
(`csrc/common/checksum.h`); on other devices, and without the C++ extension, sums of mixed words, in
PyTorch. They are compared with checksums of the same tensors only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastgen.native import native

_CHUNK = 1 << 22  # words at a time, which bounds the memory for what is computed of them
# Odd 64-bit numbers, as PyTorch's signed ones: of the golden ratio, and splitmix64's.
_PLACE = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))


@torch.no_grad()
def checksums(tensors: Sequence[Tensor], num_threads: int) -> list[int]:
    """Of each tensor, in their order.

    Args:
        tensors: of any shapes, strides, dtypes and devices; each has memory. One that is not
            contiguous is copied.
        num_threads: changes no checksum.
    """
    sums = [0] * len(tensors)
    spans = [_bytes_of(tensor) for tensor in tensors]
    on_host = [at for at, span in enumerate(spans) if native is not None and span.is_cpu]
    if on_host:
        found = native.checksums([spans[at].numpy() for at in on_host], num_threads)
        for at, value in zip(on_host, found, strict=True):
            sums[at] = value
    elsewhere = sorted(set(range(len(tensors))) - set(on_host))
    # sync: after all of them have been started
    for at, total in [(at, sum_of_words(spans[at])) for at in elsewhere]:
        sums[at] = int(total)
    return sums


def sum_of_words(span: Tensor) -> Tensor:
    """The checksum in PyTorch of bytes (n,): int64 (), modulo 2**64."""
    total = torch.zeros((), dtype=torch.int64, device=span.device)
    for start in range(0, len(span), 8 * _CHUNK):
        chunk = span[start : start + 8 * _CHUNK]
        words = pad(chunk, (0, -len(chunk) % 8)).view(torch.int64)  # (n / 8,)
        first = start // 8 + 1
        places = torch.arange(first, first + len(words), device=span.device)
        total += _mixed(words + places * _PLACE).sum()
    return total


def _mixed(words: Tensor) -> Tensor:
    """splitmix64's finalizer, which maps 64 bits one to one."""
    for shift, factor in zip((30, 27), _MIX, strict=True):
        words = (words ^ _shifted(words, shift)) * factor
    return words ^ _shifted(words, 31)


def _shifted(words: Tensor, count: int) -> Tensor:
    """To the right, with zeros from the left."""
    return (words >> count) & ((1 << (64 - count)) - 1)


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)
