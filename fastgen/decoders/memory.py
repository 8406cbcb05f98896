"""The memory plan of a model, made before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from fastgen.errors import OptionError

BLOCK_SIZE = 32  # tokens of a KV block
MB = 2**20


def blocks_for(num_tokens: int) -> int:
    """KV blocks that so many tokens of a row take."""
    return -(-num_tokens // BLOCK_SIZE)


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes. Weights, as the decoder keeps them, and KV blocks are allocated at load.

    Scratch is the upper bound of what one step needs at a time.
    """

    weights: int
    kv_cache: int
    scratch: int
    num_blocks: int

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.scratch

    @property
    def kv_tokens(self) -> int:
        return self.num_blocks * BLOCK_SIZE

    def __str__(self) -> str:
        weights, kv_cache, scratch, total = (
            f"{size / MB:,.0f} MB"
            for size in (self.weights, self.kv_cache, self.scratch, self.total)
        )
        return (
            f"{total} = weights {weights} + KV {kv_cache} "
            f"({self.kv_tokens:,} tokens) + scratch {scratch}"
        )


def plan_memory(
    *,
    weights: int,
    scratch: int,
    block_bytes: int,
    max_batch_size: int,
    max_seq_len: int,
    free: int,
    max_memory: int | None = None,
) -> MemoryPlan:
    """Decide how many KV blocks there will be.

    Args:
        weights, scratch, block_bytes: bytes of the weights, of a step's scratch, of one KV block.
        max_batch_size, max_seq_len: rows and tokens a row that the KV holds where memory allows.
        free: bytes that can be had now.
        max_memory: MB for weights, KV and scratch together; None takes at most half of what is free
            after the weights.

    Raises:
        OptionError: not even one full context fits; says what does.
    """
    if max_memory is None:
        room = (free - weights) // 2 - scratch
        bound = f"half of what is free after the weights ({free / MB:,.0f} MB free now)"
    else:
        room = max_memory * MB - weights - scratch
        bound = f"max_memory={max_memory} MB"
    needed = blocks_for(max_seq_len)
    num_blocks = min(max_batch_size * needed, max(0, room) // block_bytes)
    if num_blocks < needed:
        kv_needed = needed * block_bytes
        raise OptionError(
            f"one context of {max_seq_len} tokens needs {kv_needed / MB:,.1f} MB of KV "
            f"beside {weights / MB:,.1f} MB of weights and {scratch / MB:,.1f} MB of scratch, more "
            f"than {bound}; lower max_seq_len or max_batch_size, or raise max_memory",
            "max_memory",
        )
    return MemoryPlan(weights, num_blocks * block_bytes, scratch, num_blocks)
