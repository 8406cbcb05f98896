"""How one row's token is chosen: from few candidates, or from the whole vocabulary.

Both return the first id, in token-id order, whose running sum of kept probabilities exceeds
uniform * total (fastgen.sampling.definition). Probabilities are fixed-point, so sums do not depend
on their order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from fastgen.kernels.processing import divided, fixed_point


@triton.jit
def ordered(values):
    """int32 that compare as float32 values do; there is one zero."""
    bits = tl.where(values == 0.0, 0.0, values).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def from_ordered(keys):
    """The float32 values that `ordered` made these int32 of."""
    return (keys ^ ((keys >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def first_above(running, target, total):
    """The index of the first of non-decreasing `running` sums that exceeds uniform * total; where
    that product rounds up to the total, of the first that reaches the total."""
    not_above = tl.sum((running.to(tl.float64) <= target).to(tl.int32), 0)
    return tl.minimum(not_above, tl.sum((running < total).to(tl.int32), 0))


@triton.jit
def gather_candidates(
    source, maxima, temperature, wanted, hot_tiles, candidate_values, candidate_ids,
    V: tl.constexpr, T: tl.constexpr, TILE: tl.constexpr, MOST: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Write down, in the order of their ids, all values that reach the `wanted`-th highest of the
    tiles' maxima: the `wanted` highest values, and all their equals, are among them.

    Returns:
        How many there are; more than MOST are not all written.
    """
    tile = tl.arange(0, maxima.shape[0])
    descending = tl.sort(maxima, descending=True)
    least = tl.max(tl.where(tile == wanted - 1, descending, float("-inf")), 0)
    is_hot = (maxima >= least) & (maxima > float("-inf"))
    tl.store(hot_tiles + tl.cumsum(is_hot.to(tl.int32), 0) - 1, tile, mask=is_hot)
    num_hot = tl.sum(is_hot.to(tl.int32), 0)
    tl.debug_barrier()  # what one thread wrote, others read
    count = 0
    for start in range(0, num_hot, GROUP):
        at = start + tl.arange(0, GROUP)
        hot = tl.load(hot_tiles + at, mask=at < num_hot, other=T)
        ids = (hot[:, None] * TILE + tl.arange(0, TILE)[None, :]).reshape(GROUP * TILE)
        values = tl.load(source + ids, mask=ids < V, other=float("-inf"))
        values = divided(values, temperature)
        is_candidate = (values >= least) & (values > float("-inf"))
        place = count + tl.cumsum(is_candidate.to(tl.int32), 0) - 1
        there = is_candidate & (place < MOST)
        tl.store(candidate_values + place, values, mask=there)
        tl.store(candidate_ids + place, ids, mask=there)
        count += tl.sum(is_candidate.to(tl.int32), 0)
    tl.debug_barrier()
    return count


@triton.jit
def choose_among(
    candidate_values, candidate_ids, count, highest, top_k, top_p, min_p, uniform, whole,
    MOST: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """An id from up to MOST candidates; -1 where top_p would keep more than the candidates.

    whole: int64, the mass of the whole vocabulary, where that is what top_p is a share of; 0: of
    the candidates.
    """
    at = tl.arange(0, MOST)
    there = at < count
    values = tl.load(candidate_values + at, mask=there, other=float("-inf"))
    ids = tl.load(candidate_ids + at, mask=there, other=0)
    keys = ordered(values).to(tl.int64) * MOST + (MOST - 1 - at)  # of equals the lowest id first
    best = tl.sort(keys, descending=True)
    best_values = from_ordered((best >> (MOST.bit_length() - 1)).to(tl.int32))
    kept = at < count
    if top_k > 0:
        kth = tl.max(tl.where(at == tl.minimum(top_k, count) - 1, best_values, float("-inf")), 0)
        kept = kept & (best_values >= kth)
    exact, fixed = fixed_point(best_values, highest, BITS)
    running = tl.cumsum(tl.where(kept, fixed, 0), 0)
    total = tl.sum(tl.where(kept, fixed, 0), 0)
    goal = top_p * tl.where(whole > 0, whole, total).to(tl.float64)
    is_enough = total.to(tl.float64) >= goal
    if top_p < 1.0:
        kept = kept & (at <= tl.sum((running.to(tl.float64) < goal).to(tl.int32), 0))
    kept = kept & (exact >= min_p)
    edge = tl.min(tl.where(kept, best, tl.max(best, 0)), 0)
    _, fixed = fixed_point(values, highest, BITS)
    fixed = tl.where(there & (keys >= edge), fixed, 0)
    running = tl.cumsum(fixed, 0)
    total = tl.sum(fixed, 0)
    chosen = first_above(running, uniform * total.to(tl.float64), total)
    token_id = tl.sum(tl.where(at == chosen, ids, 0), 0)
    return tl.where(is_enough, token_id, -1)


@triton.jit
def revive(scores, mask, V: tl.constexpr, CHUNK: tl.constexpr):
    """Where everything that a row's mask allows has been ruled out, any of it may be drawn: 0 for
    what it allows, -inf for the rest, as fastgen.sampling.processors has it.

    Returns:
        The lowest id that is allowed; V if none is.
    """
    lowest = V
    for start in range(0, V, CHUNK):
        ids = start + tl.arange(0, CHUNK)
        word = tl.load(mask + ids // 32, mask=ids < V, other=0)
        is_allowed = ((word >> (ids % 32)) & 1) != 0
        tl.store(scores + ids, tl.where(is_allowed, 0.0, float("-inf")), mask=ids < V)
        lowest = tl.minimum(lowest, tl.min(tl.where(is_allowed, ids, V), 0))
    tl.debug_barrier()
    return lowest


@triton.jit
def _amount(
    source, weights, temperature, least, edge,
    V: tl.constexpr, CHUNK: tl.constexpr, COUNTS: tl.constexpr,
):  # fmt: skip
    """Mass, or number, of what is at least `least` and `edge`, ordered values."""
    amount = tl.zeros([CHUNK], tl.int64)
    for start in range(0, V, CHUNK):
        ids = start + tl.arange(0, CHUNK)
        values = tl.load(source + ids, mask=ids < V, other=float("-inf"))
        key = ordered(divided(values, temperature)).to(tl.int64)
        own = tl.full([CHUNK], 1, tl.int64)
        if not COUNTS:
            own = tl.load(weights + ids, mask=ids < V, other=0)
        amount += tl.where((ids < V) & (key >= least) & (key >= edge), own, 0)
    return tl.sum(amount, 0)


@triton.jit
def _edge(
    source, weights, temperature, least, goal,
    V: tl.constexpr, CHUNK: tl.constexpr, COUNTS: tl.constexpr,
):  # fmt: skip
    """The highest ordered value that leaves an amount of at least `goal`, a float64."""
    low = goal.to(tl.int64) * 0 - 2147483648
    high = low + 4294967295
    while low < high:
        middle = low + (high - low + 1) // 2
        amount = _amount(source, weights, temperature, least, middle, V, CHUNK, COUNTS)
        if amount.to(tl.float64) >= goal:
            low = middle
        else:
            high = middle - 1
    return low


@triton.jit
def choose_of_all(
    source, weights, temperature, highest, top_k, top_p, min_p, uniform, has_weights,
    V: tl.constexpr, CHUNK: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """An id, whatever the options: edges are found by bisection, a pass over the row each.

    weights: int64 (V,), of `weigh`; written first where has_weights is false.
    """
    if not has_weights:
        for start in range(0, V, CHUNK):
            ids = start + tl.arange(0, CHUNK)
            values = tl.load(source + ids, mask=ids < V, other=float("-inf"))
            _, fixed = fixed_point(divided(values, temperature), highest, BITS)
            tl.store(weights + ids, fixed, mask=ids < V)
        tl.debug_barrier()
    least = uniform.to(tl.int64) * 0 - 2147483648
    if top_k > 0:
        goal = top_k.to(tl.float64)
        least = _edge(source, weights, temperature, least, goal, V, CHUNK, True)
    edge, num_equals = least, uniform.to(tl.int64) * 0 + V
    if top_p < 1.0:
        total = _amount(source, weights, temperature, least, least, V, CHUNK, False)
        goal = top_p * total.to(tl.float64)
        edge = _edge(source, weights, temperature, least, goal, V, CHUNK, False)
        above = _amount(source, weights, temperature, least, edge + 1, V, CHUNK, False)
        _, own = fixed_point(from_ordered(edge.to(tl.int32)), highest, BITS)
        missing = tl.maximum(goal - above.to(tl.float64), 0.0) / tl.maximum(own, 1).to(tl.float64)
        num_equals = tl.maximum(missing.to(tl.int64), 1)
        num_equals += ((above + num_equals * own).to(tl.float64) < goal).to(tl.int64)
    total = uniform.to(tl.int64) * 0
    equals = total
    for start in range(0, V, CHUNK):
        kept, equals = _kept(
            source, weights, temperature, highest, start, edge, equals, num_equals, min_p,
            V, CHUNK, BITS,
        )  # fmt: skip
        total += tl.sum(kept, 0)
    target = uniform * total.to(tl.float64)
    before = uniform.to(tl.int64) * 0
    equals = before
    token_id = 0
    for start in range(0, V, CHUNK):  # running sums never fall: the id is how many are too low
        kept, equals = _kept(
            source, weights, temperature, highest, start, edge, equals, num_equals, min_p,
            V, CHUNK, BITS,
        )  # fmt: skip
        token_id += first_above(before + tl.cumsum(kept, 0), target, total)
        before += tl.sum(kept, 0)
    return token_id


@triton.jit
def _kept(
    source, weights, temperature, highest, start, edge, equals, num_equals, min_p,
    V: tl.constexpr, CHUNK: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Weights of a chunk that the filters leave, int64 (CHUNK,); and equals of the edge so far."""
    ids = start + tl.arange(0, CHUNK)
    values = divided(tl.load(source + ids, mask=ids < V, other=float("-inf")), temperature)
    key = ordered(values).to(tl.int64)
    is_equal = (key == edge) & (ids < V)
    rank = equals + tl.cumsum(is_equal.to(tl.int64), 0)  # from 1
    exact, _ = fixed_point(values, highest, BITS)
    kept = ((key > edge) | (is_equal & (rank <= num_equals))) & (exact >= min_p) & (ids < V)
    own = tl.load(weights + ids, mask=kept, other=0)
    return own, equals + tl.sum(is_equal.to(tl.int64), 0)


@triton.jit
def choose_unfiltered(
    source, chunk_sums, temperature, highest, min_p, uniform,
    V: tl.constexpr, CHUNK: tl.constexpr, PADDED: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """An id where no filter, or only min_p, is on: `weigh` has summed each chunk."""
    num_chunks: tl.constexpr = (V + CHUNK - 1) // CHUNK
    chunk = tl.arange(0, PADDED)
    sums = tl.load(chunk_sums + chunk, mask=chunk < num_chunks, other=0)
    running = tl.cumsum(sums, 0)
    total = tl.sum(sums, 0)
    target = uniform * total.to(tl.float64)
    own_chunk = first_above(running, target, total)
    before = tl.sum(tl.where(chunk < own_chunk, sums, 0), 0)
    ids = own_chunk * CHUNK + tl.arange(0, CHUNK)
    values = divided(tl.load(source + ids, mask=ids < V, other=float("-inf")), temperature)
    exact, fixed = fixed_point(values, highest, BITS)
    fixed = tl.where((exact >= min_p) & (ids < V), fixed, 0)
    return own_chunk * CHUNK + first_above(before + tl.cumsum(fixed, 0), target, total)
