"""Embedding, norms, linear layers, QKV and the head against their twins, at odd shapes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from fastgen.kernels.embedding import embed
from fastgen.kernels.head import head
from fastgen.kernels.launch import Settings
from fastgen.kernels.linear import activated_linear, add_linear
from fastgen.kernels.norm import layer_norm
from fastgen.kernels.qkv import qkv
from fastgen.kernels.vocabulary import TILE
from torch import Tensor

import kernel_twins as twins
from fastgen.checkpoints.config import ACTIVATIONS
from kernel_device import DEVICE, DTYPES, assert_near, poisoned, quiet, random

EPSILON = 1e-5
pytestmark = quiet


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    return found


def random_weight(outputs: int, inputs: int, dtype: torch.dtype, *, int8: bool) -> Any:
    """(out, in) and the scales of int8."""
    if not int8:
        return random(outputs, inputs, dtype=dtype, scale=inputs**-0.5), None
    whole = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, device=DEVICE)
    return whole, random(outputs).abs() / 127 * inputs**-0.5


def random_norm(size: int) -> tuple[Tensor, Tensor, float]:
    return 1 + random(size, scale=0.2), random(size, scale=0.1), EPSILON


def normed(x: Tensor, norm: tuple[Tensor, Tensor, float], dtype: torch.dtype) -> Tensor:
    """As operands of a product are."""
    return twins.layer_norm(x, *norm).to(dtype)


@pytest.mark.parametrize("size", [1, 3, 36, 768, 1600])
def test_norm(size: int, dtype: torch.dtype) -> None:
    """Rows far from zero: the mean is not to cost the deviation its digits."""
    hidden = random(9, size) + 100 * torch.arange(9, device=DEVICE)[:, None]
    norm = random_norm(size)
    row_at = torch.tensor([8, 0, 0, 5], dtype=torch.int32, device=DEVICE)
    out = poisoned(4, size, dtype=dtype)
    layer_norm(Settings(dtype), out, hidden, norm, 4, row_at)
    expected = twins.layer_norm(hidden[row_at.long()], *norm)
    # the input itself is rounded to float32: at 800, to 3e-5 of its deviation
    wide = torch.float16 if dtype == torch.float32 else dtype
    assert_near(out, expected, wide)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("size", [4, 100, 1280])
def test_embedding(size: int, quantized: bool) -> None:
    wte, scales = random_weight(50, size, torch.float32, int8=quantized)
    factors = random(size).abs() if quantized else None
    wpe = random(96, size)
    last_drawn = torch.tensor([0, 0, 31], dtype=torch.int32, device=DEVICE)
    ids, positions = [7, 49, -3, 0], [90, 91, 3, 64]
    starts, cached, tables = [0, 2, 4], [40, 63], [[5, 2, 9], [1, 7, 4]]
    names = ("token_ids", "positions", "row_of", "row_starts", "cache_lens", "block_tables")
    values = (ids, positions, [0, 0, 1, 1], starts, cached, tables)
    batch = {
        name: torch.tensor(value, dtype=torch.int32, device=DEVICE)
        for name, value in zip(names, values, strict=True)
    }
    hidden, slots = poisoned(4, size), poisoned(4, dtype=torch.int32)
    steps = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    settings = Settings(torch.float32)
    embed(settings, hidden, slots, batch, last_drawn, steps, (wte, scales, factors), wpe, 4)
    rows = wte[torch.tensor([7, 49, 31, 0])].double()
    if quantized:
        assert factors is not None
        rows = rows * scales[torch.tensor([7, 49, 31, 0])].double()[:, None] * factors.double()
    assert_near(hidden, rows + wpe[torch.tensor(positions)].double(), torch.float32)
    # tokens 40 and 41 of the first row, 63 and 64 of the second
    assert slots.tolist() == [2 * 32 + 8, 2 * 32 + 9, 7 * 32 + 31, 4 * 32]
    assert steps.item() == 1


SHAPES = [(1, 768, 96), (3, 36, 100), (8, 17, 300), (17, 100, 37), (70, 80, 130), (3, 3, 5)]


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_with_residual(
    shape: tuple[int, int, int], invariant: bool, int8: bool, dtype: torch.dtype
) -> None:
    rows, inputs, outputs = shape
    weight, scales = random_weight(outputs, inputs, dtype, int8=int8)
    x, bias, hidden = random(rows, inputs, dtype=dtype), random(outputs), random(rows, outputs)
    expected = hidden.double() + twins.linear(x, weight, scales, bias)
    add_linear(Settings(dtype, batch_invariant=invariant), hidden, x, (weight, scales, bias), rows)
    assert_near(hidden, expected, dtype)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("folded", [False, True], ids=["normed", "norm"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_with_norm_and_activation(
    shape: tuple[int, int, int], folded: bool, int8: bool, dtype: torch.dtype
) -> None:
    rows, inputs, outputs = shape
    weight, scales = random_weight(outputs, inputs, dtype, int8=int8)
    bias, norm = random(outputs), random_norm(inputs)
    x = random(rows, inputs) + 3
    expected = twins.linear(normed(x, norm, dtype), weight, scales, bias)
    out = poisoned(rows, outputs, dtype=dtype)
    given = (x, norm) if folded else (normed(x, norm, dtype), None)
    linear = (weight, scales, bias)
    activated_linear(Settings(dtype), out, given[0], linear, "gelu_new", rows, given[1])
    assert_near(out, twins.activated(expected, "gelu_new"), dtype)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str) -> None:
    """From -40 to 40, through one input that is the weight's only one."""
    x = torch.linspace(-40, 40, 64, device=DEVICE)[:, None].contiguous()
    one, zero = torch.ones(1, 1, device=DEVICE), torch.zeros(1, device=DEVICE)
    out = poisoned(64, 1)
    activated_linear(Settings(torch.float32), out, x, (one, None, zero), name, 64)
    assert_near(out, twins.activated(x.double(), name), torch.float32)


def test_nan_stays_nan_and_in_its_row() -> None:
    x = random(5, 20)
    x[2, 7] = float("nan")
    weight, bias = random(30, 20), random(30)
    for name in ACTIVATIONS:
        out = poisoned(5, 30)
        activated_linear(Settings(torch.float32), out, x, (weight, None, bias), name, 5)
        assert out.isnan().any(1).tolist() == [False, False, True, False, False], name


@pytest.mark.parametrize("folded", [False, True], ids=["normed", "norm"])
@pytest.mark.parametrize("kv", ["float", "int8"])
@pytest.mark.parametrize(
    ("heads", "head_dim"), [(3, 1), (5, 8), (2, 64), (2, 80), (1, 128), (3, 7)]
)
def test_qkv(heads: int, head_dim: int, kv: str, folded: bool, dtype: torch.dtype) -> None:
    width, rows = heads * head_dim, 9
    weight, scales = random_weight(3 * width, width, dtype, int8=kv == "int8")
    bias, norm, x = random(3 * width), random_norm(width), random(rows, width)
    slots = torch.randperm(5 * 32)[:rows].to(torch.int32).to(DEVICE)
    shape = (5, 2, heads, 32, head_dim)
    cache = random(*shape).to(torch.int8) if kv == "int8" else random(*shape, dtype=dtype)
    kv_scales = random(*shape[:-1]).abs() if kv == "int8" else None
    expected_cache = cache.clone() if kv_scales is None else twins.dequantized(cache, kv_scales)
    made = twins.linear(normed(x, norm, dtype), weight, scales, bias)
    query, keys, values = made.view(rows, 3, heads, head_dim).unbind(1)
    twins.write_kv(expected_cache, slots, keys, values)
    found = poisoned(rows, width, dtype=dtype)
    given = (x, norm) if folded else (normed(x, norm, dtype), None)
    linear = (weight, scales, bias)
    qkv(Settings(dtype), found, (cache, kv_scales), slots, given[0], linear, rows, given[1])
    assert_near(found, query.flatten(1), dtype)
    if kv_scales is None:
        assert_near(cache, expected_cache, dtype)
    else:  # half a step of the largest in each token and head, and rounding before that
        error = (twins.dequantized(cache, kv_scales) - expected_cache).abs()
        largest = expected_cache.abs().amax(-1, keepdim=True)
        assert (error <= largest * (0.51 / 127) + 1e-2 * (dtype != torch.float32)).all()


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("folded", [False, True], ids=["normed", "norm"])
@pytest.mark.parametrize("vocab_size", [5, 64, 1000])
def test_head(vocab_size: int, folded: bool, int8: bool, dtype: torch.dtype) -> None:
    check_head(vocab_size, 36, folded, int8, dtype)


def test_head_of_gpt2_vocabulary() -> None:
    """In the interpreter it is shorter by whole tiles, which are more of the same programs."""
    size = 50257 if DEVICE.type == "cuda" else 50257 - 704 * TILE
    check_head(size, 20, True, False, torch.float32)


def check_head(size: int, width: int, folded: bool, int8: bool, dtype: torch.dtype) -> None:
    weight, scales = random_weight(size, width, dtype, int8=int8)
    hidden, norm = random(7, width), random_norm(width)
    hidden[6] = float("nan")
    row_at = torch.tensor([6, 1, 1, 5], dtype=torch.int32, device=DEVICE)
    x = normed(hidden[row_at.long()], norm, dtype)
    expected = twins.linear(x, weight, scales, None)
    logits, tiles = poisoned(4, size), -(-size // TILE)
    found = poisoned(4, tiles), poisoned(4, tiles, dtype=torch.int32)
    arguments = (hidden, weight, scales, 4, norm, row_at) if folded else (x, weight, scales, 4)
    head(Settings(dtype), logits, found, *arguments)
    assert logits[0].isnan().all() and found[0][0].isnan().all()
    assert_near(logits[1:], expected[1:], dtype)
    highest, ids = twins.tile_maxima(logits[1:], TILE)
    assert torch.equal(found[0][1:], highest)
    assert torch.equal(found[1][1:].long(), ids)


@pytest.mark.usefixtures("products_in_order")
def test_invariant_products_do_not_know_how_many_rows_there_are(dtype: torch.dtype) -> None:
    weight, bias = random(70, 100, dtype=dtype), random(70)
    x = random(90, 100, dtype=dtype)
    found = []
    for rows, first in itertools.product((1, 16, 90), (0, 40)):
        if first + rows <= 90:
            hidden = torch.zeros(rows, 70, device=DEVICE)
            settings = Settings(dtype, batch_invariant=True)
            add_linear(settings, hidden, x[first : first + rows], (weight, None, bias), rows)
            found.append((first, hidden))
    whole = next(hidden for _, hidden in found if len(hidden) == 90)
    for first, hidden in found:
        assert torch.equal(hidden, whole[first : first + len(hidden)])
