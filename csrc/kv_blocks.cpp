#include "kv_blocks.h"

#include <cstring>
#include <vector>

#include "number_formats.h"

namespace fastgen {

namespace {

// Like the kernels' rounding; NaN stays NaN.
std::uint16_t rounded(float value) {
  return value == value ? round_to_bfloat16(value) : std::uint16_t{0x7fc0};
}

}  // namespace

void KvBlocks::write(int block, int layer, int head, int slot, const float* key,
                     const float* value) const {
  char* const keys_place = keys(block, layer, head);
  char* const values_place = values(block, layer, head);
  if (shape_.arithmetic == Arithmetic::kFloat32) {
    auto* const to_keys = reinterpret_cast<float*>(keys_place) + slot;
    for (int d = 0; d < shape_.head_dim; ++d) to_keys[d * kPanel] = key[d];
    for (int d = 0; d < shape_.head_dim; d += kPanel) {
      auto* const panel =
          reinterpret_cast<float*>(values_place + d / kPanel * shape_.value_panel_bytes());
      const int count = shape_.head_dim - d < kPanel ? shape_.head_dim - d : kPanel;
      std::memcpy(panel + slot * kPanel, value + d, count * sizeof(float));
    }
    return;
  }
  // Pairs of dimensions for keys, of tokens for values; a pair's second token is zero until it
  // comes.
  auto* const to_keys = reinterpret_cast<std::uint16_t*>(keys_place) + slot * 2;
  for (int d = 0; d < shape_.head_dim; ++d) to_keys[d / 2 * kPanel * 2 + d % 2] = rounded(key[d]);
  for (int d = 0; d < shape_.head_dim; ++d) {
    auto* const panel =
        reinterpret_cast<std::uint16_t*>(values_place + d / kPanel * shape_.value_panel_bytes());
    std::uint16_t* const pair = panel + (slot / 2 * kPanel + d % kPanel) * 2;
    pair[slot % 2] = rounded(value[d]);
    if (slot % 2 == 0) pair[1] = 0;
  }
}

void KvBlocks::grow(int num_blocks) {
  if (num_blocks <= num_blocks_) return;
  Arena larger(shape_.block_bytes() * num_blocks);
  std::memcpy(larger.data(), arena_.data(), shape_.block_bytes() * num_blocks_);
  arena_ = std::move(larger);
  num_blocks_ = num_blocks;
}

void KvBlocks::copy(const std::int32_t (*pairs)[2], int num_pairs) {
  const std::size_t bytes = shape_.block_bytes();
  std::vector<char> read(bytes * num_pairs);
  for (int pair = 0; pair < num_pairs; ++pair) {
    std::memcpy(read.data() + pair * bytes, arena_.data() + pairs[pair][0] * bytes, bytes);
  }
  for (int pair = 0; pair < num_pairs; ++pair) {
    std::memcpy(arena_.data() + pairs[pair][1] * bytes, read.data() + pair * bytes, bytes);
  }
}

}  // namespace fastgen
