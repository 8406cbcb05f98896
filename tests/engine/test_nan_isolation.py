"""A row that turns into NaN, keys and values included, leaves every other row's bits as they are.

Beside it in a batch, in blocks that were its own, and behind a beginning that both share.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastgen
from cpu_decoders import ARITHMETICS, INSTRUCTION_SETS, cpu_decoder, plan_of
from fastgen.decoders.interface import Decoder
from fastgen.frontends.generator import Generator
from poisoned import POISON, save_poisoned, save_poisoned_odd
from stepping import Rows, to_numpy

# What poisons does not fit float16.
POISONABLE = sorted(name for name, each in ARITHMETICS.items() if each.weights != "float16")
PATHS = list(product(INSTRUCTION_SETS, POISONABLE))
RNG = np.random.default_rng(0)
BYSTANDERS = [RNG.integers(201, 4096, length).tolist() for length in (45, 1, 64)]
VICTIM = RNG.integers(201, 4096, 60).tolist()
POISONED_AT = 33
OPTIONS: dict[str, Any] = {"max_seq_len": 64, "max_logits": 128}

pytestmark = pytest.mark.skipif(not INSTRUCTION_SETS, reason="the C++ extension is not built")


@pytest.fixture(scope="module", params=["bundled", "odd"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("poisoned")
    return (
        save_poisoned(made, num_layers=2) if request.param == "bundled" else save_poisoned_odd(made)
    )


def poisoned(row: list[int]) -> list[int]:
    return [*row[:POISONED_AT], POISON, *row[POISONED_AT + 1 :]]


def fed_in_chunks(decoder: Decoder, rows: Rows, fed: dict[int, list[int]], size: int) -> Any:
    """Logits of each row's tokens; `rows` has places for four."""
    found: dict[int, list[np.ndarray]] = {row: [] for row in fed}
    for start in range(0, max(map(len, fed.values())), size):
        new = [fed.get(row, [])[start : start + size] for row in range(4)]
        logits = to_numpy(decoder.forward(rows.batch(new)))
        for row, tokens in enumerate(new):
            if tokens:
                found[row].append(logits[: len(tokens)])
                logits = logits[len(tokens) :]
    return {row: np.concatenate(parts) for row, parts in found.items()}


@pytest.mark.parametrize("size", [1, 9, 32])
@pytest.mark.parametrize(("isa", "arithmetic"), PATHS)
def test_rows_beside_it_and_in_its_blocks(
    isa: str, arithmetic: str, size: int, folder: Path
) -> None:
    with cpu_decoder(folder, arithmetic, isa=isa, **OPTIONS) as decoder:
        alone = fed_in_chunks(decoder, Rows(decoder, 4), dict(enumerate(BYSTANDERS)), size)
        rows = Rows(decoder, 4, seed=1)
        fed = dict(enumerate([*BYSTANDERS, poisoned(VICTIM)]))
        beside = fed_in_chunks(decoder, rows, fed, size)
        assert np.isnan(beside.pop(3)[POISONED_AT:]).all()
        assert_same_bits(beside, alone)
        for slot in (0, 1, 2):  # the block tables of the victim, which has ended
            rows.tables[slot], rows.tables[3] = rows.tables[3].copy(), rows.tables[slot].copy()
            rows.cache_lens[:] = 0
            again = fed_in_chunks(decoder, rows, {slot: BYSTANDERS[slot]}, size)
            assert_same_bits(again, {slot: alone[slot]})
            rows.cache_lens[:] = 0
            fed_in_chunks(decoder, rows, {3: poisoned(VICTIM)}, size)


@pytest.mark.parametrize("size", [1, 9, 32])
@pytest.mark.parametrize(("isa", "arithmetic"), PATHS)
def test_a_copy_of_its_last_block_up_to_the_poison(
    isa: str, arithmetic: str, size: int, folder: Path
) -> None:
    """What stands behind the copied tokens is NaN in the copy, too."""
    with cpu_decoder(folder, arithmetic, isa=isa, **OPTIONS) as decoder:
        rows = Rows(decoder, 4)
        alone = fed_in_chunks(decoder, rows, {0: VICTIM}, size)[0]
        fed_in_chunks(decoder, rows, {1: VICTIM[:POISONED_AT]}, size)
        fed_in_chunks(decoder, rows, {1: [POISON] * 20}, size)
        decoder.copy_blocks(
            list(zip(rows.tables[1].tolist(), rows.tables[2].tolist(), strict=True))
        )
        rows.cache_lens[2] = POISONED_AT
        behind = fed_in_chunks(decoder, rows, {2: VICTIM[POISONED_AT:]}, size)[2]
        assert np.array_equal(behind, alone[POISONED_AT:])


@pytest.mark.parametrize("size", [2, 9, 32, 60])
@pytest.mark.parametrize(("isa", "arithmetic"), PATHS)
def test_tokens_before_it_in_its_own_row(
    isa: str, arithmetic: str, size: int, folder: Path
) -> None:
    """They may be the beginning of other rows, or scored, or followed by a draft that is poison."""
    with cpu_decoder(folder, arithmetic, isa=isa, **OPTIONS) as decoder:
        alone = fed_in_chunks(decoder, Rows(decoder, 4), {0: VICTIM}, size)[0]
        found = fed_in_chunks(decoder, Rows(decoder, 4), {0: poisoned(VICTIM)}, size)[0]
        assert np.array_equal(found[:POISONED_AT], alone[:POISONED_AT])
        assert np.isnan(found[POISONED_AT:]).all()


@pytest.mark.parametrize("arithmetic", ["float32", "bfloat16", "int8", "float32_kv8"])
def test_a_request_that_shares_its_beginning_with_one(arithmetic: str, tmp_path: Path) -> None:
    """Through the engine: the victim fails alone, the other has the tokens it always had.

    The victim takes two steps. After the first, the other may have its first block.
    """
    folder = save_poisoned(tmp_path, num_layers=2)
    long_victim = [*poisoned(VICTIM), *RNG.integers(201, 4096, 260).tolist()]
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0, "ignore_eos": True}
    with Generator(*in_order(plan_of(folder, arithmetic, max_seq_len=384))) as model:
        wanted = [model.generate(prompt, **options)[0] for prompt in (VICTIM, *BYSTANDERS)]
    for order in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0]):
        with Generator(*in_order(plan_of(folder, arithmetic, max_seq_len=384))) as model:
            prompts = [long_victim, VICTIM, *BYSTANDERS]
            found = model.generate([prompts[at] for at in order], **options)
            again = model.generate(VICTIM, **options)[0]
        results = dict(zip(order, found, strict=True))
        assert results[0].completions[0].finish_reason == "error"
        assert "NaN" in str(results[0].completions[0].error)
        for at in range(1, 5):
            assert tokens_of(results[at]) == tokens_of(wanted[at - 1])
        assert tokens_of(again) == tokens_of(wanted[0])


def in_order(planned: tuple[Any, Any]) -> tuple[Any, None, Any]:
    """The arguments of Generator, without a tokenizer."""
    checkpoint, plan = planned
    return checkpoint, None, plan


def tokens_of(generation: fastgen.Generation) -> tuple[int, ...]:
    return generation.completions[0].token_ids


def assert_same_bits(found: dict[int, np.ndarray], wanted: dict[int, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    for row, logits in found.items():
        assert np.isfinite(logits).all()
        assert np.array_equal(logits, wanted[row]), f"row {row}"
