"""Candidates re-ranked: draw several with best_of, and let a function of one's own choose.

python examples/rerank.py "In the beginning" --candidates 16
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import fastgen


def variety(completions: Sequence[fastgen.Completion]) -> list[float]:
    """Prefer texts that repeat themselves least: the share of different words."""
    scores = []
    for completion in completions:
        words = completion.text.lower().split()
        scores.append(len(set(words)) / max(1, len(words)))
    return scores


def best(
    model: fastgen.Generator, prompt: str, candidates: int, keep: int = 3, seed: int = 0
) -> dict[str, list[str]]:
    """The likeliest of the candidates, and those with the most variety; all are drawn once each."""
    rows = {"n": keep, "best_of": candidates, "seed": seed, "max_new_tokens": 40}
    likeliest, varied = (
        fastgen.SamplingParams(**rows, temperature=0.9),
        fastgen.SamplingParams(**rows, temperature=0.9, rank=variety),
    )
    generations = model.generate([prompt, prompt], [likeliest, varied])
    texts = [[completion.text for completion in one.completions] for one in generations]
    return {"likeliest": texts[0], "most varied": texts[1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("prompt")
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--model", help="folder or hub id (default: the bundled model)")
    arguments = parser.parse_args()
    with fastgen.load(arguments.model) as model:
        for how, texts in best(model, arguments.prompt, arguments.candidates).items():
            print(f"--- {how} ---")
            for text in texts:
                print(arguments.prompt + text.replace("\n", " "))


if __name__ == "__main__":
    main()
