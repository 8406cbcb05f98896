"""The sampler, the decoder and drafts under sanitizers: alone, and inside Python; the thread pool.

AddressSanitizer and UndefinedBehaviorSanitizer look for wrong memory and arithmetic,
ThreadSanitizer for races between threads that share a step, libFuzzer for bytes that reach
new code.
"""

from __future__ import annotations

import re
import shutil
import sys
import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pybind11
import pytest

from sanitizers import (
    ADDRESS,
    COMMON,
    INCLUDE,
    POOL,
    ROOT,
    THREAD,
    Build,
    compiler,
    counts,
    failure,
    parts_of,
    run,
)

DRIVER = ROOT / "tests" / "native" / "sampler_driver.cpp"
POOL_DRIVER = ROOT / "tests" / "native" / "pool_driver.cpp"
DECODER_DRIVER = ROOT / "tests" / "native" / "decoder_driver.cpp"
DRAFTS_DRIVER = ROOT / "tests" / "native" / "speculation_driver.cpp"
SECONDS = 30  # of each driver of the sampler
POOL_SECONDS = 10
DECODER_SECONDS = 30
DRAFTS_SECONDS = 10
SAMPLER = ("common", "sampler")  # what its driver needs of csrc
DECODER = ("common", "decoder")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="sanitizers are set up for Linux"),
]


@pytest.mark.parametrize(
    ("name", "flags", "least"),
    [("address", ADDRESS, 1000), ("thread", THREAD, 300)],
)
def test_random_bytes(name: str, flags: tuple[str, ...], least: int, tmp_path: Path) -> None:
    program = tmp_path / name
    parts = parts_of(ROOT / "csrc", *SAMPLER)
    run(compiler("g++"), *COMMON, *flags, INCLUDE, *parts, DRIVER, "-o", program)
    print(counts(program, SECONDS, r"(\d+) cases", (least,)), "cases")


def test_fuzzer(tmp_path: Path) -> None:
    program = tmp_path / "fuzzer"
    flags = ("-DLIBFUZZER", "-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all")
    parts = parts_of(ROOT / "csrc", *SAMPLER)
    run(compiler("clang++"), *COMMON, *flags, INCLUDE, *parts, DRIVER, "-o", program)
    artifacts = f"-artifact_prefix={tmp_path}/"
    runs = 0
    while runs < 5000:
        output = run(program, f"-max_total_time={SECONDS}", "-max_len=4096", artifacts)
        [done] = re.findall(r"Done (\d+) runs", output)
        runs += int(done)
    print(f"fuzzer: {runs} runs")


def test_the_drivers_checks_can_fail(tmp_path: Path) -> None:
    """A sampler that forgets suppress_tokens, and one that reads behind a row, are both caught."""
    broken = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", broken)
    driver = shutil.copytree(DRIVER.parent, tmp_path / "tests" / "native") / DRIVER.name
    source = (broken / "sampler" / "processors.cpp").read_text()
    old = "rule_out(options.suppress_tokens, scores);"
    assert old in source
    (broken / "sampler" / "processors.cpp").write_text(source.replace(old, ""))
    assert "suppress" in failure_of(broken, driver, tmp_path / "forgets")
    (broken / "sampler" / "processors.cpp").write_text(source)
    kernels = (broken / "sampler" / "sampler_kernels.inc").read_text()
    old = "start + at < count ? block[at] : kLowest"
    assert old in kernels
    (broken / "sampler" / "sampler_kernels.inc").write_text(kernels.replace(old, "block[at]"))
    assert "AddressSanitizer" in failure_of(broken, driver, tmp_path / "reads")


def failure_of(sources: Path, driver: Path, program: Path) -> str:
    include, parts = f"-I{sources}", parts_of(sources, *SAMPLER)
    run(compiler("g++"), *COMMON, *ADDRESS, include, *parts, driver, "-o", program)
    return failure(program, 20)


@pytest.mark.parametrize(
    ("flags", "least_forks"),
    [pytest.param(ADDRESS, 20, id="address"), pytest.param(THREAD, 0, id="thread")],
)
def test_the_thread_pool(flags: tuple[str, ...], least_forks: int, tmp_path: Path) -> None:
    program = tmp_path / "pool"
    run(compiler("g++"), *COMMON, *flags, INCLUDE, POOL, POOL_DRIVER, "-o", program)
    told = r"(\d+) calls, (\d+) shared, (\d+) forks"
    print(counts(program, POOL_SECONDS, told, (5000, 500, least_forks)), "calls, shared, forks")


@pytest.mark.parametrize(
    ("flags", "old", "new", "complaint"),
    [
        pytest.param(ADDRESS, "num_active(state) > 0", "false", "trace->", id="caller waits"),
        pytest.param(ADDRESS, "if (num_awake < seats)", "if (false)", "until", id="sleepers wake"),
        pytest.param(
            THREAD,
            "fetch_sub(kActive, std::memory_order_release)",
            "fetch_sub(kActive, std::memory_order_relaxed)",
            "ThreadSanitizer: data race",
            id="writes are seen",
        ),
    ],
)
def test_the_pool_drivers_checks_can_fail(
    flags: tuple[str, ...], old: str, new: str, complaint: str, tmp_path: Path
) -> None:
    source = POOL.read_text()
    assert source.count(old) == 1
    broken, program = tmp_path / POOL.name, tmp_path / "pool"
    broken.write_text(source.replace(old, new))
    run(compiler("g++"), *COMMON, *flags, INCLUDE, broken, POOL_DRIVER, "-o", program)
    assert complaint in failure(program, 5)


def copy_sources(folder: Path, flags: tuple[str, ...]) -> Path:
    """csrc, for AddressSanitizer with an arena whose pieces it can tell from each other."""
    copy = folder / "csrc"
    shutil.copytree(ROOT / "csrc", copy)
    if flags == ADDRESS:
        shutil.copy(ROOT / "tests" / "native" / "guarded_arena.h", copy / "common" / "arena.h")
    return copy


Builds = Callable[[tuple[str, ...]], Build]


@pytest.fixture(scope="module")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> Builds:
    """The decoder's objects, by the sanitizer's flags."""

    def build(flags: tuple[str, ...]) -> Build:
        folder = tmp_path_factory.mktemp("decoder")
        sources = copy_sources(folder, flags)
        return Build(folder, sources, parts_of(sources, *DECODER), flags)

    return cache(build)


@pytest.mark.parametrize(
    ("flags", "least"),
    [pytest.param(ADDRESS, 200, id="address"), pytest.param(THREAD, 100, id="thread")],
)
def test_the_decoder(flags: tuple[str, ...], least: int, decoders: Builds) -> None:
    program = decoders(flags).program(DECODER_DRIVER)
    print(counts(program, DECODER_SECONDS, r"(\d+) cases", (least,)), "cases")


@pytest.mark.parametrize(
    ("flags", "name", "old", "new", "complaint"),
    [
        pytest.param(
            ADDRESS,
            "attention",
            "rows.cache_lens[task.row] + task.first + 1;",
            "rows.cache_lens[task.row] + task.first + 2;",
            "memcmp",
            id="looks ahead",
        ),
        pytest.param(
            ADDRESS,
            "packed_linear",
            "bias = cursor.take<float>(padded)",
            "bias = cursor.take<float>(columns)",
            "AddressSanitizer",
            id="reads behind a piece",
        ),
        pytest.param(
            THREAD,
            "packed_linear",
            "alignas(kCacheLine) float sums[",
            "alignas(kCacheLine) static float sums[",
            "ThreadSanitizer: data race",
            id="shares a buffer",
        ),
    ],
)
def test_the_decoder_drivers_checks_can_fail(
    flags: tuple[str, ...],
    name: str,
    old: str,
    new: str,
    complaint: str,
    decoders: Builds,
    tmp_path: Path,
) -> None:
    decoder = decoders(flags)
    source = (decoder.sources / "decoder" / f"{name}.cpp").read_text()
    assert source.count(old) == 1
    broken = tmp_path / f"{name}.cpp"
    broken.write_text(source.replace(old, new))
    assert complaint in failure(decoder.program(DECODER_DRIVER, broken), 20)


def drafts_program(sources: Path, program: Path) -> Path:
    parts = sorted((sources / "speculation").glob("*.cpp"))
    run(compiler("g++"), *COMMON, *ADDRESS, f"-I{sources}", *parts, DRAFTS_DRIVER, "-o", program)
    return program


def test_drafts(tmp_path: Path) -> None:
    program = drafts_program(copy_sources(tmp_path, ADDRESS), tmp_path / "drafts")
    print(counts(program, DRAFTS_SECONDS, r"(\d+) cases", (300,)), "cases")


@pytest.mark.parametrize(
    ("name", "old", "new", "complaint"),
    [
        pytest.param(
            "suffix_automaton.cpp",
            "edge.target = shorter;",
            "edge.target = target;",
            "length == longest",
            id="keeps the longer state",
        ),
        pytest.param(
            "suffix_automaton.cpp",
            "at < distance ? after[at] : ids[at - distance]",
            "after[at]",
            "AddressSanitizer",
            id="reads past the last token",
        ),
        pytest.param(
            "output_store.cpp",
            "if (at(place - before + word).word != salt[word]) return 0;",
            "",
            "has(outputs",
            id="forgets the salt",
        ),
        pytest.param(
            "output_store.h", "ring_[place & mask_]", "ring_[place]", "AddressSanitizer", id="ring"
        ),
    ],
)
def test_the_drafts_drivers_checks_can_fail(
    name: str, old: str, new: str, complaint: str, tmp_path: Path
) -> None:
    sources = copy_sources(tmp_path, ADDRESS)
    broken = sources / "speculation" / name
    source = broken.read_text()
    assert old in source
    broken.write_text(source.replace(old, new))
    assert complaint in failure(drafts_program(sources, tmp_path / "drafts"), 5)


def test_the_extension_inside_python(tmp_path: Path) -> None:
    """The tests of what needs no PyTorch, with bindings and all built for sanitizers."""
    package = tmp_path / "fastgen"
    shutil.copytree(ROOT / "fastgen", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    module = package / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]
    copy = copy_sources(tmp_path, ADDRESS)
    sources = sorted(copy.glob("*/*.cpp"))
    includes.append(f"-I{copy}")
    gxx = compiler("g++")
    shared = ("-shared", "-fPIC", "-fvisibility=hidden")
    run(gxx, *COMMON, *ADDRESS, *shared, *includes, *sources, "-o", module)
    libraries = [
        run(gxx, f"-print-file-name={name}").strip() for name in ("libasan.so", "libstdc++.so")
    ]
    env = {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python itself keeps memory until the end
        "PYTHONPATH": str(tmp_path),
        "PYTHONSAFEPATH": "1",  # the checkout, where this runs, has a package of that name, too
        "PYTHONMALLOC": "malloc",
    }
    options = ("-q", "-p", "no:cacheprovider", "--import-mode=importlib")
    tests = [
        ROOT / "tests" / folder / f"test_native_{part}.py"
        for folder, part in (("sampling", "sampler"), ("decoders", "decoder"))
    ]
    tests.append(ROOT / "tests" / "speculation" / "test_suffix_automaton.py")
    output = run(sys.executable, "-m", "pytest", *options, *tests, env=env)
    assert re.search(r"\d+ passed", output) and "skipped" not in output, output
    where = "import fastgen._native as n; print(n.__file__)"
    assert run(sys.executable, "-c", where, env=env).strip() == str(module)
