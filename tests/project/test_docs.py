"""The documentation is true: examples run, links lead somewhere, the list of files is whole."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fastgen
from fastgen import SamplingParams
from option_tables import as_tables

ROOT = Path(__file__).parents[2]
NAMES = ("library", "sampling", "serving", "speculation", "transformers")
PAGES = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in NAMES)]
LINKING = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")),
    *sorted(path for path in (ROOT / "docs").rglob("*.md") if "](" in path.read_text()),
]


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


def test_architecture_lists_every_file_once() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    _, _, listing = page.partition("\n## Files\n")
    assert sorted(_listed(listing)) == sorted(_sources())


def _listed(listing: str) -> Iterator[str]:
    """Folders stand at 4 columns, each with its files at 6, several of a line between commas."""
    folder = ""
    for line in listing.splitlines():
        if found := re.fullmatch(r" {4}(\S+/)", line):
            folder = found[1]
        elif found := re.match(r" {6}(\S+(?:, \S+)*)(?: {2,}|$)", line):
            yield from (folder + name for name in found[1].split(", "))


def _sources() -> Iterator[str]:
    endings = {".py", ".pyi", ".cpp", ".h", ".inc"}
    for path in (
        path for top in ("fastgen", "csrc", "kernels") for path in (ROOT / top).rglob("*")
    ):
        name = path.relative_to(ROOT).as_posix()
        if path.suffix in endings and (path.name != "__init__.py" or name == "fastgen/__init__.py"):
            yield name


@pytest.mark.parametrize("page", LINKING, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    """Within the repository: to a file or folder, and to a heading of a page."""
    targets = re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text())
    assert targets
    for target in targets:
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), target
        if anchor:
            assert anchor in _anchors(path.read_text()), target


@pytest.mark.parametrize("page", LINKING, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_named_files_exist(page: Path) -> None:
    pattern = r"(?<![\w/.-])((?:benchmarks|csrc|docs|fastgen|kernels|tests|tools)/[\w/-]+\.\w+)"
    for name in re.findall(pattern, page.read_text()):
        assert (ROOT / name).exists(), name


def _anchors(page: str) -> set[str]:
    """Of headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
