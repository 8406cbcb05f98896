"""The first kernel of a step: token and position embeddings, and where keys and values will go."""

from __future__ import annotations

import triton
import triton.language as tl
from fastgen.kernels.launch import Settings, cdiv, power_of_two, run, wait_for_previous
from torch import Tensor

BLOCK_SIZE = tl.constexpr(32)  # tokens of a KV block
_COLUMNS = 1024  # of a program
STEPS_COUNTED = 2**30  # then from 0 again: 2^31 steps are days


@triton.jit(do_not_specialize=["table_width"])
def _embed(
    hidden, slots, token_ids, positions, row_of, row_starts, cache_lens, block_tables,
    last_drawn, num_steps, wte, wte_scales, wte_factors, wpe,
    table_width, C: tl.constexpr, COLUMNS: tl.constexpr, QUANTIZED: tl.constexpr,
    WRAP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_previous(PDL)
    token = tl.program_id(0)
    token_id = tl.load(token_ids + token)
    if token_id < 0:
        token_id = tl.load(last_drawn + (-1 - token_id))
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < C
    embedded = tl.load(wte + token_id.to(tl.int64) * C + column, mask=inside, other=0.0)
    embedded = embedded.to(tl.float32)
    if QUANTIZED:
        factor = tl.load(wte_factors + column, mask=inside, other=0.0)
        embedded = embedded * tl.load(wte_scales + token_id) * factor
    position = tl.load(positions + token).to(tl.int64)
    embedded += tl.load(wpe + position * C + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(hidden + token.to(tl.int64) * C + column, embedded, mask=inside)
    if tl.program_id(1) == 0:
        if token == 0:
            tl.store(num_steps, (tl.load(num_steps) + 1) % WRAP)
        row = tl.load(row_of + token)
        cached_at = tl.load(cache_lens + row) + token - tl.load(row_starts + row)
        block = tl.load(block_tables + row * table_width + cached_at // BLOCK_SIZE)
        tl.store(slots + token, block * BLOCK_SIZE + cached_at % BLOCK_SIZE)


def embed(
    settings: Settings,
    hidden: Tensor,
    slots: Tensor,
    batch: dict[str, Tensor],
    last_drawn: Tensor,
    num_steps: Tensor,
    embedding: tuple[Tensor, Tensor | None, Tensor | None],
    wpe: Tensor,
    num_tokens: int,
) -> None:
    """hidden = wte[token_ids] + wpe[positions]; slots = block * 32 + offset of each new token.

    Args:
        hidden: float32 (N, C), written. slots: int32 (N,), written.
        batch: int32 token_ids (N,), of which -1 - s stands for last_drawn[s]; positions (N,);
            row_of (N,); row_starts (R + 1,); cache_lens (R,); block_tables (R, M).
        last_drawn: int32 (seats,).
        num_steps: int32 (1,), counted up, modulo STEPS_COUNTED.
        embedding: (V, C); int8: with float32 scales (V,), and factors (C,) by which its columns
            were divided.
        wpe: (positions, C).
    """
    wte, scales, factors = embedding
    size = wte.shape[1]
    columns = min(_COLUMNS, power_of_two(size))
    arguments = {
        "hidden": hidden,
        "slots": slots,
        **batch,
        "last_drawn": last_drawn,
        "num_steps": num_steps,
        "wte": wte,
        "wte_scales": scales,
        "wte_factors": factors,
        "wpe": wpe,
        "table_width": batch["block_tables"].shape[1],
        "C": size,
        "COLUMNS": columns,
        "QUANTIZED": scales is not None,
        "WRAP": STEPS_COUNTED,
    }
    run(_embed, (num_tokens, cdiv(size, columns)), settings, arguments)
