"""The package as users install it: wheel, source archive, editable, with and without a compiler.

Everything is built from a copy of the checkout and installed into new virtual environments, which
see the packages of this one, except fastgen itself. Nothing is fetched.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import processes

Tokens = dict[tuple[str, ...], list[int]]

ROOT = Path(__file__).parents[2]
NO_COMPILER = {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"}
BUILD_VARIABLES = ("CC", "CXX", "CFLAGS", "CPPFLAGS", "CXXFLAGS", "LDSHARED", "LDCXXSHARED")
PIP_INSTALL = ("install", "--no-build-isolation", "--no-deps", "--no-index")
PROMPT = "In the beginning"
GREEDY = ("--temperature", "0", "--max-new-tokens", "12", "--json", PROMPT)
SAMPLED = ("--temperature", "1", "--seed", "3", "--max-new-tokens", "12", "--json", PROMPT)
OUTSIDE = {"kernels": "fastgen/kernels", "benchmarks/peers": "fastgen/bench/peers"}
HAS_NATIVE = "from fastgen.native import native; print(native is not None)"
LOAD_TWICE = """
import warnings, fastgen
for _ in range(2):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with fastgen.load() as model:
            model("a", fastgen.SamplingParams(max_new_tokens=1))
    print([str(warning.message) for warning in caught if "extension" in str(warning.message)])
"""
BUILD_SDIST = "import sys, setuptools.build_meta as b; print(b.build_sdist(sys.argv[1]))"


def run(
    *command: str | Path, cwd: Path, env: dict[str, str] | None = None, fails: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run to the end; where it does not end as expected, the test fails with its output."""
    inherited = {k: v for k, v in os.environ.items() if k not in (*BUILD_VARIABLES, "PYTHONPATH")}
    process = processes.run(
        command, cwd=cwd, env={**inherited, "HF_HUB_OFFLINE": "1", **(env or {})}
    )
    assert (process.returncode != 0) == fails, process.stdout + process.stderr
    return process


def copy_checkout(folder: Path) -> Path:
    """What git would track, so that the checkout's own build folders are neither read nor used."""
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split()]
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", *ignored))
    return folder


def build_wheel(source: Path, folder: Path, env: dict[str, str] | None = None) -> tuple[Path, str]:
    """The wheel of a folder or archive, and what its build said."""
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--no-cache-dir", "-v")
    command = (sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", folder, source)
    process = run(*command, cwd=folder.parent, env=env)
    [wheel] = folder.glob("*.whl")
    return wheel, process.stdout + process.stderr


def build_sdist(tmp_path: Path) -> Path:
    checkout = copy_checkout(tmp_path / "checkout")
    run(sys.executable, "-c", BUILD_SDIST, tmp_path, cwd=checkout)
    [archive] = tmp_path.glob("*.tar.gz")
    return archive


def names_in(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def package_files() -> set[str]:
    """What a wheel must hold of fastgen, apart from the extension."""
    files: set[str] = set()
    for folder, installed in {"fastgen": "fastgen", **OUTSIDE}.items():
        for path in (ROOT / folder).rglob("*"):
            inside = path.relative_to(ROOT / folder).as_posix()
            if path.is_file() and path.suffix != ".so" and "__pycache__" not in inside:
                files.add(f"{installed}/{inside}")
    return files


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with links to all that is installed here, except fastgen and its import hook."""
    folder = tmp_path_factory.mktemp("packages")
    for site in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for path in Path(site).iterdir():
            if "fastgen" not in path.name:
                (folder / path.name).symlink_to(path)
    return folder


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment whose compiler does not optimize, for what no speed depends on."""
    if shutil.which("g++") is None:
        return {}
    script = tmp_path_factory.mktemp("compiler") / "g++"
    script.write_text(f'#!/bin/sh\nexec {shutil.which("g++")} "$@" -O0\n')
    script.chmod(0o755)
    return {"CXX": str(script)}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory, quick: dict[str, str]) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    return build_wheel(copy_checkout(folder / "checkout"), folder / "dist", quick)[0]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    """What the fastgen of this environment generates, by its options."""
    folder = tmp_path_factory.mktemp("here")
    command = (sys.executable, "-m", "fastgen", "generate")
    return {
        options: token_ids(run(*command, *options, cwd=folder).stdout)
        for options in (GREEDY, SAMPLED)
    }


class Venv:
    """A new environment that sees the packages of this one, except fastgen."""

    def __init__(self, folder: Path, packages: Path) -> None:
        self.folder = folder
        run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
        [site] = folder.glob("lib/python*/site-packages")
        (site / "packages.pth").write_text(f"{packages}\n")
        self.site = site

    def install(self, *what: str | Path, env: dict[str, str] | None = None) -> None:
        pip = (sys.executable, "-m", "pip", "--python", self.folder / "bin" / "python")
        run(*pip, *PIP_INSTALL, *what, cwd=self.folder, env=env)

    def python(self, code: str) -> str:
        return run(self.folder / "bin" / "python", "-c", code, cwd=self.folder).stdout.strip()

    def error(self, code: str) -> str:
        command = (self.folder / "bin" / "python", "-c", code)
        return run(*command, cwd=self.folder, fails=True).stderr

    def tokens(self, options: tuple[str, ...]) -> list[int]:
        command: tuple[str | Path, ...] = (
            self.folder / "bin" / "fastgen", "generate", *options
        )  # fmt: skip
        return token_ids(run(*command, cwd=self.folder).stdout)

    def fastgen_folder(self) -> Path:
        return Path(self.python("import fastgen; print(fastgen.__file__)")).parent


@pytest.fixture
def venv(tmp_path: Path, packages: Path) -> Venv:
    return Venv(tmp_path / "venv", packages)


def token_ids(record: str) -> list[int]:
    [completion] = json.loads(record)["completions"]
    found: list[int] = completion["token_ids"]
    return found


def pins() -> set[str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    rows = [line for line in lines if not line.startswith("#")]
    assert rows == sorted(rows)
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", row) for row in rows)
    return {row.partition("==")[0] for row in rows}


def required(text: str, seen: set[str]) -> set[str]:
    """The names that a requirement needs here, itself included, as far as they are installed."""
    requirement = Requirement(text)
    marker = requirement.marker
    extras = requirement.extras or {""}
    if text in seen or (marker and not marker.evaluate({"extra": ""})):
        return set()
    seen.add(text)
    names: set[str] = {canonicalize_name(requirement.name)}
    try:
        inner = importlib.metadata.requires(requirement.name) or []
    except importlib.metadata.PackageNotFoundError:
        return names
    for child in inner:
        wanted = Requirement(child)
        if wanted.marker is None or any(wanted.marker.evaluate({"extra": e}) for e in extras):
            names |= required(str(wanted).partition(";")[0], seen)
    return names


def test_constraints_pin_all_that_is_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    declared = [*project["build-system"]["requires"], *project["project"]["dependencies"], "wheel"]
    for extra in project["project"]["optional-dependencies"].values():
        declared += extra
    names = set().union(*(required(text, set()) for text in declared))
    not_run_here = {"fastgen", "ray", "triton"}  # clusters, GPUs
    assert names - pins() - not_run_here == set()


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = names_in(wheel)
    [native] = [name for name in names if re.fullmatch(r"fastgen/_native\..*\.so", name)]
    rest = {name for name in names if ".dist-info/" not in name} - {native}
    assert rest == package_files()
    assert {"fastgen/py.typed", "fastgen/_native.pyi", "fastgen/kernels/__init__.py"} <= rest
    assert "fastgen/bundled/model.safetensors" in rest


def test_sdist_holds_all_that_a_build_needs_and_nothing_else(tmp_path: Path) -> None:
    with tarfile.open(build_sdist(tmp_path)) as archive:
        paths = [Path(member.name) for member in archive if member.isfile()]
    names = {Path(*path.parts[1:]).as_posix() for path in paths}
    names = {name for name in names if not name.startswith("fastgen.egg-info/")}
    names -= {"PKG-INFO", "setup.cfg"}  # made by setuptools
    files = {"LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"}
    files |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.*")}
    for name in package_files():
        for folder, installed in OUTSIDE.items():
            name = name.replace(f"{installed}/", f"{folder}/")
        files.add(name)
    assert names == files


def test_wheel_works_outside_the_checkout(wheel: Path, venv: Venv, expected: Tokens) -> None:
    venv.install(wheel)
    assert venv.fastgen_folder() == venv.site / "fastgen"
    modules = venv.python(
        "import fastgen._native, fastgen.kernels\n"
        "print(fastgen._native.__file__, fastgen.kernels.__file__, sep='\\n')"
    )
    assert all(Path(line).is_relative_to(venv.site) for line in modules.splitlines())
    assert venv.tokens(GREEDY) == expected[GREEDY]


@pytest.mark.slow
def test_wheel_from_the_sdist_works(
    wheel: Path, venv: Venv, expected: Tokens, quick: dict[str, str], tmp_path: Path
) -> None:
    built, _ = build_wheel(build_sdist(tmp_path), tmp_path / "dist", quick)
    assert names_in(built) == names_in(wheel)
    venv.install(built)
    assert venv.fastgen_folder() == venv.site / "fastgen"
    assert venv.tokens(GREEDY) == expected[GREEDY]


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_extension_compiles_portably(
    compiler: str, venv: Venv, expected: Tokens, tmp_path: Path
) -> None:
    """By either compiler, without a flag that ties the result to this processor or to PyTorch."""
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    built, log = build_wheel(copy_checkout(tmp_path / "c"), tmp_path / "dist", {"CXX": compiler})
    compiled = [line.split() for line in log.splitlines() if " -c csrc/" in line]
    assert len(compiled) == len(list((ROOT / "csrc").rglob("*.cpp")))
    for words in compiled:
        assert words[0] == compiler
        assert not [word for word in words if re.match("-m(arch|tune|cpu)=", word)]
        assert not [word for word in words if word.startswith("-I") and "torch" in Path(word).parts]
    venv.install(built)
    assert venv.python(HAS_NATIVE) == "True"
    assert venv.tokens(SAMPLED) == expected[SAMPLED]


@pytest.mark.slow
@pytest.mark.parametrize("absent", ["named compiler", "any compiler"])
def test_without_a_compiler(absent: str, venv: Venv, expected: Tokens, tmp_path: Path) -> None:
    """One warning while building, one at each load; the tokens are the same. Broken is an error."""
    env = NO_COMPILER if absent == "named compiler" else {"PATH": str(tmp_path)}
    built, log = build_wheel(copy_checkout(tmp_path / "checkout"), tmp_path / "dist", env)
    assert log.count("fastgen._native was not built") == 1
    assert "install a C++ compiler and reinstall fastgen" in log
    assert {name for name in names_in(built) if ".dist-info/" not in name} == package_files()
    venv.install(built)
    assert venv.python(HAS_NATIVE) == "False"
    loads = venv.python(LOAD_TWICE).splitlines()
    assert [line.count("C++ extension was not built") for line in loads] == [1, 1]
    for options in (GREEDY, SAMPLED):
        assert venv.tokens(options) == expected[options]

    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    (venv.site / "fastgen" / f"_native{suffix}").write_bytes(b"not a library")
    assert "ImportError" in venv.error("import fastgen.native")


@pytest.mark.slow
def test_editable_install(
    venv: Venv, expected: Tokens, quick: dict[str, str], tmp_path: Path
) -> None:
    """It finds kernels and extension; a later one that cannot compile leaves no older extension."""
    checkout = copy_checkout(tmp_path / "checkout")
    venv.install("--editable", checkout, env=quick)
    assert venv.fastgen_folder() == checkout / "fastgen"
    assert venv.python("import fastgen.kernels as k; print(k.__file__)").startswith(str(checkout))
    assert venv.python(HAS_NATIVE) == "True"
    assert venv.tokens(GREEDY) == expected[GREEDY]
    venv.install("--editable", checkout, env=NO_COMPILER)
    assert venv.python(HAS_NATIVE) == "False"
