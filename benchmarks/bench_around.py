"""What stands around the model: importing, cold start, the engine, sampling options, memory.

    python benchmarks/bench_around.py [--parts import,start,engine,sampling,memory] [--save]

import: seconds that `import fastgen` adds to an empty interpreter's, in fresh processes.
start: from starting a process to its first token, the checkpoint's files in the system's cache:
    with weights packed in it, read from the cache of packed weights, and shared.
engine: what the engine adds to the decoder's steps, of a tiny model, as "a step + b for each row".
sampling: a decode step with sampling options against a greedy one.
memory: peak resident memory after loading, and with all contexts full, against the plan.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import around_engine
import around_process
import harness
import models

from fastgen.bench.shapes import SHAPES, save_checkpoint
from fastgen.decoders.machine import granted_cores

Record = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What was asked for, and where checkpoints may be written."""

    folder: Path
    shape: str
    dtypes: list[str]
    rounds: int
    load: dict[str, Any]  # options of fastgen.load

    def checkpoint(self, shape: str) -> Path:
        folder = self.folder / shape
        return folder if folder.exists() else save_checkpoint(folder, SHAPES[shape])

    def importing(self) -> Iterator[Record]:
        yield around_process.import_time(self.rounds)

    def start(self) -> Iterator[Record]:
        folder = self.checkpoint(self.shape)
        yield from around_process.cold_start(folder, self.dtypes, self.load, self.rounds)

    def engine(self) -> Iterator[Record]:
        tiny = self.checkpoint("tiny")
        yield from around_engine.engine_overhead(tiny, self.load, self.rounds)

    def sampling(self) -> Iterator[Record]:
        folder = self.checkpoint(self.shape)
        for dtype in self.dtypes:
            yield from around_engine.sampling_cost(folder, dtype, self.load, self.rounds)

    def memory(self) -> Iterator[Record]:
        folder, shape = self.checkpoint(self.shape), SHAPES[self.shape]
        for dtype in self.dtypes:
            yield around_process.resident_memory(folder, shape, dtype, self.load)


PARTS: dict[str, Callable[[Run], Iterator[Record]]] = {
    "import": Run.importing,
    "start": Run.start,
    "engine": Run.engine,
    "sampling": Run.sampling,
    "memory": Run.memory,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    models.add_choice(parser, "--parts", ",".join(PARTS), PARTS)
    models.add_choice(parser, "--dtypes", ",".join(models.PRECISIONS), models.PRECISIONS)
    parser.add_argument("--shape", default="gpt2", choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=granted_cores())
    parser.add_argument("--decoder", default="cpu", help="of fastgen.load (default: cpu)")
    parser.add_argument("--save", action="store_true", help="keep the result in results/")
    options = parser.parse_args()
    load = {"decoder": options.decoder, "num_threads": options.threads}
    found: dict[str, list[Record]] = {}
    with tempfile.TemporaryDirectory() as name:
        run = Run(Path(name), options.shape, options.dtypes, options.rounds, load)
        for part in options.parts:
            found[part] = []
            for record in PARTS[part](run):
                found[part].append(record)
                values = "  ".join(f"{key}: {value}" for key, value in record.items())
                print(f"{part:9} {values}", flush=True)
    about = {"shape": options.shape, "rounds": options.rounds, **load}
    harness.report("bench_around", {**about, **found}, save=options.save, packages=["numpy"])


if __name__ == "__main__":
    main()
