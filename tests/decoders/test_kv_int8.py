"""Keys and values of 8 bits on the CPU decoder: near those of float32, and what they take.

That a row's bits follow from the row alone, for them too, is in test_invariance.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastgen
from cpu_decoders import INSTRUCTION_SETS, cpu_decoder
from fastgen.decoders.plan import LoadOptions
from fastgen.decoders.select import plan_decoder
from fastgen.frontends.generator import BUNDLED_MODEL, open_model
from fastgen.native import native
from packed_files import load
from quality import HARD_COPIES, HARD_KEYS, held_out, kl_and_perplexity, save_hard_copy
from stepping import all_logits
from tolerances import TOLERANCES

NUM_TOKENS = 3072  # rows of 1,024: whole contexts
CHUNKS = [80]
OF_8_BITS = {"float32_kv8": "float32", "bfloat16_kv8": "bfloat16", "int8_kv8": "int8"}

pytestmark = pytest.mark.skipif(native is None, reason="the C++ extension is not built")


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    def folder(name: str) -> Path:
        if name == "bundled":
            return BUNDLED_MODEL
        return save_hard_copy(name, tmp_path_factory.mktemp(name))

    return folder


def logits_of(folder: Path, arithmetic: str, rows: list[list[int]], isa: str = "") -> np.ndarray:
    """(T, V) of all rows, one after the other."""
    with cpu_decoder(folder, arithmetic, isa=isa, num_threads=2, max_logits=256) as decoder:
        return np.concatenate(all_logits(decoder, rows, CHUNKS))


def check_quality(folder: Path, arithmetic: str, kl: float) -> None:
    """Against all in float32."""
    text = held_out(NUM_TOKENS)
    reference = logits_of(folder, "float32", text.rows)
    found = logits_of(folder, arithmetic, text.rows)
    quality = kl_and_perplexity(reference, found, np.concatenate(text.targets))
    print(f"{folder.name}: {quality}")
    assert 0 < quality.kl <= kl
    assert abs(quality.perplexity_change) <= TOLERANCES["int8_perplexity"]


@pytest.mark.parametrize("name", ["bundled", *HARD_COPIES, HARD_KEYS])
def test_they_are_close_to_those_of_float32(name: str, folder_of: Callable[[str], Path]) -> None:
    check_quality(folder_of(name), "float32_kv8", TOLERANCES["kv_int8_kl"])


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_on_every_path(isa: str, folder_of: Callable[[str], Path]) -> None:
    text, folder = held_out(512), folder_of(HARD_KEYS)
    reference = logits_of(folder, "float32", text.rows)
    found = logits_of(folder, "float32_kv8", text.rows, isa)
    quality = kl_and_perplexity(reference, found, np.concatenate(text.targets))
    assert 0 < quality.kl <= TOLERANCES["kv_int8_kl"]


@pytest.mark.parametrize("name", ["bundled", *HARD_COPIES])
def test_with_weights_of_8_bits_they_keep_those_tolerances(
    name: str, folder_of: Callable[[str], Path]
) -> None:
    check_quality(folder_of(name), "int8_kv8", TOLERANCES["int8_kl"])


def test_the_hard_keys_are_the_same_function(folder_of: Callable[[str], Path]) -> None:
    """In float32, where large keys and offsets cost a few bits."""
    rows = held_out(256).rows
    found = logits_of(folder_of(HARD_KEYS), "float32", rows)
    assert np.abs(found - logits_of(BUNDLED_MODEL, "float32", rows)).max() < 1e-2


@pytest.mark.parametrize("arithmetic", OF_8_BITS)
def test_another_cache_gives_other_logits(arithmetic: str) -> None:
    """So the option reaches the decoder in every arithmetic."""
    rows = held_out(64).rows
    found = logits_of(BUNDLED_MODEL, arithmetic, rows)
    assert not np.array_equal(found, logits_of(BUNDLED_MODEL, OF_8_BITS[arithmetic], rows))


def plan_with(**options: Any) -> Any:
    return plan_decoder(open_model(None), LoadOptions(decoder="cpu", **options))


def test_blocks_are_smaller_and_more_of_them_fit() -> None:
    """The bundled model has 6 layers and 4 heads of 64."""
    floats, codes = plan_with(), plan_with(kv_dtype="int8")
    numbers, scales = 6 * 32 * 2 * 256, 6 * 32 * 2 * 4
    assert floats.memory.kv_cache == floats.memory.num_blocks * 4 * numbers
    assert codes.memory.kv_cache == codes.memory.num_blocks * (numbers + 4 * scales)
    room = (floats.memory.weights + floats.memory.scratch) // 2**20 + 40
    few, many = plan_with(max_memory=room), plan_with(max_memory=room, kv_dtype="int8")
    assert few.memory.num_blocks < many.memory.num_blocks
    assert many.memory.total <= room * 2**20
    assert many.memory.num_blocks > 3.5 * few.memory.num_blocks


@pytest.mark.parametrize(
    ("options", "kv_dtype"),
    [({}, "float32"), ({"dtype": "bfloat16"}, "bfloat16"), ({"kv_dtype": "int8"}, "int8")],
)
def test_the_plan_says_how_they_are_kept(options: dict[str, Any], kv_dtype: str) -> None:
    assert plan_with(**options).kv_dtype == kv_dtype


def test_a_model_as_users_load_it() -> None:
    kinds: list[dict[str, Any]] = [{}, {"dtype": "bfloat16"}, {"quantize": "int8"}]
    for kind in kinds:
        with fastgen.load(decoder="cpu", kv_dtype="int8", max_batch_size=2, **kind) as model:
            text = model("In the beginning", temperature=0, max_new_tokens=8)
        assert text.startswith(" of the Lord")


def test_packed_folders_and_files_of_the_cache_serve_both_kinds(
    folder: Path, cache: Path, tmp_path: Path
) -> None:
    """Weights do not depend on how keys and values are kept."""
    for kv_dtype in ("auto", "int8", "auto"):
        load(folder, cache, kv_dtype=kv_dtype).close()
    assert len(list(cache.iterdir())) == 1
    packed = fastgen.pack(None, tmp_path / "packed", quantize="int8")
    with fastgen.load(packed, kv_dtype="int8", max_batch_size=1) as model:
        assert (model.plan.weights, model.plan.kv_dtype) == ("int8", "int8")
        expected = model("And it came to pass", temperature=0, max_new_tokens=9)
    options: dict[str, Any] = {"quantize": "int8", "kv_dtype": "int8", "max_batch_size": 1}
    with fastgen.load(cache=False, **options) as model:
        assert model("And it came to pass", temperature=0, max_new_tokens=9) == expected
