"""The CPU decoder's promise: a row's bits follow from the row alone.

Not from what else is in the batch, where in it the row stands, how its tokens are cut into steps,
which blocks it has, whose blocks its beginning was taken from, or how many threads compute. Every
run tries cases of its own; a failure prints the seed that repeats it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastgen
from cpu_decoders import ARITHMETICS, INSTRUCTION_SETS, cpu_decoder, plan_of
from fastgen.decoders.interface import Decoder, StepBatch
from fastgen.decoders.memory import BLOCK_SIZE, blocks_for
from fastgen.frontends.generator import Generator, find_tokenizer
from stepping import all_logits
from tiny_checkpoints import CONFIG, random_tensors, write_checkpoint

NUM_CASES = 504  # in all
MAX_ROWS, MAX_LEN = 8, 90
SHAPES: dict[str, dict[str, Any]] = {
    "head_dim_12": {"n_embd": 36, "n_head": 3, "vocab_size": 211},
    "head_dim_25": {"n_embd": 100, "n_head": 4, "n_inner": 37, "vocab_size": 70},
    "head_dim_1": {"n_embd": 5, "n_head": 5, "n_inner": 33, "vocab_size": 64},
    "wider than a block of steps": {"n_embd": 272, "n_head": 4, "n_inner": 530, "n_layer": 1},
}
PATHS = list(product(INSTRUCTION_SETS, ARITHMETICS))

pytestmark = pytest.mark.skipif(not INSTRUCTION_SETS, reason="the C++ extension is not built")


def fresh_rng() -> np.random.Generator:
    seed = int(os.environ.get("FASTGEN_TEST_SEED") or int.from_bytes(os.urandom(4), "big"))
    print(f"repeat with FASTGEN_TEST_SEED={seed}")
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: save_shape(name, tmp_path_factory.mktemp("shape")) for name in SHAPES}


def save_shape(name: str, folder: Path) -> Path:
    """Weights that leave activations of order one, so that attention attends."""
    sizes = {"n_positions": 96, **SHAPES[name]}
    tensors = random_tensors({**CONFIG, **sizes})
    for key, tensor in tensors.items():
        if key.endswith(".weight") and "ln_" in key:
            tensor += 1
        elif tensor.ndim == 2:
            tensor *= 15 * tensor.shape["wte" in key or "wpe" in key] ** -0.5
    return write_checkpoint(folder, tensors, **sizes)


@dataclass
class Row:
    """A row on its way: what has been fed, where it is cached, and the logits so far."""

    token_ids: list[int]
    blocks: list[int]
    fed: int = 0
    taken: int = 0  # tokens whose keys and values another row computed
    logits: list[np.ndarray] = field(default_factory=list)

    @property
    def left(self) -> int:
        return len(self.token_ids) - self.fed

    def shared_with(self, other: Row) -> int:
        """Tokens this row could take from another: the same from the start on, and computed."""
        pairs = zip(self.token_ids[:-1], other.token_ids[: other.fed], strict=False)
        return next(
            (at for at, (a, b) in enumerate(pairs) if a != b), min(self.left - 1, other.fed)
        )


class Case:
    """Random rows, fed in random pieces, orders and company."""

    def __init__(self, decoder: Decoder, vocab_size: int, rng: np.random.Generator) -> None:
        self.decoder, self.vocab_size, self.rng = decoder, vocab_size, rng
        self.free = rng.permutation(decoder.limits.num_blocks).tolist()
        self.rows: list[Row] = []
        for _ in range(rng.integers(1, MAX_ROWS + 1)):
            self.rows.append(Row(self.random_tokens(), []))

    def random_tokens(self) -> list[int]:
        length = int(self.rng.integers(1, MAX_LEN + 1))
        tokens: list[int] = self.rng.integers(0, self.vocab_size, length).tolist()
        if self.rows and self.rng.random() < 0.5:  # begins as another row does
            [other] = self.rng.choice(np.array([row.token_ids for row in self.rows], object), 1)
            kept = int(self.rng.integers(0, min(length, len(other)) + 1))
            tokens[:kept] = other[:kept]
        return tokens

    def run(self) -> list[Row]:
        while waiting := [row for row in self.rows if row.left]:
            chosen = self.rng.permutation(len(waiting))[: self.rng.integers(1, MAX_ROWS + 1)]
            self.step([waiting[at] for at in chosen])
        return self.rows

    def step(self, rows: list[Row]) -> None:
        for row in rows:
            if not row.blocks:
                self.begin(row)
        longest = self.rng.choice([1, 2, 7, 33, MAX_LEN])
        counts, room = [], self.decoder.limits.max_tokens
        for row in rows:
            counts.append(min(int(self.rng.integers(1, longest + 1)), row.left, room))
            room -= counts[-1]
        rows = [row for row, count in zip(rows, counts, strict=True) if count]
        batch = self.batch(rows, [count for count in counts if count])
        logits = self.decoder.forward(batch)
        in_order = np.empty_like(logits)
        in_order[batch.logits_at] = logits
        for row, start, end in zip(rows, batch.row_starts, batch.row_starts[1:], strict=False):
            row.logits.append(in_order[start:end])
            row.fed += int(end - start)

    def begin(self, row: Row) -> None:
        """Give it blocks; its beginning is another row's, where there is one."""
        row.blocks = [self.free.pop() for _ in range(blocks_for(len(row.token_ids)))]
        shared = [(row.shared_with(other), other) for other in self.rows if other is not row]
        if not shared or self.rng.random() < 0.2:
            return
        num_tokens, other = max(shared, key=lambda pair: pair[0])
        whole = num_tokens // BLOCK_SIZE
        if self.rng.random() < 0.5:  # all of it, copied
            num_blocks = blocks_for(num_tokens)
            pairs = list(zip(other.blocks[:num_blocks], row.blocks, strict=False))
            self.decoder.copy_blocks(pairs)
        else:  # whole blocks are shared, what stands behind them is copied or computed
            num_tokens = num_tokens if self.rng.random() < 0.5 else whole * BLOCK_SIZE
            if num_tokens % BLOCK_SIZE:
                self.decoder.copy_blocks([(other.blocks[whole], row.blocks[whole])])
            self.free += row.blocks[:whole]
            row.blocks[:whole] = other.blocks[:whole]
        row.fed = row.taken = num_tokens

    def batch(self, rows: list[Row], counts: list[int]) -> StepBatch:
        starts = np.cumsum([0, *counts])
        fed = [row.token_ids[row.fed : row.fed + n] for row, n in zip(rows, counts, strict=True)]
        positions = [np.arange(row.fed, row.fed + n) for row, n in zip(rows, counts, strict=True)]
        width = max(len(row.blocks) for row in rows) + int(self.rng.integers(0, 3))
        tables = self.rng.integers(-5, 10**6, (len(rows), width))  # what is not used is not read
        for table, row in zip(tables, rows, strict=True):
            table[: len(row.blocks)] = row.blocks
        arrays = (
            *(np.concatenate(fed), np.concatenate(positions), starts),
            *(np.array([row.fed for row in rows]), tables),
            *(self.rng.permutation(int(starts[-1])), np.full(starts[-1], -1)),
        )
        return StepBatch(*(array.astype(np.int32) for array in arrays))


def alone(decoder: Decoder, token_ids: list[int]) -> np.ndarray:
    """Logits (T, V) of a row that is fed whole, to a decoder that does nothing else."""
    count = len(token_ids)
    arrays = (
        *(token_ids, np.arange(count), [0, count], [0], [np.arange(blocks_for(count))]),
        *(np.arange(count), np.full(count, -1)),
    )
    found = decoder.forward(StepBatch(*(np.array(array, np.int32) for array in arrays)))
    return np.array(found)


@pytest.mark.parametrize(("isa", "arithmetic"), PATHS)
def test_a_rows_bits_follow_from_the_row_alone(
    isa: str, arithmetic: str, folders: dict[str, Path]
) -> None:
    rng = fresh_rng()
    count = -(-NUM_CASES // len(PATHS))
    for shape, num_cases in zip(SHAPES, split(count, len(SHAPES)), strict=True):
        options: dict[str, Any] = {"isa": isa, "max_logits": 256}
        num_threads = int(rng.integers(2, 5))
        with (
            cpu_decoder(folders[shape], arithmetic, **options) as single,
            cpu_decoder(folders[shape], arithmetic, num_threads=num_threads, **options) as several,
        ):
            for _ in range(num_cases):
                decoder = single if rng.random() < 0.3 else several
                vocab_size = SHAPES[shape].get("vocab_size", CONFIG["vocab_size"])
                for row in Case(decoder, vocab_size, rng).run():
                    wanted = alone(single, row.token_ids)[row.taken :]
                    found = np.concatenate(row.logits)
                    assert np.isfinite(wanted).all() and wanted.std() > 0.1
                    assert np.array_equal(found, wanted), shape


def split(count: int, parts: int) -> list[int]:
    """As even as can be."""
    return [count * (at + 1) // parts - count * at // parts for at in range(parts)]


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_many_rows_at_once(arithmetic: str, folders: dict[str, Path]) -> None:
    """So many that each thread takes rows of its own through all layers."""
    rng = fresh_rng()
    rows = [rng.integers(0, 211, rng.integers(1, 30)).tolist() for _ in range(130)]
    options: dict[str, Any] = {"max_batch_size": 130, "max_seq_len": 32, "num_threads": 2}
    with cpu_decoder(folders["head_dim_12"], arithmetic, **options) as decoder:
        together = all_logits(decoder, rows, [1], seed=int(rng.integers(1000)))
        for found, row in zip(together, rows, strict=True):
            assert np.array_equal(found, alone(decoder, row))


@pytest.fixture(scope="module", params=ARITHMETICS)
def models(request: pytest.FixtureRequest) -> Iterator[dict[int, Generator]]:
    """The bundled model by its number of threads."""
    made = {}
    for num_threads in (1, 2, 3):
        checkpoint, plan = plan_of(None, request.param, num_threads=num_threads, max_seq_len=256)
        made[num_threads] = Generator(checkpoint, find_tokenizer(checkpoint), plan)
    yield made
    for model in made.values():
        model.close()


def test_sampled_tokens_are_the_same_in_any_company(models: dict[int, Generator]) -> None:
    """Through the engine: chunked prompts, shared beginnings, copied blocks, queues."""
    assert models[1].plan.limits.batch_invariant
    rng = fresh_rng()
    beginning = rng.integers(1, 4096, 70).tolist()
    prompts = [
        beginning[: rng.integers(1, 70)] + rng.integers(1, 4096, rng.integers(1, 60)).tolist()
        for _ in range(12)
    ]
    params = [random_params(rng, row) for row in range(12)]
    wanted = [
        models[1].generate(prompt, options)[0].completions
        for prompt, options in zip(prompts, params, strict=True)
    ]
    for num_threads, model in models.items():
        order = rng.permutation(12)
        found = model.generate([prompts[at] for at in order], [params[at] for at in order])
        for at, generation in zip(order, found, strict=True):
            ids = [completion.token_ids for completion in generation.completions]
            expected = [completion.token_ids for completion in wanted[at]]
            assert ids == expected, f"{num_threads} threads"
            assert generation.completions == wanted[at], "and log-probabilities"


def random_params(rng: np.random.Generator, seed: int) -> fastgen.SamplingParams:
    return fastgen.SamplingParams(
        seed=seed,
        temperature=float(rng.choice([0, 0.8, 1.5])),
        top_p=float(rng.choice([0.9, 1])),
        repetition_penalty=float(rng.choice([1, 1.3])),
        max_new_tokens=int(rng.integers(1, 25)),
        n=int(rng.choice([1, 1, 3])),
        logprobs=int(rng.integers(0, 3)),
        ignore_eos=True,
    )
