// 16-bit floats as bits: how one number is widened and rounded. Nothing here knows NaN: weights are
// checked to be finite before they come here.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace fastgen {

inline float float_of_bits(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline std::uint32_t bits_of_float(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float widen_bfloat16(std::uint16_t half) {
  return float_of_bits(static_cast<std::uint32_t>(half) << 16);
}

// To the nearest, ties to even.
inline std::uint16_t round_to_bfloat16(float value) {
  const std::uint32_t bits = bits_of_float(value);
  return static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// The exponent is moved by a product with 2^112, which is exact for subnormal halves, too.
inline float widen_float16(std::uint16_t half) {
  const float magnitude = float_of_bits((half & 0x7fffu) << 13) * 0x1p112f;
  return half & 0x8000 ? -magnitude : magnitude;
}

// To the nearest, ties to even; 0x7c00 (infinity) where that is beyond 65504.
inline std::uint16_t round_to_float16(float value) {
  const std::uint32_t sign = (bits_of_float(value) >> 16) & 0x8000;
  const float magnitude = std::fabs(value);
  if (magnitude >= 65520) return static_cast<std::uint16_t>(sign | 0x7c00);
  // Below 2^-14 a half has steps of 2^-24; above, 10 bits after the leading one.
  const float smallest_normal = 0x1p-14f;
  std::uint32_t half;
  if (magnitude < smallest_normal) {
    half = static_cast<std::uint32_t>(std::nearbyint(magnitude * 0x1p24f));
  } else {
    const std::uint32_t bits = bits_of_float(magnitude);
    half = ((bits + 0xfff + ((bits >> 13) & 1)) >> 13) - (112u << 10);
  }
  return static_cast<std::uint16_t>(sign | half);
}

inline bool is_finite_float16(std::uint16_t half) { return (half & 0x7c00) != 0x7c00; }

}  // namespace fastgen
