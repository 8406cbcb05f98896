"""A decoder of the CPU that behaves like one of a GPU: a step has run when it is waited for, or
something else wants the memory, and the engine may start the next one before. It holds the engine
to the interface's rules: a seat and a row's blocks are free only after the row's last step has been
waited for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastgen.decoders.interface import StepBatch
from fastgen.sampling.draw import Draw
from fastgen.sampling.params import SamplingParams


@dataclass
class LateStep:
    decoder: LateDecoder
    batch: StepBatch
    is_async: bool
    made: Any = None  # the step of the decoder below, or what that raised
    waited: bool = False

    def wait(self) -> list[Draw]:
        self.decoder.catch_up(self)
        self.waited = True
        if isinstance(self.made, Exception):
            raise self.made
        draws: list[Draw] = self.made.wait()
        return draws

    def __getattr__(self, name: str) -> Any:
        return getattr(self.made, name)  # logits

    def holds(self, seat: int) -> bool:
        return not self.waited and seat in self.batch.seats.tolist()


class LateDecoder:
    """Steps with log-probabilities are made at once, as by the CUDA decoder."""

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder
        self._queue: deque[LateStep] = deque()
        self._under_way: list[LateStep] = []
        self._with_logprobs: set[int] = set()  # seats
        self.most_under_way = 0

    def step(self, batch: StepBatch) -> LateStep:
        is_async = self._with_logprobs.isdisjoint(batch.seats.tolist())
        step = LateStep(self, batch, is_async)
        self._queue.append(step)
        if not is_async:
            self.catch_up(step)
        self._under_way = [one for one in self._under_way if not one.waited] + [step]
        self.most_under_way = max(self.most_under_way, len(self._under_way))
        return step

    def catch_up(self, last: LateStep | None = None) -> None:
        while self._queue and (last is None or last.made is None):
            step = self._queue.popleft()
            try:
                step.made = self._decoder.step(step.batch)
                step.made.wait()
            except Exception as error:
                step.made = error

    def bind(self, seat: int, params: SamplingParams, token_ids: Sequence[int]) -> None:
        self._assert_free(seat)
        self._with_logprobs.discard(seat)
        if params.logprobs is not None:
            self._with_logprobs.add(seat)
        self._decoder.bind(seat, params, token_ids)

    def release(self, seat: int) -> None:
        self._assert_free(seat)
        self._decoder.release(seat)

    def _assert_free(self, seat: int) -> None:
        assert not any(step.holds(seat) for step in self._under_way), "a step holds this seat"

    def forward(self, batch: StepBatch) -> np.ndarray[Any, Any]:
        self.catch_up()
        logits: np.ndarray[Any, Any] = self._decoder.forward(batch)
        return logits

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        self.catch_up()
        self._decoder.copy_blocks(pairs)

    def close(self) -> None:
        assert not any(not step.waited for step in self._under_way), "closed in a step"
        self._decoder.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)
