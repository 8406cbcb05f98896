"""The runs of `fastgen bench` that README.md, benchmarks/README.md and docs/performance.md show.

    python benchmarks/dated_run.py [--only float32,int8] [--rounds 5] [--python PEER=PATH ...]

Each is one command, printed before it runs; its last line is kept as results/runs/NAME.json, plots
beside it. `report.py` makes the tables of what is kept. All of it takes about an hour on two cores,
which nothing else should use.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys

import models
from harness import RESULTS

FOLDER = RESULTS / "runs"
CONTEXTS = (32, 240, 496, 976)  # prompt lengths; 32 new tokens follow


def _runs(rounds: int) -> dict[str, list[str]]:
    """Options of each run."""
    found: dict[str, list[str]] = {}
    few = f"--rounds={max(3, rounds - 2)}"
    precisions = {
        name: [f"--{option}={value}" for option, value in load.items()]
        for name, load in models.PRECISIONS.items()
    }
    for name, options in precisions.items():
        plot = FOLDER / f"{name}.png"
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", type=models.names, help="these runs, or those that begin so")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--python", action="append", default=[], metavar="PEER=PATH")
    options = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, own in _runs(options.rounds).items():
        if options.only and not any(name.startswith(each) for each in options.only):
            continue
        if any(option.startswith("--compare") for option in own):
            own = [*own, *(f"--python={each}" for each in options.python)]
        print(f"{name}: fastgen bench {shlex.join(own)}", flush=True)
        command = [sys.executable, "-m", "fastgen", "bench", *own]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        *shown, line = done.stdout.splitlines()
        print("\n".join(shown), flush=True)
        (FOLDER / f"{name}.json").write_text(json.dumps(json.loads(line), indent=1) + "\n")


if __name__ == "__main__":
    main()
