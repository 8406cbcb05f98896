"""The scripts of benchmarks/ start, and published tables are made of published records."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

import processes

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks"
SCRIPTS = [*sorted(FOLDER.glob("bench_*.py")), *(FOLDER / f"{name}.py" for name in (
    "dated_run", "peaks", "report",
))]  # fmt: skip
RUNS = sorted((FOLDER / "results" / "runs").glob("*/*.json"))


def run(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": "/usr/bin:/bin"}  # without PYTHONSAFEPATH, under which scripts miss their folder
    return processes.run([sys.executable, script, *arguments], env=env)


def test_published_tables_are_made_of_published_records() -> None:
    done = run(FOLDER / "report.py", "--check")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", RUNS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_published_records_fit_the_schema(path: Path) -> None:
    schema = json.loads((ROOT / "fastgen" / "bench" / "schema.json").read_text())
    record = json.loads(path.read_text())
    jsonschema.validate(record, schema)
    isa = path.parent.name.rpartition("-")[2]
    forced = [why for why in record["fallbacks"] if why.startswith(f"FASTGEN_ISA={isa} keeps")]
    assert record["fallbacks"] == forced


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_says_what_it_does(script: Path) -> None:
    done = run(script, "--help")
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr
