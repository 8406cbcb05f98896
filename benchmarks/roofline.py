"""The least time that a step can take: its bytes over the bandwidth, its arithmetic over the peaks.

max(bytes of weights and KV / read bandwidth,
    multiply-adds of the matrices / their peak + those of attention / its peak)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from models import Precision, Shape


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


def decode_step(shape: Shape, precision: Precision, batch: int, context: int) -> Step:
    """One new token in each row; `context` tokens, it included, are attended to."""
    weights = shape.linear + shape.head
    kv = batch * context * shape.context
    return Step(
        read=weights * precision.weight_bytes + kv * precision.kv_bytes,
        linear=batch * weights,
        attention=kv,
    )


def prefill_step(
    shape: Shape, precision: Precision, cached: int, count: int, *, last: bool
) -> Step:
    """`count` tokens of one row behind `cached` ones; the head's logits only behind the last."""
    head = shape.head if last else 0
    attended = count * cached + count * (count + 1) // 2
    kv = (cached + count) * shape.context
    return Step(
        read=(shape.linear + head) * precision.weight_bytes + kv * precision.kv_bytes,
        linear=count * shape.linear + head,
        attention=attended * shape.context,
    )
