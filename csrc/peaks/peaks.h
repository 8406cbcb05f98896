// What this machine can do at most: bytes read, and multiply-adds made, by threads together.
//
// Memory is read with the best instructions of the processor. Numbers are multiplied with those of
// a path, as its kernels do (decoder_dots.inc). Each thread is held on its core, where the system
// does that.

#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "common/arena.h"

namespace fastgen {

// A way of reading memory.
struct PeakReader {
  const char* name;
  void (*once)(const char* memory, std::size_t bytes);
};

constexpr int kNumPeakReaders = 8;
constexpr std::size_t kPeakReadUnit = 8 * kCacheLine;  // a line for each of up to 8 streams

const std::array<PeakReader, kNumPeakReaders>& peak_readers();

// Memory to read: for each core a buffer, which is first touched there.
class PeakBuffers {
 public:
  // bytes_each: a multiple of kPeakReadUnit.
  PeakBuffers(std::vector<int> cores, std::size_t bytes_each);

  // Seconds in which all threads read their buffers `times` times.
  double read_seconds(const PeakReader& reader, int times) const;

 private:
  std::vector<int> cores_;
  std::size_t bytes_each_;
  std::vector<Arena> buffers_;
};

// A way of multiplying and adding, in registers alone.
struct PeakMultiplier {
  const char* how;
  int macs;  // of a round
  void (*run)(std::int64_t rounds);
};

constexpr int kNumPeakMultipliers = 3;

// Of float32, bfloat16 and int8: what a path, one of instruction_sets(), multiplies with.
std::array<PeakMultiplier, kNumPeakMultipliers> peak_multipliers(const std::string& path);

// Seconds in which a thread on each core makes `rounds` rounds.
double multiply_seconds(const std::vector<int>& cores, const PeakMultiplier& multiplier,
                        std::int64_t rounds);

}  // namespace fastgen
