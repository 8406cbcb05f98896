// A decoder's packed weights as bytes: of a file, and to be written to one.

#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "common/arena.h"
#include "decoder/cpu_decoder.h"

namespace fastgen {

// A part of a file: its descriptor, and where the part begins.
using FilePart = std::pair<int, std::size_t>;

// Memory for the weights: new, or a file's, which holds them packed. Raises OSError if that cannot
// be mapped.
Arena weight_memory(const DecoderShape& shape, const std::optional<FilePart>& mapped);

// Of each section of the weights.
std::vector<std::uint64_t> weight_checksums(const CpuDecoder& decoder);

// Takes all weights from a file, and returns their checksums; none if it could not be read.
std::vector<std::uint64_t> read_weights(CpuDecoder& decoder, const FilePart& part);

void bind_packed_weights(pybind11::module_& module);

}  // namespace fastgen
