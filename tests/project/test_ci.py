"""The hosted workflow, as far as it can be checked without its host: it is sound, runs .ci/run, and
covers the processors and Pythons that fastgen is for.
"""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOWS = ROOT / ".github" / "workflows"


@pytest.fixture(scope="module")
def workflow() -> dict[Any, Any]:
    read: dict[Any, Any] = yaml.safe_load((WORKFLOWS / "ci.yml").read_text())
    return read


@pytest.fixture(scope="module")
def job(workflow: dict[Any, Any]) -> dict[str, Any]:
    [only] = workflow["jobs"].values()
    return dict(only)


def test_it_runs_on_what_is_pushed_and_proposed(workflow: dict[Any, Any]) -> None:
    """YAML 1.1 reads the key "on" as true."""
    events = workflow[True]
    assert set(events) == {"push", "pull_request"} and events["push"] == {"branches": ["main"]}
    assert workflow["permissions"] == {"contents": "read"}


def test_it_runs_ci_run_and_nothing_else_of_its_own(job: dict[str, Any]) -> None:
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert commands == [".ci/run < /dev/null"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_it_covers_the_pythons_and_processors_of_the_project(job: dict[str, Any]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = re.findall(r"Python :: (3\.\d+)$", "\n".join(project["classifiers"]), re.MULTILINE)
    assert project["requires-python"] == f">={found[0]}"
    matrix = job["strategy"]["matrix"]
    assert matrix["python"] == found
    x86, arm = matrix["machine"]
    assert arm == f"{x86}-arm"
    assert job["runs-on"] == "${{ matrix.machine }}"
    [given] = [step["with"] for step in job["steps"] if "setup-python" in step.get("uses", "")]
    assert given == {"python-version": "${{ matrix.python }}"}


def test_every_action_and_expression_is_one_that_there_is(job: dict[str, Any]) -> None:
    uses = [step["uses"] for step in job["steps"] if "uses" in step]
    assert all(re.fullmatch(r"actions/(checkout|setup-python)@v\d+", name) for name in uses)
    assert uses[0].startswith("actions/checkout@"), "nothing can be run before"
    known = {*(f"matrix.{name}" for name in job["strategy"]["matrix"])} | {
        "github.workflow",
        "github.ref",
        "github.event_name == 'pull_request'",
    }
    expressions = re.findall(r"\$\{\{ *(.*?) *\}\}", (WORKFLOWS / "ci.yml").read_text())
    assert expressions and set(expressions) <= known
