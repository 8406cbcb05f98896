"""The least time that a step can take: its bytes over the bandwidth, its arithmetic over the peaks.

max(bytes of weights and KV / read bandwidth,
    multiply-adds of the matrices / their peak + those of attention / its peak)

after Williams, Waterman and Patterson, "Roofline: an insightful visual performance model" (2009).
Left out, since they are small beside these: activations, embeddings, biases, norms, what is drawn.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastgen.bench.shapes import Precision, Shape


@dataclass(frozen=True)
class Speeds:
    """What the machine can do a second, at the time: bytes read and multiply-adds."""

    read: float
    linear: float
    attention: float


@dataclass(frozen=True)
class Step:
    """What one step has to read and compute at least."""

    read: float  # bytes
    linear: float  # multiply-adds
    attention: float

    def reading(self, speeds: Speeds) -> float:
        return self.read / speeds.read

    def computing(self, speeds: Speeds) -> float:
        return self.linear / speeds.linear + self.attention / speeds.attention

    def limit(self, speeds: Speeds) -> float:
        return max(self.reading(speeds), self.computing(speeds))


def limit(steps: Iterable[Step], speeds: Speeds) -> float:
    """Seconds that all the steps, one after the other, take at least."""
    return sum(step.limit(speeds) for step in steps)


def ragged_step(
    shape: Shape,
    precision: Precision,
    new: Sequence[int] | NDArray[np.integer],
    cached: Sequence[int] | NDArray[np.integer],
    num_logits: int,
) -> Step:
    """A step of any rows, whose blocks are not shared.

    Args:
        new, cached: tokens of each row that are computed, and those that are in the cache before.
        num_logits: tokens that the head is computed for.
    """
    counts, before = np.asarray(new, np.int64), np.asarray(cached, np.int64)
    head = shape.head if num_logits else 0
    attended = int((counts * before + counts * (counts + 1) // 2).sum())  # causal
    return Step(
        read=(shape.linear + head) * precision.weight_bytes
        + int((before + counts).sum()) * shape.context * precision.kv_bytes,
        linear=int(counts.sum()) * shape.linear + num_logits * shape.head,
        attention=attended * shape.context,
    )


def decode_step(shape: Shape, precision: Precision, batch: int, context: int) -> Step:
    """One new token in each row; `context` tokens, it included, are attended to."""
    return ragged_step(shape, precision, [1] * batch, [context - 1] * batch, batch)


def prefill_step(
    shape: Shape, precision: Precision, cached: int, count: int, *, last: bool
) -> Step:
    """`count` tokens of one row after `cached` ones; the head's logits for the last one only."""
    return ragged_step(shape, precision, [count], [cached], int(last))
