"""The benchmark's own arithmetic: turns, percentiles, the roofline, and what is made of rounds."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from fastgen.bench import hardware_peaks, roofline
from fastgen.bench.hardware_peaks import HardwarePeaks
from fastgen.bench.interleave import interleave, interleave_calls, median, percentile, ratio
from fastgen.bench.measure import Round, Rounds, first_tokens_step, mean_gap
from fastgen.bench.peaks import Peak
from fastgen.bench.recording import StepSize
from fastgen.bench.roofline import Speeds, Step
from fastgen.bench.shapes import SHAPES, Precision, Shape, random_prompts, save_checkpoint
from fastgen.checkpoints.checkpoint import open_checkpoint
from fastgen.decoders.plan import LoadOptions
from fastgen.decoders.select import plan_decoder
from fastgen.errors import EngineError

FLOAT32 = Precision(4, 4, "float32", "float32")
INT8 = Precision(1, 2, "int8", "bfloat16")


def test_what_is_compared_takes_turns() -> None:
    """A B C, A B C; warm-ups run like the others and do not count."""
    order: list[str] = []

    def measure(name: str, seconds: list[float]) -> Callable[[], float]:
        def run() -> float:
            order.append(name)
            return seconds[order.count(name) - 1]

        return run

    found = interleave_calls(
        {"a": measure("a", [9, 1, 2]), "b": measure("b", [9, 3, 8])}, rounds=2, warmups=1
    )
    assert order == ["a", "b"] * 3
    assert found == {"a": [1, 2], "b": [3, 8]}
    assert ratio(found["b"], found["a"]) == 3.5  # of 3 / 1 and 8 / 2: within rounds
    calls = interleave({"a": lambda: order.append("x"), "b": lambda: None}, rounds=3, warmups=0)
    assert order[6:] == ["x"] * 3 and all(len(each) == 3 for each in calls.values())


def test_percentiles_are_values_by_nearest_rank() -> None:
    values = [5, 1, 4, 2, 3]
    assert [percentile(values, share) for share in (0.0, 0.2, 0.21, 0.5, 0.99, 1.0)] == [
        1, 1, 2, 3, 5, 5,
    ]  # fmt: skip
    assert percentile(range(1, 101), 0.99) == 99
    assert median([4, 1, 3, 2]) == 2.5


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "tiny"])
def test_sizes_are_those_of_gpt2(name: str) -> None:
    """Against transformers' own parameters: all matrices, the tied head once."""
    shape = SHAPES[name]
    config = transformers.GPT2Config(n_embd=shape.hidden, n_layer=shape.layers, n_head=shape.heads)
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(config)
    matrices = {key: each for key, each in model.named_parameters() if each.dim() == 2}
    linear = sum(each.numel() for key, each in matrices.items() if ".h." in key)
    assert (shape.linear, shape.head) == (linear, matrices["transformer.wte.weight"].numel())


def test_a_shape_is_read_from_a_checkpoint(tmp_path: Path) -> None:
    shape = Shape(layers=2, hidden=24, heads=3, inner=40, vocab=61)
    save_checkpoint(tmp_path, shape)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config[:-1] + ', "n_inner": 40}')
    checkpoint = open_checkpoint(tmp_path)
    assert Shape.of(checkpoint.config) == shape
    tied = sum(math.prod(info.shape) for _, info in checkpoint.tensors() if len(info.shape) == 2)
    assert shape.linear + shape.head == tied - 1024 * 24  # less the positions
    plan = plan_decoder(checkpoint, LoadOptions(device="cpu", quantize="int8"))
    assert Precision.of(plan) == INT8
    plan = plan_decoder(checkpoint, LoadOptions(device="cpu", dtype="float16"))
    assert Precision.of(plan) == Precision(2, 4, "float32", "float32")
    plan = plan_decoder(checkpoint, LoadOptions(device="cpu", dtype="float32", kv_dtype="int8"))
    assert Precision.of(plan) == Precision(4, 1, "float32", "int8")
    plan = plan_decoder(checkpoint, LoadOptions(device="cpu", quantize="int8", kv_dtype="int8"))
    assert Precision.of(plan) == Precision(1, 1, "int8", "int8")
    plan = plan_decoder(checkpoint, LoadOptions(device="cpu", dtype="float16", decoder="torch"))
    assert Precision.of(plan) == Precision(2, 2, "float32", "float32")


@pytest.mark.parametrize("precision", [FLOAT32, INT8])
def test_the_limit_of_a_ragged_step(precision: Precision) -> None:
    """Against a count token by token."""
    rng = np.random.default_rng(0)
    shape = Shape(layers=3, hidden=20, heads=2, inner=44, vocab=101)
    weights = 3 * (4 * 20 * 20 + 2 * 20 * 44)
    for _ in range(20):
        rows = int(rng.integers(1, 6))
        new, cached = rng.integers(1, 9, rows), rng.integers(0, 30, rows)
        num_logits = int(rng.integers(0, rows + 1))
        seen = sum(
            before + token + 1
            for count, before in zip(new.tolist(), cached.tolist(), strict=True)
            for token in range(count)
        )
        step = roofline.ragged_step(shape, precision, new, cached, num_logits)
        head = 101 * 20
        kv = 2 * 3 * 20 * int((new + cached).sum())
        read = (weights + (head if num_logits else 0)) * precision.weight_bytes
        assert step == Step(
            read=read + kv * precision.kv_bytes,
            linear=int(new.sum()) * weights + num_logits * head,
            attention=2 * 3 * 20 * seen,  # a multiply-add for each number of keys and values
        )
    assert roofline.decode_step(shape, precision, 3, 8) == roofline.ragged_step(
        shape, precision, [1, 1, 1], [7, 7, 7], 3
    )
    assert roofline.prefill_step(shape, precision, 4, 6, last=False) == roofline.ragged_step(
        shape, precision, [6], [4], 0
    )


def test_a_step_takes_the_longer_of_reading_and_computing() -> None:
    speeds = Speeds(read=10.0, linear=4.0, attention=2.0)
    reads, computes = Step(100, 8, 2), Step(10, 8, 2)
    assert (reads.limit(speeds), computes.limit(speeds)) == (10.0, 3.0)
    assert roofline.limit([reads, computes], speeds) == 13.0


def test_prompts_end_in_the_step_that_computes_their_last_token() -> None:
    def size(*rows: tuple[int, int]) -> StepSize:
        new, cached = zip(*rows, strict=True)
        return StepSize(np.array(new, np.int32), np.array(cached, np.int32), 1)

    sizes = [
        size((5, 0), (3, 0)),  # the first prompt ends
        size((1, 5), (1, 3)),
        size((1, 6), (1, 4)),  # the second one's
        size((1, 7), (1, 5)),
    ]
    assert first_tokens_step(sizes, 2, 5) == 2
    with pytest.raises(EngineError, match="2 of 3"):
        first_tokens_step(sizes, 3, 5)


def decode_size(batch: int, cached: int) -> StepSize:
    return StepSize(np.ones(batch, np.int32), np.full(batch, cached, np.int32), batch)


def test_what_is_made_of_rounds() -> None:
    """Two rows of three tokens; the second row's first token comes later."""
    shape = SHAPES["tiny"]
    prefill = [StepSize(np.array([4, 4], np.int32), np.zeros(2, np.int32), 2)]
    decode = [decode_size(2, 4), decode_size(2, 5)]
    one = Round([[1.0, 3.0, 4.0], [2.0, 3.0, 4.0]], prefill, decode)
    two = Round([[1.0, 2.0, 6.0], [1.0, 2.0, 6.0]], prefill, decode)
    assert (one.seconds, one.prefill_seconds, one.decode_seconds) == (4.0, 2.0, 2.0)
    assert (one.num_tokens, one.num_decoded) == (6, 4)
    assert mean_gap([1.0, 3.0, 4.0]) == 1.5
    speeds = Speeds(read=1e7, linear=1e9, attention=1e9)
    record = Rounds(2, [(one, speeds), (two, speeds)]).record(shape, FLOAT32)
    limit = [
        roofline.limit([roofline.ragged_step(shape, FLOAT32, *size) for size in sizes], speeds)
        for sizes in (prefill, decode)
    ]
    assert record["ttft_ms"] == {"p50": 1000.0, "p99": 2000.0}
    assert record["tpot_ms"] == {"p50": 1500.0, "p99": 2500.0}
    assert record["itl_ms"] == {"p50": 1000.0, "p99": 4000.0}
    assert record["tokens_per_s"] == 1.2  # 6 over the median of 4 and 6 seconds
    assert record["decode_tokens_per_s"] == 1.4  # the median of 4 / 2 and 4 / 5
    whole = sum(limit)
    assert record["limit_tokens_per_s"] == round(6 / whole, 1)
    assert record["share"] == {
        "median": pytest.approx((whole / 4 + whole / 6) / 2, rel=5e-3),
        "lowest": pytest.approx(whole / 6, rel=5e-3),
        "highest": pytest.approx(whole / 4, rel=5e-3),
    }
    assert record["prefill_share"]["highest"] == pytest.approx(limit[0], rel=5e-3)
    assert record["decode_share"]["highest"] == pytest.approx(limit[1] / 2, rel=5e-3)
    assert record["decode_bound"] == "memory"
    slow = Speeds(read=1e12, linear=1e6, attention=1e6)
    assert Rounds(2, [(one, slow)]).record(shape, FLOAT32)["decode_bound"] == "arithmetic"


def test_one_new_token_has_no_decode_part() -> None:
    size = StepSize(np.array([4], np.int32), np.zeros(1, np.int32), 1)
    record = Rounds(1, [(Round([[2.0]], [size], []), Speeds(1e9, 1e9, 1e9))]).record(
        SHAPES["tiny"], FLOAT32
    )
    for name in ("tpot_ms", "itl_ms", "decode_tokens_per_s", "decode_share", "decode_bound"):
        assert record[name] is None, name
    assert record["tokens_per_s"] == 0.5


def test_without_limits_there_are_no_shares() -> None:
    seen = Round([[1.0, 2.0]], [decode_size(1, 3)], [decode_size(1, 4)])
    record = Rounds(1, [(seen, None)]).record(SHAPES["tiny"], FLOAT32)
    for name in ("limit_tokens_per_s", "share", "prefill_share", "decode_share", "decode_bound"):
        assert record[name] is None, name
    none = HardwarePeaks({}, FLOAT32)
    assert none.speeds(none.probe(), none.probe()) is None and none.record() == {}


def test_limits_are_of_the_measurements_around(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware_peaks, "SETTLE", 0.0)
    seconds: dict[str, list[float]] = {"read": [1, 3, 5], "int8": [2, 2, 2], "bfloat16": [1, 1, 4]}

    def peak(name: str, amount: float) -> Peak:
        values = iter(seconds[name])
        return Peak(f"how {name}", amount, lambda: next(values))

    machine = HardwarePeaks({name: peak(name, 12e9) for name in seconds}, INT8)
    first, second, third = (machine.probe() for _ in range(3))
    assert machine.speeds(first, second) == Speeds(read=6e9, linear=6e9, attention=12e9)
    assert machine.speeds(second, third) == Speeds(read=3e9, linear=6e9, attention=4.8e9)
    assert machine.record()["read"] == {
        "median": 4.0, "lowest": 2.4, "highest": 12.0, "unit": "GB/s", "how": "how read",
    }  # fmt: skip
    assert machine.record()["int8"]["unit"] == "G multiply-adds/s"


def test_random_weights_are_a_checkpoint_and_prompts_are_new(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a", SHAPES["tiny"])
    save_checkpoint(tmp_path / "b", SHAPES["tiny"])
    files: list[Any] = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]  # the same seed: the same weights on every machine
    rng = np.random.default_rng(0)
    first, second = random_prompts(2, 8, rng, 50), random_prompts(2, 8, rng, 50)
    assert first != second and {len(prompt) for prompt in first} == {8}
    assert max(max(prompt) for prompt in first + second) < 50
