"""A program of threads: each submits, and waits only for its own result.

python examples/threads.py
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor

import fastgen

OPENINGS = ("In the beginning", "And it came to pass", "The king said", "Behold")


def tell(engine: fastgen.ThreadedEngine, number: int) -> str:
    """One worker's work; the engine puts all workers' prompts into the same steps."""
    opening = OPENINGS[number % len(OPENINGS)]
    future = engine.submit(opening, seed=number, max_new_tokens=20, temperature=0.8, timeout=30)
    return opening + future.result().text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="folder or hub id (default: the bundled model)")
    model = parser.parse_args().model
    with (
        fastgen.load(model) as loaded,
        fastgen.ThreadedEngine(loaded) as engine,
        ThreadPoolExecutor(8) as workers,
    ):
        for story in workers.map(lambda number: tell(engine, number), range(12)):
            print(story.replace("\n", " "))


if __name__ == "__main__":
    main()
