"""A dialogue in DialoGPT's form: turns that end with the end-of-text token, all fed back.

    python examples/dialogue.py --model microsoft/DialoGPT-small

What has been said is found in the KV cache again, so a turn costs only what is new.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator

import fastgen


def replies(model: fastgen.Generator, turns: Iterable[str], seed: int = 0) -> Iterator[str]:
    """The model's answer to each turn, given all before it."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError("a dialogue needs a model with a tokenizer")
    eos_id = model.config.eos_token_ids[0]
    reserve = 60  # tokens for an answer
    history: list[int] = []
    for turn in turns:
        history += [*tokenizer.encode([turn])[0], eos_id]
        history = history[-(model.plan.limits.max_seq_len - reserve) :]
        [generation] = model.generate(
            [history], max_new_tokens=reserve, temperature=0.7, top_k=50, seed=seed
        )
        completion = generation.completions[0]
        history += completion.token_ids
        if completion.finish_reason != "stop":  # it was cut off: end its turn
            history.append(eos_id)
        yield completion.text.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="folder or hub id (default: the bundled model)")
    arguments = parser.parse_args()
    with fastgen.load(arguments.model, max_batch_size=1) as model:
        turns = (line.strip() for line in iter(sys.stdin.readline, ""))
        for reply in replies(model, turns):
            print(">", reply.replace("\n", " "), flush=True)


if __name__ == "__main__":
    main()
