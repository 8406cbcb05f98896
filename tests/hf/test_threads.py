"""Calls from several threads share one decoder: native ones its steps, others its time."""

from __future__ import annotations

import copy
import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from engine_harness import check_blocks
from hf_models import fresh_pair, generated, kv_rows_of, num_used_blocks, random_ids

CALLS: list[dict[str, Any]] = [
    {"do_sample": False},
    {"do_sample": False, "repetition_penalty": 1.3, "num_return_sequences": 1},
    {"do_sample": False, "guidance_scale": 1.5},  # transformers' loop
    {"do_sample": False, "num_beams": 3},
    {"do_sample": False, "prompt_lookup_num_tokens": 3},
    {"do_sample": False, "return_dict_in_generate": True, "output_scores": True},
]


def _call(model: Any, number: int) -> Any:
    rng = np.random.default_rng(number)
    options = CALLS[number % len(CALLS)]
    rows = 1 if "prompt_lookup_num_tokens" in options else int(rng.integers(1, 4))
    ids = random_ids(model, rng, rows, int(rng.integers(1, 50)))
    output = generated(model, input_ids=ids, max_new_tokens=20, pad_token_id=7, **options)
    return getattr(output, "sequences", output)


@pytest.mark.usefixtures("own_garbage")
def test_calls_of_every_kind_at_once() -> None:
    _, ours = fresh_pair()
    expected = [_call(ours, number) for number in range(60)]
    with ThreadPoolExecutor(6) as threads:
        found = list(threads.map(lambda number: _call(ours, number), range(60)))
    for number, (one, other) in enumerate(zip(expected, found, strict=True)):
        assert torch.equal(one, other), number
    gc.collect()
    assert num_used_blocks(ours) == 0


def test_native_calls_join_each_others_steps() -> None:
    _, ours = fresh_pair()
    ids = random_ids(ours, np.random.default_rng(0), 8, 5)
    call = {"do_sample": False, "max_new_tokens": 60, "eos_token_id": None, "pad_token_id": 7}
    generated(ours, input_ids=ids[:1], **call)
    stats = kv_rows_of(ours).engine.stats
    before = stats.steps
    start = threading.Barrier(8)

    def run(row: int) -> Any:
        start.wait()
        return generated(ours, input_ids=ids[row : row + 1], **call)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(run, range(8)))
    assert stats.steps - before < 8 * 60 // 2


def test_a_loop_of_forwards_is_not_starved_by_generation() -> None:
    _, ours = fresh_pair()
    over = threading.Event()

    def generate_on_and_on() -> None:
        while not over.is_set():
            _call(ours, 0)

    threads = [threading.Thread(target=generate_on_and_on, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        ids: Any = torch.tensor([[20, 21]])
        cache: Any = None
        with torch.no_grad():
            for _ in range(40):
                output = ours(ids, past_key_values=cache)
                cache, ids = output.past_key_values, output.logits[:, -1:].argmax(-1)
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert cache.get_seq_length() == 41


@pytest.mark.usefixtures("own_garbage")
def test_caches_that_go_while_others_generate() -> None:
    """Their blocks come back from whatever thread collects them."""
    _, ours = fresh_pair()

    def churn(number: int) -> None:
        with torch.no_grad():
            cache = ours(random_ids(ours, np.random.default_rng(number), 2, 40)).past_key_values
            twin = copy.deepcopy(cache)
            ours(torch.ones(2, 1).long(), past_key_values=twin)
            twin.crop(-5)
        _call(ours, 0)

    with ThreadPoolExecutor(5) as threads:
        list(threads.map(churn, range(40)))
    gc.collect()
    assert num_used_blocks(ours) == 0
    check_blocks(kv_rows_of(ours).engine)


def test_weights_written_while_others_generate() -> None:
    """Calls under way end with the weights that they began with; none fails."""
    _, ours = fresh_pair()
    expected = [_call(ours, number) for number in range(12)]
    over = threading.Event()

    def write() -> None:
        while not over.is_set():
            with torch.no_grad():
                ours.transformer.ln_f.bias.add_(0.0)
                ours(torch.tensor([[20, 30]]))

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    try:
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(lambda number: _call(ours, number % 12), range(48)))
    finally:
        over.set()
        writer.join()
    for number, other in enumerate(found):
        assert torch.equal(expected[number % 12], other)


def test_blocks_reserved_for_rows_are_not_taken_by_forwards() -> None:
    _, ours = fresh_pair()
    kept: list[Any] = []

    def fill(number: int) -> None:
        with torch.no_grad():
            for _ in range(20):
                ids = random_ids(ours, np.random.default_rng(number), 2, 60)
                kept.append(ours(ids).past_key_values)

    def generate(number: int) -> Any:
        ids = random_ids(ours, np.random.default_rng(number), 2, 3)
        call = {"do_sample": False, "max_new_tokens": 90, "eos_token_id": None, "pad_token_id": 7}
        return [generated(ours, input_ids=ids, **call) for _ in range(10)]

    with ThreadPoolExecutor(4) as threads:
        fillers = [threads.submit(fill, number) for number in range(2)]
        outputs = [threads.submit(generate, number) for number in range(2)]
        results = [output for future in outputs for output in future.result()]
        for future in fillers:
            future.result()
    assert all(isinstance(output, torch.Tensor) for output in results), results
