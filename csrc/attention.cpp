#include "attention.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "parallel.h"

namespace fastgen {

namespace {

int num_new(const StepRows& rows, int row) {
  return rows.row_starts[row + 1] - rows.row_starts[row];
}

int block_of(const StepRows& rows, int row, int index) {
  return rows.block_tables[static_cast<std::size_t>(row) * rows.table_width + index];
}

// A head's queries, keys and values of a row's new tokens, put where attention wants them.
void cache_head(const StepRows& rows, int row, int head, const AttentionLayer& layer,
                const KvBlocks& blocks, const DecoderKernels& kernels) {
  const KvShape& shape = blocks.shape();
  const int hidden = shape.num_heads * shape.head_dim, at = head * shape.head_dim;
  for (int index = 0; index < num_new(rows, row); ++index) {
    const int token = rows.row_starts[row] + index, cached_at = rows.cache_lens[row] + index;
    const int block = block_of(rows, row, cached_at / kBlockTokens);
    const int slot = cached_at % kBlockTokens;
    const float* const query = layer.qkv + token * layer.qkv_stride + at;
    if (shape.arithmetic == Arithmetic::kFloat32) {
      blocks.write(block, layer.layer, head, slot, query + hidden, query + 2 * hidden);
      continue;
    }
    std::uint16_t* const rounded =
        layer.rounded + token * layer.rounded_stride + head * shape.padded_dim();
    const int part = shape.num_heads * shape.padded_dim();
    for (int which = 0; which < 3; ++which) {
      kernels.round_bfloat16(query + which * hidden, shape.head_dim, rounded + which * part);
    }
    blocks.write(block, layer.layer, head, slot, rounded + part, rounded + 2 * part);
  }
}

// One head's attention for the queries of a tile: scores of some blocks, their weights, the
// weighted values.
class TileAttention {
 public:
  static constexpr int kBlocksAtOnce = 4;  // whose scores a processor can work on side by side

  TileAttention(const KvBlocks& blocks, const AttentionLayer& layer, const DecoderKernels& kernels,
                int head, int count)
      : blocks_(blocks),
        shape_(blocks.shape()),
        layer_(layer),
        kernels_(kernels),
        tile_(kernels.tiles[static_cast<int>(shape_.arithmetic)]),
        head_(head),
        count_(count) {
    std::fill(softmax_.highest, softmax_.highest + kMaxTileRows,
              -std::numeric_limits<float>::infinity());
    std::fill(softmax_.total, softmax_.total + kMaxTileRows, 0.0f);
  }

  void score(int index, int block, const void* queries, std::size_t stride) {
    tile_(queries, stride, count_, blocks_.keys(block, layer_.layer, head_), shape_.key_steps(),
          scores_[index]);
  }

  // `visible`: of the block's keys, to the first query; the next ones see one more each.
  void add(int index, int block, int visible, float* outputs) {
    kernels_.weigh_scores(scores_[index], count_, layer_.scale, visible, softmax_, weights_);
    const void* weights = weights_;
    std::size_t weight_stride = kPanel * sizeof(float);
    if (shape_.arithmetic == Arithmetic::kBFloat16) {
      kernels_.round_bfloat16(weights_, count_ * kPanel, rounded_);
      weights = rounded_;
      weight_stride = kPanel * sizeof(std::uint16_t);
    }
    const int tokens = std::clamp(visible + count_ - 1, 0, kBlockTokens);
    const char* values = blocks_.values(block, layer_.layer, head_);
    for (int d = 0; d < shape_.head_dim; d += kPanel, values += shape_.value_panel_bytes()) {
      tile_(weights, weight_stride, count_, values, num_steps(shape_.arithmetic, tokens), sums_);
      if (visible < tokens && has_nan()) {
        for (int row = 0; row < count_; ++row) {
          sum_visible(static_cast<const char*>(weights) + row * weight_stride, values,
                      std::clamp(visible + row, 0, kBlockTokens), sums_ + row * kPanel);
        }
      }
      kernels_.rescale_and_add(sums_, count_, softmax_.rescale,
                               std::min(kPanel, shape_.head_dim - d), outputs + d,
                               layer_.output_stride);
    }
  }

  void divide(float* outputs) {
    for (int row = 0; row < count_; ++row) {
      kernels_.scale(1 / softmax_.total[row], shape_.head_dim,
                     outputs + row * layer_.output_stride);
    }
  }

 private:
  bool has_nan() const {
    float sum = 0;
    for (int at = 0; at < count_ * kPanel; ++at) sum += sums_[at] * 0;
    return !(sum == 0);
  }

  // One query's weighted values of its `visible` tokens alone: a value behind them that is NaN or
  // infinite would not vanish with a weight of 0.
  void sum_visible(const void* weights, const char* values, int visible, float* sums) {
    alignas(kCacheLine) char copy[kBlockTokens * kPanel * sizeof(float)];
    std::memcpy(copy, values, shape_.value_panel_bytes());
    if (shape_.arithmetic == Arithmetic::kBFloat16 && visible % 2 != 0) {
      auto* const pairs = reinterpret_cast<std::uint16_t*>(copy) + visible / 2 * kPanel * 2;
      for (int column = 0; column < kPanel; ++column) pairs[2 * column + 1] = 0;
    }
    tile_(weights, 0, 1, copy, num_steps(shape_.arithmetic, visible), sums);
  }

  const KvBlocks& blocks_;
  const KvShape& shape_;
  const AttentionLayer& layer_;
  const DecoderKernels& kernels_;
  Tile tile_;
  int head_, count_;
  Softmax softmax_;
  alignas(kCacheLine) float scores_[kBlocksAtOnce][kMaxTileRows * kPanel];
  alignas(kCacheLine) float weights_[kMaxTileRows * kPanel];
  alignas(kCacheLine) float sums_[kMaxTileRows * kPanel];
  alignas(kCacheLine) std::uint16_t rounded_[kMaxTileRows * kPanel];
};

void attend_tile(const StepRows& rows, const AttentionPlan::Task& task, const AttentionLayer& layer,
                 const KvBlocks& blocks, const DecoderKernels& kernels) {
  const KvShape& shape = blocks.shape();
  const int token = rows.row_starts[task.row] + task.first;
  const int at = task.head * shape.head_dim;
  const void* queries = layer.qkv + token * layer.qkv_stride + at;
  std::size_t stride = layer.qkv_stride * sizeof(float);
  if (shape.arithmetic == Arithmetic::kBFloat16) {
    queries = layer.rounded + token * layer.rounded_stride + task.head * shape.padded_dim();
    stride = layer.rounded_stride * sizeof(std::uint16_t);
  }
  float* const outputs = layer.outputs + token * layer.output_stride + at;
  for (int row = 0; row < task.count; ++row) {
    std::memset(outputs + row * layer.output_stride, 0, shape.head_dim * sizeof(float));
  }
  const int visible = rows.cache_lens[task.row] + task.first + 1;  // to the first query
  const int num_blocks = (visible + task.count - 2) / kBlockTokens + 1;
  TileAttention attention(blocks, layer, kernels, task.head, task.count);
  for (int first = 0; first < num_blocks; first += TileAttention::kBlocksAtOnce) {
    const int count = std::min(TileAttention::kBlocksAtOnce, num_blocks - first);
    for (int at = 0; at < count; ++at) {
      attention.score(at, block_of(rows, task.row, first + at), queries, stride);
    }
    for (int at = 0; at < count; ++at) {
      attention.add(at, block_of(rows, task.row, first + at), visible - (first + at) * kBlockTokens,
                    outputs);
    }
  }
  attention.divide(outputs);
}

}  // namespace

AttentionPlan::AttentionPlan(const StepRows& rows, int num_heads, int max_tile_rows)
    : rows_(rows), num_heads_(num_heads), max_tile_rows_(max_tile_rows), starts_(1, 0) {
  for (int row = 0; row < rows.num_rows; ++row) {
    const int tiles = (num_new(rows, row) + max_tile_rows - 1) / max_tile_rows;
    starts_.push_back(starts_.back() + tiles * num_heads);
    one_tile_a_row_ = one_tile_a_row_ && tiles == 1;
  }
}

// A head's tiles stand together: they read the same keys.
AttentionPlan::Task AttentionPlan::task(int index) const {
  const auto behind = std::upper_bound(starts_.begin(), starts_.end(), index);
  const int row = static_cast<int>(behind - starts_.begin()) - 1;
  const int tiles = (starts_[row + 1] - starts_[row]) / num_heads_;
  const int head = (index - starts_[row]) / tiles, tile = (index - starts_[row]) % tiles;
  const int first = tile * max_tile_rows_;
  return {row, head, first, std::min(max_tile_rows_, num_new(rows_, row) - first)};
}

void attend(const StepRows& rows, const AttentionPlan& plan, const AttentionLayer& layer,
            const KvBlocks& blocks, const DecoderKernels& kernels, int num_threads) {
  const int num_heads = blocks.shape().num_heads;
  if (plan.one_tile_a_row()) {  // then nobody else waits for a task's keys
    parallel_rows(rows.num_rows, num_heads, num_threads, [&](int begin, int end) {
      for (int index = begin; index < end; ++index) {
        const AttentionPlan::Task task = plan.task(index);
        cache_head(rows, task.row, task.head, layer, blocks, kernels);
        attend_tile(rows, task, layer, blocks, kernels);
      }
    });
    return;
  }
  parallel_for(rows.num_rows * num_heads, num_threads, [&](int begin, int end) {
    for (int index = begin; index < end; ++index) {
      cache_head(rows, index / num_heads, index % num_heads, layer, blocks, kernels);
    }
  });
  parallel_for(plan.num_tasks(), num_threads, [&](int begin, int end) {
    for (int index = begin; index < end; ++index) {
      attend_tile(rows, plan.task(index), layer, blocks, kernels);
    }
  });
}

}  // namespace fastgen
