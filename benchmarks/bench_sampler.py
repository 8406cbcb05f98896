"""The samplers alone: C++ against the torch twin and against transformers, option by option.

    python benchmarks/bench_sampler.py [--rounds 15] [--save]

Logits of GPT-2's vocabulary at batch 1, 8 and 32, of two kinds: as the bundled model gives them for
its held-out text (their sorted values, stretched from its vocabulary to GPT-2's), and flat. A row
has a prompt of 100 tokens. Timed is what a step pays for its draws, from logits to ids on the host:
`NativeSampler.draw` with one thread and with all that are granted, `TorchSampler.draw`, and
transformers' processors with softmax and multinomial. All take turns in one run, so each finds the
caches as another left them, as they are after a forward pass. "hot" is the mean of
ten calls of one thread, one right after another.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from transformers.generation import logits_process as hf

import fastgen
from fastgen.bench import interleave
from fastgen.decoders.machine import granted_cores
from fastgen.native import native
from fastgen.sampling.native_sampler import NativeSampler
from fastgen.sampling.torch_sampler import TorchSampler

VOCAB_SIZE, PROMPT, MAX_LEN = 50_257, 100, 1024
BATCHES = (1, 8, 32)
HOT_CALLS = 10
HELD_OUT = Path(__file__).parents[1] / "tests" / "data" / "held_out.txt"
Options = dict[str, Any]
CASES: dict[str, Options] = {
    "greedy": {"temperature": 0},
    "no filter": {},
    "temperature": {"temperature": 0.8},
    "top_k": {"top_k": 50},
    "top_k + top_p": {"top_k": 50, "top_p": 0.95},
    "top_k + top_p + temperature": {"top_k": 50, "top_p": 0.95, "temperature": 0.8},
    "top_p": {"top_p": 0.95},
    "min_p": {"min_p": 0.05},
    "typical_p": {"typical_p": 0.9},
    "epsilon_cutoff": {"epsilon_cutoff": 3e-4},
    "eta_cutoff": {"eta_cutoff": 3e-4},
    "top_h": {"top_h": 0.4},
    "repetition_penalty": {"temperature": 0, "repetition_penalty": 1.1},
    "no_repeat_ngram_size": {"temperature": 0, "no_repeat_ngram_size": 3},
    "penalties + top_k + top_p": {
        **{"temperature": 0.8, "top_k": 50, "top_p": 0.95},
        **{"repetition_penalty": 1.1, "no_repeat_ngram_size": 3},
    },
    "every filter": {
        **{"temperature": 0.8, "top_h": 0.9, "top_k": 50, "top_p": 0.95, "min_p": 0.01},
        **{"typical_p": 0.95, "epsilon_cutoff": 1e-4, "eta_cutoff": 1e-4},
    },
}
WARPERS: dict[str, type] = {
    "temperature": hf.TemperatureLogitsWarper,
    "top_h": hf.TopHLogitsWarper,
    "top_k": hf.TopKLogitsWarper,
    "top_p": hf.TopPLogitsWarper,
    "min_p": hf.MinPLogitsWarper,
    "typical_p": hf.TypicalLogitsWarper,
    "epsilon_cutoff": hf.EpsilonLogitsWarper,
    "eta_cutoff": hf.EtaLogitsWarper,
}


def like_the_bundled_models(count: int, rng: np.random.Generator) -> np.ndarray:
    """float32 (count, V): the k-th highest of many is that of few at the same place on a scale of
    log k, so that the head keeps its shape; then put in random order."""
    text = HELD_OUT.read_text()
    with fastgen.load(cache=False) as model:
        rows: list[np.ndarray] = []

        def keep(token_ids: np.ndarray, logits: np.ndarray) -> None:
            rows.append(np.sort(logits)[::-1].copy())

        prompts = [text[start : start + 300] for start in range(0, 300 * count, 300)]
        model.generate(prompts, max_new_tokens=1, logits_processor=keep)
    ranks = np.log(np.arange(1, VOCAB_SIZE + 1)) / np.log(VOCAB_SIZE)
    few = np.log(np.arange(1, len(rows[0]) + 1)) / np.log(len(rows[0]))
    stretched = [rng.permutation(np.interp(ranks, few, row)) for row in rows]
    return np.stack(stretched).astype(np.float32)


def ours(sampler: Any, logits: Any, params: Options, prompts: list[list[int]]) -> Callable[[], Any]:
    seats = np.arange(len(prompts), dtype=np.int32)
    drafts = np.full(len(prompts), -1, np.int32)

    def bind() -> None:
        for seat, prompt in enumerate(prompts):
            sampler.bind(seat, fastgen.SamplingParams(seed=seat, **params), prompt)

    bind()
    return lambda: sampler.draw(logits, seats, drafts)


def transformers_draw(
    logits: torch.Tensor, params: Options, prompts: list[list[int]]
) -> Callable[[], Any]:
    chain = hf.LogitsProcessorList()
    if "repetition_penalty" in params:
        chain.append(hf.RepetitionPenaltyLogitsProcessor(params["repetition_penalty"]))
    if "no_repeat_ngram_size" in params:
        chain.append(hf.NoRepeatNGramLogitsProcessor(params["no_repeat_ngram_size"]))
    sampled = params.get("temperature", 1) > 0
    chain += [make(params[name]) for name, make in WARPERS.items() if sampled and name in params]
    ids = torch.tensor(prompts)

    @torch.inference_mode()
    def call() -> list[int]:
        scores = chain(ids, logits)
        if not sampled:
            return scores.argmax(-1).tolist()
        return torch.multinomial(scores.softmax(-1), 1)[:, 0].tolist()

    return call


def measure(rounds: int) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(0)
    kinds = {
        "bundled": like_the_bundled_models(max(BATCHES), rng),
        "flat": rng.normal(0, 0.1, (max(BATCHES), VOCAB_SIZE)).astype(np.float32),
    }
    threads = granted_cores()
    for kind, every in kinds.items():
        for batch in BATCHES:
            logits = np.ascontiguousarray(every[:batch])
            tensor = torch.from_numpy(logits)
            prompts = rng.integers(0, VOCAB_SIZE, (batch, PROMPT)).tolist()
            for case, params in CASES.items():
                eos: frozenset[int] = frozenset()
                one, many = (
                    NativeSampler(batch, VOCAB_SIZE, eos, MAX_LEN, count) for count in (1, threads)
                )
                twin = TorchSampler(batch, VOCAB_SIZE, eos, torch.device("cpu"))
                alone = ours(one, logits, params, prompts)
                candidates = {
                    "native_1_thread": alone,
                    "hot": lambda alone=alone: [alone() for _ in range(HOT_CALLS)],
                    "native": ours(many, logits, params, prompts),
                    "torch_twin": ours(twin, tensor, params, prompts),
                    "transformers": transformers_draw(tensor, params, prompts),
                }
                seconds = interleave.interleave(candidates, rounds=rounds, warmups=2)
                yield record(kind, batch, case, seconds)


def record(kind: str, batch: int, case: str, seconds: dict[str, list[float]]) -> dict[str, Any]:
    seconds["hot"] = [value / HOT_CALLS for value in seconds["hot"]]
    found = {name: round(interleave.median(values) * 1e6, 1) for name, values in seconds.items()}
    return {
        "logits": kind,
        "batch": batch,
        "options": case,
        "microseconds": found,
        "over_torch_twin": round(interleave.ratio(seconds["torch_twin"], seconds["native"]), 1),
        "over_transformers": round(interleave.ratio(seconds["transformers"], seconds["native"]), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--save", action="store_true", help="keep the result in results/")
    arguments = parser.parse_args()
    if native is None:
        parser.error("fastgen's C++ extension is not built")
    print(f"{'logits':8} {'batch':>5} {'options':28} {'1 thread':>9} {'hot':>9} {'native':>9} "
          f"{'twin':>9} {'hf':>9}  microseconds; twin/native, hf/native")  # fmt: skip
    records = []
    for found in measure(arguments.rounds):
        records.append(found)
        times = "".join(f"{value:10.1f}" for value in found["microseconds"].values())
        ratios = f"{found['over_torch_twin']:9.1f} {found['over_transformers']:7.1f}"
        name = f"{found['logits']:8} {found['batch']:5} {found['options']:28}"
        print(name + times + ratios, flush=True)
    result = {"threads": granted_cores(), "cases": records}
    packages = ("numpy", "torch", "transformers")
    harness.report("bench_sampler", result, save=arguments.save, packages=packages)


if __name__ == "__main__":
    main()
