// Numbers for the drivers, the same wherever they run: no function of a library makes them.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>

#include "common/checksum.h"
#include "decoder/decoder_kernels.h"

class Random {
 public:
  explicit Random(unsigned seed) : generator_(seed) {}

  int below(int bound) { return static_cast<int>(generator_() % bound); }
  float value() { return static_cast<float>(below(1 << 24) - (1 << 23)) * 0x1p-23f; }  // [-1, 1)

 private:
  std::mt19937 generator_;
};

// For tiles of which nothing is to be fetched.
inline fastgen::Fetch no_fetch() {
  static const char columns[4 * fastgen::kPanel] = {};
  return {columns, 0};
}

inline bool near(double found, double wanted, double tolerance) {
  return std::fabs(found - wanted) <= tolerance;
}

template <typename Values>
unsigned long long checksum(const Values& values) {
  return fastgen::xxh64({values.data(), values.size() * sizeof(*values.data())});
}

// Bytes of four codes, which a path may keep wider.
inline int code_bytes(const fastgen::DecoderKernels& kernels) {
  const float values[] = {0, 255, 3, 7}, ones[] = {1, 1, 1, 1};
  std::uint8_t codes[8];
  std::fill(codes, codes + 8, std::uint8_t{0xa5});
  kernels.quantize(values, ones, 4, codes);
  return std::count(codes + 4, codes + 8, 0xa5) == 4 ? 4 : 8;
}
