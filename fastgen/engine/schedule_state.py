"""What the engine and its scheduler keep of a row while it waits and runs."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastgen.engine.leases import Lease


@dataclass(slots=True, eq=False)
class ScheduleState:
    """Written by the engine's step alone.

    Attributes:
        queue_key: rows with a lower one go first.
        is_waiting: it is in the queue.
        awaits_prefix: a running row computes its beginning: others may pass it.
        seat: -1 while it has none.
        lease: its KV blocks, from its admission on. `lease.num_tokens` counts those tokens whose
            keys and values are in the cache after the steps that have been started.
        is_bound: the decoder's sampler has the row in its seat.
        num_under_way: steps started with it and not waited for: they hold its seat and blocks.
    """

    queue_key: tuple[int, int] = (0, 0)
    is_waiting: bool = False
    awaits_prefix: bool = False
    seat: int = -1
    lease: Lease = field(init=False)
    is_bound: bool = False
    num_under_way: int = 0
