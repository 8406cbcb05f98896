"""Weights that were packed before give the bits of weights that are packed now, in every
arithmetic: from the cache, mapped from it, and from a packed folder.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastgen
import processes
from cpu_decoders import (
    ARITHMETICS,
    INSTRUCTION_SETS,
    KINDS_OF_WEIGHTS,
    cpu_decoder,
    instruction_set,
    native_of,
)
from fastgen.decoders.cpu.plan import decoder_shape
from fastgen.frontends.generator import open_model
from fastgen.native import native
from packed_files import (
    checkpoint_of,
    entry_of,
    header_of,
    load,
    packings,
    settled,
    tokens_of,
    weights_of,
)
from stepping import all_logits
from tiny_checkpoints import write_checkpoint

pytestmark = pytest.mark.skipif(native is None, reason="the C++ extension is not built")

# Name -> variant of a checkpoint, and what it is loaded with.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "float32": ("plain", {"dtype": "float32"}),
    "float16_weights": ("fp16_file", {}),
    "bfloat16_weights": ("bf16_file", {}),
    "bfloat16": ("plain", {"dtype": "bfloat16"}),
    "int8": ("plain", {"quantize": "int8"}),
    "int8_float32": ("plain", {"quantize": "int8", "dtype": "float32"}),
    "untied": ("untied", {"quantize": "int8"}),
    "both_heads_differ": ("both_heads_differ", {}),
    "swapped_head": ("swapped_head", {"dtype": "float16"}),
    "odd sizes": ("width_100", {"quantize": "int8"}),
    "shards": ("sharded", {"dtype": "bfloat16"}),
}
assert set(KINDS_OF_WEIGHTS) <= CASES.keys()
ROWS = [[3, 1, 4, 1, 5, 9, 2, 6], [5, 3], [5] * 40]


def logits_of(model: fastgen.Generator) -> list[np.ndarray]:
    return all_logits(model.engine.decoder, [[i % 13 for i in row] for row in ROWS], [7, 1])


def assert_same(model: fastgen.Generator, expected: list[np.ndarray], weights: bytes) -> None:
    assert weights_of(model) == weights
    for found, wanted in zip(logits_of(model), expected, strict=True):
        assert found.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("name", CASES)
def test_every_way_gives_the_same_bits(
    name: str,
    variant: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kind, options = CASES[name]
    folder, cache = settled(variant(kind)), tmp_path / "cache"
    options = {**options, "max_batch_size": 3}
    with load(folder, False, **options) as model:
        expected, weights, plan = logits_of(model), weights_of(model), model.plan
    with load(folder, cache, **options) as model:  # packs, and stores
        assert_same(model, expected, weights)
    packing = {key: value for key, value in options.items() if key in ("dtype", "quantize")}
    packed = fastgen.pack(folder, tmp_path / "packed", **packing)
    with packings(monkeypatch) as packed_now:
        with load(folder, cache, **options) as model:
            assert_same(model, expected, weights)
        with load(folder, cache, share_weights=True, **options) as model:
            assert_same(model, expected, weights)
        for share in (False, True):  # what it was packed with need not be said
            for own in (packing, {}):
                with load(packed, False, share_weights=share, max_batch_size=3, **own) as model:
                    assert_same(model, expected, weights)
                    assert (model.plan.dtype, model.plan.weights) == (plan.dtype, plan.weights)
                    assert model.plan.memory == plan.memory
    assert packed_now == []


@pytest.mark.parametrize("arithmetic", KINDS_OF_WEIGHTS)
def test_packing_depends_on_neither_the_instruction_set_nor_the_threads(
    arithmetic: str, tmp_path: Path
) -> None:
    """So neither is in the key of the cache, and a packed folder runs on every processor."""
    folder = checkpoint_of(tmp_path)
    found = set()
    for isa in INSTRUCTION_SETS:
        for threads in (1, 3):
            with cpu_decoder(folder, arithmetic, isa=isa, num_threads=threads) as decoder:
                found.add(bytes(native_of(decoder).weights()))
    assert len(found) == 1


def test_a_file_of_another_path_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, cache = checkpoint_of(tmp_path / "model"), tmp_path / "cache"
    with instruction_set("portable"), load(folder, cache, quantize="int8") as model:
        expected = tokens_of(model)
    with packings(monkeypatch) as packed:
        for isa in INSTRUCTION_SETS:
            with instruction_set(isa), load(folder, cache, quantize="int8") as model:
                assert tokens_of(model) == expected
    assert packed == [] and entry_of(cache)


def test_sections_make_up_all_of_the_weights(variant: Callable[[str], Path]) -> None:
    for name in ("plain", "untied", "one_of_each"):
        for dtype, weights, _ in ARITHMETICS.values():
            shape = decoder_shape(open_model(variant(name)), dtype, weights, 8, 2)
            sections = native.weight_sections(shape)
            at = 0
            for offset, num_bytes in sections:
                assert offset == at and num_bytes > 0
                at += num_bytes
            assert at == native.decoder_bytes(shape)[0]


def exact_checkpoint(folder: Path) -> Path:
    """Weights that are exact in every format, made of no random numbers."""
    tensors = {}
    config = {"vocab_size": 37, "n_positions": 16, "n_embd": 8, "n_layer": 2, "n_head": 2}
    shapes: list[tuple[str, tuple[int, ...]]]
    shapes = [("wte.weight", (37, 8)), ("wpe.weight", (16, 8))]
    for layer in range(2):
        sizes: dict[str, tuple[int, ...]] = {
            "ln_1": (8,), "ln_2": (8,), "attn.c_attn": (8, 24), "attn.c_proj": (8, 8),
            "mlp.c_fc": (8, 32), "mlp.c_proj": (32, 8),
        }  # fmt: skip
        for name, shape in sizes.items():
            shapes += [(f"h.{layer}.{name}.weight", shape), (f"h.{layer}.{name}.bias", shape[-1:])]
    shapes += [("ln_f.weight", (8,)), ("ln_f.bias", (8,))]
    for number, (name, shape) in enumerate(shapes):
        values = (np.arange(np.prod(shape)) * (2 * number + 3) + number) % 127 - 63
        tensors[name] = (values / 64).astype(np.float32).reshape(shape)
    return write_checkpoint(folder, tensors, **config)


# XXH64 of the packed weights of `exact_checkpoint`. Where this fails, packing has changed: files
# that were packed before would be read as something else. Count kPackingVersion up
# (csrc/decoder/cpu_decoder.cpp), and write the new sums here.
LAYOUT = "1/32/1x128/1x64/2x128/2x128/4x128/little"
SUMS = {
    "float32": 0x2FD679DA37C4EE06,
    "float16_weights": 0xC2D4BD158485B7AE,
    "bfloat16_weights": 0xC6CA193A351A1DF3,
    "bfloat16": 0xC6CA193A351A1DF3,
    "int8": 0xB01AC623C84A9986,
}


@pytest.mark.parametrize("arithmetic", SUMS)
def test_packing_is_what_its_version_says(arithmetic: str, tmp_path: Path) -> None:
    if arithmetic == "int8" and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("compilers for other processors may round once less")
    assert native.packed_layout() == LAYOUT
    with cpu_decoder(exact_checkpoint(tmp_path), arithmetic) as decoder:
        assert native.xxh64(native_of(decoder).weights()) == SUMS[arithmetic]


def test_a_mapped_decoder_cannot_be_written_to(tmp_path: Path) -> None:
    folder, cache = checkpoint_of(tmp_path / "model"), tmp_path / "cache"
    with load(folder, cache, share_weights=True) as model:
        made = native_of(model.engine.decoder)
        before = tokens_of(model)
        writes: tuple[Callable[[], Any], ...] = (
            lambda: made.set_positions(np.zeros((16, 8), np.float32)),
            lambda: made.pack_head(np.zeros((11, 8), np.float32), None),
            lambda: made.set_norm(0, False, np.zeros(8, np.float32), np.zeros(8, np.float32)),
            lambda: made.pack_projection(
                0, 1, np.zeros((8, 8), np.float32), np.zeros(8, np.float32), None
            ),
            lambda: made.read_weights(0, 0),
        )
        for write in writes:
            with pytest.raises(RuntimeError, match="a file's"):
                write()
        with pytest.raises(ValueError, match="read-only"):
            made.weights()[0] = 1
        assert tokens_of(model) == before


def test_what_cannot_be_mapped_or_read_is_said(tmp_path: Path) -> None:
    shape = decoder_shape(open_model(checkpoint_of(tmp_path)), "float32", "float32", 8, 2)
    made = native.CpuDecoder(shape, 1, 1)
    with open(tmp_path / "model.safetensors", "rb") as file:
        assert len(made.read_weights(file.fileno(), 0)) == 0  # too short
        with pytest.raises(OSError, match="Invalid argument"):
            native.CpuDecoder(shape, 1, 1, (file.fileno(), 1))  # not at a page
    with pytest.raises(OSError, match="Bad file descriptor"):
        native.CpuDecoder(shape, 1, 1, (10**6, 0))


def test_a_forked_child_goes_on_with_shared_weights(tmp_path: Path) -> None:
    folder, cache = checkpoint_of(tmp_path / "model"), tmp_path / "cache"
    with load(folder, cache, share_weights=True) as model:
        expected = tokens_of(model)
        assert processes.in_fork(lambda: tokens_of(model)) == expected
        assert tokens_of(model) == expected
    assert header_of(entry_of(cache))[0].num_bytes > 0
