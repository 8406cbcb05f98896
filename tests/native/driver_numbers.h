// Numbers for the drivers, the same wherever they run: no function of a library makes them.

#pragma once

#include <cmath>
#include <cstdint>
#include <random>
#include <string>

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

inline bool near(double found, double wanted, double tolerance) {
  return std::fabs(found - wanted) <= tolerance;
}

template <typename Values>
unsigned long long checksum(const Values& values) {
  return fastgen::xxh64({values.data(), values.size() * sizeof(*values.data())});
}

// Whether a path's int8 tile takes one code after the other. int8_driver.cpp checks those that
// arrange them in another way, too.
inline bool takes_plain_codes(const std::string& path) {
  return path != "avx2" && path != "avx512";
}

// What such a path takes off codes and zeros: see RowScale.
inline int code_shift(const fastgen::DecoderKernels& kernels) {
  const float zero = 0, one = 1;
  std::uint8_t code;
  return -kernels.quantize(&zero, &one, 1, &code).zero;
}
