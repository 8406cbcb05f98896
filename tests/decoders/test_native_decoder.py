"""The C++ decoder by itself: cached, uncached and chunked; its bindings; what they refuse.

Imports no torch, so that it can also run under sanitizers (test_sanitizers.py).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastgen
from cpu_decoders import (
    ARITHMETICS,
    INSTRUCTION_SETS,
    cpu_decoder,
    instruction_set,
    native_of,
    native_sampler_of,
    plan_of,
)
from fastgen.decoders.cpu.plan import decoder_shape
from fastgen.decoders.interface import Decoder
from fastgen.decoders.select import build_decoder
from fastgen.native import native
from stepping import Rows, all_logits, to_numpy
from tiny_checkpoints import CONFIG, random_array, random_tensors, run_python, write_checkpoint

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "odd": {"n_embd": 21, "n_head": 3, "n_inner": 37, "vocab_size": 67},
    "one head each": {"n_embd": 3, "n_head": 3, "n_inner": 1, "n_layer": 1, "vocab_size": 13},
    "two panels": {"n_embd": 66, "n_head": 2, "n_inner": 65, "vocab_size": 33},
}
PATHS = list(product(INSTRUCTION_SETS, ARITHMETICS))
# What an arithmetic may change of logits whose largest is about 1.
NEAR = {"float32": 1e-5, "float16_weights": 1e-3, "bfloat16_weights": 0.02, "bfloat16": 0.03,
        "int8": 0.05, "int8_float32": 0.05, "float32_kv8": 0.01, "float16_weights_kv8": 0.01,
        "bfloat16_kv8": 0.03, "int8_kv8": 0.05}  # fmt: skip

pytestmark = pytest.mark.skipif(native is None, reason="the C++ extension is not built")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: write_checkpoint(
            tmp_path_factory.mktemp("shape"),
            random_tensors({**CONFIG, **sizes, "n_positions": 70}),
            **{**sizes, "n_positions": 70},
        )
        for name, sizes in SHAPES.items()
    }


@pytest.fixture
def decoder(folders: dict[str, Path]) -> Iterator[Decoder]:
    with cpu_decoder(folders["tiny"], num_threads=2) as made:
        yield made


def random_rows(seed: int, vocab_size: int, *lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, length).tolist() for length in lengths]


@pytest.mark.parametrize(("isa", "arithmetic"), PATHS)
@pytest.mark.parametrize("shape", SHAPES)
def test_cached_is_uncached_is_chunked(
    shape: str, isa: str, arithmetic: str, folders: dict[str, Path]
) -> None:
    folder = folders[shape]
    rows = random_rows(1, SHAPES[shape].get("vocab_size", 11), 70, 1, 33, 32)
    with cpu_decoder(folder, isa=INSTRUCTION_SETS[-1]) as reference:
        near = [all_logits(reference, [row], [70])[0] for row in rows]
    options: dict[str, Any] = {"isa": isa, "max_logits": 280}
    with cpu_decoder(folder, arithmetic, num_threads=3, **options) as decoder:
        whole = [all_logits(decoder, [row], [70])[0] for row in rows]
        for chunks in ([70], [1], [2, 5, 3], [31, 1], [33, 7]):
            for found, wanted in zip(all_logits(decoder, rows, chunks), whole, strict=True):
                assert np.array_equal(found, wanted), chunks
    for found, wanted in zip(whole, near, strict=True):
        assert np.abs(found - wanted).max() < NEAR[arithmetic] * max(1, np.abs(wanted).max())


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"quantize": "int8"}])
def test_the_bundled_model_as_users_load_it(options: dict[str, Any]) -> None:
    [row] = random_rows(2, 4096, 90)
    with fastgen.load(decoder="cpu", max_batch_size=2, max_seq_len=96, **options) as model:
        decoder = model.engine.decoder
        [whole] = all_logits(decoder, [row], [96])
        assert np.array_equal(all_logits(decoder, [row], [1, 30])[0], whole)
        text = model("In the beginning", temperature=0, max_new_tokens=8)
    assert text.startswith(" of the Lord")


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_copies_and_growth_keep_the_bits(arithmetic: str, folders: dict[str, Path]) -> None:
    [row] = random_rows(3, 67, 70)
    with cpu_decoder(folders["odd"], arithmetic, max_batch_size=2) as decoder:
        [wanted] = all_logits(decoder, [row], [70])
        rows = Rows(decoder, 2)
        decoder.forward(rows.batch([row[:45], []]))
        decoder.reserve(decoder.limits.num_blocks + 3, 4)
        swapped = rows.tables[:, [1, 0, 2]].copy()
        decoder.copy_blocks(list(zip(rows.tables[0].tolist(), swapped[1].tolist(), strict=True)))
        rows.tables[1], rows.cache_lens[1] = swapped[1], 45
        found = to_numpy(decoder.forward(rows.batch([row[45:], row[45:]])))
        assert np.array_equal(found[:25], wanted[45:])
        assert np.array_equal(found[25:], wanted[45:])
        decoder.copy_blocks([])
        cycle = [(int(a), int(b)) for a, b in zip(*rows.tables, strict=True)]
        decoder.copy_blocks([*cycle, *[(b, a) for a, b in cycle]])  # read before they are written
        rows.tables = rows.tables[::-1].copy()
        rows.cache_lens[:] = 45
        assert np.array_equal(decoder.forward(rows.batch([row[45:], row[45:]])), found)


@pytest.mark.usefixtures("own_garbage")
def test_a_closed_decoder_raises_and_its_logits_stay(folders: dict[str, Path]) -> None:
    decoder = build_decoder(*plan_of(folders["tiny"]))
    batch = Rows(decoder, 1).batch([[1, 2, 3]])
    view = decoder.forward(batch)
    before = view.copy()
    decoder.close()
    decoder.close()
    calls: list[Callable[[Any], Any]] = [
        lambda closed: closed.forward(batch),
        lambda closed: closed.step(batch),
        lambda closed: closed.step(replace(batch, seats=np.zeros(3, np.int32))),
        lambda closed: closed.copy_blocks([(0, 1)]),
        lambda closed: closed.reserve(10**4, 1),
        lambda closed: native_of(closed).pack_head(np.zeros((11, 8), np.float32), None),
        lambda closed: native_of(closed).set_positions(np.zeros((70, 8), np.float32)),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="closed"):
            call(decoder)
    del decoder
    gc.collect()
    assert np.array_equal(view, before)


_CLOSED_MEANWHILE = """
import sys, threading
sys.setswitchinterval(1e-6)
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from cpu_decoders import cpu_decoder
from stepping import Rows

def forward(decoder, batch):
    decoder._native.forward(*decoder._rows(batch), batch.logits_at).sum()

def copy(decoder, batch):
    decoder.copy_blocks([(0, 1), (1, 2)])

def work(call, decoder, batch, ends, begun):
    try:
        while True:
            call(decoder, batch)
            begun.release()
    except RuntimeError as error:
        ends.append(str(error))

for _ in range(100):
    with cpu_decoder(Path(sys.argv[2])) as decoder:
        ends, begun = [], threading.Semaphore(0)
        arguments = decoder, Rows(decoder, 1).batch([[1, 2, 3]]), ends, begun
        threads = [threading.Thread(target=work, args=(call, *arguments), daemon=True)
                   for call in (forward, copy) * 2]
        for thread in threads:
            thread.start()
        for _ in range(5):  # at least one thread is in its second call
            begun.acquire()
        decoder.close()
        for thread in threads:
            thread.join()
    assert ends == ["this decoder has been closed"] * 4, ends
print("fine")
"""


def test_closing_while_other_threads_step_raises_in_them(folders: dict[str, Path]) -> None:
    """The interface forbids it, and the engine does not do it; still no memory goes wrong."""
    assert (
        run_python(_CLOSED_MEANWHILE, Path(__file__).parents[1] / "helpers", folders["tiny"])
        == "fine\n"
    )


INT32 = 2**31 - 1
WRONG_BATCHES: dict[str, dict[str, Any]] = {
    "no tokens": {"token_ids": []},
    "token too large": {"token_ids": [1, 11, 3]},
    "token far too large": {"token_ids": [INT32, 1, 1]},
    "position negative": {"positions": [0, -1, 2]},
    "position too large": {"positions": [0, 1, 70]},
    "positions missing": {"positions": [0, 1]},
    "starts begin late": {"row_starts": [1, 3]},
    "starts end early": {"row_starts": [0, 2]},
    "starts missing": {"row_starts": [0]},
    "starts for two rows": {"row_starts": [0, 1, 3]},
    "starts go back": {"row_starts": [0, 5, 3], "cache_lens": [0, 0], "block_tables": [[0], [1]]},
    "starts below 0": {"row_starts": [0, -9, 3], "cache_lens": [0, 0], "block_tables": [[0], [1]]},
    "no rows": {"row_starts": [0], "cache_lens": [], "block_tables": np.zeros((0, 1))},
    "cache_lens negative": {"cache_lens": [-1]},
    "cache_lens beyond its table": {"cache_lens": [30]},
    "cache_lens overflows": {"cache_lens": [INT32 - 2]},
    "cache_lens overflows just": {"cache_lens": [INT32]},
    "block negative": {"block_tables": [[-1]]},
    "block too large": {"block_tables": [[24]]},
    "block of INT32_MAX": {"block_tables": [[INT32]]},
    "no blocks": {"block_tables": np.zeros((1, 0))},
    "blocks flat": {"block_tables": [0]},
    "blocks for two rows": {"block_tables": [[0], [1]]},
    "logits_at negative": {"logits_at": [-1]},
    "logits_at too large": {"logits_at": [3]},
    "logits_at too many": {"logits_at": [0] * 71},
}  # fmt: skip
GOOD_BATCH: dict[str, Any] = {
    "token_ids": [1, 2, 3], "positions": [0, 1, 2], "row_starts": [0, 3], "cache_lens": [0],
    "block_tables": [[5]], "logits_at": [2, 0],
}  # fmt: skip
REFUSALS = (ValueError, IndexError, TypeError, AssertionError)


@pytest.mark.parametrize("name", WRONG_BATCHES)
def test_wrong_batches_are_refused(name: str, decoder: Decoder) -> None:
    """Whatever they hold, they do not read or write another's memory."""
    arrays = {k: np.array(v, np.int32) for k, v in {**GOOD_BATCH, **WRONG_BATCHES[name]}.items()}
    good = [np.array(value, np.int32) for value in GOOD_BATCH.values()]
    wanted = native_of(decoder).forward(*good).copy()
    with pytest.raises(REFUSALS):
        native_of(decoder).forward(*arrays.values())
    decoder.bind(0, fastgen.SamplingParams(), [1])
    draws = [np.zeros(1, np.int32), np.full(1, -1, np.int32), 0]
    with pytest.raises(REFUSALS):
        native_of(decoder).step(*arrays.values(), native_sampler_of(decoder), *draws)
    assert np.array_equal(native_of(decoder).forward(*good), wanted)


@pytest.mark.parametrize("at", range(6))
def test_arrays_of_other_types_or_orders_are_refused(at: int, decoder: Decoder) -> None:
    good: list[Any] = [np.array(value, np.int32) for value in GOOD_BATCH.values()]
    for wrong in (good[at].astype(np.int64), good[at].astype(np.float32), None, "x", 3):
        arguments = [*good[:at], wrong, *good[at + 1 :]]
        with pytest.raises(TypeError):
            native_of(decoder).forward(*arguments)
    spread = np.repeat(good[at], 2, axis=-1)[..., ::2]
    if spread.shape[-1] > 1:
        with pytest.raises(TypeError):
            native_of(decoder).forward(*good[:at], spread, *good[at + 1 :])


def test_draws_that_do_not_fit_are_refused(decoder: Decoder, folders: dict[str, Path]) -> None:
    good = [np.array(value, np.int32) for value in GOOD_BATCH.values()]
    sampler = native_sampler_of(decoder)
    decoder.bind(0, fastgen.SamplingParams(), [1])
    zero, none = np.zeros(1, np.int32), np.full(1, -1, np.int32)
    for wrong in (
        (sampler, np.zeros(3, np.int32), np.full(3, -1, np.int32), 0),
        (sampler, np.full(1, 8, np.int32), none, 0),
        (sampler, none, none, 0),
        (sampler, zero, np.zeros(2, np.int32), 0),
        (sampler, zero, none, -1),
        (native.Sampler(1, 12, 20, 1), zero, none, 0),
        (None, zero, none, 0),
    ):
        with pytest.raises(REFUSALS):
            native_of(decoder).step(*good, *wrong)
    for max_top in (0, 3, 40):  # 40: more than there are tokens
        drawn, logits = native_of(decoder).step(*good, sampler, zero, none, max_top)
        ids, _, _, top_ids, _ = drawn
        assert ids.shape == (1,) and top_ids.shape == (1, max_top) and logits.shape == (2, 11)


def test_blocks_that_are_not_there_are_refused(decoder: Decoder) -> None:
    count = decoder.limits.num_blocks
    for pairs in ([(0, count)], [(count, 0)], [(-1, 0)], [(0, 1), (0, INT32)]):
        with pytest.raises(IndexError, match="block"):
            decoder.copy_blocks(pairs)
    for wrong in (np.zeros(2, np.int32), np.zeros((1, 3), np.int32), np.zeros((1, 2))):
        with pytest.raises(REFUSALS):
            native_of(decoder).copy_blocks(wrong)
    native_of(decoder).reserve(0)
    native_of(decoder).reserve(-5)
    decoder.copy_blocks([(0, count - 1)])


Change = Callable[[dict[str, Any]], Any]
WRONG_SHAPES: dict[str, Change] = {
    "a size is missing": lambda shape: shape.pop("inner_size"),
    "a size is 0": lambda shape: shape.update(vocab_size=0),
    "a size is negative": lambda shape: shape.update(max_positions=-1),
    "a size is no number": lambda shape: shape.update(num_layers="two"),
    "heads that do not divide": lambda shape: shape.update(num_heads=3),
    "a scale is missing": lambda shape: shape["attention_scales"].pop(),
    "an unknown activation": lambda shape: shape.update(activation="elu"),
    "an unknown dtype": lambda shape: shape.update(dtype="float8"),
    "unknown weights": lambda shape: shape.update(weights="int4"),
}


@pytest.mark.parametrize("name", WRONG_SHAPES)
def test_wrong_shapes_are_refused(name: str, folders: dict[str, Path]) -> None:
    checkpoint, _ = plan_of(folders["tiny"])
    shape = decoder_shape(checkpoint, "float32", "float32", 64, 8)
    native.CpuDecoder(shape, 1, 1)
    WRONG_SHAPES[name](shape)
    makes: tuple[Callable[[], Any], ...] = (
        lambda: native.CpuDecoder(shape, 1, 1),
        lambda: native.decoder_bytes(shape),
    )
    for make in makes:
        with pytest.raises((*REFUSALS, KeyError, RuntimeError)):
            make()


def test_wrong_weights_are_refused(folders: dict[str, Path]) -> None:
    checkpoint, _ = plan_of(folders["tiny"])
    shape = decoder_shape(checkpoint, "float32", "float32", 64, 8)
    for blocks, threads in ((0, 1), (1, 0), (-1, 1)):
        with pytest.raises(ValueError, match="at least 1"):
            native.CpuDecoder(shape, blocks, threads)
    made = native.CpuDecoder(shape, 1, 1)
    square, bias = random_array(8, 8), random_array(8)
    made.pack_projection(0, 1, square, bias, None)
    for wrong in (
        (2, 1, square, bias, None),
        (-1, 1, square, bias, None),
        (0, 4, square, bias, None),
        (0, -1, square, bias, None),
        (0, 0, square, bias, None),
        (0, 1, square.T, bias, None),
        (0, 1, square[:, :7], bias, None),
        (0, 1, square.ravel(), bias, None),
        (0, 1, square.astype(np.float64), bias, None),
        (0, 1, square.astype(np.int16), bias, None),
        (0, 1, square, bias[:7], None),
        (0, 1, square, bias, np.ones(9, np.float32)),
    ):
        with pytest.raises(REFUSALS):
            made.pack_projection(*wrong)
    calls: tuple[Callable[[], Any], ...] = (
        lambda: made.pack_head(random_array(8, 11), None),
        lambda: made.set_norm(2, False, bias, bias),
        lambda: made.set_norm(-2, False, bias, bias),
        lambda: made.set_norm(0, False, bias, bias[:3]),
        lambda: made.set_positions(random_array(16, 8)),
        lambda: made.set_embedding(random_array(11, 8)),
    )
    for call in calls:
        with pytest.raises(REFUSALS):
            call()


def test_an_unknown_instruction_set_is_refused(folders: dict[str, Path]) -> None:
    shape = decoder_shape(plan_of(folders["tiny"])[0], "float32", "float32", 64, 8)
    with instruction_set("sse17"), pytest.raises(ValueError, match="sse17"):
        native.CpuDecoder(shape, 1, 1)
    with instruction_set("portable"):
        assert native.chosen_instruction_set() == "portable"
    assert native.instruction_sets()[-1] == "portable"


def test_bfloat16_is_multiplied_the_faster_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless it is said which."""
    monkeypatch.delenv("FASTGEN_ISA", raising=False)
    for isa in native.instruction_sets():
        with instruction_set(isa):
            assert native.bfloat16_instruction_set() == isa
    with instruction_set(""):
        best, chosen = native.instruction_sets()[0], native.bfloat16_instruction_set()
    cpuinfo = Path("/proc/cpuinfo")
    is_intel = cpuinfo.exists() and "GenuineIntel" in cpuinfo.read_text()
    assert chosen == ("avx512_vnni" if is_intel and best == "avx512_bf16" else best)
