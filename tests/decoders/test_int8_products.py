"""Products of int8 are exact integers on every path: logits against sums made in 64 bits.

A model whose layers are zero, and whose last norm has no gain, multiplies that norm's bias with the
head. Inputs that span 255, and columns whose largest weight is 127, have scales of 1: logits are
then the sums themselves. tests/native/int8_driver.cpp has more lengths, and rows that differ.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cpu_decoders import INSTRUCTION_SETS, instruction_set
from fastgen.native import native

COLUMNS = 67  # two panels and a bit
ROWS = (1, 2, 3, 4, 5, 6, 7, 12, 13, 25)
# Steps are of 4 inputs; sums are made apart in blocks of 256 steps.
LENGTHS = (*range(1, 40), 63, 64, 65, 127, 129, 1023, 1024, 1025, 1061)

Array = NDArray[np.int64]

pytestmark = pytest.mark.skipif(native is None, reason="the C++ extension is not built")


class Product:
    """Rows of `length` codes with one matrix (length, COLUMNS) of weights, on one path."""

    def __init__(self, path: str, length: int) -> None:
        self.length = length
        shape = {
            "vocab_size": COLUMNS, "max_positions": max(ROWS), "hidden_size": length,
            "num_layers": 1, "num_heads": 1, "inner_size": 1, "activation": "relu",
            "layer_norm_epsilon": 1e-5, "attention_scales": [1.0], "dtype": "float32",
            "weights": "int8", "kv_dtype": "float32", "tied": True,
            "max_tokens": max(ROWS), "max_logits": max(ROWS),
        }  # fmt: skip
        with instruction_set(path):
            self.decoder: Any = native.CpuDecoder(shape, 1, 2)

    def set_weights(self, weights: Array) -> None:
        rows = np.ascontiguousarray(weights.T, np.float32)
        assert np.abs(rows).max(axis=1).tolist() == [127] * COLUMNS
        self.decoder.pack_head(rows, None)

    def set_inputs(self, codes: Array, zero: int) -> None:
        """All rows are codes - zero."""
        values = codes - zero
        assert max(0, values.max()) - min(0, values.min()) == 255
        no_gain = np.zeros(self.length, np.float32)
        self.decoder.set_norm(-1, False, no_gain, values.astype(np.float32))

    def sums(self, count: int) -> NDArray[np.float32]:
        """(count, COLUMNS)"""
        at = np.arange(count, dtype=np.int32)
        one, table = np.zeros(1, np.int32), np.zeros((1, 1), np.int32)
        starts = np.array([0, count], np.int32)
        logits: NDArray[np.float32] = self.decoder.forward(at * 0, at, starts, one, table, at)
        return logits.copy()


def some_weights(kind: str, length: int, rng: np.random.Generator) -> Array:
    signs = rng.choice([-127, 127], (length, COLUMNS))
    if kind == "random":
        weights = rng.integers(-127, 128, (length, COLUMNS))
        weights[rng.integers(length, size=COLUMNS), np.arange(COLUMNS)] = signs[0]
        return weights
    return {"most": np.full_like(signs, 127), "least": np.full_like(signs, -127)}.get(kind, signs)


def some_codes(kind: str, length: int, rng: np.random.Generator) -> tuple[Array, int]:
    """Codes, and the zero point with which they come out of quantization."""
    if kind == "most":
        return np.full(length, 255), 0
    if kind == "least":
        return np.zeros(length, np.int64), 255
    codes = rng.choice([0, 255], length) if kind == "ends" else rng.integers(0, 256, length)
    first, second = rng.permutation(length)[:2] if length > 1 else (0, 0)
    codes[first], codes[second] = 0, 255
    return codes, 0 if length == 1 else int(rng.integers(256))


@pytest.mark.parametrize("path", INSTRUCTION_SETS)
def test_sums_are_exact(path: str) -> None:
    rng = np.random.default_rng(8)
    for length in LENGTHS:
        product = Product(path, length)
        for of_weights in ("most", "least", "signs", "random"):
            weights = some_weights(of_weights, length, rng)
            product.set_weights(weights)
            for of_codes in ("most", "least", "ends", "random"):
                codes, zero = some_codes(of_codes, length, rng)
                product.set_inputs(codes, zero)
                wanted = ((codes - zero) @ weights).astype(np.float32)
                for count in ROWS:
                    found = product.sums(count)
                    where = (length, of_weights, of_codes, count)
                    assert (found == wanted).all(), where
