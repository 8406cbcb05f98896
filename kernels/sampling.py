"""The last kernel of a step: one draw for each row that wants one, and the feedback of its token.

A program a draw. Greedy rows and rows with a top-k (up to MOST_TOP_K) read what their tiles' maxima
point at; rows without filters read the chunk that the uniform falls into. Where top-p alone
decides, the 512 highest and what equals them are tried, then the whole row.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from fastgen.kernels.choosing import (
    choose_among,
    choose_of_all,
    choose_unfiltered,
    gather_candidates,
    revive,
)
from fastgen.kernels.launch import Settings, cdiv, power_of_two, run, wait_for_previous
from fastgen.kernels.philox import uniform
from fastgen.kernels.processing import (
    CHANGES,
    CHUNK,
    FREQUENCY,
    HAS_MASK,
    MIN_P,
    MOST_TOP_K,
    PRESENCE,
    REPETITION,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    ProcessedLogits,
    SeatTable,
    divided,
    fixed_point_bits,
    option,
)
from fastgen.kernels.vocabulary import TILE
from torch import Tensor

MOST_CANDIDATES = 1024
_TRIED = tl.constexpr(512)  # candidates at least, where top-p alone decides
_GROUP = 32  # tiles that are read together
_LONG_CHUNK = 2048  # logits that are read together where all are


@dataclass(frozen=True, slots=True)
class Feedback:
    """Where draws go.

    Attributes:
        drawn: int32 (ring, n), in memory that the host can read too; -1: nothing could be drawn.
        num_steps: int32 (1,), the line of `drawn` to write to, counted up by each step.
        token_ids, positions, cache_lens: int32 (n,), of a step with one token a row that is to be
            followed by one like it: they are moved on. None where they are not.
    """

    drawn: Tensor
    num_steps: Tensor
    token_ids: Tensor | None = None
    positions: Tensor | None = None
    cache_lens: Tensor | None = None


@triton.jit
def _sampled(
    source, maxima, draw, seat, highest, is_revived, options, seeds, lengths, weights,
    chunk_sums, hot_tiles, candidate_values, candidate_ids,
    V: tl.constexpr, T: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr, MOST: tl.constexpr, MOST_TOP_K: tl.constexpr, GROUP: tl.constexpr,
    LONG_CHUNK: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    temperature = option(options, TEMPERATURE, seat).to(tl.float32)
    top_k = option(options, TOP_K, seat).to(tl.int32)
    top_p = option(options, TOP_P, seat)
    min_p = option(options, MIN_P, seat)
    u = uniform(tl.load(seeds + seat), tl.load(lengths + seat))
    num_chunks: tl.constexpr = (V + CHUNK - 1) // CHUNK
    is_long = (top_k == 0) | (top_k > MOST_TOP_K)
    token_id = -1
    is_tried = (is_revived == 0) & (top_k <= MOST_TOP_K)  # else nothing known of its tiles helps
    if (is_revived == 0) & (top_k == 0) & (top_p == 1.0):
        token_id = choose_unfiltered(
            source, chunk_sums + draw * num_chunks, temperature, highest, min_p, u,
            V, CHUNK, CHUNKS, BITS,
        )  # fmt: skip
    elif is_tried:
        wanted = tl.where(top_k > 0, top_k, _TRIED)
        count = gather_candidates(
            source, divided(maxima, temperature), temperature, wanted, hot_tiles + draw * T,
            candidate_values + draw * MOST, candidate_ids + draw * MOST,
            V, T, TILE, MOST, GROUP,
        )  # fmt: skip
        if count <= MOST:
            chunk = tl.arange(0, CHUNKS)
            inside = chunk < tl.where(is_long, num_chunks, 0)
            whole = tl.sum(tl.load(chunk_sums + draw * num_chunks + chunk, mask=inside, other=0), 0)
            token_id = choose_among(
                candidate_values + draw * MOST, candidate_ids + draw * MOST, count, highest,
                top_k, top_p, min_p, u, whole, MOST, BITS,
            )  # fmt: skip
    if token_id < 0:
        has_weights = (is_revived == 0) & is_long
        token_id = choose_of_all(
            source, weights + draw * V, temperature, highest, top_k, top_p, min_p, u, has_weights,
            V, LONG_CHUNK, BITS,
        )  # fmt: skip
    return token_id


@triton.jit(do_not_specialize=["width"])
def _sample(
    drawn, num_steps, next_ids, positions, cache_lens, draw_seats, options, seeds, lengths,
    last_drawn, counts, masks, logits, tile_max, tile_ids, scores, score_max, score_ids, weights,
    chunk_sums, hot_tiles, candidate_values, candidate_ids, width,
    V: tl.constexpr, T: tl.constexpr, TILE: tl.constexpr, PADDED: tl.constexpr,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, MOST: tl.constexpr, MOST_TOP_K: tl.constexpr,
    GROUP: tl.constexpr, LONG_CHUNK: tl.constexpr, BITS: tl.constexpr, RING: tl.constexpr,
    ADVANCES: tl.constexpr, SAMPLES: tl.constexpr, PROCESSES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_previous(PDL)
    draw = tl.program_id(0).to(tl.int64)
    seat = tl.load(draw_seats + draw).to(tl.int64)
    if seat >= 0:
        tile = tl.arange(0, PADDED)
        is_tile = tile < T
        maxima = tl.load(tile_max + draw * T + tile, mask=is_tile, other=float("-inf"))
        source, best_ids = logits + draw * V, tile_ids + draw * T
        usable = tl.min((maxima < float("inf")).to(tl.int32), 0) > 0  # no NaN and no infinity
        usable = usable & (tl.max(maxima, 0) > float("-inf"))
        is_revived = 0
        revived_id = V
        if PROCESSES:
            if usable & (option(options, CHANGES, seat) > 0):
                maxima = tl.load(score_max + draw * T + tile, mask=is_tile, other=float("-inf"))
                source, best_ids = scores + draw * V, score_ids + draw * T
                has_mask = option(options, HAS_MASK, seat) > 0
                if has_mask & (tl.max(maxima, 0) == float("-inf")):
                    words: tl.constexpr = (V + 31) // 32
                    revived_id = revive(scores + draw * V, masks + seat * words, V, LONG_CHUNK)
                    is_revived = (revived_id < V).to(tl.int32)
        highest = tl.where(is_revived > 0, 0.0, tl.max(maxima, 0))
        usable = usable & (tl.min((maxima < float("inf")).to(tl.int32), 0) > 0)
        usable = usable & (highest > float("-inf"))
        temperature = option(options, TEMPERATURE, seat).to(tl.float32)
        token_id = -1
        if usable:
            if temperature == 0:
                ids = tl.load(best_ids + tile, mask=is_tile, other=V)
                token_id = tl.min(tl.where(maxima == highest, ids, V), 0)
                token_id = tl.where(is_revived > 0, revived_id, token_id)
            elif SAMPLES:
                highest = tl.math.div_rn(highest, temperature)
                if (highest < float("inf")) & (highest > float("-inf")):
                    token_id = _sampled(
                        source, maxima, draw, seat, highest, is_revived, options, seeds,
                        lengths, weights, chunk_sums, hot_tiles, candidate_values, candidate_ids,
                        V, T, TILE, CHUNK, CHUNKS, MOST, MOST_TOP_K, GROUP, LONG_CHUNK, BITS,
                    )  # fmt: skip
        line = tl.load(num_steps) % RING
        tl.store(drawn + line * width + draw, token_id)
        fed = tl.maximum(token_id, 0)
        tl.store(last_drawn + seat, fed)
        if token_id >= 0:
            tl.store(lengths + seat, tl.load(lengths + seat) + 1)
            penalizes = option(options, REPETITION, seat) != 1
            penalizes = penalizes | (option(options, FREQUENCY, seat) != 0)
            penalizes = penalizes | (option(options, PRESENCE, seat) != 0)
            if penalizes:
                count = counts + seat * V + token_id
                tl.store(count, tl.load(count) + 1)
        if ADVANCES:
            tl.store(next_ids + draw, fed)
            tl.store(positions + draw, tl.load(positions + draw) + 1)
            tl.store(cache_lens + draw, tl.load(cache_lens + draw) + 1)


def sample(
    settings: Settings,
    feedback: Feedback,
    seats: Tensor,
    table: SeatTable,
    rows: ProcessedLogits,
    num_draws: int,
    *,
    samples: bool = True,
    processes: bool = True,
) -> None:
    """Draw once for each row of logits whose seat is not -1; the seats count what they drew.

    Args:
        seats: int32 (n,), none twice.
        samples: some row has a temperature; `weigh` has run.
        processes: some row's logits change; `process` has run.
    """
    vocab_size = rows.logits.shape[1]
    num_tiles = rows.tile_max.shape[1]
    arguments = {
        "drawn": feedback.drawn,
        "num_steps": feedback.num_steps,
        "next_ids": feedback.token_ids,
        "positions": feedback.positions,
        "cache_lens": feedback.cache_lens,
        "draw_seats": seats,
        "options": table.options,
        "seeds": table.seeds,
        "lengths": table.lengths,
        "last_drawn": table.last_drawn,
        "counts": table.counts,
        "masks": table.masks,
        "logits": rows.logits,
        "tile_max": rows.tile_max,
        "tile_ids": rows.tile_ids,
        "scores": rows.scores,
        "score_max": rows.score_max,
        "score_ids": rows.score_ids,
        "weights": rows.weights,
        "chunk_sums": rows.chunk_sums,
        "hot_tiles": rows.hot_tiles,
        "candidate_values": rows.candidate_values,
        "candidate_ids": rows.candidate_ids,
        "width": feedback.drawn.shape[1],
        "V": vocab_size,
        "T": num_tiles,
        "TILE": TILE,
        "PADDED": power_of_two(num_tiles),
        "CHUNK": CHUNK,
        "CHUNKS": power_of_two(cdiv(vocab_size, CHUNK)),
        "MOST": MOST_CANDIDATES,
        "MOST_TOP_K": MOST_TOP_K,
        "GROUP": _GROUP,
        "LONG_CHUNK": _LONG_CHUNK,
        "BITS": fixed_point_bits(vocab_size),
        "RING": len(feedback.drawn),
        "ADVANCES": feedback.token_ids is not None,
        "SAMPLES": samples,
        "PROCESSES": processes,
    }
    run(_sample, (num_draws,), settings, arguments, num_warps=8, fuse=False)
