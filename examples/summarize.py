"""Summaries by "TL;DR:", as GPT-2's paper had them: top-k 2, the first three sentences.

python examples/summarize.py article.txt --model gpt2-xl
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import fastgen

CUE = "\nTL;DR:"
NEW_TOKENS = 100


def summary(model: fastgen.Generator, article: str, seed: int = 0) -> str:
    """Three sentences at most; an article that is too long loses its end."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError("a summary needs a model with a tokenizer")
    [ids], [cue] = tokenizer.encode([article]), tokenizer.encode([CUE])
    room = model.plan.limits.max_seq_len - NEW_TOKENS - len(cue)
    [generation] = model.generate(
        [ids[:room] + cue], max_new_tokens=NEW_TOKENS, top_k=2, seed=seed, stop="\n\n"
    )
    sentences = re.split(r"(?<=[.!?])\s+", generation.text.strip())
    return " ".join(sentences[:3])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("article", type=Path)
    parser.add_argument("--model", help="folder or hub id (default: the bundled model)")
    arguments = parser.parse_args()
    with fastgen.load(arguments.model, max_batch_size=1) as model:
        print(summary(model, arguments.article.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
