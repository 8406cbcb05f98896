"""The whole CUDA decoder, on a GPU or in Triton's interpreter: logits against float64, tokens
against the other decoders, graphs against kernels started one by one, and its promises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastgen
from fastgen.decoders.cuda.decoder import CudaDecoder
from fastgen.decoders.interface import StepBatch
from kernel_device import INTERPRETED, quiet
from poisoned import POISON, save_poisoned_odd
from quality import held_out, kl_and_perplexity, save_hard_copy
from stepping import Rows, all_logits, to_numpy
from tolerances import TOLERANCES
from variant_cases import Case, transformers_case, worst_error
from variants import VARIANTS

pytestmark = quiet
Folder = Callable[[str], Path]
DTYPES = ["float32", "float16"] + ([] if INTERPRETED else ["bfloat16"])
# Triton's interpreter takes half a minute for the larger ones.
QUICK = ["head_dim_1", "width_100", "untied", "codeparrot", "odd_vocab", "one_of_each"]
SLOW = ["head_dim_8", "head_dim_80", "head_dim_128", "n_inner", "epsilon", "act_relu"]


def slow(*values: Any) -> Any:
    """In the interpreter; a GPU takes no time for any of them."""
    return pytest.param(*values, marks=[pytest.mark.slow] * INTERPRETED)


SIZES: dict[str, Any] = {"max_batch_size": 4, "decoder": "cuda"}
MOST = 5 if INTERPRETED else 8  # new tokens; some rows are to have 4 at least


def load(folder: Path, **options: Any) -> fastgen.Generator:
    return fastgen.load(folder, **{**SIZES, **options})


@pytest.fixture(scope="module")
def small(variant: Folder) -> Path:
    return variant("one_layer")


def decoder_of(model: fastgen.Generator) -> CudaDecoder:
    decoder = model.engine.decoder
    assert isinstance(decoder, CudaDecoder)
    return decoder


def random_rows(seed: int, *lengths: int, most: int = 211) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, most, length).tolist() for length in lengths]


@pytest.mark.parametrize("name", [*QUICK, *map(slow, SLOW)] if INTERPRETED else list(VARIANTS))
def test_float32_logits_are_as_close_as_transformers(name: str, variant: Folder) -> None:
    case: Case = transformers_case(name, variant(name), (1, 17, 50))
    with load(variant(name), dtype="float32") as model:
        case.assert_close(all_logits(decoder_of(model), case.rows, [40, 1]), "float32")


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("name", ["untied", "width_36", slow("head_dim_80")])
def test_16_bit_logits_are_as_close_as_transformers(name: str, dtype: str, variant: Folder) -> None:
    case = transformers_case(name, variant(name), (1, 17, 50), dtype)
    with load(variant(name), dtype=dtype) as model:
        case.assert_close(all_logits(decoder_of(model), case.rows, [33, 5]), dtype)


PARAMS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"seed": 1},
    {"seed": 2, "top_k": 20, "top_p": 0.9, "temperature": 0.8},
    {"seed": 3, "repetition_penalty": 1.4, "logit_bias": {7: 2.0}, "ignore_eos": True},
    {"seed": 4, "typical_p": 0.8, "no_repeat_ngram_size": 2},  # drawn on the host
    {"seed": 5, "logprobs": 2, "min_p": 0.05, "allowed_token_ids": list(range(0, 211, 3))},
    {"seed": 6, "n": 2, "min_new_tokens": 4},
    {"temperature": 0, "presence_penalty": 1.0, "prompt_logprobs": 1},
]


def generated(folder: Path, **options: Any) -> list[Any]:
    prompts = random_rows(1, 3, 1, 40, 9, 12, 5, 7, 20)
    params = [fastgen.SamplingParams(max_new_tokens=MOST, **own) for own in PARAMS]
    with fastgen.load(folder, dtype="float32", **{**SIZES, **options}) as model:
        results = model.generate(prompts, params)
        assert model.engine.num_free_blocks == model.plan.limits.num_blocks
    return results


def tokens_of(results: list[Any]) -> list[Any]:
    return [[one.token_ids for one in result.completions] for result in results]


def test_generates_what_the_torch_decoder_generates(small: Path) -> None:
    """More rows than seats, of every kind; and log-probabilities."""
    ours, theirs = generated(small), generated(small, decoder="torch")
    assert tokens_of(ours) == tokens_of(theirs)
    pairs = zip(ours[5].completions[0].logprobs, theirs[5].completions[0].logprobs, strict=True)
    for own, other in pairs:
        assert [i for i, _ in own.top] == [i for i, _ in other.top]
        assert abs(own.logprob - other.logprob) < TOLERANCES["logprob"]
    scored = [result[7].prompt_logprobs for result in (ours, theirs)]
    for own, other in zip(*(part[1:] for part in scored), strict=True):
        assert abs(own.logprob - other.logprob) < TOLERANCES["logprob"]


def test_without_graphs_it_generates_the_same(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_graphs = generated(small)
    monkeypatch.setenv("FASTGEN_CUDA_GRAPHS", "0")
    assert tokens_of(generated(small)) == tokens_of(with_graphs)


@pytest.fixture
def decoder(small: Path) -> Iterator[CudaDecoder]:
    with load(small, dtype="float32") as model:
        yield decoder_of(model)


def test_steps_can_be_launched_before_earlier_ones_are_looked_at(decoder: CudaDecoder) -> None:
    """The device feeds its own tokens back; what the host sees late is what it sees at once."""
    prompts, seats = random_rows(2, 5, 33, 2), [2, 0, 1]
    found = []
    for ahead in (False, True):
        for seat in seats:
            params = fastgen.SamplingParams(seed=seat, top_k=30, frequency_penalty=0.5)
            decoder.bind(seat, params, prompts[seat])
        rows, steps = Rows(decoder, 3), []
        steps.append(decoder.step(rows.batch([prompts[s] for s in seats], seats=seats)))
        for _ in range(6):
            drawn = [[-1 - s] for s in seats]
            if not ahead:
                drawn = [[draw.token_id] for draw in steps[-1].wait()]
            steps.append(decoder.step(rows.batch(drawn, seats=seats)))
        found.append([[draw.token_id for draw in step.wait()] for step in steps])
    assert found[0] == found[1]


def test_rows_come_and_go_between_graphs(decoder: CudaDecoder) -> None:
    """Other rows in the same places, other seats, other numbers of rows: nothing of the last step
    is taken for this one's."""
    rng = np.random.default_rng(3)
    rows = Rows(decoder, 4)
    tokens = random_rows(3, 9, 4, 17, 30)
    prompts = [list(own) for own in tokens]
    for row in range(4):
        decoder.bind(row, fastgen.SamplingParams(temperature=0), prompts[row])
    drawn = decoder.step(rows.batch(prompts, seats=[0, 1, 2, 3])).wait()
    for own, draw in zip(tokens, drawn, strict=True):
        own.append(draw.token_id)
    replaced: dict[int, set[int]] = {row: set() for row in range(4)}
    for _ in range(14):
        chosen = [row for row in range(4) if rng.random() < 0.6] or [2]
        fed = [[tokens[row][-1]] if row in chosen else [] for row in range(4)]
        seats = list(range(4))
        if rng.random() < 0.3:  # as if drawn by somebody else: not what the seat drew last
            other = chosen[0]
            tokens[other][-1] = (tokens[other][-1] + 1) % 211
            fed[other] = [tokens[other][-1]]
            replaced[other].add(len(tokens[other]) - 1)
        for draw in decoder.step(rows.batch(fed, seats=seats)).wait():
            tokens[draw.seat].append(draw.token_id)
    for row, own in enumerate(tokens):
        logits = all_logits(decoder, [own], [96], seed=row)[0]
        for at in set(range(len(prompts[row]), len(own))) - replaced[row]:
            gap = logits[at - 1].max() - logits[at - 1, own[at]]  # equals may be rounded apart
            assert gap <= 1e-5, (row, at, gap)


def test_a_row_may_be_fed_what_another_seat_drew(decoder: CudaDecoder) -> None:
    """Before anything was looked at, too."""
    prompts = random_rows(11, 5, 6, 7)
    found = []
    for ahead in (False, True):
        for seat in range(3):
            decoder.bind(seat, fastgen.SamplingParams(seed=seat), prompts[seat])
        rows = Rows(decoder, 3)
        step = decoder.step(rows.batch(prompts, seats=[0, 1, 2]))
        fed = [[-2]] * 3 if ahead else [[step.wait()[1].token_id]] * 3
        draws = decoder.step(rows.batch(fed, seats=[0, 1, 2])).wait()
        found.append([draw.token_id for draw in draws])
    assert found[0] == found[1]


def test_what_the_host_chose_counts_though_a_draw_is_seen_later(decoder: CudaDecoder) -> None:
    [prompt] = random_rows(12, 5)
    found = []
    for late in (False, True):
        decoder.bind(0, fastgen.SamplingParams(temperature=0), prompt)
        rows = Rows(decoder, 1)
        step = decoder.step(rows.batch([prompt], seats=[0]))
        drawn = None if late else step.wait()[0].token_id
        decoder.observe(0, 17)
        drawn = drawn if drawn is not None else step.wait()[0].token_id
        first = decoder.step(rows.batch([[drawn]], seats=[0])).wait()[0].token_id
        found.append((first, decoder.step(rows.batch([[-1]], seats=[0])).wait()[0].token_id))
    assert found[0] == found[1]


def test_a_step_that_fails_between_its_kernels_costs_no_later_one(
    decoder: CudaDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> None:
        raise RuntimeError("no such kernel")

    [prompt] = random_rows(13, 9)
    found = []
    for breaks in (False, True):
        decoder.bind(0, fastgen.SamplingParams(seed=3), prompt)
        rows = Rows(decoder, 1)
        prefill = rows.batch([prompt], seats=[0])
        if breaks:
            with monkeypatch.context() as patched:
                patched.setattr("fastgen.decoders.cuda.model.add_linear", broken)
                for _ in range(3):
                    with pytest.raises(RuntimeError, match="no such kernel"):
                        decoder.step(prefill)
        drawn = [decoder.step(prefill).wait()[0].token_id]
        drawn += [decoder.step(rows.batch([[-1]], seats=[0])).wait()[0].token_id for _ in range(3)]
        found.append(drawn)
    assert found[0] == found[1]


def test_rows_longer_than_the_models(small: Path) -> None:
    """Which a caller with positions of its own may have, as in transformers."""
    [row] = random_rows(14, 130)
    found = []
    for name in ("torch", "cuda"):
        with fastgen.load(small, decoder=name, dtype="float32", max_batch_size=2) as model:
            decoder = model.engine.decoder
            parts = []
            for start, end in ((0, 90), (90, 129), (129, 130)):
                count = end - start
                batch = StepBatch.ragged(
                    token_ids=row[start:end],
                    counts=[count],
                    positions=np.arange(start, end) % 96,
                    cache_lens=[start],
                    block_tables=np.array([[3, 0, 5, 1, 4]], np.int32),
                    logits_at=np.arange(count),
                    seats=np.full(count, -1),
                )
                parts.append(decoder.step(batch).logits)
            found.append(np.concatenate(parts))
    assert worst_error([found[1]], [found[0]]) < 1e-5 * np.abs(found[0]).max()


def test_a_mixed_step_is_its_parts(decoder: CudaDecoder) -> None:
    rows = random_rows(4, 30, 60, 3)
    alone = all_logits(decoder, rows, [96])
    stepper = Rows(decoder, 3)
    decoder.forward(stepper.batch([rows[0][:29], rows[1][:10], []]))
    mixed = to_numpy(decoder.forward(stepper.batch([rows[0][29:], rows[1][10:], rows[2]])))
    expected = np.concatenate([alone[0][29:], alone[1][10:], alone[2]])
    assert worst_error([mixed], [expected]) < 1e-5 * np.abs(expected).max()


def test_nan_hurts_no_other_row_and_no_earlier_token(tmp_path: Path) -> None:
    folder = save_poisoned_odd(tmp_path)
    victim, other = random_rows(5, 38, 25, most=4096)
    victim[20] = POISON
    with load(folder, dtype="float32", max_seq_len=64) as model:
        decoder = decoder_of(model)
        expected = all_logits(decoder, [[*victim[:20], 1, *victim[21:]], other], [64])
        for chunks in ([64], [16]):
            found = all_logits(decoder, [victim, other], chunks, seed=1)
            assert np.isnan(found[0][20:]).all()
            assert worst_error([found[0][:20]], [expected[0][:20]]) < 1e-4
            assert worst_error([found[1]], [expected[1]]) < 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
@pytest.mark.usefixtures("products_in_order")
def test_invariant_bits_follow_from_the_row_alone(kv_dtype: str, dtype: str, small: Path) -> None:
    rows = random_rows(6, 50, 3, 33, 18)
    with load(small, dtype=dtype, batch_invariant=True, kv_dtype=kv_dtype) as model:
        decoder = decoder_of(model)
        assert decoder.limits.batch_invariant
        together = all_logits(decoder, rows, [7, 30, 1])
        for row, expected in zip(rows, together, strict=True):
            assert np.array_equal(all_logits(decoder, [row], [96], seed=2)[0], expected)


WEIGHTS, KV = {"quantize": "int8"}, {"kv_dtype": "int8"}


@pytest.mark.parametrize(
    ("copy", "options"),
    [
        ("both", {**WEIGHTS, **KV}),
        slow("both", KV),
        slow("both", WEIGHTS),
        slow("plain", {**WEIGHTS, **KV}),
    ],
)
def test_int8_keeps_the_quality(copy: str, options: dict[str, str], tmp_path: Path) -> None:
    folder = (
        fastgen.frontends.generator.BUNDLED_MODEL
        if copy == "plain"
        else save_hard_copy(copy, tmp_path)
    )
    text = held_out(64, window=64) if INTERPRETED else held_out(2048)
    sizes: dict[str, Any] = {"max_seq_len": 64} if INTERPRETED else {}
    dtype = "float32" if INTERPRETED else "bfloat16"
    with fastgen.load(folder, decoder="torch", dtype="float32", device="cpu", **sizes) as model:
        expected = all_logits(model.engine.decoder, text.rows, [48])
    with load(folder, dtype=dtype, **sizes, **options) as model:
        found = all_logits(decoder_of(model), text.rows, [48])
    targets = np.concatenate(text.targets)
    quality = kl_and_perplexity(np.concatenate(expected), np.concatenate(found), targets)
    assert quality.kl <= TOLERANCES["int8_kl"], quality
    if not INTERPRETED:  # few tokens say nothing about a change of half a percent
        assert abs(quality.perplexity_change) <= TOLERANCES["int8_perplexity"], quality


@pytest.mark.parametrize("options", [{}, {"quantize": "int8", "kv_dtype": "int8"}])
def test_memory_is_as_planned(options: dict[str, str], variant: Folder) -> None:
    with load(variant("width_100"), dtype="float16", **options) as model:
        decoder, plan = decoder_of(model), model.plan.memory
        inner: Any = decoder._model
        weights = inner.weights
        tensors = [weights.wpe, *weights.head, *weights.embedding, *weights.ln_f[:2]]
        for layer in weights.layers:
            for name in type(layer).__slots__:
                tensors += [part for part in getattr(layer, name) if torch.is_tensor(part)]
        assert size_of(tensors) == plan.weights
        cache = size_of([inner.kv_cache, inner.kv_scales])
        assert cache // (plan.num_blocks + 1) * plan.num_blocks == plan.kv_cache
        work = [inner._hidden, inner._normed, inner._query, inner._attended, inner._inner]
        sampler: Any = decoder._sampler
        parts = [sampler.table, sampler.scores]
        work += [getattr(part, name) for part in parts for name in type(part).__slots__]
        assert size_of([*work, inner._slots]) <= plan.scratch


def size_of(tensors: list[Any]) -> int:
    distinct = {one.data_ptr(): one for one in tensors if one is not None}
    return sum(one.numel() * one.itemsize for one in distinct.values())


def test_it_grows_and_goes_on(decoder: CudaDecoder) -> None:
    [row] = random_rows(8, 40)
    params = fastgen.SamplingParams(seed=4, repetition_penalty=1.3)
    found = []
    for grows in (False, True):
        decoder.bind(0, params, row)
        rows = Rows(decoder, 1)
        drawn = [decoder.step(rows.batch([row], seats=[0])).wait()[0].token_id]
        for _ in range(4):
            if grows:
                limits = decoder.limits
                decoder.reserve(limits.num_blocks + 1, limits.num_seats + 1)
            drawn.append(decoder.step(rows.batch([[-1]], seats=[0])).wait()[0].token_id)
        found.append(drawn)
    assert found[0] == found[1]


def test_warmup_leaves_everything_as_it_was(decoder: CudaDecoder) -> None:
    [row] = random_rows(9, 20)
    decoder.bind(0, fastgen.SamplingParams(seed=4), row)
    rows = Rows(decoder, 1)
    first = decoder.step(rows.batch([row], seats=[0])).wait()
    decoder.warmup()
    second = decoder.step(rows.batch([[-1]], seats=[0])).wait()
    decoder.bind(0, fastgen.SamplingParams(seed=4), row)
    again = Rows(decoder, 1)
    assert decoder.step(again.batch([row], seats=[0])).wait() == first
    assert decoder.step(again.batch([[-1]], seats=[0])).wait() == second


def test_drafts_beside_rows_of_every_kind(small: Path) -> None:
    """Drafts with and without penalties, one row drawn on the host: as one by one."""
    prompts = random_rows(10, 6, 6, 6)
    penalized, on_host = {"seed": 5, "repetition_penalty": 2.0}, {"seed": 6, "typical_p": 0.9}
    options: list[dict[str, Any]] = [{"temperature": 0}, penalized, on_host]
    found = []
    for name in ("torch", "cuda"):
        with fastgen.load(small, decoder=name, dtype="float32", max_batch_size=4) as model:
            decoder = model.engine.decoder
            for seat, own in enumerate(options):
                decoder.bind(seat, fastgen.SamplingParams(**own), prompts[seat])
            rows = Rows(decoder, 3)
            batch = rows.batch([[*prompt, 1, 2, 3] for prompt in prompts])
            seats = np.full(27, -1, np.int32)
            for row in range(3):
                seats[9 * row + 5 : 9 * row + 9] = row
            chosen = np.flatnonzero(seats >= 0)
            batch = replace(batch, logits_at=chosen.astype(np.int32), seats=seats[chosen])
            found.append([draw[:2] for draw in decoder.step(batch).wait()])  # (seat, token_id)
    assert found[0] == found[1]
