"""Decoders whose steps are timed, so that what the engine adds to them can be told apart."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fastgen.decoders.interface import Decoder, StepBatch
from fastgen.sampling.draw import Draw


@dataclass(frozen=True, slots=True)
class FinishedStep:
    """A PendingStep that was waited for."""

    draws: list[Draw]
    logits: NDArray[np.float32]
    is_async: ClassVar[bool] = False

    def wait(self) -> list[Draw]:
        return self.draws


class TimedDecoder:
    """Counts steps, and their seconds from the call to the draws; the rest is the decoder's own."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self.steps, self.seconds = 0, 0.0

    def step(self, batch: StepBatch) -> FinishedStep:
        start = time.perf_counter()
        finished = self._finished(batch)
        self.seconds += time.perf_counter() - start
        self.steps += 1
        return finished

    def _finished(self, batch: StepBatch) -> FinishedStep:
        step = self._decoder.step(batch)
        return FinishedStep(step.wait(), step.logits)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)


class InstantDecoder(TimedDecoder):
    """Draws id 0 at once, so that nothing drives the engine out of the processor's caches."""

    def _finished(self, batch: StepBatch) -> FinishedStep:
        draws = [Draw(seat, 0) for seat in batch.seats.tolist()]
        return FinishedStep(draws, np.empty((0, 0), np.float32))
