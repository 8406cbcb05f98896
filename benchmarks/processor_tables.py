"""The dated runs by processor (dated_run.py): which one the pages show, and a table of each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from cells import PEERS, judged, markdown, percent, processor
from dated_run import RUNS, run_names
from models import PRECISIONS

LONG_PROMPT = "context_496"  # the run whose prefill is shown
# Wanted shares of the limit at batch 1, 8, 32, and of prefill.
WANTED = {
    "AVX2": {"float32": (90, 75, 70, 75), "bfloat16": (85, 70, 65, 70), "int8": (85, 70, 65, 65)},
    "AMD": {"float32": (90, 80, 75, 80), "bfloat16": (92, 80, 75, 78), "int8": (88, 72, 65, 70)},
    "Intel": {"float32": (90, 75, 62, 75), "bfloat16": (85, 70, 60, 65), "int8": (83, 65, 52, 60)},
}
_NONE = (0, 0, 0, 0)
WANTED_FASTER = (1.0, 1.3, 1.3)  # than the fastest other engine

Record = dict[str, Any]


@cache
def shown() -> Path:
    """The folder whose records the pages show: the newest that has every run."""
    whole = [
        folder
        for folder in sorted(RUNS.iterdir())
        if all((folder / f"{name}.json").exists() for name in run_names())
    ]
    return max(whole, key=lambda folder: str(record_of(folder, "float32")["machine"]["date"]))


def plots() -> str:
    """Those of the runs with other engines."""
    own = shown().relative_to(RUNS.parents[1])
    return "\n".join(f"![{name}]({own}/{name}.png)" for name in PRECISIONS)


def processors() -> str:
    """Each processor's runs: share of the limit of decode steps, and other engines."""
    return "\n\n".join(_table(folder) for folder in sorted(RUNS.iterdir()))


def _table(folder: Path) -> str:
    names = [name for name in PRECISIONS if (folder / f"{name}.json").exists()]
    about = record_of(folder, names[0])["machine"]
    head = ("", "batch", "tokens/s", "decode, share of the limit", "fastest other engine",
            "times as fast")  # fmt: skip
    rows = [row for name in names for row in _rows(folder, name)]
    forced = "forced " if "-forced-" in folder.name else "best "
    return f"{processor(about)}, {forced}path `{_path_of(folder)}`:\n\n{markdown(head, rows)}"


def _rows(folder: Path, name: str) -> Iterator[tuple[Any, ...]]:
    record = record_of(folder, name)
    kind = _kind(record["machine"], folder)
    wanted = _NONE if kind is None else WANTED[kind][name]
    for row, least, lead in zip(record["results"], wanted, WANTED_FASTER, strict=False):
        batch = row["batch_size"]
        tokens = f"{row['tokens_per_s']:,.0f}"
        yield name, batch, tokens, _share(row["decode_share"], least), *_best(record, batch, lead)
    long = f"{LONG_PROMPT}_{name}"
    if (folder / f"{long}.json").exists():
        rows = record_of(folder, long)["results"]
        row = next(row for row in rows if row["batch_size"] == 1)
        share = _share(row["prefill_share"], wanted[-1])
        yield name, "prefill of 496 tokens", "", share, "", ""


def _share(share: dict[str, float], wanted: float) -> str:
    return judged(percent(share), wanted, f"{percent(share)} %")


def _best(record: Record, batch: int, wanted: float) -> tuple[str, str]:
    """The engine over which the lead is least, and the lead."""
    rows = record.get("comparison", {"results": []})["results"]
    peers = [row for row in rows if row["batch_size"] == batch and row["peer"] != "fastgen"]
    if not peers:
        return "-", "-"
    best = min(peers, key=lambda row: float(row["fastgen_is_faster"]["median"]))
    faster = best["fastgen_is_faster"]["median"]
    return PEERS[best["peer"]], judged(faster, wanted, f"{faster:.2f}")


def _kind(machine: Record, folder: Path) -> str | None:
    """Of the processors for which targets were set; None: none were."""
    path = _path_of(folder)
    if path.startswith("avx512"):
        return "Intel" if "Intel" in machine["cpu"] else "AMD"
    return "AVX2" if path in ("avx2", "avx_vnni") else None


def _path_of(folder: Path) -> str:
    """The instruction set that was taken, as FASTGEN_ISA names it."""
    return folder.name.rpartition("-")[2]


def record_of(folder: Path, name: str) -> Record:
    """Of one run."""
    record: Record = json.loads((folder / f"{name}.json").read_text())
    return record
