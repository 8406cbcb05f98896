#include "bindings/packed_weights.h"

#include <pybind11/stl.h>

#include <cerrno>

#include "bindings/decoder_shape.h"
#include "common/checksum.h"
#include "common/file_reading.h"

namespace py = pybind11;

namespace fastgen {

namespace {

std::vector<std::pair<std::size_t, std::size_t>> sections_of(const py::dict& given) {
  std::vector<std::pair<std::size_t, std::size_t>> sections;
  for (const WeightSection& section : CpuDecoder::weight_sections(shape_of(given))) {
    sections.emplace_back(section.offset, section.bytes);
  }
  return sections;
}

std::vector<MemorySpan> spans_of(const CpuDecoder& decoder) {
  std::vector<MemorySpan> spans;
  for (const WeightSection& section : CpuDecoder::weight_sections(decoder.shape())) {
    spans.push_back({decoder.weights() + section.offset, section.bytes});
  }
  return spans;
}

}  // namespace

Arena weight_memory(const DecoderShape& shape, const std::optional<FilePart>& mapped) {
  const std::size_t bytes = CpuDecoder::weight_bytes(shape);
  if (!mapped) return Arena(bytes);
  Arena memory;
  int error = 0;
  {
    const py::gil_scoped_release released;  // all of the file is read
    memory = Arena::of_file(mapped->first, mapped->second, bytes);
    error = errno;
  }
  if (memory.data() == nullptr) {
    errno = error;
    PyErr_SetFromErrno(PyExc_OSError);
    throw py::error_already_set();
  }
  return memory;
}

std::vector<std::uint64_t> weight_checksums(const CpuDecoder& decoder) {
  const std::vector<MemorySpan> spans = spans_of(decoder);
  std::vector<std::uint64_t> sums(spans.size());
  checksums(spans.data(), static_cast<int>(spans.size()), decoder.num_threads(), sums.data());
  return sums;
}

std::vector<std::uint64_t> read_weights(CpuDecoder& decoder, const FilePart& part) {
  const std::vector<MemorySpan> spans = spans_of(decoder);
  std::vector<std::uint64_t> sums(spans.size());
  const auto read = [&](const MemorySpan& piece) {
    const std::size_t at = static_cast<const char*>(piece.data) - decoder.weights();
    return read_at(part.first, part.second + at, decoder.weights() + at, piece.bytes);
  };
  const bool whole = filled_checksums(spans.data(), static_cast<int>(spans.size()),
                                      decoder.num_threads(), read, sums.data());
  if (!whole) sums.clear();
  return sums;
}

void bind_packed_weights(py::module_& module) {
  module.def("packed_layout", &packed_layout, "Names how packed weights lie in memory.");
  module.def("weight_sections", &sections_of, py::arg("shape"),
             "Offset and bytes of each piece of a CpuDecoder's packed weights, in order.");
}

}  // namespace fastgen
