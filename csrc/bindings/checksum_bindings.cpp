// Python's view of the checksums of memory.

#include "bindings/checksum_bindings.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <vector>

#include "common/checksum.h"

namespace py = pybind11;

namespace fastgen {

namespace {

using Bytes = py::array_t<std::uint8_t, py::array::c_style>;

MemorySpan span_of(const Bytes& bytes) {
  return {bytes.data(), static_cast<std::size_t>(bytes.nbytes())};
}

std::vector<std::uint64_t> checksums_of(const std::vector<Bytes>& arrays, int num_threads) {
  if (num_threads < 1) throw py::value_error("num_threads: must be at least 1");
  std::vector<MemorySpan> spans;
  for (const Bytes& bytes : arrays) spans.push_back(span_of(bytes));
  std::vector<std::uint64_t> sums(spans.size());
  const py::gil_scoped_release released;
  checksums(spans.data(), static_cast<int>(spans.size()), num_threads, sums.data());
  return sums;
}

}  // namespace

void bind_checksums(py::module_& module) {
  module.def(
      "xxh64", [](const Bytes& bytes) { return xxh64(span_of(bytes)); }, py::arg("bytes"),
      "XXH64 of a uint8 array, with the seed 0.");
  module.def("checksums", &checksums_of, py::arg("arrays"), py::arg("num_threads"),
             "A 64-bit checksum of each uint8 array, which depends on every byte and on its place. "
             "The number of threads changes none. Releases the GIL.");
}

}  // namespace fastgen
