"""What this machine can do at most (fastgen/bench/peaks.py), from repeated measurements.

    python benchmarks/peaks.py [--threads 2] [--rounds 9] [--megabytes 400]

400 MB are far above most machines' last cache; fewer show what the caches give.
"""

from __future__ import annotations

import argparse

from fastgen.bench.interleave import interleave_calls, median
from fastgen.bench.peaks import KINDS, Peaks
from fastgen.decoders.machine import granted_cores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=granted_cores())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--megabytes", type=float, default=400, help="read in a pass, by all")
    arguments = parser.parse_args()
    with Peaks(arguments.threads, int(arguments.megabytes * 1e6)) as machine:
        peaks = {"read": machine.read(), **{kind: machine.multiply_add(kind) for kind in KINDS}}
        measures = {name: peak.seconds for name, peak in peaks.items()}
        seconds = interleave_calls(measures, rounds=arguments.rounds)
    for name, peak in peaks.items():
        speeds = sorted(peak.amount / value / 1e9 for value in seconds[name])
        unit = "GB/s" if name == "read" else "G multiply-adds/s"
        spread = f"{speeds[0]:.1f} to {speeds[-1]:.1f}"
        print(f"{name:9} {median(speeds):7.1f} {unit}, {spread} ({peak.how})")


if __name__ == "__main__":
    main()
