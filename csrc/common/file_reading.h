// Reading a part of a file into memory.

#pragma once

#include <cstddef>

namespace fastgen {

// Fills `data` with the file's bytes from `offset` on; false where it ends before, or cannot be
// read. The file's own position stays where it is, so threads may share it.
bool read_at(int file, std::size_t offset, void* data, std::size_t bytes);

}  // namespace fastgen
