"""The uniform: Philox4x32-10, a counter-based random generator without state.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). Every draw is a function of
(seed, position), so a row's tokens depend neither on its batch mates nor on how often anybody drew.

The rounds use only `*`, `>>`, `&` and `^` on 64-bit integers, so the same function serves Python
ints, NumPy int64 arrays and torch int64 tensors (products wrap; the shifts' sign bits are masked).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastgen.native import native

_M0, _M1 = 0xD2511F53, 0xCD9E8D57  # round multipliers
_W0, _W1 = 0x9E3779B9, 0xBB67AE85  # key increments: the golden ratio and sqrt(3) - 1
_MASK32 = 0xFFFFFFFF
_ROUNDS = 10

Word = Any  # int, NDArray[np.int64] or a torch.int64 tensor; values in [0, 2**32)


def philox4x32(counter: tuple[Word, Word, Word, Word], key: tuple[Word, Word]) -> tuple[Word, ...]:
    """Ten rounds over four counter words and two key words; returns four 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK32) ^ c1 ^ k0,
            p1 & _MASK32,
            ((p0 >> 32) & _MASK32) ^ c3 ^ k1,
            p0 & _MASK32,
        )
        k0, k1 = (k0 + _W0) & _MASK32, (k1 + _W1) & _MASK32
    return c0, c1, c2, c3


def words_to_uniform(high: Word, low: Word) -> Word:
    """53 bits of two 32-bit words as an integer; times 2**-53 it is a uniform in [0, 1)."""
    return ((high << 32 | low) >> 11) & (2**53 - 1)


def uniforms(seeds: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """One uniform in [0, 1) for each row.

    Args:
        seeds: int64 (R,), the 64 bits of each row's unsigned seed.
        positions: int64 (R,), the index in its row of the token that is being drawn.
    """
    if native is not None:
        return np.asarray(native.uniforms(seeds, positions))
    zeros = np.zeros_like(positions)
    key = (seeds & _MASK32, (seeds >> 32) & _MASK32)
    high, low, _, _ = philox4x32((positions & _MASK32, zeros, zeros, zeros), key)
    return np.asarray(words_to_uniform(high, low) * 2.0**-53)


def sample_seed(seed: int, index: int) -> int:
    """The seed of sample `index` of a request: sample 0 uses the request's own."""
    if index == 0:
        return seed
    key = (seed & _MASK32, seed >> 32)
    high, low, _, _ = philox4x32((index, 0, 0, 1), key)
    return int(high << 32 | low)
