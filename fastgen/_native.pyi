from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

def coins(seeds: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.float64]: ...
def cpu_features() -> list[str]: ...
def sampler_bytes(num_seats: int, vocab_size: int, max_tokens: int, num_threads: int) -> int: ...

class Sampler:
    def __init__(
        self, num_seats: int, vocab_size: int, max_tokens: int, num_threads: int
    ) -> None: ...
    def reserve(self, num_seats: int) -> None: ...
    def bind(self, seat: int, prompt: Sequence[int], options: dict[str, Any]) -> None: ...
    def set_mask(self, seat: int, allowed: NDArray[np.bool_] | None) -> None: ...
    def observe(self, seat: int, token_id: int) -> None: ...
    def draw(
        self,
        logits: NDArray[np.float32],
        seats: NDArray[np.int32],
        drafts: NDArray[np.int32],
        max_top: int,
    ) -> tuple[
        NDArray[np.int32],
        NDArray[np.uint8],
        NDArray[np.float64],
        NDArray[np.int32],
        NDArray[np.float64],
    ]: ...
