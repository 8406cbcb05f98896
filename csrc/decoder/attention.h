// Attention of one layer over block tables: new keys and values go in, then every query looks at
// the keys up to its own. Online softmax (Milakov and Gimelshein, 2018) over a row's blocks in
// order, so that a query's result does not depend on what else is computed.

#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "decoder/kv_blocks.h"
#include "decoder/kv_ranges.h"

namespace fastgen {

// A step's rows, as StepBatch describes them (fastgen/decoders/interface.py).
struct StepRows {
  int num_tokens, num_rows, table_width;
  const std::int32_t *token_ids, *positions, *row_starts, *cache_lens, *block_tables;
};

// What the layers of a step share: which queries are attended to together.
class AttentionPlan {
 public:
  AttentionPlan(const StepRows& rows, int num_heads, int max_tile_rows);

  // Tokens [first, first + count) of a row's new ones, for one head.
  struct Task {
    int row, head, first, count;
  };
  int num_tasks() const { return starts_.back(); }
  // Every row has one task for each head.
  bool one_tile_a_row() const { return one_tile_a_row_; }
  Task task(int index) const;

 private:
  const StepRows& rows_;
  int num_heads_, max_tile_rows_;
  std::vector<int> starts_;  // (rows + 1) of each row's tasks
  bool one_tile_a_row_ = true;
};

struct AttentionLayer {
  int layer;
  float scale;       // on scores
  const float* qkv;  // (tokens, 3 * hidden), `qkv_stride` floats apart
  std::size_t qkv_stride;
  // Scratch for qkv in bfloat16, each head padded with a zero to whole pairs, `rounded_stride`
  // apart: queries as inputs of a tile, in room for floats; then keys, then values. Or for codes of
  // 16 and 8 bits: queries and their scales, then keys, then values.
  std::uint16_t* rounded;
  std::size_t rounded_stride;
  const KvRanges* ranges;  // of keys and values of 8 bits
  float* outputs;          // (tokens, hidden), heads side by side, `output_stride` floats apart
  std::size_t output_stride;
};

void attend(const StepRows& rows, const AttentionPlan& plan, const AttentionLayer& layer,
            const KvBlocks& blocks, const DecoderKernels& kernels, int num_threads);

}  // namespace fastgen
