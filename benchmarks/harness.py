"""What every benchmark shares: interleaved runs, medians and ratios, one JSON line at the end.

The machine may be shared and its speed may drift, so candidates take turns within one run, and only
medians and ratios of that run are worth quoting.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"

Measure = Callable[[], float]  # does its work and returns the seconds that count


def timed(call: Callable[[], Any]) -> Measure:
    """Measures the whole call."""

    def measure() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return measure


def take_turns(
    measures: Mapping[str, Measure], *, rounds: int, warmups: int = 1
) -> dict[str, list[float]]:
    """Seconds of each measure, A B C, A B C, ...; the first rounds are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in measures}
    for turn in range(warmups + rounds):
        for name, measure in measures.items():
            taken = measure()
            if turn >= warmups:
                seconds[name].append(taken)
    return seconds


def interleave(
    candidates: Mapping[str, Callable[[], Any]], *, rounds: int, warmups: int = 1
) -> dict[str, list[float]]:
    """Seconds of each candidate's calls, in turns."""
    measures = {name: timed(call) for name, call in candidates.items()}
    return take_turns(measures, rounds=rounds, warmups=warmups)


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def ratio(slow: list[float], fast: list[float]) -> float:
    """Median of the ratios of runs that stood next to each other."""
    return median(a / b for a, b in zip(slow, fast, strict=True))


def machine(packages: Iterable[str] = ()) -> dict[str, Any]:
    """What a reader needs to know of where the numbers come from, with the packages' versions."""
    model = "unknown"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0].partition(":")[2].strip() if names else model
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def report(name: str, record: dict[str, Any], *, save: bool, packages: Iterable[str] = ()) -> None:
    """Print one line of JSON, the last of the output, and keep it if asked to."""
    line = json.dumps({"benchmark": name, "machine": machine(packages), **record})
    if save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(line + "\n")
    print(line)


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    folder = Path(__file__).parent
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
