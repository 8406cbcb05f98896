"""The C++ extension, and folders outside of fastgen/ that are parts of it; all else stands in
pyproject.toml."""

import sys
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import find_packages, setup
from setuptools.errors import BaseError, CCompilerError

# What is installed from folders outside of fastgen/.
ELSEWHERE = {"fastgen.kernels": "kernels", "fastgen.bench.peers": "benchmarks/peers"}


class OptionalBuildExt(build_ext):
    """Without a working compiler, fastgen is installed without its extension, and says so."""

    def build_extension(self, ext):
        try:
            super().build_extension(ext)
        except (BaseError, CCompilerError, OSError) as error:
            self._remove_older(ext)
            self.warn(
                f"{ext.name} was not built ({error}). fastgen works without it, more slowly; "
                "to have it, install a C++ compiler and reinstall fastgen."
            )

    def _remove_older(self, ext):
        built = Path(self.get_ext_fullpath(ext.name))
        folder = Path("fastgen") if self.editable_mode else built.parent
        (folder / built.name).unlink(missing_ok=True)


sources = sorted(glob("csrc/*/*.cpp"))
headers = sorted([*glob("csrc/*/*.h"), *glob("csrc/*/*.inc")])
native = Pybind11Extension(
    "fastgen._native", sources, include_dirs=["csrc"], depends=headers, cxx_std=17
)
if sys.platform != "win32":
    native.extra_compile_args += ["-O3", "-pthread"]
    native.extra_link_args += ["-pthread"]
native.optional = True  # an editable install then does not look for what was not built

ParallelCompile("FASTGEN_BUILD_JOBS").install()  # as many files at once as there are processors
setup(
    ext_modules=[native],
    cmdclass={"build_ext": OptionalBuildExt},
    packages=[*find_packages(include=["fastgen", "fastgen.*"]), *ELSEWHERE],
    package_dir=ELSEWHERE,
)
