"""A step's integers, packed and copied to the device at once.

Shapes: R rows, N tokens, L logits, M blocks of a row; see StepBatch.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastgen.decoders.cuda.model import SMALL_TILE, StepInputs, Tiles
from fastgen.decoders.interface import Capacity, Ints, StepBatch
from fastgen.decoders.memory import blocks_for

_ALIGNED = 4  # integers: kernels are compiled for pointers to multiples of 16 bytes
_COPIES = 4  # that may be under way


def tile_tokens(row_starts: Ints, is_taken: NDArray[np.bool_], size: int) -> tuple[Ints, Ints]:
    """Rows cut into tiles of at most `size` tokens: the row of each tile, and its first token."""
    counts = np.where(is_taken, -(-np.diff(row_starts) // size), 0)
    rows = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    within = np.arange(len(rows), dtype=np.int32) - np.repeat(
        np.cumsum(counts, dtype=np.int32) - counts.astype(np.int32), counts
    )
    return rows, (row_starts[rows] + within * size).astype(np.int32)


def new_event(device: torch.device) -> torch.cuda.Event | None:
    """Nothing where there is no GPU to wait for."""
    return torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]


class InputCopier:
    """Copies integers to one buffer on the device; several copies may be under way."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._copy_index = 0
        self._allocate(size, device)

    def _allocate(self, size: int, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._device = torch.zeros(size, dtype=torch.int32, device=device)
        self._hosts = [
            torch.zeros(size, dtype=torch.int32, pin_memory=on_gpu) for _ in range(_COPIES)
        ]
        self._copied = [new_event(device) for _ in range(_COPIES)]

    def copy(self, parts: Mapping[str, Ints]) -> dict[str, Tensor]:
        """The parts on the device, valid until the next call of it runs there."""
        room = sum(part.size + _ALIGNED for part in parts.values())
        if room > len(self._device):  # rows longer than the model's have longer tables
            if self._device.is_cuda:  # steps under way read the old one
                torch.cuda.current_stream(self._device.device).synchronize()
            self._allocate(room, self._device.device)
        self._copy_index = (self._copy_index + 1) % _COPIES
        host, event = self._hosts[self._copy_index], self._copied[self._copy_index]
        if event is not None:
            event.synchronize()  # of a copy made long ago
        packed, starts, end = host.numpy(), [], 0
        for part in parts.values():
            starts.append(end)
            packed[end : end + part.size] = part.ravel()
            end += -(-part.size // _ALIGNED) * _ALIGNED
        self._device[:end].copy_(host[:end], non_blocking=True)
        if event is not None:
            event.record()
        views = (
            self._device[start : start + part.size].view(part.shape)
            for start, part in zip(starts, parts.values(), strict=True)
        )
        return dict(zip(parts, views, strict=True))


def inputs_size(limits: Capacity) -> int:
    """Integers of the largest step."""
    tokens, logits = limits.max_tokens, limits.max_logits
    rows = min(tokens, max(limits.num_seats, logits))
    sizes = (*[tokens] * 7, rows + 1, rows, rows * blocks_for(limits.max_seq_len), *[logits] * 2)
    return sum(sizes) + _ALIGNED * len(sizes)


def parts_of(batch: StepBatch, seats: Ints, large_tile: int) -> dict[str, Ints]:
    """The step's arrays for the device; `seats` draw there."""
    counts = np.diff(batch.row_starts)
    is_small = (counts <= SMALL_TILE) | (large_tile == SMALL_TILE)
    small, large = (
        tile_tokens(batch.row_starts, taken, size)
        for taken, size in ((is_small, SMALL_TILE), (~is_small, large_tile))
    )
    return {
        "token_ids": batch.token_ids,
        "positions": batch.positions,
        "row_of": np.repeat(np.arange(len(counts), dtype=np.int32), counts),
        "row_starts": batch.row_starts,
        "cache_lens": batch.cache_lens,
        "block_tables": batch.block_tables,
        "logits_at": batch.logits_at,
        "seats": seats,
        "small_rows": small[0],
        "small_starts": small[1],
        "large_rows": large[0],
        "large_starts": large[1],
    }


def step_inputs(parts: Mapping[str, Tensor], large_tile: int, longest: int) -> StepInputs:
    """Of the parts on the device; `longest`: tokens of a row, with its cache."""
    names = ("token_ids", "positions", "row_of", "row_starts", "cache_lens", "block_tables")
    tiles = (
        Tiles(parts[f"{name}_rows"], parts[f"{name}_starts"], len(parts[f"{name}_rows"]), size)
        for name, size in (("small", SMALL_TILE), ("large", large_tile))
    )
    return StepInputs(
        batch={name: parts[name] for name in names},
        logits_at=parts["logits_at"],
        num_tokens=len(parts["token_ids"]),
        num_logits=len(parts["logits_at"]),
        tiles=[some for some in tiles if some.count],
        longest=longest,
    )


def decode_parts(num_rows: int, width: int, spare_block: int) -> dict[str, Ints]:
    """A step of padding rows, one token each: no draw, and no row's block."""
    row = np.arange(num_rows, dtype=np.int32)
    zeros, none = np.zeros_like(row), row[:0]
    return {
        "token_ids": zeros,
        "positions": zeros,
        "row_of": row,
        "row_starts": np.arange(num_rows + 1, dtype=np.int32),
        "cache_lens": zeros,
        "block_tables": np.full((num_rows, width), spare_block, np.int32),
        "logits_at": row,
        "seats": np.full(num_rows, -1, np.int32),
        "small_rows": row,
        "small_starts": row,
        "large_rows": none,
        "large_starts": none,
    }


def is_plain_decode(batch: StepBatch, limits: Capacity) -> bool:
    """Whether each row brings one token, and wants its logits, in order: at most one for each seat,
    none longer than rows of an engine are."""
    count = len(batch.cache_lens)
    return (
        count <= limits.num_seats
        and int(batch.cache_lens.max()) < limits.max_seq_len
        and batch.block_tables.shape[1] <= blocks_for(limits.max_seq_len)
        and len(batch.token_ids) == len(batch.logits_at) == count
        and bool((batch.logits_at == np.arange(count)).all())
        and len(set(batch.seats[batch.seats >= 0].tolist())) == int((batch.seats >= 0).sum())
    )


def buckets(num_rows: int) -> list[int]:
    """Numbers of rows that graphs are made for: powers of two, and the largest."""
    powers = itertools.takewhile(lambda size: size < num_rows, (1 << n for n in range(31)))
    return [*powers, num_rows]
