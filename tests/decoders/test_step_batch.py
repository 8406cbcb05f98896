"""How a StepBatch is made."""

from __future__ import annotations

import numpy as np
import pytest

from fastgen.decoders.interface import Capacity, StepBatch, check_batch

LIMITS = Capacity(
    num_blocks=8, block_size=32, max_seq_len=96, max_tokens=16, max_logits=8, num_seats=4,
    batch_invariant=True,
)  # fmt: skip
TABLES = np.arange(6, dtype=np.int32).reshape(2, 3)
ARRAYS = StepBatch.__slots__


def test_positions_follow_what_is_cached() -> None:
    batch = StepBatch.ragged(
        token_ids=[5, 6, 7, 8], counts=[1, 3], cache_lens=[40, 2], block_tables=TABLES,
        logits_at=[0, 3], seats=[1, -1],
    )  # fmt: skip
    check_batch(batch, LIMITS)
    assert batch.positions.tolist() == [40, 2, 3, 4]
    assert batch.row_starts.tolist() == [0, 1, 4]
    assert all(getattr(batch, name).dtype == np.int32 for name in ARRAYS)


def test_a_caller_may_have_positions_of_its_own() -> None:
    batch = StepBatch.ragged(
        token_ids=np.array([5, 6]), counts=[2], cache_lens=[40], block_tables=TABLES[:1],
        logits_at=[1], seats=[-1], positions=np.array([3, 9]),
    )  # fmt: skip
    check_batch(batch, LIMITS)
    assert batch.positions.tolist() == [3, 9] and batch.positions.dtype == np.int32


@pytest.mark.parametrize("count", [1, 2])
def test_a_step_of_decoding_rows_is_the_ragged_one(count: int) -> None:
    token_ids, cached, seats = [5, -2][:count], [40, 2][:count], np.array([3, 1][:count], np.int32)
    decode = StepBatch.decode(token_ids, cached, TABLES[:count], seats)
    check_batch(decode, LIMITS)
    ragged = StepBatch.ragged(
        token_ids=token_ids, counts=[1] * count, cache_lens=cached, block_tables=TABLES[:count],
        logits_at=range(count), seats=seats,
    )  # fmt: skip
    for name in ARRAYS:
        assert getattr(decode, name).dtype == np.int32
        assert np.array_equal(getattr(decode, name), getattr(ragged, name)), name
