"""What a run was made of: each step's rows, and when each token came."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastgen.decoders.interface import Decoder, PendingStep, StepBatch
from fastgen.engine.requests import Request, Row


class StepSize(NamedTuple):
    """One step: tokens computed and tokens cached before, of each row; logits in all."""

    new: NDArray[np.int32]
    cached: NDArray[np.int32]
    num_logits: int


class RecordingDecoder:
    """A decoder that notes the size of each of its steps; all else is the decoder's own."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self.sizes: list[StepSize] = []

    def step(self, batch: StepBatch) -> PendingStep:
        new = np.diff(batch.row_starts)
        self.sizes.append(StepSize(new, batch.cache_lens.copy(), len(batch.logits_at)))
        return self._decoder.step(batch)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)


class TokenClock:
    """A listener that notes when each of a request's tokens was handed out."""

    def __init__(self) -> None:
        self.times: list[float] = []  # time.perf_counter()

    def row_drew(self, row: Row) -> None:
        self.times.append(time.perf_counter())

    def request_ended(self, request: Request) -> None:
        pass
