"""What a caller does between an engine's steps: forwards of its own, in leased blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engine_harness import assert_idle, greedy, make_engine, new_tokens, random_prompt, run_all
from fastgen.decoders.interface import StepBatch
from fastgen.decoders.memory import BLOCK_SIZE
from fastgen.engine.blocks import block_keys
from fastgen.engine.leases import Lease
from fastgen.engine.pause import Pause
from fastgen.errors import EngineError
from fastgen.speculation.costs import SIZES, StepCosts
from stepping import to_numpy


def next_token(pause: Pause, lease: Lease, new: list[int]) -> int:
    """The most probable token behind the lease's and these, which are computed."""
    cached = lease.num_tokens
    pause.copy_blocks(lease.extend(len(new)))
    batch = StepBatch.ragged(
        token_ids=new, counts=[len(new)], cache_lens=[cached],
        block_tables=np.array([lease.blocks], np.int32), logits_at=[len(new) - 1], seats=[-1],
    )  # fmt: skip
    return int(to_numpy(pause.forward(batch))[0].argmax())


def test_a_forward_of_ones_own_goes_on_where_a_row_was_and_takes_drafts_back() -> None:
    engine, prompt = make_engine(), random_prompt(np.random.default_rng(3), 70)
    request = engine.add_request(prompt, greedy(max_new_tokens=4, ignore_eos=True))
    run_all(engine, [request])
    [wanted] = new_tokens(request)
    keys, num_found = block_keys(prompt)[:2], 2 * BLOCK_SIZE
    with engine.between_steps() as pause:
        pause.reserve_blocks(4)
        lease = pause.lease()
        lease.acquire(keys, num_found, reuse=num_found)
        assert lease.num_tokens == num_found, "the row has left them"
        assert next_token(pause, lease, prompt[num_found:]) == wanted[0]
    again = engine.add_request(prompt, greedy(max_new_tokens=4, ignore_eos=True))
    run_all(engine, [again])  # beside the lease, which keeps its blocks
    assert new_tokens(again) == [wanted]
    with engine.between_steps() as pause:
        twin = lease.share()
        drafts = [wanted[0], *[token + 1 for token in wanted[1:]]]
        next_token(pause, lease, drafts)
        lease.rewind(len(drafts) - 1)
        for one in (lease, twin):
            start = one.num_tokens - len(prompt)
            assert next_token(pause, one, wanted[start:3]) == wanted[3]
        assert lease.blocks[-1] != twin.blocks[-1]
        lease.release()
        twin.release()
    assert_idle(engine)


def test_it_makes_room_for_rows_before_anybody_takes_it() -> None:
    engine = make_engine(seats=1, max_seq_len=64)
    before = engine.decoder.limits
    with engine.between_steps() as pause:
        pause.reserve_rows([64, 64, 64])
        assert engine.decoder.limits.num_seats == 3
        assert engine.num_free_blocks >= 3 * 2 >= before.num_blocks
    prompts = [random_prompt(np.random.default_rng(at), 40) for at in range(3)]
    run_all(engine, [engine.add_request(prompt, greedy(max_new_tokens=3)) for prompt in prompts])
    assert_idle(engine)


class Unread:
    """Logits of which one number at a time may be read."""

    def __init__(self, logits: Any) -> None:
        self.logits, self.num_read = logits, 0

    def __getitem__(self, at: tuple[int, int]) -> Any:
        self.num_read += 1
        return self.logits[at].item()


def test_steps_are_timed_without_their_logits_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for one number, which is there when the step has ended."""
    engine, costs = make_engine(seats=2), StepCosts()
    forward, batches, read = engine.decoder.forward, list[StepBatch](), list[Unread]()

    def unread(batch: StepBatch) -> Unread:
        batches.append(batch)
        read.append(Unread(forward(batch)))
        return read[-1]

    monkeypatch.setattr(engine.decoder, "forward", unread, raising=False)
    with engine.between_steps() as pause:
        pause.measure_steps(costs)
    assert costs.is_measured and [one.num_read for one in read] == [1] * len(read)
    sizes = sorted({len(batch.token_ids) for batch in batches})
    assert sizes == list(SIZES) and len(batches) == 3 * len(sizes)
    assert all(len(batch.logits_at) == len(batch.token_ids) for batch in batches)
    assert_idle(engine)


def test_a_closed_engine_has_no_pauses() -> None:
    engine = make_engine()
    engine.close()
    with pytest.raises(EngineError, match="closed"), engine.between_steps():
        pass
