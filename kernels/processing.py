"""What changes logits before a draw, and the probabilities of rows that no top-k makes short.

Both kernels look at a row's own options first, and do nothing for rows that need nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from fastgen.kernels.launch import Settings, cdiv, power_of_two, run, wait_for_previous
from fastgen.kernels.vocabulary import TILE, store_highest
from torch import Tensor

# Columns of SeatTable.options
TEMPERATURE = tl.constexpr(0)  # 0: greedy
TOP_K = tl.constexpr(1)  # 0: off
TOP_P = tl.constexpr(2)  # 1: off
MIN_P = tl.constexpr(3)  # 0: off
REPETITION = tl.constexpr(4)  # 1: off
FREQUENCY = tl.constexpr(5)
PRESENCE = tl.constexpr(6)
HAS_BIAS = tl.constexpr(7)  # of these and the next, 0 or 1
HAS_MASK = tl.constexpr(8)
CHANGES = tl.constexpr(9)  # any of the last five
NUM_OPTIONS = tl.constexpr(10)

MOST_TOP_K = 256  # more candidates take the way of rows without top-k
IN_PROMPT = 1 << 30  # in SeatTable.counts
CHUNK = 1024  # logits of a program


@dataclass(frozen=True, slots=True)
class SeatTable:
    """What the device knows of the row in each seat.

    Attributes:
        options: float64 (seats, NUM_OPTIONS).
        seeds: int64 (seats,); lengths: int32 (seats,), tokens of the row so far.
        last_drawn: int32 (seats,).
        counts: int32 (seats, V), how often each id was generated, plus IN_PROMPT.
        biases: float32 (seats, V).
        masks: int32 (seats, ceil(V / 32)), bits of the ids that are allowed.
    """

    options: Tensor
    seeds: Tensor
    lengths: Tensor
    last_drawn: Tensor
    counts: Tensor
    biases: Tensor
    masks: Tensor


@dataclass(frozen=True, slots=True)
class ProcessedLogits:
    """Logits of a step's n draws, and what its kernels find out about them.

    Attributes:
        logits: float32 (n, V); tile_max, tile_ids: (n, T), of `head`.
        scores: float32 (n, V), with max and ids of its tiles: of rows whose logits change.
        weights: int64 (n, V), fixed-point probabilities; chunk_sums: int64 (n, chunks).
        hot_tiles: int32 (n, T), candidates: float32 and int32 (n, MOST_CANDIDATES).
    """

    logits: Tensor
    tile_max: Tensor
    tile_ids: Tensor
    scores: Tensor
    score_max: Tensor
    score_ids: Tensor
    weights: Tensor
    chunk_sums: Tensor
    hot_tiles: Tensor
    candidate_values: Tensor
    candidate_ids: Tensor


@triton.jit
def option(options, name: tl.constexpr, seat):
    return tl.load(options + seat * NUM_OPTIONS + name)


@triton.jit
def divided(values, divisor):
    """In float32, correctly rounded."""
    return tl.math.div_rn(values, tl.zeros_like(values) + divisor)


@triton.jit
def fixed_point(values, highest, BITS: tl.constexpr):
    """exp(value - highest) in float64, and as whole multiples of 2^-BITS, int64.

    Sums of these are exact, and so the same in any order.
    """
    exact = tl.exp(values.to(tl.float64) - highest.to(tl.float64))
    exact = tl.where(values == float("-inf"), 0.0, exact)
    one: tl.constexpr = 1 << BITS
    return exact, (exact * one + 0.5).to(tl.int64)


def fixed_point_bits(vocab_size: int) -> int:
    """As many as let V probabilities be summed in 62 bits."""
    return 61 - (vocab_size - 1).bit_length()


@triton.jit
def _process(
    logits, scores, score_max, score_ids, draw_seats, options, counts, biases, masks,
    V: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_previous(PDL)
    draw = tl.program_id(0).to(tl.int64)
    seat = tl.load(draw_seats + draw).to(tl.int64)
    is_drawn = seat >= 0
    seat = tl.maximum(seat, 0)
    if is_drawn & (option(options, CHANGES, seat) > 0):
        ids = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
        inside = ids < V
        values = tl.load(logits + draw * V + ids, mask=inside, other=float("-inf"))
        if option(options, HAS_BIAS, seat) > 0:
            values = values + tl.load(biases + seat * V + ids, mask=inside, other=0.0)
        repetition = option(options, REPETITION, seat).to(tl.float32)
        frequency = option(options, FREQUENCY, seat).to(tl.float32)
        presence = option(options, PRESENCE, seat).to(tl.float32)
        if (repetition != 1.0) | (frequency != 0.0) | (presence != 0.0):
            seen = tl.load(counts + seat * V + ids, mask=inside, other=0)
            if repetition != 1.0:
                penalized = tl.where(
                    values < 0.0,
                    values * repetition,
                    divided(values, repetition),
                )
                values = tl.where(seen != 0, penalized, values)
            generated = seen & ((1 << 30) - 1)
            penalized = values - generated.to(tl.float32) * frequency - presence
            values = tl.where(generated > 0, penalized, values)
        if option(options, HAS_MASK, seat) > 0:
            words: tl.constexpr = (V + 31) // 32
            word = tl.load(masks + seat * words + ids // 32, mask=inside, other=0)
            values = tl.where((word >> (ids % 32)) & 1 != 0, values, float("-inf"))
        tl.store(scores + draw * V + ids, values, mask=inside)
        row = draw + tl.arange(0, 1)
        store_highest(
            score_max, score_ids, values[None, :], row, row >= 0, ids, V, 1, CHUNK, TILE
        )  # fmt: skip


@triton.jit
def _weigh(
    weights, chunk_sums, logits, tile_max, scores, score_max, draw_seats, options,
    V: tl.constexpr, T: tl.constexpr, PADDED: tl.constexpr, CHUNK: tl.constexpr,
    BITS: tl.constexpr, MOST_TOP_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_previous(PDL)
    draw = tl.program_id(0).to(tl.int64)
    seat = tl.load(draw_seats + draw).to(tl.int64)
    is_drawn = seat >= 0
    seat = tl.maximum(seat, 0)
    top_k = option(options, TOP_K, seat)
    has_temperature = option(options, TEMPERATURE, seat) > 0
    if is_drawn & has_temperature & ((top_k == 0) | (top_k > MOST_TOP_K)):
        changes = option(options, CHANGES, seat) > 0
        source = scores if changes else logits
        maxima = score_max if changes else tile_max
        tile = tl.arange(0, PADDED)
        highest = tl.max(tl.load(maxima + draw * T + tile, mask=tile < T, other=float("-inf")), 0)
        temperature = option(options, TEMPERATURE, seat).to(tl.float32)
        ids = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
        values = tl.load(source + draw * V + ids, mask=ids < V, other=float("-inf"))
        values = divided(values, temperature)
        highest = tl.math.div_rn(highest, temperature)
        exact, fixed = fixed_point(values, highest, BITS)
        min_p = option(options, MIN_P, seat)
        if (top_k == 0) & (option(options, TOP_P, seat) == 1.0):
            fixed = tl.where(exact < min_p, 0, fixed)  # nothing else is to be filtered before
        else:
            tl.store(weights + draw * V + ids, fixed, mask=ids < V)
        num_chunks: tl.constexpr = (V + CHUNK - 1) // CHUNK
        tl.store(chunk_sums + draw * num_chunks + tl.program_id(1), tl.sum(fixed, 0))


def process(
    settings: Settings, rows: ProcessedLogits, seats: Tensor, table: SeatTable, num_draws: int
) -> None:
    """Process the logits of draws whose row changes them, and find the highest of each tile.

    In the order of fastgen.sampling.processors: bias, repetition penalty, frequency and presence
    penalty, allowed ids.

    Args:
        seats: int32 (n,), -1 for none.
    """
    vocab_size = rows.logits.shape[1]
    arguments = {
        "logits": rows.logits,
        "scores": rows.scores,
        "score_max": rows.score_max,
        "score_ids": rows.score_ids,
        "draw_seats": seats,
        "options": table.options,
        "counts": table.counts,
        "biases": table.biases,
        "masks": table.masks,
        "V": vocab_size,
        "TILE": TILE,
        "CHUNK": CHUNK,
    }
    run(_process, (num_draws, cdiv(vocab_size, CHUNK)), settings, arguments, fuse=False)


def weigh(
    settings: Settings, rows: ProcessedLogits, seats: Tensor, table: SeatTable, num_draws: int
) -> None:
    """Fixed-point probabilities of the draws whose row has no top-k, or a large one, and their sum
    over each CHUNK. min_p is taken into account where it is the only filter."""
    vocab_size = rows.logits.shape[1]
    num_tiles = rows.tile_max.shape[1]
    arguments = {
        "weights": rows.weights,
        "chunk_sums": rows.chunk_sums,
        "logits": rows.logits,
        "tile_max": rows.tile_max,
        "scores": rows.scores,
        "score_max": rows.score_max,
        "draw_seats": seats,
        "options": table.options,
        "V": vocab_size,
        "T": num_tiles,
        "PADDED": power_of_two(num_tiles),
        "CHUNK": CHUNK,
        "BITS": fixed_point_bits(vocab_size),
        "MOST_TOP_K": MOST_TOP_K,
    }
    run(_weigh, (num_draws, cdiv(vocab_size, CHUNK)), settings, arguments, fuse=False)
