"""The runs of `fastgen bench` that README.md, benchmarks/README.md and docs/performance.md show.

    python benchmarks/dated_run.py [--only float32,int8] [--rounds 5] [--python PEER=PATH ...]

Each is one command, printed before it runs; its last line is kept as
results/runs/PROCESSOR/NAME.json, plots beside it, and takes the place of an earlier one of the same
processor alone. FASTGEN_ISA measures a path that the processor would not take by itself, as another
processor. `report.py` makes the tables of what is kept. All of it takes about an hour on two cores,
which nothing else should use; `--only main` those that docs/performance.md has of every processor.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import models
from harness import RESULTS

from fastgen.bench.machine import machine
from fastgen.native import native

RUNS = RESULTS / "runs"
_SAY_NOTHING = ("processor", "cpu", "core", "tm")
CONTEXTS = (32, 240, 496, 976)  # prompt lengths; 32 new tokens follow


def processor_folder() -> Path:
    """Of the processor here and its path, the best or that of FASTGEN_ISA: "amd-epyc-avx2"."""
    path = "no-extension" if native is None else native.chosen_instruction_set()
    if os.environ.get("FASTGEN_ISA"):
        path = f"forced-{path}"
    words = re.findall(r"[a-z0-9]+", machine()["cpu"].lower().replace("(r)", ""))
    known = [word for word in words if word not in _SAY_NOTHING]
    return RUNS / "-".join([*known, path])


def _runs(rounds: int, folder: Path) -> dict[str, list[str]]:
    """Options of each run."""
    found: dict[str, list[str]] = {}
    few = f"--rounds={max(3, rounds - 2)}"
    precisions = {
        name: [f"--{option}={value}" for option, value in load.items()]
        for name, load in models.PRECISIONS.items()
    }
    for name, options in precisions.items():
        plot = folder / f"{name}.png"
        found[name] = [*options, f"--rounds={rounds}", "--compare", f"--plot={plot}"]
    for name in ("float32", "bfloat16"):
        compare = [few, "--decoder=torch", "--compare=transformers"]
        found[f"torch_{name}"] = [*precisions[name], *compare]
    for name, options in precisions.items():
        found[f"threads_1_{name}"] = [*options, few, "--threads=1"]
        for context in CONTEXTS:
            sizes = ["--batch-sizes=1,8", f"--prompt-len={context}", "--output-len=32"]
            found[f"context_{context}_{name}"] = [*options, few, *sizes]
    return found


def run_names() -> list[str]:
    return list(_runs(0, RUNS))


def _is_asked(name: str, only: Sequence[str]) -> bool:
    return ("main" in only and name in models.PRECISIONS) or any(map(name.startswith, only))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", type=models.names,
        help=f"runs that begin so; main: {', '.join(models.PRECISIONS)}")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--python", action="append", default=[], metavar="PEER=PATH")
    options = parser.parse_args()
    folder = processor_folder()
    folder.mkdir(parents=True, exist_ok=True)
    forced = ["--allow-fallback"] if os.environ.get("FASTGEN_ISA") else []  # the record names it
    for name, own in _runs(options.rounds, folder).items():
        if options.only and not _is_asked(name, options.only):
            continue
        if any(option.startswith("--compare") for option in own):
            own = [*own, *(f"--python={each}" for each in options.python)]
        print(f"{name}: fastgen bench {shlex.join(own)}", flush=True)
        command = [sys.executable, "-m", "fastgen", "bench", *own, *forced]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        *shown, line = done.stdout.splitlines()
        print("\n".join(shown), flush=True)
        (folder / f"{name}.json").write_text(json.dumps(json.loads(line), indent=1) + "\n")


if __name__ == "__main__":
    main()
