"""The C++ extension, and `kernels/` as fastgen.kernels; all else stands in pyproject.toml."""

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup
from setuptools.errors import CCompilerError, ExecError, PlatformError


class OptionalBuildExt(build_ext):
    """Without a working compiler, fastgen is installed without its extension, and says so."""

    def build_extension(self, ext):
        try:
            super().build_extension(ext)
        except (CCompilerError, ExecError, PlatformError) as error:
            self.warn(
                f"{ext.name} was not built ({error}). fastgen works without it, more slowly; "
                "to have it, install a C++ compiler and reinstall fastgen."
            )


setup(
    ext_modules=[Pybind11Extension("fastgen._native", ["csrc/bindings.cpp"], cxx_std=17)],
    cmdclass={"build_ext": OptionalBuildExt},
    packages=["fastgen", "fastgen.decoders", "fastgen.kernels"],
    package_dir={"fastgen.kernels": "kernels"},
)
