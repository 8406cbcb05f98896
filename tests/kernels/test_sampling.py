"""Draws of the Triton sampler: the ids that the definition returns, from the same logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from fastgen.kernels.launch import Settings
from fastgen.kernels.vocabulary import TILE

import kernel_twins as twins
from fastgen import SamplingParams
from fastgen.decoders.cuda.sampler import RING, CudaSampler, Kind
from fastgen.sampling.draw import Draw
from fastgen.sampling.options import unknown_to
from kernel_device import DEVICE, quiet
from option_cases import CASES, check_option, params_of
from sampling_harness import (
    EOS,
    DefinedRow,
    Rows,
    adversarial_logits,
    draw_each,
    random_logits,
    random_params,
)
from triton_interpreter import OWN_SORT

pytestmark = quiet


class TritonSampler(CudaSampler):
    """Draws from logits on the host, as the head would have left them; no drafts."""

    def __init__(self, num_seats: int, vocab_size: int, eos_ids: frozenset[int]) -> None:
        sizes = (num_seats, vocab_size, eos_ids, 512, num_seats)
        super().__init__(Settings(torch.float32), *sizes, DEVICE)

    def draw(self, logits: np.ndarray, seats: np.ndarray, drafts: Sequence[int]) -> list[Draw]:
        assert max(drafts) < 0
        self.flush()
        rows, count = torch.from_numpy(logits).to(DEVICE), len(seats)
        self.scores.logits[:count] = rows
        self.scores.tile_max[:count], self.scores.tile_ids[:count] = twins.tile_maxima(rows, TILE)
        self.feedback.num_steps.add_(1)
        self.num_steps += 1
        on_host = self.on_host[seats]
        on_device = np.where(on_host, np.int32(-1), seats).astype(np.int32)
        kind: Kind = self.kind(on_device)
        self.launch(torch.from_numpy(on_device).to(DEVICE), count, kind)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        at = np.arange(count)
        draws = self.draws_of(seats, self.line(self.num_steps)[:count], at)
        if on_host.any():
            none = np.full(int(on_host.sum()), -1, np.int32)
            for draw in self.draw_on_host(logits[on_host], seats[on_host], none):
                draws[int(np.flatnonzero(seats == draw.seat)[0])] = draw
        assert torch.equal(self.scores.logits[:count].view(torch.int32), rows.view(torch.int32))
        return draws


def device_params(rng: np.random.Generator, vocab_size: int) -> SamplingParams:
    """Of the options that kernels know."""
    params = random_params(rng, vocab_size)
    defaults = {f.name: getattr(SamplingParams, f.name, None) for f in fields(SamplingParams)}
    others: dict[str, Any] = {
        name: value for name, value in defaults.items() if name not in CudaSampler.on_device
    }
    return replace(params, **others)


class DeviceRows(Rows):
    def bind_random(self, rng: np.random.Generator, seat: int) -> None:
        token_ids = rng.integers(0, self.vocab_size, rng.integers(1, 40)).tolist()
        self.bind(seat, device_params(rng, self.vocab_size), token_ids)


@pytest.mark.parametrize("rows_of", [DeviceRows, Rows], ids=["device", "any"])
@pytest.mark.parametrize(
    ("vocab_size", "trials", "length"),
    [(5, 3, 5), (13, 3, 5), (64, 3, 5), (301, 4, 5), (1500, 2, 4), (50257, 1, 2)],
)
def test_random_options_draw_the_defined_ids(
    rows_of: type[Rows], vocab_size: int, trials: int, length: int
) -> None:
    """Eight rows at once, several tokens long; masks, observed tokens and bad logits between."""
    rng = np.random.default_rng(vocab_size)
    for _ in range(trials):
        rows = rows_of(TritonSampler, 8, vocab_size)
        for seat in range(8):
            rows.bind_random(rng, seat)
        for _ in range(length):
            for seat in range(8):
                rows.interfere(rng, seat)
            logits = random_logits(rng, 8, vocab_size)
            if rng.random() < 0.3:
                logits[rng.integers(8), rng.integers(vocab_size)] = rng.choice([np.nan, np.inf])
            rows.draw_and_compare(rng, logits)


FILTERS: list[dict[str, Any]] = [
    {"temperature": 0},
    {},
    *({"top_k": k} for k in (1, 3, 50, 256, 257, 1500)),
    *({"top_p": p} for p in (0.01, 0.5, 0.95, 0.9999)),
    *({"min_p": p} for p in (1e-9, 0.5, 1.0)),
    {"top_k": 50, "top_p": 0.95},
    {"top_k": 2000, "top_p": 0.5, "min_p": 0.1},
]


@pytest.mark.parametrize("vocab_size", [7, 211, 1003])
def test_adversarial_logits_draw_the_defined_ids(vocab_size: int) -> None:
    logits = adversarial_logits(np.random.default_rng(vocab_size), vocab_size)
    for options in FILTERS:
        check_each(logits, options)


@pytest.mark.parametrize("options", [{}, {"top_k": 50, "top_p": 0.95}, {"top_p": 0.5}])
def test_gpt2_vocabulary(options: dict[str, Any]) -> None:
    """A row with a clear nucleus, and one whose nucleus is most of the vocabulary."""
    rng = np.random.default_rng(1)
    check_each(rng.normal(0, np.array([[4], [0.01]]), (2, 50257)).astype(np.float32), options)


def test_tritons_own_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tl, "sort", OWN_SORT)
    check_each(random_logits(np.random.default_rng(2), 1, 300), {"top_k": 50, "top_p": 0.9})


def check_each(logits: np.ndarray, options: dict[str, Any]) -> None:
    params = [SamplingParams(seed=seed, **options) for seed in range(len(logits))]
    pairs = zip(params, logits, strict=True)
    wanted = [DefinedRow(one, [1], EOS).draw(row) for one, row in pairs]
    assert draw_each(TritonSampler, logits, params) == wanted, options


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"temperature": 0}, {"top_p": 0.3}])
def test_everything_allowed_was_ruled_out(options: dict[str, Any]) -> None:
    """Then any of it is drawn; where nothing is allowed, the row has nothing to draw."""
    logits = np.full((3, 100), 1.0, np.float32)
    logits[:, [5, 60, 77]] = -np.inf
    listed = {"allowed_token_ids": [60, 5, 77], **options}
    params = [SamplingParams(seed=seed, **listed) for seed in range(3)]
    pairs = zip(params, logits, strict=True)
    wanted = [DefinedRow(one, [1], EOS).draw(row) for one, row in pairs]
    assert draw_each(TritonSampler, logits, params) == wanted
    assert {token_id for token_id, _ in wanted} <= {5, 60, 77}
    sampler = TritonSampler(1, 100, EOS)
    sampler.bind(0, params[0], [1])
    sampler.set_mask(0, np.zeros(100, bool))
    [draw] = sampler.draw(logits[:1], np.zeros(1, np.int32), [-1])
    assert not draw.ok


def test_log_probabilities_are_of_raw_logits() -> None:
    rng = np.random.default_rng(3)
    logits = rng.normal(0, 2, (2, 300)).astype(np.float32)
    sampler = TritonSampler(2, 300, EOS)
    for seat, wanted in enumerate((None, 3)):
        params = SamplingParams(seed=1, logprobs=wanted, logit_bias={7: 3.0})
        sampler.bind(seat, params, [1])
    plain, scored = sampler.draw(logits, np.array([0, 1], np.int32), [-1, -1])
    assert plain.logprobs is None
    assert scored.logprobs is not None
    expected = torch.from_numpy(logits[1]).double().log_softmax(0)
    assert abs(scored.logprobs.logprob - expected[scored.token_id].item()) < 1e-12
    best = expected.argsort(descending=True)[:3].tolist()
    assert [token_id for token_id, _ in scored.logprobs.top] == best


def test_a_grown_table_keeps_its_rows() -> None:
    rng = np.random.default_rng(4)
    sampler = TritonSampler(2, 64, EOS)
    row = DefinedRow(SamplingParams(seed=9, repetition_penalty=1.5, top_k=9), [3, 4], EOS)
    sampler.bind(1, row.params, row.token_ids)
    for _ in range(2):
        logits = rng.normal(0, 2, (1, 64)).astype(np.float32)
        [draw] = sampler.draw(logits, np.array([1], np.int32), [-1])
        assert (draw.token_id, draw.ok) == row.draw(logits[0])
        sampler.reserve(sampler.num_seats + 3)


def test_lines_of_draws_come_round() -> None:
    sampler = TritonSampler(1, 8, EOS)
    sampler.bind(0, SamplingParams(temperature=0), [1])
    for step in range(RING + 3):
        logits = np.zeros((1, 8), np.float32)
        logits[0, step % 8] = 1
        [draw] = sampler.draw(logits, np.zeros(1, np.int32), [-1])
        assert draw.token_id == step % 8


@pytest.mark.parametrize("name", CASES)
def test_every_option_acts_or_is_drawn_on_the_host(name: str) -> None:
    check_option(TritonSampler, name)
    params, _ = params_of(name)
    sampler = TritonSampler(1, 8, EOS)
    if not unknown_to(sampler.known_options, params):
        sampler.bind(0, params, [1])
        assert sampler.on_host[0] == bool(unknown_to(CudaSampler.on_device, params))
