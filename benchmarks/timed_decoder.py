"""A decoder whose steps are timed, so that what the engine adds to them can be told apart."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastgen.decoders.interface import Decoder, Draw, PendingStep, StepBatch


@dataclass(frozen=True, slots=True)
class FinishedStep:
    """A PendingStep that was waited for."""

    draws: list[Draw]
    step: PendingStep

    def wait(self) -> list[Draw]:
        return self.draws

    @property
    def logits(self) -> NDArray[np.float32]:
        return self.step.logits


class TimedDecoder:
    """Counts steps, and their seconds from the call to the draws; the rest is the decoder's own."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self.steps, self.seconds = 0, 0.0

    def step(self, batch: StepBatch) -> FinishedStep:
        start = time.perf_counter()
        step = self._decoder.step(batch)
        draws = step.wait()
        self.seconds += time.perf_counter() - start
        self.steps += 1
        return FinishedStep(draws, step)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)
