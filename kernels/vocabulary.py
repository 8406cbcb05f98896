"""What is known of each TILE of a row's logits: the highest, and where it stands."""

from __future__ import annotations

import triton
import triton.language as tl

TILE = 64  # logits


@triton.jit
def store_highest(
    tile_max, tile_ids, values, rows, is_row, columns,
    V: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Of values (BM, BN), whole tiles of logits: the highest of each, NaN if one is NaN, and the
    lowest id that has it."""
    tiles: tl.constexpr = BN // TILE
    ids = tl.broadcast_to(columns[None, :], [BM, BN])
    values = tl.where(ids < V, values, float("-inf")).reshape(BM, tiles, TILE)
    ids = ids.reshape(BM, tiles, TILE)
    highest = tl.max(values, 2)  # (BM, tiles)
    at = tl.min(tl.where(values == highest[:, :, None], ids, V), 2)
    has_nan = tl.max((values != values).to(tl.int32), 2) > 0
    highest = tl.where(has_nan, float("nan"), highest)
    num_tiles: tl.constexpr = (V + TILE - 1) // TILE
    tile = tl.min(columns, 0) // TILE + tl.arange(0, tiles)
    target = rows.to(tl.int64)[:, None] * num_tiles + tile[None, :]
    inside = is_row[:, None] & (tile < num_tiles)[None, :]
    tl.store(tile_max + target, highest, mask=inside)
    tl.store(tile_ids + target, at, mask=inside)
