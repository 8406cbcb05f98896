// 64-bit checksums of memory: XXH64 (https://github.com/Cyan4973/xxHash, the specification in
// doc/xxhash_spec.md), which depends on every byte and on its place.

#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace fastgen {

struct MemorySpan {
  const void* data;
  std::size_t bytes;
};

std::uint64_t xxh64(MemorySpan span);

// sums[i] is the checksum of spans[i]: that of the checksums of its pieces, in their order. The
// pieces are of a fixed size and shared among threads, whose number changes no sum.
void checksums(const MemorySpan* spans, int num_spans, int num_threads, std::uint64_t* sums);

// The same of memory that is not filled yet: `fill` fills a piece, on the thread that then sums it,
// while it is in that core's cache. False if a piece could not be filled; `sums` mean nothing then.
bool filled_checksums(const MemorySpan* spans, int num_spans, int num_threads,
                      const std::function<bool(const MemorySpan&)>& fill, std::uint64_t* sums);

}  // namespace fastgen
