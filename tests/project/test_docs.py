"""The examples in the documentation run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import fastgen
from fastgen import SamplingParams
from option_tables import as_tables

ROOT = Path(__file__).parents[2]
NAMES = ("sampling", "serving", "transformers")
PAGES = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in NAMES)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_run(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert blocks, "the page has no example"
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, page.name, "exec"), names)
    if isinstance(names["model"], fastgen.Generator):
        names["model"].close()
    assert capsys.readouterr().out.strip()


def test_the_tables_of_options_are_the_projects_own() -> None:
    """On a failure: write what `as_tables` returns into the page."""
    text = (ROOT / "docs" / "sampling.md").read_text()
    for table in as_tables():
        assert table in text


def test_every_option_is_described() -> None:
    text = (ROOT / "docs" / "sampling.md").read_text()
    described = set(re.findall(r"`(\w+)[`=(]", text))
    assert set(SamplingParams.__dataclass_fields__) <= described
