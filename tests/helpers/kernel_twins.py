"""What each Triton kernel computes, in plain torch and float64, from its docstring alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.decoders.torch.weights import ACTIVATIONS

BLOCK = 32


def layer_norm(x: Tensor, gain: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    return F.layer_norm(x.double(), x.shape[-1:], gain.double(), bias.double(), epsilon)


def linear(x: Tensor, weight: Tensor, scales: Tensor | None, bias: Tensor | None) -> Tensor:
    """x (N, K) @ weight (M, K).T; int8 weights have a scale for each output."""
    wide = weight.double() if scales is None else weight.double() * scales.double()[:, None]
    product = x.double() @ wide.t()
    return product if bias is None else product + bias.double()


def activated(x: Tensor, name: str) -> Tensor:
    return ACTIVATIONS[name](x)


def write_kv(cache: Tensor, slots: Tensor, keys: Tensor, values: Tensor) -> None:
    """cache (blocks, 2, H, 32, D); keys, values (N, H, D) go to slots (N,)."""
    for token, slot in enumerate(slots.tolist()):
        cache[slot // BLOCK, 0, :, slot % BLOCK] = keys[token].to(cache.dtype)
        cache[slot // BLOCK, 1, :, slot % BLOCK] = values[token].to(cache.dtype)


def attention(
    query: Tensor,
    cache: Tensor,
    row_starts: list[int],
    cache_lens: list[int],
    block_tables: Tensor,
    scale: float,
) -> Tensor:
    """(N, H, D): each token attends to its row's cache up to itself. query (N, H, D)."""
    attended = torch.empty(query.shape, dtype=torch.float64)
    for row, cached in enumerate(cache_lens):
        start, end = row_starts[row], row_starts[row + 1]
        length = cached + end - start
        blocks = block_tables[row, : -(-length // BLOCK)].long()
        # (2, H, length, D)
        own = cache[blocks].double().permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :length]
        for token in range(start, end):
            seen = own[:, :, : cached + token - start + 1]
            scores = (seen[0] @ query[token].double()[:, :, None])[..., 0] * scale  # (H, seen)
            attended[token] = (scores.softmax(-1)[:, None] @ seen[1])[:, 0]
    return attended


def dequantized(cache: Tensor, scales: Tensor) -> Tensor:
    """int8 (blocks, 2, H, 32, D) and scales (blocks, 2, H, 32) -> float64."""
    return cache.double() * scales.double()[..., None]


def tile_maxima(logits: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """Of each `tile` logits, float32 (L, V): the highest, NaN if one is, and its lowest id."""
    padding = -logits.shape[1] % tile
    padded = F.pad(logits, (0, padding), value=float("-inf"))
    tiles = padded.view(len(padded), -1, tile)
    ids = tiles.argmax(2) + torch.arange(tiles.shape[1], device=logits.device) * tile
    return tiles.amax(2), ids
