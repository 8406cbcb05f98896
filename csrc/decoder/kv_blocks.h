// Keys and values in blocks of 32 tokens, laid out as panels, so that attention is made of tiles.
//
// A block holds all layers and heads, one after another; of each head first the keys, then the
// values. Keys are one panel whose columns are the block's tokens and whose inputs are the head's
// dimensions; values are panels whose columns are dimensions and whose inputs are tokens. Before
// keys of 8 bits stand their scales, one for each token, and then those of the values.

#pragma once

#include <cstddef>
#include <cstdint>

#include "common/arena.h"
#include "decoder/decoder_kernels.h"

namespace fastgen {

constexpr int kBlockTokens = 32;
static_assert(kBlockTokens == kPanel, "a block's tokens are a panel's columns");

struct KvShape {
  Arithmetic arithmetic;  // kFloat32, kBFloat16 or kInt8WideInputs
  int num_layers, num_heads, head_dim;

  int padded_dim() const { return head_dim + head_dim % 2; }  // whole pairs
  int key_steps() const { return num_steps(arithmetic, head_dim); }
  int value_panels() const { return num_panels(head_dim); }
  std::size_t step_bytes() const { return step_shape(arithmetic).bytes; }
  std::size_t value_panel_bytes() const { return num_steps(arithmetic, kPanel) * step_bytes(); }
  bool has_scales() const { return arithmetic == Arithmetic::kInt8WideInputs; }
  std::size_t scale_bytes() const { return has_scales() ? 2 * kPanel * sizeof(float) : 0; }
  std::size_t key_bytes() const { return key_steps() * step_bytes(); }
  std::size_t head_bytes() const {
    return scale_bytes() + key_bytes() + value_panels() * value_panel_bytes();
  }
  std::size_t block_bytes() const { return head_bytes() * num_heads * num_layers; }
};

class KvBlocks {
 public:
  KvBlocks(const KvShape& shape, int num_blocks)
      : shape_(shape), num_blocks_(num_blocks), arena_(shape.block_bytes() * num_blocks) {}

  const KvShape& shape() const { return shape_; }
  int num_blocks() const { return num_blocks_; }

  char* keys(int block, int layer, int head) const {
    return this->block(block) + shape_.scale_bytes() +
           (static_cast<std::size_t>(layer) * shape_.num_heads + head) * shape_.head_bytes();
  }
  // Of the tokens of the block whose keys these are: (32) of keys, then (32) of values.
  float* scales(char* keys) const { return reinterpret_cast<float*>(keys - shape_.scale_bytes()); }
  char* values(int block, int layer, int head) const {
    return keys(block, layer, head) + shape_.key_bytes();
  }

  // One token's key and value of a head, (head_dim) of floats or bfloat16, at `slot` of a block.
  // Slots are written in order: after the last one only zeros are read, whatever the block
  // held before.
  void write(int block, int layer, int head, int slot, const float* key, const float* value) const;
  void write(int block, int layer, int head, int slot, const std::uint16_t* key,
             const std::uint16_t* value) const;
  // Codes, and what they are multiplied with; a key has padded_dim() of them. What stands after the
  // last slot is not looked at: the codes of its weights are 0.
  void write(int block, int layer, int head, int slot, const std::int8_t* key, float key_scale,
             const std::int8_t* value, float value_scale) const;

  void grow(int num_blocks);
  // Pairs are (from, to); all are read as they were before any is written.
  void copy(const std::int32_t (*pairs)[2], int num_pairs, int num_threads);

 private:
  char* block(int index) const { return arena_.data() + index * shape_.block_bytes(); }
  void copy_staged(const std::int32_t (*pairs)[2], int num_pairs);

  KvShape shape_;
  int num_blocks_;
  Arena arena_;
};

}  // namespace fastgen
