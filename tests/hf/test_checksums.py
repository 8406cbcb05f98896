"""Checksums of weights: every byte counts, and so does its place."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from fastgen.hf import checksums as module
from fastgen.hf.checksums import checksums, sum_of_words
from fastgen.native import native

Sum = Callable[[torch.Tensor], int]


def _of_host(tensor: torch.Tensor) -> int:
    [value] = checksums([tensor], 2)
    return value


def _of_words(tensor: torch.Tensor) -> int:
    return int(sum_of_words(tensor.contiguous().view(-1).view(torch.uint8)))


SUMS = [
    pytest.param(_of_host, id="host", marks=pytest.mark.skipif(native is None, reason="no C++")),
    pytest.param(_of_words, id="PyTorch"),
]
PIECE = 1 << 18  # bytes, in C++


@pytest.mark.skipif(native is None, reason="the extension was not built")
@pytest.mark.parametrize(
    ("data", "expected"),
    [  # of the specification's own test program, and of its well-known examples
        (b"", 0xEF46DB3751D8E999),
        (b"a", 0xD24EC4F1A98C6E5B),
        (b"abc", 0x44BC2CF5AD770999),
        (b"Nobody inspects the spammish repetition", 0xFBCEA83C8A378BF1),
    ],
)
def test_xxh64(data: bytes, expected: int) -> None:
    assert native.xxh64(np.frombuffer(data, np.uint8)) == expected


@pytest.mark.parametrize("sum_of", SUMS)
@pytest.mark.parametrize("size", [1, 7, 8, 31, 32, 33, 100])
def test_every_bit_and_every_length(sum_of: Sum, size: int) -> None:
    data = torch.from_numpy(np.random.default_rng(size).integers(0, 256, size).astype(np.uint8))
    sums = {sum_of(data), sum_of(torch.cat([data, data[:1]]))}
    for at in range(size):
        for bit in range(8):
            changed = data.clone()
            changed[at] ^= 1 << bit
            sums.add(sum_of(changed))
    assert len(sums) == 2 + 8 * size
    assert sum_of(data.clone()) in sums


@pytest.mark.parametrize("sum_of", SUMS)
def test_changes_that_simple_sums_miss(sum_of: Sum) -> None:
    """Values exchanged, pairs of signs, multiples of powers of two, opposite changes."""
    base = torch.from_numpy(np.random.default_rng(0).normal(size=(300, 512)).astype(np.float32))
    changes: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda t: t[:2].neg_(),
        lambda t: t[:, :2].neg_(),
        lambda t: t.neg_(),
        lambda t: t.copy_(t.flip(0)),
        lambda t: t.copy_(t.flip(1)),
        lambda t: t.copy_(t.roll(PIECE // 4)),
        lambda t: t[10:12].copy_(t[10:12].flip(0)),
        lambda t: t.mul_(2),
        lambda t: t.view(torch.int32).view(-1)[::2].add_(1),
        lambda t: t.view(torch.int32)[:2].add_(torch.tensor([[1], [-1]], dtype=torch.int32)),
        lambda t: t.zero_(),
        lambda t: t.zero_().sub_(0.0).neg_(),
    ]
    sums = [sum_of(base)]
    for change in changes:
        changed = base.clone()
        change(changed)
        sums.append(sum_of(changed))
    assert len(set(sums)) == 1 + len(changes)


@pytest.mark.parametrize("sum_of", SUMS)
def test_random_writes_are_seen(sum_of: Sum) -> None:
    rng = np.random.default_rng(1)
    data = torch.from_numpy(rng.integers(0, 256, 3 * PIECE + 77).astype(np.uint8))
    sums = {sum_of(data)}
    for count in range(1, 101):
        start = int(rng.integers(0, len(data)))
        data[start : start + int(rng.integers(1, 1 << int(rng.integers(1, 16))))] ^= 1 + count
        sums.add(sum_of(data))
    assert len(sums) == 101


def test_threads_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    sizes = [0, 1, 5, PIECE - 1, PIECE, PIECE + 1, 5 * PIECE + 13]
    tensors = [torch.from_numpy(rng.integers(0, 256, n).astype(np.uint8)) for n in sizes]
    expected = checksums(tensors, 1)
    assert all(checksums(tensors, num_threads) == expected for num_threads in (2, 3, 8))
    assert [checksums([tensor], 2)[0] for tensor in tensors] == expected
    words = [_of_words(tensor) for tensor in tensors]
    monkeypatch.setattr(module, "_CHUNK", 100)
    assert [_of_words(tensor) for tensor in tensors] == words
    monkeypatch.setattr(module, "native", None)
    assert checksums(tensors, 2) == words


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_strides_and_dtypes(dtype: torch.dtype) -> None:
    """What is summed is what a tensor holds, in its own order."""
    whole = torch.arange(1, 49).view(6, 8).to(dtype)
    views = [whole, whole.t(), whole[::2], whole[:, 1::2], torch.nn.Parameter(whole), whole[2]]
    sums = checksums(views, 2)
    assert sums == checksums([view.detach().clone().contiguous() for view in views], 2)
    assert sums[0] == sums[4] and len(set(sums)) == 5
    whole[2, 3] = -1  # seen in all but those that leave it out
    changed = [one != other for one, other in zip(sums, checksums(views, 2), strict=True)]
    assert changed == [True] * 6
    assert not checksums([], 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu() -> None:
    tensor = torch.arange(10_000, dtype=torch.float32)
    assert checksums([tensor.cuda(), tensor.cuda()], 1) == [_of_words(tensor)] * 2
