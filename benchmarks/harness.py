"""What every benchmark shares: interleaved runs, the machine's limits, one JSON line at the end.

The machine may be shared and its speed may drift, so candidates take turns within one run, and only
medians and ratios of that run are worth quoting.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def interleave(
    candidates: dict[str, Callable[[], Any]], *, rounds: int, warmups: int = 1
) -> dict[str, list[float]]:
    """Seconds of each candidate's calls, A B C, A B C, ...; the first rounds are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(warmups + rounds):
        for name, call in candidates.items():
            start = time.perf_counter()
            call()
            if turn >= warmups:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median(values: list[float]) -> float:
    return statistics.median(values)


def ratio(slow: list[float], fast: list[float]) -> float:
    """Median of the ratios of runs that stood next to each other."""
    return median([a / b for a, b in zip(slow, fast, strict=True)])


def read_bandwidth(num_bytes: int = 400_000_000) -> Callable[[], None]:
    """A candidate that reads `num_bytes` once, with all threads."""
    values = torch.randn(num_bytes // 4)
    return lambda: values.sum()  # type: ignore[return-value]


def fma_peak(dtype: torch.dtype, size: int = 1024) -> tuple[Callable[[], None], int]:
    """A candidate that multiplies two square matrices, and its multiply-adds."""
    left, right = (torch.randn(size, size).to(dtype) for _ in range(2))
    return lambda: left @ right, size**3  # type: ignore[return-value]


def machine() -> dict[str, Any]:
    """What a reader needs to know of where the numbers come from."""
    model = "unknown"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0].partition(":")[2].strip() if names else model
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def report(name: str, record: dict[str, Any], *, save: bool) -> None:
    """Print one line of JSON, the last of the output, and keep it if asked to."""
    line = json.dumps({"benchmark": name, "machine": machine(), **record})
    if save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(line + "\n")
    print(line)


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    folder = Path(__file__).parent
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
