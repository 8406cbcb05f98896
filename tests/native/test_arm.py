"""The C++ parts on Arm: built by Debian's cross compiler, run by qemu-user, and compared with this
machine's results.

How fast they are on a real Arm processor, an emulator cannot tell.
"""

from __future__ import annotations

import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import processes
from sanitizers import INCLUDE, ROOT, compiler, counts, run

NATIVE = ROOT / "tests" / "native"
FLAGS = ("-std=c++17", "-O2", "-pthread", INCLUDE)
ARM_COMPILER = "aarch64-linux-gnu-g++"
SECONDS = 5  # of each driver with random cases
# Emulated processors: what Linux says of them, and the paths that follow. Nothing asks for a path:
# they are chosen by the features alone.
CPUS = {
    "cortex-a53": (["asimd"], ["neon", "portable"]),
    "neoverse-n1": (["asimd", "fphp", "asimddp"], ["neon_dotprod", "neon", "portable"]),
    "max": (
        ["asimd", "fphp", "asimddp", "i8mm", "bf16"],
        ["neon_i8mm", "neon_dotprod", "neon", "portable"],
    ),
}
Lines = list[list[str]]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="qemu-user runs on Linux"),
]


def emulator() -> str:
    path = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if path is None:
        pytest.skip("qemu-user is not installed")
    return path


def parts() -> list[Path]:
    """What the drivers need: all but the bindings, speculation and the peaks."""
    folders = ("common", "decoder", "sampler")
    return sorted(path for name in folders for path in (ROOT / "csrc" / name).glob("*.cpp"))


class Build:
    """Objects of one compiler, and statically linked programs; each made once."""

    def __init__(self, compiler_path: str, folder: Path) -> None:
        self.compiler, self.folder = compiler_path, folder
        with ThreadPoolExecutor(2) as pool:
            self.objects = {made.stem: made for made in pool.map(self.compile, parts())}

    def compile(self, source: Path) -> Path:
        made = self.folder / f"{source.stem}.o"
        run(self.compiler, *FLAGS, "-c", source, "-o", made)
        return made

    def program(self, driver: str) -> Path:
        program = self.folder / driver
        if not program.exists():
            self.link(self.objects, driver, program)
        return program

    def link(self, objects: dict[str, Path], driver: str, program: Path) -> None:
        source = NATIVE / f"{driver}.cpp"
        run(self.compiler, *FLAGS, "-static", *objects.values(), source, "-o", program)

    def changed_program(self, driver: str, kernels: str, sources: Path) -> Path:
        """The driver with these objects, but one made from other sources."""
        made, program = sources / f"{kernels}.o", sources / driver
        source = sources / "decoder" / f"{kernels}.cpp"
        run(self.compiler, f"-I{sources}", *FLAGS, "-c", source, "-o", made)
        self.link(self.objects | {kernels: made}, driver, program)
        return program


@pytest.fixture(scope="module")
def arm(tmp_path_factory: pytest.TempPathFactory) -> Build:
    emulator()
    return Build(compiler(ARM_COMPILER), tmp_path_factory.mktemp("arm"))


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Build:
    return Build(compiler("g++"), tmp_path_factory.mktemp("here"))


@pytest.fixture(scope="module")
def programs(arm: Build, here: Build) -> dict[str, tuple[Path, Path]]:
    """Drivers for Arm and for this machine."""
    return {
        name: (arm.program(name), here.program(name)) for name in ("tile_driver", "draw_driver")
    }


def emulated(program: Path, cpu: str) -> str:
    return run(emulator(), "-cpu", cpu, program, env={"FASTGEN_ISA": ""})


def lines(output: str) -> Lines:
    return [line.split() for line in output.splitlines()]


def told(said: Lines, word: str) -> Lines:
    found = [rest for first, *rest in said if first == word]
    assert found, word
    return found


@pytest.mark.parametrize("cpu", CPUS)
def test_tiles(cpu: str, programs: dict[str, tuple[Path, Path]]) -> None:
    """Int8 sums and widened halves are exact, which the driver checks; packed weights are this
    machine's; on every path of NEON floats are added by one fused multiply-add after another."""
    arm, here = programs["tile_driver"]
    said = lines(emulated(arm, cpu))
    features, paths = CPUS[cpu]
    assert told(said, "features") == [features] and told(said, "paths") == [paths]
    assert told(said, "chosen") == [paths[:1]]
    assert told(said, "packed") == told(lines(run(here)), "packed")
    sums = {(path, name): checksum for path, name, checksum in told(said, "sums")}
    fused = {name: checksum for (path, name), checksum in sums.items() if path == "fused"}
    assert len(set(fused.values())) == 4
    for path in paths[:-1]:
        assert {name: sums[path, name] for name in fused} == fused


@pytest.mark.parametrize("cpu", CPUS)
def test_rows(cpu: str, arm: Build) -> None:
    """Norms, activations, softmax and quantization, against double."""
    said = lines(emulated(arm.program("row_driver"), cpu))
    assert told(said, "checked") == [[path] for path in CPUS[cpu][1]]


def test_rows_here(here: Build) -> None:
    assert told(lines(run(here.program("row_driver"))), "checked")


@pytest.mark.parametrize("cpu", CPUS)
def test_draws(cpu: str, programs: dict[str, tuple[Path, Path]]) -> None:
    """The same ids for the same logits as on this machine, whatever its processor."""
    arm, here = programs["draw_driver"]
    said, wanted = lines(emulated(arm, cpu)), lines(run(here))
    assert told(said, "uniforms") == told(wanted, "uniforms")
    [draws] = {checksum for _, checksum in told(wanted, "draws")}
    assert {checksum for _, checksum in told(said, "draws")} == {draws}


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("driver", ["decoder_driver", "sampler_driver"])
def test_random_cases(driver: str, cpu: str, arm: Build, tmp_path: Path) -> None:
    """Rows alone and in batches, to the same bits; draws by portable code and by the best path."""
    script = tmp_path / f"{driver}-{cpu}"
    command = f'FASTGEN_ISA= exec {emulator()} -cpu {cpu} {arm.program(driver)} "$@"'
    script.write_text(f"#!/bin/sh\n{command}\n")
    script.chmod(0o755)
    print(counts(script, SECONDS, r"(\d+) cases", (10,)), "cases")


def test_a_path_that_the_processor_lacks_is_refused(arm: Build) -> None:
    command = (emulator(), "-cpu", "cortex-a53", "-E", "FASTGEN_ISA=neon_dotprod")
    process = processes.run([*command, arm.program("tile_driver")])
    assert process.returncode != 0
    assert "FASTGEN_ISA=neon_dotprod: this processor has neon, portable" in process.stderr


@pytest.mark.parametrize(
    ("cpu", "kernels", "name", "old", "new", "complaint"),
    [
        pytest.param(
            "cortex-a53",
            "decoder_kernels_neon",
            "decoder_dots_neon.inc",
            "vpaddq_s16(low, high)",
            "vpaddq_s16(low, low)",
            "column_sums",
            id="other columns",
        ),
        pytest.param(
            "max",
            "decoder_kernels_neon_i8mm",
            "decoder_tile_smmla.inc",
            "step + 1 < steps",
            "step < steps",
            "",
            id="past an odd end",
        ),
    ],
)
def test_the_drivers_checks_can_fail(
    cpu: str,
    kernels: str,
    name: str,
    old: str,
    new: str,
    complaint: str,
    arm: Build,
    tmp_path: Path,
) -> None:
    """A changed sum, and a read past the last row's end."""
    sources = shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    changed = sources / "decoder" / name
    source = changed.read_text()
    assert source.count(old) == 1
    changed.write_text(source.replace(old, new))
    program = arm.changed_program("tile_driver", kernels, sources)
    process = processes.run([emulator(), "-cpu", cpu, "-U", "FASTGEN_ISA", program])
    assert process.returncode != 0 and complaint in process.stderr
