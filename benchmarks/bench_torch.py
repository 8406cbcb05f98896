"""The torch decoder against transformers on a CPU: the whole of `generate`, ids in, ids out.

    python benchmarks/bench_torch.py [--layers 12 --hidden 768 --heads 12] [--rounds 5] [--save]

GPT-2 124M's shape with random weights, 32 prompt tokens, 96 new ones, greedy, at batch 1, 8 and 32,
in float32 and bfloat16. Both are timed from token ids to token ids, after a warm-up; loading and
tokenizing are left out. The limit of a step is the larger of its bytes over the read bandwidth and
its multiply-adds over the peak, both measured in the same run.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

import fastgen

PROMPT, NEW = 32, 96
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def save_model(folder: Path, layers: int, hidden: int, heads: int) -> GPT2Config:
    config = GPT2Config(n_layer=layers, n_embd=hidden, n_head=heads, initializer_range=0.1)
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return config


def transformers_call(folder: Path, dtype: str, batch: int) -> Callable[[], Any]:
    peer = GPT2LMHeadModel.from_pretrained(folder, dtype=DTYPES[dtype]).eval()
    ids = torch.tensor(prompts(batch, peer.config.vocab_size))
    options = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": 0}

    @torch.inference_mode()
    def call() -> Any:
        return peer.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, PROMPT:]

    return call


def read_bandwidth(num_bytes: int = 400_000_000) -> Callable[[], Any]:
    """A candidate that reads `num_bytes` once, with all threads."""
    values = torch.randn(num_bytes // 4)
    return values.sum


def fma_peak(dtype: torch.dtype, size: int = 1024) -> tuple[Callable[[], Any], int]:
    """A candidate that multiplies two square matrices, and its multiply-adds."""
    left, right = (torch.randn(size, size).to(dtype) for _ in range(2))
    return lambda: left @ right, size**3


_fresh_seeds = itertools.count(1)


def fastgen_call(model: fastgen.Generator, batch: int, **options: Any) -> Callable[[], Any]:
    """Each call's prompts are new, so that nothing is found in the cache."""

    def call() -> Any:
        many = prompts(batch, model.config.vocab_size, seed=next(_fresh_seeds))
        return model.generate(many, max_new_tokens=NEW, ignore_eos=True, **options)

    return call


def prompts(batch: int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (batch, PROMPT), generator=generator).tolist()


def step_limit(config: GPT2Config, batch: int, itemsize: int, speed: dict[str, float]) -> float:
    """Seconds that a decode step takes at least, at the middle of the generation."""
    weights = 12 * config.n_layer * config.n_embd**2 + config.vocab_size * config.n_embd
    kv = 2 * config.n_layer * config.n_embd * (PROMPT + NEW // 2)  # per row; as many MACs
    memory = (weights + batch * kv) * itemsize / speed["bytes"]
    return max(memory, batch * (weights + kv) / speed["macs"])


def measure(
    folder: Path, config: GPT2Config, dtype: str, batch: int, rounds: int
) -> dict[str, Any]:
    read, (multiply, macs) = read_bandwidth(), fma_peak(DTYPES[dtype])
    load = {"decoder": "torch", "dtype": dtype, "max_batch_size": batch, "max_seq_len": 256}
    with fastgen.load(folder, **load) as model:
        seconds = harness.interleave(
            {
                "read": read,
                "multiply": multiply,
                "transformers": transformers_call(folder, dtype, batch),
                "fastgen": fastgen_call(model, batch, temperature=0),
                "sampled": fastgen_call(model, batch, seed=1, top_k=50, top_p=0.95),
            },
            rounds=rounds,
        )
    speed = {"bytes": 4e8 / min(seconds["read"]), "macs": macs / min(seconds["multiply"])}
    limit = NEW * step_limit(config, batch, DTYPES[dtype].itemsize, speed)
    tokens = batch * NEW
    return {
        "dtype": dtype,
        "batch": batch,
        "transformers_tokens_per_s": round(tokens / harness.median(seconds["transformers"]), 1),
        "fastgen_tokens_per_s": round(tokens / harness.median(seconds["fastgen"]), 1),
        "speedup": round(harness.ratio(seconds["transformers"], seconds["fastgen"]), 2),
        "sampled_over_greedy": round(harness.ratio(seconds["sampled"], seconds["fastgen"]), 3),
        "share_of_limit": round(limit / harness.median(seconds["fastgen"]), 2),
        "read_gb_per_s": round(speed["bytes"] / 1e9, 1),
        "gmacs_per_s": round(speed["macs"] / 1e9, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="The torch decoder against transformers.")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--batch-sizes", default="1,8,32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        config = save_model(Path(name), arguments.layers, arguments.hidden, arguments.heads)
        for dtype in DTYPES:
            for batch in map(int, arguments.batch_sizes.split(",")):
                rows.append(measure(Path(name), config, dtype, batch, arguments.rounds))
                print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    shape = {"layers": arguments.layers, "hidden": arguments.hidden, "heads": arguments.heads}
    work = {"prompt_tokens": PROMPT, "new_tokens": NEW, "threads": torch.get_num_threads()}
    record = {"shape": shape, **work, "rows": rows}
    packages = ("torch", "transformers")
    harness.report("bench_torch", record, save=arguments.save, packages=packages)


if __name__ == "__main__":
    main()
