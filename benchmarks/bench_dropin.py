"""The drop-in against transformers, on a CPU: the same `generate` calls on the same weights.

    python benchmarks/bench_dropin.py [--layers 12 --hidden 768 --heads 12] [--rounds 5] [--save]

GPT-2 124M's shape with random weights, 32 prompt tokens, 96 new ones: greedy at batch 1 and 8,
beams of 4 at batch 1, sampling (transformers' default, top_k 50) and greedy with scores at batch 8;
in float32 and bfloat16. Whole calls of `generate`, tensors in, tensors out, in turns; packing of
weights and the first call are left out. `equal_tokens` is the share of greedy tokens that are the
same: in float32 nearly all must be, in bfloat16 both round, and rows part.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Callable
from typing import Any

import harness
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

import fastgen
from fastgen.bench import interleave

PROMPT, NEW = 32, 96
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "greedy, batch 1": (1, {"do_sample": False}),
    "greedy, batch 8": (8, {"do_sample": False}),
    "4 beams, batch 1": (1, {"do_sample": False, "num_beams": 4}),
    "sampled, batch 8": (8, {"do_sample": True}),
    "greedy with scores, batch 8": (
        8,
        {"do_sample": False, "return_dict_in_generate": True, "output_scores": True},
    ),
}


def call_of(model: Any, batch: int, options: dict[str, Any]) -> Callable[[], Any]:
    ids = torch.arange(batch * PROMPT).view(batch, PROMPT) * 37 % model.config.vocab_size
    mask = torch.ones_like(ids)
    # without an eos, so that no processor is needed to keep it away
    lengths = {"max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0}
    return lambda: model.generate(ids, attention_mask=mask, **lengths, **options)


def share_of_equal_tokens(theirs: torch.Tensor, ours: torch.Tensor) -> float:
    return float((theirs == ours)[:, PROMPT:].float().mean())


def measure(config: GPT2Config, dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(config).eval().to(dtype)
    ours = fastgen.accelerate(copy.deepcopy(theirs))
    results = []
    for name, (batch, options) in CASES.items():
        calls = {"fastgen": call_of(ours, batch, options)}
        begun = time.perf_counter()  # packs the weights in the first case
        tokens = calls["fastgen"]()
        first_call, path = time.perf_counter() - begun, ours.last_path
        calls["transformers"] = call_of(theirs, batch, options)
        expected = calls["transformers"]()
        seconds = interleave.interleave(calls, rounds=rounds)
        speeds = {who: batch * NEW / interleave.median(each) for who, each in seconds.items()}
        result = {
            "dtype": str(dtype).removeprefix("torch."),
            "case": name,
            "path": path,
            "tokens_per_second": {who: round(speed, 1) for who, speed in speeds.items()},
            "times_faster": round(interleave.ratio(seconds["transformers"], seconds["fastgen"]), 2),
            "first_call_seconds": round(first_call, 2),
        }
        if not options["do_sample"]:
            got, want = (getattr(out, "sequences", out) for out in (tokens, expected))
            result["equal_tokens"] = round(share_of_equal_tokens(want, got), 3)
        results.append(result)
        print(result, flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    config = GPT2Config(
        n_layer=args.layers, n_embd=args.hidden, n_head=args.heads, initializer_range=0.1
    )
    results = [
        result
        for dtype in (torch.float32, torch.bfloat16)
        for result in measure(config, dtype, args.rounds)
    ]
    shape = {"layers": args.layers, "hidden": args.hidden, "heads": args.heads}
    record = {"shape": shape, "prompt": PROMPT, "new": NEW, "results": results}
    harness.report("bench_dropin", record, save=args.save, packages=["torch", "transformers"])


if __name__ == "__main__":
    main()
