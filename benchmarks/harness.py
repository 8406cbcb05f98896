"""What every benchmark of this folder ends with: one line of JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastgen.bench.machine import machine

RESULTS = Path(__file__).parent / "results"


def report(name: str, record: dict[str, Any], *, save: bool, packages: Iterable[str] = ()) -> None:
    """Print it, the last of the output, with the machine's description; keep it if asked to."""
    line = _line(name, record, packages)
    if save:
        _keep(name, line)
    print(line)


def keep(name: str, record: dict[str, Any], *, packages: Iterable[str] = ()) -> None:
    """What there is of a long run so far, in place of the record before."""
    _keep(name, _line(name, record, packages))


def _line(name: str, record: dict[str, Any], packages: Iterable[str]) -> str:
    return json.dumps({"benchmark": name, "machine": machine(packages), **record})


def _keep(name: str, line: str) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(line + "\n")
