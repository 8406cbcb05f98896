"""int8: close to the model in float32, also where channels are far larger than the rest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fastgen
from fastgen.decoders.quantization import norm_smoothing, peaks, value_smoothing
from fastgen.frontends.generator import BUNDLED_MODEL
from quality import HARD_COPIES, HeldOut, held_out, kl_and_perplexity, save_hard_copy
from stepping import all_logits
from tolerances import TOLERANCES

NUM_TOKENS = 4096
CHUNKS = [32]  # tokens of each row in a step
DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]


@pytest.fixture(scope="module")
def text() -> HeldOut:
    return held_out(NUM_TOKENS)


@pytest.fixture(scope="module")
def checkpoint_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    def folder(name: str) -> Path:
        if name == "bundled":
            return BUNDLED_MODEL
        return save_hard_copy(name, tmp_path_factory.mktemp(name))

    return folder


def logits_of(folder: Path, text: HeldOut, **options: Any) -> np.ndarray:
    """(T, V) of all rows, one behind the other."""
    with fastgen.load(folder, device="cpu", max_batch_size=len(text.rows), **options) as model:
        return np.concatenate(all_logits(model.engine.decoder, text.rows, CHUNKS))


@pytest.mark.parametrize("name", ["bundled", *HARD_COPIES])
def test_int8_is_close_to_float32(
    name: str, text: HeldOut, checkpoint_folder: Callable[[str], Path]
) -> None:
    folder = checkpoint_folder(name)
    reference = logits_of(folder, text, dtype="float32", decoder="torch")
    found = logits_of(folder, text, quantize="int8", decoder="cpu")
    quality = kl_and_perplexity(reference, found, np.concatenate(text.targets))
    assert 0 < quality.kl <= TOLERANCES["int8_kl"]
    assert abs(quality.perplexity_change) <= TOLERANCES["int8_perplexity"]


def test_hard_copies_are_what_they_should_be(
    checkpoint_folder: Callable[[str], Path],
) -> None:
    """Values: the same function. Residual: another, whose perplexity is of the same order."""
    few = held_out(512)
    targets = np.concatenate(few.targets)
    reference = logits_of(BUNDLED_MODEL, few, dtype="float32", decoder="torch")
    values, residual, both = (
        logits_of(checkpoint_folder(name), few, dtype="float32", decoder="torch")
        for name in HARD_COPIES
    )
    assert np.abs(values - reference).max() < 1e-3
    assert np.abs(both - residual).max() < 1e-3
    assert 0.01 < kl_and_perplexity(reference, residual, targets).perplexity_change < 2


def test_kl_and_perplexity_of_known_distributions() -> None:
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.25, 0.5])
    first, second = (np.log(np.tile(x, (300, 1))).astype(np.float32) + 3 for x in (p, q))
    kl, change = kl_and_perplexity(first, second, np.zeros(300, np.int64))
    assert kl == pytest.approx((p * np.log(p / q)).sum(), rel=1e-5)
    assert change == pytest.approx(1.0, rel=1e-5)  # half as probable: twice the perplexity
    assert kl_and_perplexity(first, first, np.ones(300, np.int64)) == (0, 0)


def test_held_out_rows_and_targets() -> None:
    whole, parts = held_out(100, 100), held_out(100, 40)
    assert [len(row) for row in parts.rows] == [40, 40, 20]
    assert np.concatenate(parts.rows).tolist() == whole.rows[0]
    assert np.concatenate(parts.targets).tolist() == whole.targets[0].tolist()
    assert whole.rows[0][1:] == whole.targets[0][:-1].tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (700, 768), (5, 200_000)])
def test_peaks_of_rows_and_columns(shape: tuple[int, int], dtype: Any) -> None:
    weight = np.random.default_rng(0).normal(0, 1, shape).astype(dtype)
    for part in (weight, weight[:, shape[1] // 2 :], np.zeros_like(weight)):
        for axis in (0, 1):
            found = peaks(part, axis)
            assert found.dtype == np.float32
            assert np.array_equal(found, np.abs(part.astype(np.float32)).max(1 - axis))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("input_axis", [0, 1])
def test_large_channels_behind_a_norm_are_halved_in_logarithm(input_axis: int, dtype: Any) -> None:
    """64 times the usual gain, a 64th of the weights: a factor of 64, however they are stored."""
    gain, bias, weight = _random_layer()
    gain[7], bias[7], weight[7] = gain[7] * 64, bias[7] * 64, weight[7] / 64
    gain[9], bias[9] = gain[9] / 64, bias[9] / 64  # below the usual: left alone
    weight = weight if input_axis == 0 else np.ascontiguousarray(weight.T)
    stored = (array.astype(dtype) for array in (gain, bias, weight))
    factors = norm_smoothing(*stored, input_axis=input_axis)
    assert factors.dtype == np.float32 and factors.shape == (48,)
    assert factors[7] == 64
    assert (np.delete(factors, 7) == 1).all()


@pytest.mark.parametrize("exponent", [-6, 6])
def test_values_are_balanced_against_the_projection(exponent: int) -> None:
    rng = np.random.default_rng(0)
    c_attn = rng.uniform(0.9, 1, (48, 144)).astype(np.float32)
    bias, projection = np.zeros(144, np.float32), rng.uniform(0.9, 1, (48, 48)).astype(np.float32)
    c_attn[:, 96 + 5] *= 2.0**exponent
    projection[5] /= 2.0**exponent
    factors = value_smoothing(c_attn[:, 96:], bias[96:], projection)
    assert factors[5] == 2.0**exponent
    assert (np.delete(factors, 5) == 1).all()


def test_factors_are_finite_powers_of_two_whatever_the_weights() -> None:
    gain, bias, weight = _random_layer()
    gain[:4], bias[:4] = [0, 0, 3e38, 1e-45], [0, 0, -3e38, 0]
    weight[2:6] = np.array([0, 1e-45, 3e38, 0])[:, None]
    square = np.ascontiguousarray(weight[:, :48])
    dead = np.zeros_like(square)
    with np.errstate(over="ignore"):
        for factors in (
            norm_smoothing(gain, bias, weight),
            value_smoothing(square.T, bias, square),
            value_smoothing(dead, gain * 0, dead),
        ):
            assert (np.frexp(factors)[0] == 0.5).all()
            assert (factors >= 2.0**-12).all() and (factors <= 2.0**12).all()


def _random_layer() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gain (48,), bias (48,) and weight (48, 96), each channel of about the same size."""
    rng = np.random.default_rng(0)
    gain, bias = rng.uniform(0.9, 1.1, 48), rng.uniform(-0.1, 0.1, 48)
    weight = rng.uniform(-1, 1, (48, 96))
    return gain.astype(np.float32), bias.astype(np.float32), weight.astype(np.float32)
