"""Every sampler behind one face, a row as the definition sees it, and random options and logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np

from fastgen import SamplingParams
from fastgen.native import native
from fastgen.sampling.definition import draw
from fastgen.sampling.draw import Draw
from fastgen.sampling.native_sampler import NativeSampler
from fastgen.sampling.processors import RowState


class Sampler(Protocol):
    """Per-seat options and draws from logits on the host, float32 (n, V)."""

    def bind(self, seat: int, params: SamplingParams, token_ids: Sequence[int]) -> None: ...
    def observe(self, seat: int, token_id: int) -> None: ...
    def release(self, seat: int) -> None: ...
    def set_mask(self, seat: int, allowed: np.ndarray | None) -> None: ...
    def draw(self, logits: Any, seats: np.ndarray, drafts: Sequence[int]) -> list[Draw]: ...


def torch_on_host(num_seats: int, vocab_size: int, eos_ids: frozenset[int]) -> Sampler:
    """Imports torch only here: the tests of what works without it use this file too."""
    import torch

    from fastgen.sampling.torch_sampler import TorchSampler

    class TorchOnHost(TorchSampler):
        def draw(self, logits: Any, seats: np.ndarray, drafts: Sequence[int]) -> list[Draw]:
            tensor = torch.from_numpy(logits).to(self.device)
            before = tensor.clone()
            draws = super().draw(tensor, seats, drafts)
            assert torch.equal(before.view(torch.int32), tensor.view(torch.int32)), "changed"
            return draws

    return TorchOnHost(num_seats, vocab_size, eos_ids, torch.device("cpu"))


EOS = frozenset({0, 3})
Options = dict[str, Any]  # SamplingParams' fields by name
Make = Callable[[int, int, frozenset[int]], Sampler]  # of num_seats, vocab_size, eos_ids
SAMPLERS: dict[str, Make] = {"torch": torch_on_host}
if native is not None:
    SAMPLERS["native"] = partial(NativeSampler, max_seq_len=512, num_threads=2)


class DefinedRow:
    """One row, drawn by the definition; it counts what it draws and what it is told."""

    def __init__(
        self, params: SamplingParams, token_ids: Sequence[int], eos_ids: frozenset[int]
    ) -> None:
        self.params, self.token_ids = params, list(token_ids)
        self.prompt_len = len(self.token_ids)
        self.ending_ids = sorted(params.ending_ids(eos_ids))
        self.mask: np.ndarray | None = None

    @property
    def state(self) -> RowState:
        token_ids = np.array(self.token_ids, np.int64)
        return RowState(token_ids, self.prompt_len, self.ending_ids, self.mask)

    def draw(self, logits: np.ndarray) -> tuple[int, bool]:
        token_id, ok = draw(logits, self.params, self.state)
        if ok:
            self.token_ids.append(token_id)
        return token_id, ok


class Rows:
    """Rows of one sampler, and the same rows as the definition sees them."""

    def __init__(self, make: Make, num_rows: int, vocab_size: int) -> None:
        self.sampler, self.vocab_size = make(num_rows, vocab_size, EOS), vocab_size
        self.defined: dict[int, DefinedRow] = {}

    def bind(self, seat: int, params: SamplingParams, token_ids: Sequence[int]) -> None:
        self.sampler.bind(seat, params, token_ids)
        self.defined[seat] = DefinedRow(params, token_ids, EOS)

    def bind_random(self, rng: np.random.Generator, seat: int) -> None:
        token_ids = rng.integers(0, self.vocab_size, rng.integers(1, 40)).tolist()
        self.bind(seat, random_params(rng, self.vocab_size), token_ids)

    def interfere(self, rng: np.random.Generator, seat: int) -> None:
        """What a host may do between two draws."""
        row = self.defined[seat]
        if rng.random() < 0.1:
            row.token_ids.append(int(rng.integers(self.vocab_size)))
            self.sampler.observe(seat, row.token_ids[-1])
        if rng.random() < 0.2:
            share = rng.choice([0.1, 0.6, 1.0])
            row.mask = rng.random(self.vocab_size) < share if rng.random() < 0.7 else None
            self.sampler.set_mask(seat, row.mask)

    def draw_and_compare(self, rng: np.random.Generator, logits: np.ndarray) -> None:
        seats = rng.permutation(len(logits)).astype(np.int32)
        draws = self.sampler.draw(logits, seats, [-1] * len(seats))
        assert [one.seat for one in draws] == seats.tolist()
        for drawn, row_logits in zip(draws, logits, strict=True):
            row = self.defined[drawn.seat]
            assert row.draw(row_logits) == (drawn.token_id, drawn.ok), (row.params, row.state)
            if not drawn.ok:  # nothing was left: its row has ended
                self.sampler.release(drawn.seat)
                self.bind_random(rng, drawn.seat)


def draw_each(
    make: Callable[[int, int, frozenset[int]], Sampler],
    logits: np.ndarray,
    params: Sequence[SamplingParams],
    token_ids: Sequence[int] = (1,),
) -> list[tuple[int, bool]]:
    """(id, ok) of fresh rows, one for each of the logits (n, V), drawn together."""
    sampler = make(len(params), logits.shape[1], frozenset({0}))
    for seat, options in enumerate(params):
        sampler.bind(seat, options, token_ids)
    draws = sampler.draw(logits, np.arange(len(params), dtype=np.int32), [-1] * len(params))
    assert [one.seat for one in draws] == list(range(len(params)))
    return [(one.token_id, one.ok) for one in draws]


def maybe(rng: np.random.Generator, options: dict[str, Callable[[], Any]], share: float) -> Options:
    """Some of the options, each with a value of its own."""
    return {name: value() for name, value in options.items() if rng.random() < share}


def random_processors(rng: np.random.Generator, vocab_size: int, share: float = 0.3) -> Options:
    def ids(most: int = 6) -> list[int]:
        found: list[int] = rng.integers(0, vocab_size, rng.integers(1, most)).tolist()
        return found

    options = maybe(
        rng,
        {
            "logit_bias": lambda: {i: float(rng.normal(0, 4)) for i in ids()},
            "sequence_bias": lambda: {
                tuple(word): float(rng.normal(0, 4))
                for word in sorted([ids(2) + ids(3) for _ in range(12)], key=len)
            },
            "repetition_penalty": lambda: float(rng.choice([0.7, 1.1, 1.3, 2.0])),
            "frequency_penalty": lambda: float(rng.normal()),
            "presence_penalty": lambda: float(rng.normal()),
            "no_repeat_ngram_size": lambda: int(rng.integers(1, 5)),
            "bad_words": lambda: [ids(int(rng.integers(2, 5))) for _ in range(8)],
            "min_new_tokens": lambda: int(rng.integers(1, 5)),
            "allowed_token_ids": lambda: ids(max(3, vocab_size // 2)),
            "exponential_decay_length_penalty": lambda: (
                int(rng.integers(0, 3)),
                float(rng.choice([0.5, 1.01, 1.5, 3.0])),
            ),
            "suppress_tokens": ids,
            "begin_suppress_tokens": ids,
            "stop_token_ids": ids,
            "ignore_eos": lambda: True,
        },
        share,
    )
    if set(options.get("allowed_token_ids", [-1])) <= set(options.get("suppress_tokens", ())):
        del options["allowed_token_ids"]  # nothing would be left: refused
    return options


def random_filters(rng: np.random.Generator, share: float = 0.3) -> dict[str, Any]:
    return maybe(
        rng,
        {
            "top_n_sigma": lambda: float(rng.uniform(0.01, 4)),
            "top_h": lambda: float(rng.uniform(0.01, 1)),
            "top_k": lambda: int(rng.choice([1, 3, 20, 150, 1500, 10**6])),
            "top_p": lambda: float(rng.choice([0.1, 0.5, 0.9, 0.999, rng.uniform(0.01, 1)])),
            "min_p": lambda: float(rng.uniform() ** 3),
            "typical_p": lambda: float(rng.uniform(0.01, 1)),
            "epsilon_cutoff": lambda: float(rng.uniform() ** 5),
            "eta_cutoff": lambda: float(rng.uniform() ** 5),
        },
        share,
    )


def random_params(rng: np.random.Generator, vocab_size: int) -> SamplingParams:
    """Of every option; a third of the rows has filters only, and some are greedy."""
    processors = random_processors(rng, vocab_size) if rng.random() < 0.7 else {}
    temperature = float(rng.choice([0, 0.3, 1.0, 1.0, 2.5]))
    seed = int(rng.integers(0, 2**64, dtype=np.uint64))
    return SamplingParams(
        temperature=temperature, seed=seed, **processors, **random_filters(rng, rng.random())
    )


def random_logits(rng: np.random.Generator, num_rows: int, vocab_size: int) -> np.ndarray:
    """float32 (n, V): rows of several spreads, many with ties, some with -inf."""
    logits = rng.normal(0, rng.choice([0.1, 1, 3, 8], (num_rows, 1)), (num_rows, vocab_size))
    tied = rng.random(num_rows) < 0.4
    logits[tied] = np.round(logits[tied] * 2) / 2
    few = rng.random(num_rows) < 0.2
    logits[few] = np.where(rng.random(logits[few].shape) < 0.7, -np.inf, logits[few])
    logits[:, rng.integers(vocab_size)] = 0.5  # something is left
    return logits.astype(np.float32)


def adversarial_logits(rng: np.random.Generator, vocab_size: int) -> np.ndarray:
    """float32 (10, V): what filters and draws may stumble over."""
    at = np.arange(vocab_size)
    rows = [
        rng.normal(0, 3, vocab_size),
        rng.normal(0, 0.01, vocab_size),
        np.zeros(vocab_size),  # all equal
        np.where(at == vocab_size // 2, 1.0, -np.inf),  # one finite
        np.where(at % 7 == 3, -2.0, -np.inf),  # few, and equal
        rng.integers(0, 4, vocab_size),  # ties everywhere
        rng.normal(0, 1e-40, vocab_size),  # subnormal gaps
        np.where(at == 2, 1.0, rng.normal(0, 1e-40, vocab_size)),  # gaps that round to equals
        np.where(rng.random(vocab_size) < 0.5, -np.inf, rng.normal(0, 2, vocab_size)),
        rng.normal(0, 1000, vocab_size),
    ]
    rows[8][0] = 0  # something is left in the smallest vocabularies
    return np.stack(rows).astype(np.float32)


def make_native(num_seats: int, vocab_size: int, eos_ids: frozenset[int], threads: int = 2) -> Any:
    return NativeSampler(num_seats, vocab_size, eos_ids, 64, threads)
