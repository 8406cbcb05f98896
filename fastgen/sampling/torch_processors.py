"""fastgen.sampling.processors in PyTorch: each step changes the logits of many rows at once.

Shapes: n rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastgen.sampling.history import RowHistory


def process(scores: Tensor, rows: Sequence[RowHistory], allowed: Sequence[Tensor | None]) -> None:
    """Change logits, float32 (n, V), in place; `allowed` is a bool (V,) where a row has one.

    Rows that cannot be drawn from (NaN, infinite) become NaN: a ban must not hide it.
    """
    bad = ~scores.amax(1, keepdim=True).isfinite()
    changing = [(at, row) for at, row in enumerate(rows) if not row.is_plain]
    _change(scores, [(at, row.biases()) for at, row in changing], torch.add)
    _change(scores, [(at, row.repeated()) for at, row in changing], _repetition)
    _change(scores, [(at, row.counted()) for at, row in changing], _frequency)
    _change(scores, [(at, row.banned()) for at, row in changing], _rule_out)
    _allow(scores, allowed)
    _change(scores, [(at, row.risen()) for at, row in changing], _length)
    _change(scores, [(at, row.suppressed()) for at, row in changing], _rule_out)
    scores.masked_fill_(bad, math.nan)


def _change(
    scores: Tensor,
    parts: Sequence[tuple[int, tuple[NDArray[Any], ...]]],
    change: Callable[..., Tensor],
) -> None:
    """Give the logits of some ids of some rows, and what each brings, to `change`."""
    parts = [(at, part) for at, part in parts if len(part[0])]
    if not parts:
        return
    offsets = np.concatenate([part[0] + at * scores.shape[1] for at, part in parts])
    values = [
        np.concatenate(column) for column in zip(*(part[1:] for _, part in parts), strict=True)
    ]
    index, *others = (torch.from_numpy(array).to(scores.device) for array in (offsets, *values))
    flat = scores.view(-1)
    flat[index] = change(flat[index], *others)


def _repetition(some: Tensor, penalty: Tensor) -> Tensor:
    return torch.where(some < 0, some * penalty, some / penalty)


def _frequency(some: Tensor, each: Tensor, once: Tensor) -> Tensor:
    return some - each - once


def _length(some: Tensor, rise: Tensor) -> Tensor:
    return torch.where(some.isfinite(), some + some.abs() * rise, some)


def _rule_out(some: Tensor) -> Tensor:
    return torch.full_like(some, -math.inf)


def _allow(scores: Tensor, allowed: Sequence[Tensor | None]) -> None:
    masks = [mask for mask in allowed if mask is not None]
    if not masks:
        return
    rows = torch.tensor([at for at, mask in enumerate(allowed) if mask is not None])
    rows, mask = rows.to(scores.device), torch.stack(masks)  # (m,), (m, V)
    some = scores.index_select(0, rows).masked_fill_(~mask, -math.inf)
    none_left = some.amax(1, keepdim=True) == -math.inf
    scores[rows] = some.masked_fill_(mask & none_left, 0)  # all were ruled out: then any of them
