// Python's view of the machine's limits: checks cores and counts.

#include "bindings/peaks_bindings.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "common/cpu_features.h"
#include "peaks/peaks.h"

namespace py = pybind11;

namespace fastgen {

namespace {

using Cores = std::vector<int>;

Cores checked_cores(Cores cores) {
  if (cores.empty()) throw py::value_error("cores: must be at least one");
  for (const int core : cores) {
    if (core < 0) throw py::value_error("cores: must not be negative");
  }
  return cores;
}

std::size_t checked_bytes(std::int64_t bytes_each) {
  const auto unit = static_cast<std::int64_t>(kPeakReadUnit);
  if (bytes_each < unit || bytes_each % unit != 0) {
    throw py::value_error("bytes_each: must be a multiple of " + std::to_string(unit));
  }
  return static_cast<std::size_t>(bytes_each);
}

std::int64_t checked_count(const char* name, std::int64_t count) {
  if (count < 1) throw py::value_error(std::string(name) + ": must be at least 1");
  return count;
}

class CheckedPeakBuffers {
 public:
  CheckedPeakBuffers(Cores cores, std::int64_t bytes_each)
      : buffers_(checked_cores(std::move(cores)), checked_bytes(bytes_each)) {}

  std::vector<std::string> readers() const {
    std::vector<std::string> names;
    for (const PeakReader& reader : peak_readers()) names.emplace_back(reader.name);
    return names;
  }

  double read_seconds(int reader, int times) const {
    if (reader < 0 || reader >= kNumPeakReaders) throw py::value_error("reader: there is no such");
    checked_count("times", times);
    const py::gil_scoped_release released;
    return buffers_.read_seconds(peak_readers()[reader], times);
  }

 private:
  PeakBuffers buffers_;
};

// One of instruction_sets(); the best for "".
std::string checked_path(const std::string& path) {
  const std::vector<std::string> paths = instruction_sets();
  if (path.empty()) return paths.front();
  if (std::find(paths.begin(), paths.end(), path) == paths.end()) {
    throw py::value_error("path: this processor has no " + path);
  }
  return path;
}

std::vector<std::pair<std::string, int>> multipliers(const std::string& path) {
  std::vector<std::pair<std::string, int>> found;
  for (const PeakMultiplier& multiplier : peak_multipliers(checked_path(path))) {
    found.emplace_back(multiplier.how, multiplier.macs);
  }
  return found;
}

double checked_multiply_seconds(Cores cores, int kind, std::int64_t rounds,
                                const std::string& path) {
  if (kind < 0 || kind >= kNumPeakMultipliers) throw py::value_error("kind: there is no such");
  cores = checked_cores(std::move(cores));
  checked_count("rounds", rounds);
  const PeakMultiplier multiplier = peak_multipliers(checked_path(path))[kind];
  const py::gil_scoped_release released;
  return multiply_seconds(cores, multiplier, rounds);
}

}  // namespace

void bind_peaks(py::module_& module) {
  using Buffers = CheckedPeakBuffers;
  py::class_<Buffers>(module, "PeakBuffers", "Memory that threads read, on each core a buffer.")
      .def(py::init<Cores, std::int64_t>(), py::arg("cores"), py::arg("bytes_each"),
           py::call_guard<py::gil_scoped_release>(),
           "bytes_each: of each core's buffer, a multiple of 512. MemoryError where there are not "
           "so many.")
      .def("readers", &Buffers::readers, "Ways of reading, by name.")
      .def("read_seconds", &Buffers::read_seconds, py::arg("reader"), py::arg("times"),
           "Seconds in which all threads read their buffers `times` times, in the way of that "
           "index. Releases the GIL.");
  module.def("multipliers", &multipliers, py::arg("path") = "",
             "How a path (one of instruction_sets(), the best without one) makes multiply-adds of "
             "float32, bfloat16 and int8, by name, and how many each thread makes in a round.");
  module.def(
      "multiply_seconds", &checked_multiply_seconds, py::arg("cores"), py::arg("kind"),
      py::arg("rounds"), py::arg("path") = "",
      "Seconds in which a thread on each core makes `rounds` rounds of the path's multiplier "
      "of that index. Releases the GIL.");
}

}  // namespace fastgen
