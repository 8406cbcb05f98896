// 64-bit checksums of memory: XXH64 (https://github.com/Cyan4973/xxHash, the specification in
// doc/xxhash_spec.md), which depends on every byte and on its place.

#pragma once

#include <cstddef>
#include <cstdint>

namespace fastgen {

struct MemorySpan {
  const void* data;
  std::size_t bytes;
};

std::uint64_t xxh64(MemorySpan span);

// sums[i] is the checksum of spans[i]: that of the checksums of its pieces, in their order. The
// pieces are of a fixed size and shared among threads, whose number changes no sum.
void checksums(const MemorySpan* spans, int num_spans, int num_threads, std::uint64_t* sums);

}  // namespace fastgen
