"""What this machine can do at most (fastgen/bench/peaks.py), from repeated measurements.

Multiply-adds are those of each path of the decoder, the best first.

    python benchmarks/peaks.py [--threads 2] [--rounds 9] [--megabytes 400]

400 MB are far above most machines' last cache; fewer show what the caches give.
"""

from __future__ import annotations

import argparse

from fastgen.bench.interleave import interleave_calls, median
from fastgen.bench.peaks import KINDS, Peak, Peaks
from fastgen.decoders.machine import granted_cores
from fastgen.native import native


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=granted_cores())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--megabytes", type=float, default=400, help="read in a pass, by all")
    arguments = parser.parse_args()
    with Peaks(arguments.threads, int(arguments.megabytes * 1e6)) as machine:
        peaks = {"read": machine.read(), **multiply_adds(arguments.threads)}
        measures = {name: peak.seconds for name, peak in peaks.items()}
        seconds = interleave_calls(measures, rounds=arguments.rounds)
    for name, peak in peaks.items():
        speeds = sorted(peak.amount / value / 1e9 for value in seconds[name])
        unit = "GB/s" if name == "read" else "G multiply-adds/s"
        spread = f"{speeds[0]:.1f} to {speeds[-1]:.1f}"
        print(f"{name:20} {median(speeds):7.1f} {unit}, {spread} ({peak.how})")


def multiply_adds(threads: int) -> dict[str, Peak]:
    """Of each path and kind, without those that a better path's instructions make, too."""
    peaks: dict[str, Peak] = {}
    for path in native.instruction_sets():
        machine = Peaks(threads, 0, path)
        for kind in KINDS:
            peak = machine.multiply_add(kind)
            if all(peak.how != other.how for other in peaks.values()):
                peaks[f"{path} {kind}"] = peak
    return peaks


if __name__ == "__main__":
    main()
