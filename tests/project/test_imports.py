"""What importing fastgen costs, what it exports, and which module may import which: so each room
can be read, tested and replaced without those above it.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import fastgen
import processes
import rooms

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "fastgen").rglob("*.py"))
MAX_LINES = 400

# Packages that functions may import, since one can do without them, or they load slowly.
OPTIONAL = {
    *("huggingface_hub", "torch", "tqdm", "transformers", "triton"),
    *("matplotlib", "prometheus_client", "rich", "starlette", "uvicorn"),
}


class Import(NamedTuple):
    name: str  # within fastgen without "fastgen."; otherwise the top-level package
    inside: bool  # fastgen's own
    in_function: bool


def module_name(path: Path) -> str:
    dotted = ".".join(path.relative_to(ROOT / "fastgen").with_suffix("").parts)
    return dotted.removesuffix(".__init__") or "__init__"


NAMES = {module_name(path) for path in SOURCES}


def is_kernel(name: str) -> bool:
    return name.partition(".")[0] == "kernels"


@functools.cache
def imports_of(path: Path) -> list[Import]:
    return list(_walk(ast.parse(path.read_text()), in_function=False))


def _walk(node: ast.AST, in_function: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield _named(alias.name, in_function)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0 and child.module, "relative import"
            yield from _from(child.module, [alias.name for alias in child.names], in_function)
        else:
            function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from _walk(child, in_function or function)


def _from(module: str, names: list[str], in_function: bool) -> Iterator[Import]:
    """`from fastgen.decoders import choice` imports a module, `from fastgen.errors import X` one's
    attribute."""
    for name in names:
        full = f"{module}.{name}"
        yield _named(full if full.removeprefix("fastgen.") in NAMES else module, in_function)


def _named(name: str, in_function: bool) -> Import:
    if name.partition(".")[0] != "fastgen":
        return Import(name.partition(".")[0], inside=False, in_function=in_function)
    inner = name.removeprefix("fastgen").removeprefix(".") or "__init__"
    return Import(inner, inside=True, in_function=in_function)


@functools.cache
def imports_optional(name: str) -> bool:
    """Whether importing this module of fastgen imports what may not be installed."""
    if is_kernel(name):
        return True
    path = ROOT / "fastgen" / (name.replace(".", "/") + ".py")
    found = [item for item in imports_of(path) if not item.in_function] if path.exists() else []
    return any(
        imports_optional(item.name) if item.inside else item.name in OPTIONAL for item in found
    )


@pytest.mark.parametrize(
    ("code", "unwanted"),
    [
        ("import fastgen", "torch transformers tokenizers huggingface_hub numpy safetensors"),
        ("import fastgen; fastgen.SamplingParams()", "torch transformers tokenizers numpy"),
        ("import fastgen; dir(fastgen); fastgen.backends()", "torch transformers tokenizers"),
        ("import fastgen.cli", "torch transformers huggingface_hub"),
        ("import fastgen; fastgen.load", "torch tqdm email importlib.metadata"),
    ],
)
def test_importing_is_cheap(code: str, unwanted: str, tmp_path: Path) -> None:
    code += f"\nimport sys; print(sorted(set({unwanted.split()}) & set(sys.modules)))"
    command = [sys.executable, "-c", code]
    process = processes.run(command, cwd=tmp_path)
    assert process.stdout.strip() == "[]", process.stderr


def test_what_the_drop_in_needs_is_named(tmp_path: Path) -> None:
    code = "import sys; sys.modules['transformers'] = None; from fastgen import GPT2LMHeadModel"
    command = [sys.executable, "-c", code]
    process = processes.run(command, cwd=tmp_path)
    assert "GPT2LMHeadModel needs transformers: pip install 'fastgen[hf]'" in process.stderr


def test_exports() -> None:
    in_order = sorted(fastgen.__all__, key=lambda name: (not name.isupper(), name))
    assert fastgen.__all__ == in_order  # constants first
    assert set(fastgen.__all__) == {"__version__", *fastgen._MODULES}
    assert dir(fastgen) == sorted(fastgen.__all__)
    for name in fastgen.__all__:
        assert getattr(fastgen, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fastgen.nothing


def test_type_checkers_see_the_same_exports() -> None:
    tree = ast.parse((ROOT / "fastgen" / "__init__.py").read_text())
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {a.name: n.module for n in block.body if isinstance(n, ast.ImportFrom) for a in n.names}
    assert seen == {name: f"fastgen.{module}" for name, module in fastgen._MODULES.items()}


def test_every_module_has_a_room_and_a_floor() -> None:
    known = {
        name if room.name in ("words", "front door") else f"{room.name}.{name}"
        for room in rooms.ROOMS
        for line in room.order
        for name in line.split()
    }
    assert known | {room.name for room in rooms.ROOMS if room.name in NAMES} == NAMES


def test_rooms_import_one_way() -> None:
    names = [room.name for room in rooms.ROOMS]
    for at, room in enumerate(rooms.ROOMS):
        assert set(room.imports.split()) <= {*names[:at], "kernels"}, room.name


def test_contributing_shows_the_rules() -> None:
    assert rooms.as_text() in (ROOT / "CONTRIBUTING.md").read_text()


@pytest.mark.parametrize("room", [room.name for room in rooms.ROOMS if room.name in NAMES])
def test_a_room_says_what_it_is_for(room: str) -> None:
    """And brings nothing else along."""
    path = ROOT / "fastgen" / room / "__init__.py"
    tree = ast.parse(path.read_text())
    assert len(tree.body) == 1 and len(ast.get_docstring(tree) or "") > 100


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_stay_within_the_rules(path: Path) -> None:
    name = module_name(path)
    for item in imports_of(path):
        if not item.inside:
            continue
        if is_kernel(item.name):
            assert "kernels" in rooms.BY_NAME[name.partition(".")[0]].imports.split()
        else:
            assert rooms.may_import(name, item.name), f"{name} must not import {item.name}"


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_functions_import_only_what_is_heavy_and_optional(path: Path) -> None:
    for item in imports_of(path):
        if item.in_function:
            heavy = imports_optional(item.name) if item.inside else item.name in OPTIONAL
            assert heavy, f"{item.name} belongs to the top of the file"


def test_kernels_import_only_torch_and_triton() -> None:
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        for item in imports_of(path):
            ours = item.inside and is_kernel(item.name)
            assert ours or item.name in allowed, f"{path.name} imports {item.name}"


def test_no_file_is_long() -> None:
    folders = ("fastgen", "kernels", "tests", "benchmarks", "tools", "csrc")
    endings = {".py", ".pyi", ".cpp", ".h", ".cu"}
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines())
        for path in paths
        if path.suffix in endings
    }
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}
