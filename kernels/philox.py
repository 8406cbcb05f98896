"""The uniform of a draw: Philox4x32-10 (Salmon et al. 2011), as in fastgen.sampling.philox."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def uniform(seed, position):
    """float64 in [0, 1), 53 bits of Philox(key = seed, counter = (position, 0, 0, 0)).

    seed: int64, position: int32, both scalars.
    """
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c0 = position.to(tl.uint32)
    c1, c2, c3 = c0 ^ c0, c0 ^ c0, c0 ^ c0
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = (p1 & 0xFFFFFFFF).to(tl.uint32)
        c3 = (p0 & 0xFFFFFFFF).to(tl.uint32)
        k0 = (k0.to(tl.uint64) + 0x9E3779B9).to(tl.uint32)
        k1 = (k1.to(tl.uint64) + 0xBB67AE85).to(tl.uint32)
    bits = ((c0.to(tl.uint64) << 32) | c1.to(tl.uint64)) >> 11
    return bits.to(tl.int64).to(tl.float64) * 1.1102230246251565e-16
