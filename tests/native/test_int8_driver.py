"""Products of int8 on every path under sanitizers, against a scalar reference."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from cpu_decoders import INSTRUCTION_SETS
from sanitizers import ADDRESS, ROOT, Build, counts, failure

DRIVER = ROOT / "tests" / "native" / "int8_driver.cpp"
SECONDS = 10

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="sanitizers are set up for Linux"),
]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    sources = ROOT / "csrc"
    parts = [*sources.glob("decoder/decoder_kernels*.cpp"), sources / "decoder/packed_linear.cpp"]
    parts.append(sources / "common/thread_pool.cpp")
    return Build(tmp_path_factory.mktemp("int8"), sources, parts, ADDRESS)


def test_int8_products(build: Build) -> None:
    print(counts(build.program(DRIVER), SECONDS, r"(\d+) cases", (300,)), "cases")


@pytest.mark.skipif(
    not {"avx2", "avx512"} <= set(INSTRUCTION_SETS), reason="what is broken is not run here"
)
@pytest.mark.parametrize(
    ("path", "name", "old", "new", "complaint"),
    [
        pytest.param(
            "avx512",
            "decoder_dots.inc",
            "_mm512_srai_epi16(_mm512_slli_epi16(both, 8), 8)",
            "_mm512_srli_epi16(_mm512_slli_epi16(both, 8), 8)",
            "found == wanted",
            id="weights without a sign",
        ),
        pytest.param(
            "avx2",
            "decoder_codes.inc",
            "constexpr int kCodeOffset = 128;",
            "constexpr int kCodeOffset = 127;",
            "found == wanted",
            id="another zero point",
        ),
        pytest.param(
            "avx2",
            "decoder_codes.inc",
            "(count + 3) / 4 * sizeof(std::uint64_t)",
            "sizeof wide",
            "AddressSanitizer",
            id="writes past a row",
        ),
    ],
)
def test_the_int8_drivers_checks_can_fail(
    path: str, name: str, old: str, new: str, complaint: str, build: Build, tmp_path: Path
) -> None:
    """One path's kernels are made from a changed source."""
    sources = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", sources)
    changed = sources / "decoder" / name
    source = changed.read_text()
    assert source.count(old) == 1
    changed.write_text(source.replace(old, new))
    kernels = sources / "decoder" / f"decoder_kernels_{path}.cpp"
    assert complaint in failure(build.program(DRIVER, kernels, f"-I{sources}"), 10)
