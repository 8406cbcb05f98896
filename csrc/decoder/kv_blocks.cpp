#include "decoder/kv_blocks.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/parallel.h"

namespace fastgen {

void KvBlocks::write(int block, int layer, int head, int slot, const float* key,
                     const float* value) const {
  auto* const to_keys = reinterpret_cast<float*>(keys(block, layer, head)) + slot;
  for (int d = 0; d < shape_.head_dim; ++d) to_keys[d * kPanel] = key[d];
  char* panel = values(block, layer, head);
  for (int d = 0; d < shape_.head_dim; d += kPanel, panel += shape_.value_panel_bytes()) {
    const int count = std::min(kPanel, shape_.head_dim - d);
    std::memcpy(reinterpret_cast<float*>(panel) + slot * kPanel, value + d, count * sizeof(float));
  }
}

// Pairs of dimensions for keys, of tokens for values; a pair's second token is zero until it comes.
void KvBlocks::write(int block, int layer, int head, int slot, const std::uint16_t* key,
                     const std::uint16_t* value) const {
  auto* const to_keys = reinterpret_cast<std::uint32_t*>(keys(block, layer, head)) + slot;
  const int pairs = shape_.head_dim / 2;
  for (int pair = 0; pair < pairs; ++pair) {
    std::memcpy(&to_keys[pair * kPanel], key + 2 * pair, sizeof(std::uint32_t));
  }
  if (shape_.head_dim % 2 != 0) {  // a zero follows an odd head's last one
    const std::uint16_t last[2] = {key[2 * pairs], 0};
    std::memcpy(&to_keys[pairs * kPanel], last, sizeof last);
  }
  char* panel = values(block, layer, head);
  for (int d = 0; d < shape_.head_dim; d += kPanel, panel += shape_.value_panel_bytes()) {
    const int count = std::min(kPanel, shape_.head_dim - d);
    auto* const to = reinterpret_cast<std::uint16_t*>(panel) + slot / 2 * kPanel * 2;
    for (int at = 0; at < count; ++at) {
      const std::uint16_t first = slot % 2 == 0 ? value[d + at] : to[2 * at];
      to[2 * at] = first;
      to[2 * at + 1] = slot % 2 == 0 ? std::uint16_t{0} : value[d + at];
    }
  }
}

void KvBlocks::write(int block, int layer, int head, int slot, const std::int8_t* key,
                     float key_scale, const std::int8_t* value, float value_scale) const {
  char* const to_keys = keys(block, layer, head);
  scales(to_keys)[slot] = key_scale;
  scales(to_keys)[kPanel + slot] = value_scale;
  for (int d = 0; d < shape_.head_dim; d += 2) {  // pairs of dimensions
    std::memcpy(to_keys + (d / 2 * kPanel + slot) * 2, key + d, 2);
  }
  char* panel = values(block, layer, head);
  for (int d = 0; d < shape_.head_dim; d += kPanel, panel += shape_.value_panel_bytes()) {
    const int count = std::min(kPanel, shape_.head_dim - d);
    char* const to = panel + slot / 2 * kPanel * 2 + slot % 2;  // pairs of tokens
    for (int at = 0; at < count; ++at) to[2 * at] = static_cast<char>(value[d + at]);
  }
}

void KvBlocks::grow(int num_blocks) {
  if (num_blocks <= num_blocks_) return;
  Arena larger(shape_.block_bytes() * num_blocks);
  std::memcpy(larger.data(), arena_.data(), shape_.block_bytes() * num_blocks_);
  arena_ = std::move(larger);
  num_blocks_ = num_blocks;
}

void KvBlocks::copy(const std::int32_t (*pairs)[2], int num_pairs, int num_threads) {
  std::vector<bool> written(num_blocks_);
  for (int pair = 0; pair < num_pairs; ++pair) written[pairs[pair][1]] = true;
  for (int pair = 0; pair < num_pairs; ++pair) {
    if (written[pairs[pair][0]]) return copy_staged(pairs, num_pairs);
  }
  const int layers = shape_.num_layers;
  const std::size_t bytes = shape_.block_bytes() / layers;
  parallel_for(num_pairs * layers, num_threads, [&](int begin, int end) {
    for (int at = begin; at < end; ++at) {
      const auto& [from, to] = pairs[at / layers];
      const std::size_t offset = at % layers * bytes;
      std::memcpy(block(to) + offset, block(from) + offset, bytes);
    }
  });
}

// For pairs of which one reads what another writes.
void KvBlocks::copy_staged(const std::int32_t (*pairs)[2], int num_pairs) {
  const std::size_t bytes = shape_.block_bytes();
  std::vector<char> read(bytes * num_pairs);
  for (int pair = 0; pair < num_pairs; ++pair) {
    std::memcpy(read.data() + pair * bytes, block(pairs[pair][0]), bytes);
  }
  for (int pair = 0; pair < num_pairs; ++pair) {
    std::memcpy(block(pairs[pair][1]), read.data() + pair * bytes, bytes);
  }
}

}  // namespace fastgen
