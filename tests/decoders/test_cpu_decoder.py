"""The CPU decoder on every instruction set this machine has, in every arithmetic.

Against float64 next to what PyTorch errs by: the torch decoder in float32, transformers in 16 bits.
test_invariance.py has its bits, test_native_decoder.py what needs no PyTorch.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import platform
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import fastgen
from cpu_decoders import ARITHMETICS, INSTRUCTION_SETS, cpu_decoder, instruction_set, plan_of
from fastgen.decoders.interface import Decoder, StepBatch
from reference import ReferenceGPT2
from stepping import Rows, all_logits, to_numpy
from tiny_checkpoints import CONFIG, random_array, random_tensors, write_checkpoint
from variant_cases import (
    LENGTHS,
    Case,
    load,
    random_rows,
    transformers_case,
    vocab_size_of,
    worst_error,
)
from variants import VARIANTS

Folder = Callable[[str], Path]
EVERY_PATH = pytest.mark.parametrize("isa", INSTRUCTION_SETS)
SHAPES = ("plain", "untied", "codeparrot", "head_dim_1", "head_dim_80", "width_36", "width_100")

pytestmark = [
    pytest.mark.skipif(not INSTRUCTION_SETS, reason="the C++ extension is not built"),
    pytest.mark.filterwarnings("ignore:.*tensors are not used"),
]


@cache
def torch_decoder_case(name: str, folder: Path) -> Case:
    """As transformers_case, with the torch decoder for a peer."""
    rows = random_rows(name, vocab_size_of(name), LENGTHS)
    reference = ReferenceGPT2(folder)
    expected = [reference.logits(row) for row in rows]
    with load(folder, name, decoder="torch", dtype="float32") as model:
        found = [all_logits(model.engine.decoder, [row], [96])[0] for row in rows]
    return Case(rows, expected, worst_error(found, expected))


@EVERY_PATH
@pytest.mark.parametrize("name", VARIANTS)
def test_float32_is_as_close_as_the_torch_decoder(name: str, isa: str, variant: Folder) -> None:
    case = torch_decoder_case(name, variant(name))
    with cpu_decoder(variant(name), "float32", isa=isa) as decoder:
        whole = [all_logits(decoder, [row], [96])[0] for row in case.rows]
        ragged = all_logits(decoder, case.rows, [1, 7, 13])
    case.assert_close(whole, "float32")
    for one, other in zip(whole, ragged, strict=True):
        assert np.array_equal(one, other)


@EVERY_PATH
@pytest.mark.parametrize(("name", "kept"), [("fp16_file", "float16"), ("bf16_file", "bfloat16")])
def test_16_bit_files_are_kept_and_lose_nothing(
    name: str, kept: str, isa: str, variant: Folder
) -> None:
    case = torch_decoder_case(name, variant(name))
    with instruction_set(isa), load(variant(name), decoder="cpu") as model:
        assert (model.plan.dtype, model.plan.weights) == ("float32", kept)
        found = all_logits(model.engine.decoder, case.rows, [16, 3])
        kept_bytes = model.plan.memory.weights
    case.assert_close(found, "float32")
    with load(variant(name), decoder="cpu", dtype="float32") as widened:
        assert kept_bytes < 0.7 * widened.plan.memory.weights


def test_a_file_of_several_dtypes_is_kept_in_float32(tmp_path: Path) -> None:
    tensors = random_tensors()
    tensors["h.1.mlp.c_fc.weight"] = tensors["h.1.mlp.c_fc.weight"].astype(np.float16)
    folder = write_checkpoint(tmp_path, tensors)
    with fastgen.load(folder, decoder="cpu") as model:
        assert (model.plan.dtype, model.plan.weights) == ("float32", "float32")
        [found] = all_logits(model.engine.decoder, [[1, 2, 3]], [2])
    assert np.abs(found - ReferenceGPT2(folder).logits([1, 2, 3])).max() < 1e-5


@EVERY_PATH
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", SHAPES)
def test_16_bit_arithmetic_is_as_close_as_pytorchs(
    name: str, dtype: str, isa: str, variant: Folder
) -> None:
    case = transformers_case(name, variant(name), (1, 17, 64, 96), dtype)
    with instruction_set(isa), load(variant(name), decoder="cpu", dtype=dtype) as model:
        case.assert_close(all_logits(model.engine.decoder, case.rows, [5, 20]), dtype)


@EVERY_PATH
@pytest.mark.parametrize("arithmetic", ["int8", "int8_float32"])
@pytest.mark.parametrize("name", SHAPES)
def test_int8_errs_by_the_rounding_of_its_codes(
    name: str, arithmetic: str, isa: str, variant: Folder
) -> None:
    """On random weights; test_quantization.py has a real model's. Every path errs alike."""
    rows = random_rows(name, vocab_size_of(name), LENGTHS)
    reference = ReferenceGPT2(variant(name))
    expected = np.concatenate([reference.logits(row) for row in rows])
    with cpu_decoder(variant(name), arithmetic, isa=isa) as decoder:
        found = np.concatenate(all_logits(decoder, rows, [16, 3]))
    error = float(np.sqrt(((found - expected) ** 2).mean()) / expected.std())
    assert error < 0.05


@EVERY_PATH
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_token_by_token_up_to_the_last_position(arithmetic: str, isa: str, variant: Folder) -> None:
    """Every length from 1 to n_positions: whole, and as the next token of a row."""
    [row] = random_rows("lengths", 211, (96,))
    with cpu_decoder(variant("width_36"), arithmetic, isa=isa) as decoder:
        [stepped] = all_logits(decoder, [row], [1])
        for length in range(1, 97):
            [whole] = all_logits(decoder, [row[:length]], [96], seed=length)
            assert np.array_equal(whole, stepped[:length]), length


@pytest.fixture(scope="module")
def long_case(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Case]:
    sizes = {"n_positions": 1024, "n_embd": 40, "n_head": 2, "n_inner": 80, "vocab_size": 50}
    config = {**CONFIG, **sizes}
    tensors = {name: 3 * array for name, array in random_tensors(config).items()}
    folder = write_checkpoint(tmp_path_factory.mktemp("long"), tensors, **sizes)
    row = np.random.default_rng(0).integers(0, 50, 1024).tolist()
    expected = [ReferenceGPT2(folder).logits(row)]
    with fastgen.load(folder, decoder="torch", max_batch_size=1) as model:
        found = all_logits(model.engine.decoder, [row], [128])
    return folder, Case([row], expected, worst_error(found, expected))


@EVERY_PATH
def test_a_full_context_of_1024(isa: str, long_case: tuple[Path, Case]) -> None:
    folder, case = long_case
    with cpu_decoder(folder, isa=isa) as decoder:
        assert decoder.limits.max_seq_len == 1024
        case.assert_close(all_logits(decoder, case.rows, [128]), "float32")
        case.assert_close(all_logits(decoder, case.rows, [1, 63, 100]), "float32")


@EVERY_PATH
@pytest.mark.parametrize("arithmetic", ["float32", "bfloat16", "int8"])
def test_prefill_decode_and_drafts_in_one_step(arithmetic: str, isa: str, variant: Folder) -> None:
    """A prompt, a chunk of one, a next token, drafts and a row for the host: as one by one."""
    prompts = random_rows("mixed", 211, (40, 70, 9, 20, 33))
    with cpu_decoder(variant("plain"), arithmetic, isa=isa, max_logits=160) as decoder:
        together = mixed_steps(decoder, prompts, [range(5)])
        one_by_one = mixed_steps(decoder, prompts, [[row] for row in range(5)])
    assert together == one_by_one


def mixed_steps(
    decoder: Decoder, prompts: list[list[int]], groups: list[Any]
) -> dict[int, tuple[Any, bytes]]:
    """What each row draws, and its logits: the rows of a group are fed in one step.

    Row 0 ends its prompt, row 1 goes on with it, row 2 draws its second token, row 3 checks four
    drafts and row 4 brings its logits to the host.
    """
    for seat, prompt in enumerate(prompts):
        options: dict[str, Any] = {"temperature": 0} if seat == 3 else {"seed": seat, "top_k": 50}
        decoder.bind(seat, fastgen.SamplingParams(**options), prompt)
    rows = Rows(decoder, 5)
    decoder.forward(rows.batch([[], prompts[1][:20], prompts[2], prompts[3][:-1], []]))
    [right] = greedy_behind(decoder, rows, prompts[3])
    fed = [prompts[0], prompts[1][20:50], [7], [prompts[3][-1], right, 0, 1, 2], prompts[4]]
    found: dict[int, tuple[Any, bytes]] = {}
    for group in groups:
        batch = rows.batch([fed[row] if row in group else [] for row in range(5)])
        ends = [slice(*batch.row_starts[at : at + 2]) for at in range(len(group))]
        logits = to_numpy(decoder.forward(batch))
        wanted = [(end, row) for end, row in zip(ends, group, strict=True) if row != 1]
        step = decoder.step(draws_of(batch, wanted))
        draws, host = step.wait(), [part.tobytes() for part in step.logits]
        for end, row in zip(ends, group, strict=True):
            drawn = [draw.token_id for draw in draws if draw.seat == row]
            found[row] = (host if row == 4 else drawn), logits[end].tobytes()
    assert len(found[3][0]) >= 2, "the right draft is kept"
    assert found[4][0] == [found[4][1][-len(found[4][0][0]) :]]
    return found


def greedy_behind(decoder: Decoder, rows: Rows, prompt: list[int]) -> list[int]:
    logits = to_numpy(decoder.forward(rows.batch([[], [], [], prompt[-1:], []])))
    rows.cache_lens[3] -= 1
    return [int(logits[-1].argmax())]


def draws_of(batch: StepBatch, wanted: list[tuple[slice, int]]) -> StepBatch:
    """Row 3 draws behind each of its tokens, the others behind their last; row 4 on the host."""
    at: list[int] = []
    seats: list[int] = []
    for end, row in wanted:
        first = end.start if row == 3 else end.stop - 1
        at += range(first, end.stop)
        seats += [-1 if row == 4 else row] * (end.stop - first)
    return replace(batch, logits_at=np.array(at, np.int32), seats=np.array(seats, np.int32))


@EVERY_PATH
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_the_same_logits_wherever_and_how_often_they_are_asked_for(
    arithmetic: str, isa: str, variant: Folder
) -> None:
    with cpu_decoder(variant("width_100"), arithmetic, isa=isa) as decoder:
        batch = Rows(decoder, 2).batch(random_rows("repeats", 211, (5, 37)))
        every = to_numpy(decoder.forward(batch))
        for wanted in ([41, 0, 0, 4, 41], [3], list(range(41, -1, -1)), [9] * 90):
            at = np.array(wanted, np.int32)
            picked = replace(batch, logits_at=at, seats=np.full(len(at), -1, np.int32))
            assert np.array_equal(decoder.forward(picked), every[at])


def test_an_unknown_instruction_set_is_refused(variant: Folder) -> None:
    with (
        instruction_set("sse17"),
        pytest.raises(ValueError, match=r"sse17: this processor has .*portable"),
    ):
        load(variant("plain"), decoder="cpu")


@pytest.mark.parametrize(
    "name",
    [
        "wte.weight",
        "lm_head.weight",
        "h.0.attn.c_attn.weight",
        "h.0.attn.c_proj.weight",
        "h.1.mlp.c_fc.weight",
        "h.1.mlp.c_proj.weight",
        "the embedding of two",
    ],
)
def test_weights_too_large_for_float16_are_named(name: str, tmp_path: Path) -> None:
    tensors = random_tensors()
    key = "wte.weight" if " " in name else name
    if name == "lm_head.weight" or " " in name:
        tensors["lm_head.weight"] = random_array(11, 8) + 1
    tensors[key].flat[5] = 65504  # float16's largest
    folder = write_checkpoint(tmp_path, tensors)
    with fastgen.load(folder, decoder="cpu", dtype="float16", max_batch_size=1):
        pass
    for value in (65520, -1e30):
        tensors[key].flat[5] = value
        write_checkpoint(tmp_path, tensors)
        with pytest.raises(fastgen.CheckpointError, match=rf"{key} .*float16"):
            fastgen.load(folder, decoder="cpu", dtype="float16", max_batch_size=1)


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"quantize": "int8"}], ids=str)
def test_weights_that_overflow_are_named(options: dict[str, Any], tmp_path: Path) -> None:
    """Finite in the file; but rounded to bfloat16, or smoothed for int8, they are not."""
    tensors = random_tensors()
    tensors["h.0.ln_1.weight"][:] = 1
    tensors["h.0.ln_1.weight"][0] = 64  # smoothing multiplies this input's weights
    tensors["h.0.attn.c_attn.weight"][:] = 1e38
    tensors["h.0.attn.c_attn.weight"][0, 5] = 3.4e38
    folder = write_checkpoint(tmp_path, tensors)
    with pytest.raises(fastgen.CheckpointError, match=r"c_attn.weight .* too large for (bf|int8)"):
        fastgen.load(folder, decoder="cpu", max_batch_size=1, **options)


def test_the_callers_floating_point_settings_do_not_matter(variant: Folder) -> None:
    """Other threads do parts of the same work, with settings of their own."""
    libm = ctypes.CDLL(ctypes.util.find_library("m"))
    rows = random_rows("no_prefix", vocab_size_of("no_prefix"), (40, 3))
    upwards = 0x800 if platform.machine() == "x86_64" else 0x400000
    before = libm.fegetround()
    for arithmetic in ("float32", "bfloat16", "int8"):
        with cpu_decoder(variant("no_prefix"), arithmetic) as decoder:
            expected = all_logits(decoder, rows, [16])
            assert libm.fesetround(upwards) == 0
            try:
                found = all_logits(decoder, rows, [16])
                assert libm.fegetround() == upwards
            finally:
                libm.fesetround(before)
        for one, other in zip(expected, found, strict=True):
            assert np.array_equal(one, other)


def test_int8_of_weights_of_every_size(tmp_path: Path, variant: Folder) -> None:
    """Columns of zeros, of tiny and of huge weights: each has a scale of its own."""
    tensors = load_file(variant("no_prefix") / "model.safetensors")
    for at, factor in enumerate((0, 1e-30, 1e-20, 1e10)):
        tensors["wte.weight"][at] *= factor
    for path in variant("no_prefix").glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    [row] = random_rows("sizes", 200, (40,))
    row = [token_id + 8 for token_id in row]
    expected = ReferenceGPT2(tmp_path).logits(row)
    for isa in INSTRUCTION_SETS:
        with cpu_decoder(tmp_path, "int8_float32", isa=isa) as decoder:
            [found] = all_logits(decoder, [row], [96])
        assert (found[:, 0] == 0).all()
        error = np.abs(found - expected).max(0) / np.maximum(np.abs(expected).max(0), 1e-25)
        assert error[1:].max() < 0.2


def test_more_threads_than_rows_panels_or_heads(variant: Folder) -> None:
    for name in ("one_of_each", "head_dim_1"):
        rows = random_rows(name, vocab_size_of(name), (1, 2))
        with cpu_decoder(variant(name)) as decoder:
            wanted = all_logits(decoder, rows, [1])
        with cpu_decoder(variant(name), num_threads=9) as decoder:
            for found, expected in zip(all_logits(decoder, rows, [1]), wanted, strict=True):
                assert np.array_equal(found, expected)


def test_memory_is_what_the_plan_says_and_grows_with_blocks(variant: Folder) -> None:
    _, plan = plan_of(variant("plain"))
    with cpu_decoder(variant("plain")) as decoder:
        before = decoder.memory()
        assert before == plan.memory
        decoder.reserve(before.num_blocks + 5, 0)
        after = decoder.memory()
        assert after.num_blocks == before.num_blocks + 5
        assert after.kv_cache * before.num_blocks == before.kv_cache * after.num_blocks
        decoder.reserve(1, 1)  # never shrinks
        assert decoder.memory() == after
