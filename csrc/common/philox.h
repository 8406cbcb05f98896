// Philox4x32-10 (Salmon et al., SC 2011): a random generator that is a function of counter and key.

#pragma once

#include <array>
#include <cstdint>

namespace fastgen {

using Words4 = std::array<std::uint32_t, 4>;

inline Words4 philox4x32(Words4 counter, std::uint32_t key0, std::uint32_t key1) {
  constexpr std::uint64_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
  constexpr std::uint32_t kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;  // golden ratio, sqrt(3) - 1
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t product0 = kMultiplier0 * counter[0];
    const std::uint64_t product1 = kMultiplier1 * counter[2];
    counter = {static_cast<std::uint32_t>(product1 >> 32) ^ counter[1] ^ key0,
               static_cast<std::uint32_t>(product1),
               static_cast<std::uint32_t>(product0 >> 32) ^ counter[3] ^ key1,
               static_cast<std::uint32_t>(product0)};
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
  return counter;
}

// The uniform of the token at `position` of the row with `seed`: 53 bits, in [0, 1).
inline double uniform(std::uint64_t seed, std::uint64_t position) {
  const Words4 words =
      philox4x32({static_cast<std::uint32_t>(position), 0, 0, 0}, static_cast<std::uint32_t>(seed),
                 static_cast<std::uint32_t>(seed >> 32));
  const std::uint64_t bits = (std::uint64_t{words[0]} << 32 | words[1]) >> 11;
  return static_cast<double>(bits) * 0x1p-53;
}

}  // namespace fastgen
