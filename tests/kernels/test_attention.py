"""Attention over KV blocks against its twin: ragged rows, prefixes, drafts, spans, int8 caches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from fastgen.kernels.attention import Spans, attention
from fastgen.kernels.launch import Settings
from torch import Tensor

import kernel_twins as twins
from fastgen.decoders.cuda.inputs import tile_tokens
from fastgen.decoders.memory import blocks_for
from kernel_device import DEVICE, DTYPES, assert_near, poisoned, quiet, random

pytestmark = quiet
HEAD_DIMS = [1, 7, 8, 64, 80, 128]
RAGGED = ([1, 17, 3, 40], [0, 5, 70, 33])  # new tokens of each row, and tokens in its cache


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Step:
    """Rows with blocks of their own, in shuffled order, and room for what attention makes."""

    def __init__(
        self,
        counts: list[int],
        cache_lens: list[int],
        heads: int,
        head_dim: int,
        dtype: torch.dtype,
        *,
        int8: bool = False,
    ) -> None:
        self.dtype, self.heads, self.head_dim = dtype, heads, head_dim
        self.cache_lens = cache_lens
        self.row_starts = [0, *np.cumsum(counts).tolist()]
        self.lengths = [n + c for n, c in zip(counts, cache_lens, strict=True)]
        width = blocks_for(max(self.lengths))
        shape = (width * len(counts) + 1, 2, heads, 32, head_dim)
        self.scales = None
        if int8:
            self.cache = torch.randint(-127, 128, shape, dtype=torch.int8).to(DEVICE)
            self.scales = random(*shape[:-1]).abs() / 127
        else:
            self.cache = random(*shape, dtype=dtype)
        blocks = torch.randperm(shape[0])[:-1].to(torch.int32)
        self.tables = blocks.view(len(counts), width).to(DEVICE)
        self.query = random(sum(counts), heads, head_dim, dtype=dtype)

    def attend(self, tile: int, spans: int = 1, *, invariant: bool = False) -> Tensor:
        """(N, H, D), float64"""
        tiles = [torch.from_numpy(part).to(DEVICE) for part in self._tiles(tile)]
        batch = {
            "row_starts": torch.tensor(self.row_starts, dtype=torch.int32, device=DEVICE),
            "cache_lens": torch.tensor(self.cache_lens, dtype=torch.int32, device=DEVICE),
            "block_tables": self.tables,
        }
        tokens, heads, head_dim = self.query.shape
        out = poisoned(tokens, heads * head_dim, dtype=self.dtype)
        cut = Spans(2048, 1)
        if spans > 1:
            length = -(-max(self.lengths) // spans // 64) * 64
            room = poisoned(tokens * heads * spans, head_dim)
            arrived = torch.zeros(len(tiles[0]) * heads, dtype=torch.int32, device=DEVICE)
            cut = Spans(length, spans, room, room[:, 0].clone(), room[:, 0].clone(), arrived)
        attention(
            Settings(self.dtype, batch_invariant=invariant),
            out,
            self.query.flatten(1),
            (self.cache, self.scales),
            (*tiles, len(tiles[0])),
            batch,
            self.scale,
            tile_size=tile,
            spans=cut,
        )
        if cut.arrived is not None:
            assert not cut.arrived.any(), "ready for the next step"
        return out.view(self.query.shape).double().cpu()

    def expected(self) -> Tensor:
        cache = self.cache.double()
        if self.scales is not None:
            cache = twins.dequantized(self.cache, self.scales)
        arguments: Any = (self.row_starts, self.cache_lens, self.tables.cpu(), self.scale)
        return twins.attention(self.query.cpu(), cache.cpu(), *arguments)

    @property
    def scale(self) -> float:
        scale: float = self.head_dim**-0.5
        return scale

    def _tiles(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        row_starts = np.array(self.row_starts, np.int32)
        return tile_tokens(row_starts, np.ones(len(self.cache_lens), bool), size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile", [16, 64])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_ragged_rows(head_dim: int, tile: int, dtype: torch.dtype) -> None:
    step = Step(*RAGGED, 2, head_dim, dtype)
    assert_near(step.attend(tile), step.expected(), dtype)


@pytest.mark.parametrize("length", [1, 17, 1024])
@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("spans", [1, 2, 16])
def test_decode(batch: int, length: int, spans: int) -> None:
    """One token a row, the longest in the cache; the others are shorter."""
    cache_lens = [max(0, length - 1 - 61 * row) for row in range(batch)]
    step = Step([1] * batch, cache_lens, 2, 8, torch.float32)
    assert_near(step.attend(16, spans), step.expected(), torch.float32)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
def test_drafts_are_cut_into_spans_too(head_dim: int, int8: bool) -> None:
    """Several tokens a row; some spans end before some of them, or hold none that one may see."""
    step = Step([5, 1, 16], [126, 200, 50], 2, head_dim, torch.float32, int8=int8)
    assert_near(step.attend(16, 4), step.expected(), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile", [16, 64])
def test_int8_cache(tile: int, dtype: torch.dtype) -> None:
    step = Step(*RAGGED, 3, 64, dtype, int8=True)
    assert_near(step.attend(tile), step.expected(), dtype)


def test_prefill_of_a_long_prompt() -> None:
    step = Step([300], [100], 1, 64, torch.float32)
    assert_near(step.attend(128), step.expected(), torch.float32)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(("tile", "spans"), [(16, 1), (64, 1), (16, 2)])
def test_what_later_tokens_hold_hurts_no_earlier_one(tile: int, spans: int, bad: float) -> None:
    """A value that is NaN or infinite reaches those that see it, and nobody else: neither earlier
    tokens of its row nor other rows, nor what lies behind the row's end in its block."""
    step = Step([40, 3], [20, 30], 2, 8, torch.float32)
    expected = step.expected()
    at = 20 + 11  # the first row's 12th new token
    step.cache[int(step.tables[0, at // 32]), 1, 0, at % 32, 3] = bad
    behind = step.lengths[1]
    step.cache[int(step.tables[1, behind // 32]), :, :, behind % 32] = bad
    found = step.attend(tile, spans)
    assert not found[11:40, 0].isfinite().all(1).any()
    hurt = torch.zeros(43, 2, 8, dtype=torch.bool)
    hurt[11:40, 0] = True
    assert_near(found[~hurt], expected[~hurt], torch.float32)


@pytest.mark.usefixtures("products_in_order")
def test_invariant_attention_knows_neither_chunk_nor_neighbours() -> None:
    whole = Step([90, 7], [0, 40], 2, 8, torch.float32)
    together = whole.attend(16, invariant=True)
    for start, end in ((0, 1), (0, 31), (31, 33), (33, 90)):
        part = Step([end - start], [start], 2, 8, torch.float32)
        part.cache, part.query = whole.cache, whole.query[start:end].contiguous()
        part.tables = whole.tables[:1]
        assert torch.equal(part.attend(16, invariant=True), together[start:end])
