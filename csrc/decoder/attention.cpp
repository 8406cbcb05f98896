#include "decoder/attention.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "common/parallel.h"

namespace fastgen {

namespace {

int num_new(const StepRows& rows, int row) {
  return rows.row_starts[row + 1] - rows.row_starts[row];
}

int block_of(const StepRows& rows, int row, int index) {
  return rows.block_tables[static_cast<std::size_t>(row) * rows.table_width + index];
}

// A head's query as inputs of kBFloat16's tile.
char* rounded_query(int token, int head, const AttentionLayer& layer, const KvShape& shape,
                    const DecoderKernels& kernels) {
  return reinterpret_cast<char*>(layer.rounded + token * layer.rounded_stride) +
         head * shape.padded_dim() * kernels.bfloat16_input_bytes;
}

// One token's codes of a head.
struct HeadCodes {
  HeadCodes(int token, int head, const AttentionLayer& layer, const KvShape& shape) {
    const std::size_t all = static_cast<std::size_t>(shape.num_heads) * shape.padded_dim();
    const std::size_t at = static_cast<std::size_t>(head) * shape.padded_dim();
    std::uint16_t* const row = layer.rounded + token * layer.rounded_stride;
    query = reinterpret_cast<std::int16_t*>(row) + at;
    auto* const scales = reinterpret_cast<float*>(row + all);
    query_scale = scales + head;
    key = reinterpret_cast<std::int8_t*>(scales + shape.num_heads) + at;
    value = key + all;
  }

  std::int16_t* query;  // (padded dim)
  float* query_scale;
  std::int8_t *key, *value;  // (padded dim) each
};

// Up to which all products with a key, summed, fit 32 bits.
int highest_query_code(const KvShape& shape) {
  return std::min(32767, std::numeric_limits<std::int32_t>::max() / 127 / shape.padded_dim());
}

void cache_codes(int token, int head, int block, int slot, const AttentionLayer& layer,
                 const KvBlocks& blocks, const DecoderKernels& kernels) {
  const KvShape& shape = blocks.shape();
  const int dim = shape.head_dim, hidden = shape.num_heads * dim, at = head * dim;
  const float* const query = layer.qkv + token * layer.qkv_stride + at;
  const KvRange &keys = layer.ranges->keys, &values = layer.ranges->values;
  const HeadCodes codes(token, head, layer, shape);
  *codes.query_scale =
      kernels.quantize_int16(query, keys.factors + at, dim, highest_query_code(shape), codes.query);
  const float key_scale =
      kernels.quantize_int8(query + hidden, keys.centers + at, keys.inverses + at, dim, codes.key);
  const float value_scale = kernels.quantize_int8(query + 2 * hidden, values.centers + at,
                                                  values.inverses + at, dim, codes.value);
  if (dim % 2 != 0) codes.query[dim] = codes.key[dim] = 0;
  blocks.write(block, layer.layer, head, slot, codes.key, key_scale, codes.value, value_scale);
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
    if (shape.has_scales()) {
      cache_codes(token, head, block, slot, layer, blocks, kernels);
      continue;
    }
    if (shape.arithmetic == Arithmetic::kFloat32) {
      blocks.write(block, layer.layer, head, slot, query + hidden, query + 2 * hidden);
      continue;
    }
    kernels.round_bfloat16_inputs(query, shape.head_dim,
                                  rounded_query(token, head, layer, shape, kernels));
    const int part = shape.num_heads * shape.padded_dim();
    std::uint16_t* const keys =
        layer.rounded + token * layer.rounded_stride + 2 * part + head * shape.padded_dim();
    std::uint16_t* const values = keys + part;
    kernels.round_bfloat16(query + hidden, shape.head_dim, keys);
    kernels.round_bfloat16(query + 2 * hidden, shape.head_dim, values);
    blocks.write(block, layer.layer, head, slot, keys, values);
  }
}

struct Queries {
  const void* data;
  std::size_t stride;  // bytes
};

Queries queries_of(int token, int head, const AttentionLayer& layer, const KvShape& shape,
                   const DecoderKernels& kernels) {
  if (shape.arithmetic == Arithmetic::kBFloat16) {
    return {rounded_query(token, head, layer, shape, kernels),
            layer.rounded_stride * sizeof(std::uint16_t)};
  }
  if (shape.has_scales()) {
    return {HeadCodes(token, head, layer, shape).query,
            layer.rounded_stride * sizeof(std::uint16_t)};
  }
  return {layer.qkv + token * layer.qkv_stride + head * shape.head_dim,
          layer.qkv_stride * sizeof(float)};
}

// One head's attention for the queries of a tile: scores of some blocks, their weights, the
// weighted values.
class TileAttention {
 public:
  static constexpr int kBlocksAtOnce = 4;  // whose scores a processor can work on side by side

  // Of `count` queries of a head, the first of which is token `token` of the step.
  TileAttention(const KvBlocks& blocks, const AttentionLayer& layer, const DecoderKernels& kernels,
                int token, int head, int count)
      : blocks_(blocks),
        shape_(blocks.shape()),
        layer_(layer),
        kernels_(kernels),
        tile_(kernels.tiles[static_cast<int>(shape_.arithmetic)]),
        head_(head),
        count_(count) {
    for (int row = 0; shape_.has_scales() && row < count; ++row) {
      query_scales_[row] = layer.scale * *HeadCodes(token + row, head, layer, shape_).query_scale;
    }
    std::fill(softmax_.highest, softmax_.highest + kMaxTileRows,
              -std::numeric_limits<float>::infinity());
    std::fill(softmax_.total, softmax_.total + kMaxTileRows, 0.0f);
  }

  // `ahead`: how far after this block the block to be fetched lies.
  void score(int index, char* keys, const Queries& queries, std::ptrdiff_t ahead) {
    for (std::size_t at = 0; at < shape_.scale_bytes(); at += kCacheLine) {
      __builtin_prefetch(keys - shape_.scale_bytes() + ahead + at, 0, kSecondLevel);
    }
    tile_(queries.data, queries.stride, count_, keys, shape_.key_steps(), fetch(keys + ahead),
          scores_[index]);
  }

  // `visible`: of the block's values, to the first query; the next ones see one more each.
  void add(int index, char* keys, int visible, std::ptrdiff_t ahead, float* outputs) {
    if (shape_.has_scales()) return add_codes(index, keys, visible, ahead, outputs);
    const char* values = keys + shape_.key_bytes();
    kernels_.weigh_scores(scores_[index], count_, layer_.scale, visible, softmax_, weights_);
    const void* weights = weights_;
    std::size_t weight_stride = kPanel * sizeof(float);
    if (shape_.arithmetic == Arithmetic::kBFloat16) {
      kernels_.round_bfloat16_inputs(weights_, count_ * kPanel, rounded_);
      weights = rounded_;
      weight_stride = static_cast<std::size_t>(kPanel) * kernels_.bfloat16_input_bytes;
    }
    const int tokens = std::clamp(visible + count_ - 1, 0, kBlockTokens);
    for (int d = 0; d < shape_.head_dim; d += kPanel, values += shape_.value_panel_bytes()) {
      tile_(weights, weight_stride, count_, values, num_steps(shape_.arithmetic, tokens),
            fetch(values + ahead), sums_);
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
    const int at = head_ * shape_.head_dim;
    for (int row = 0; row < count_; ++row, outputs += layer_.output_stride) {
      const float factor = 1 / softmax_.total[row];
      if (shape_.has_scales()) {
        const KvRange& range = layer_.ranges->values;
        kernels_.restore(factor, range.factors + at, range.centers + at, shape_.head_dim, outputs);
      } else {
        kernels_.scale(factor, shape_.head_dim, outputs);
      }
    }
  }

 private:
  Fetch fetch(const char* from) const {
    return {from, static_cast<std::ptrdiff_t>(shape_.step_bytes())};
  }

  void add_codes(int index, char* keys, int visible, std::ptrdiff_t ahead, float* outputs) {
    const float* const scales = blocks_.scales(keys);
    float code_scales[kMaxTileRows];
    kernels_.weigh_int8_scores(scores_[index], count_, query_scales_, visible, scales,
                               scales + kPanel, softmax_, codes_, code_scales);
    const int tokens = std::clamp(visible + count_ - 1, 0, kBlockTokens);
    const char* values = keys + shape_.key_bytes();
    for (int d = 0; d < shape_.head_dim; d += kPanel, values += shape_.value_panel_bytes()) {
      tile_(codes_, kPanel * sizeof codes_[0], count_, values, num_steps(shape_.arithmetic, tokens),
            fetch(values + ahead), sums_);
      kernels_.rescale_and_add_int8(sums_, count_, softmax_.rescale, code_scales,
                                    std::min(kPanel, shape_.head_dim - d), outputs + d,
                                    layer_.output_stride);
    }
  }

  bool has_nan() const {
    float sum = 0;
    for (int at = 0; at < count_ * kPanel; ++at) sum += sums_[at] * 0;
    return !(sum == 0);
  }

  // One query's weighted values of its `visible` tokens alone: a value after them that is NaN or
  // infinite would not vanish with a weight of 0.
  void sum_visible(const void* weights, const char* values, int visible, float* sums) {
    alignas(kCacheLine) char copy[kBlockTokens * kPanel * sizeof(float)];
    std::memcpy(copy, values, shape_.value_panel_bytes());
    if (shape_.arithmetic == Arithmetic::kBFloat16 && visible % 2 != 0) {
      auto* const pairs = reinterpret_cast<std::uint16_t*>(copy) + visible / 2 * kPanel * 2;
      for (int column = 0; column < kPanel; ++column) pairs[2 * column + 1] = 0;
    }
    tile_(weights, 0, 1, copy, num_steps(shape_.arithmetic, visible), {copy, 0}, sums);
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
  alignas(kCacheLine) float rounded_[kMaxTileRows * kPanel];       // as inputs of kBFloat16's tile
  float query_scales_[kMaxTileRows];                               // of queries that are codes
  alignas(kCacheLine) std::int16_t codes_[kMaxTileRows * kPanel];  // of weights
};

// A task's keys, block by block; each block's values follow its keys.
class TaskKeys {
 public:
  TaskKeys(const StepRows& rows, const AttentionPlan::Task& task, int layer, const KvBlocks& blocks)
      : table_(rows.block_tables + static_cast<std::size_t>(task.row) * rows.table_width),
        num_blocks_((rows.cache_lens[task.row] + task.first + task.count - 1) / kBlockTokens + 1),
        layer_(layer),
        head_(task.head),
        blocks_(blocks) {}

  int num_blocks() const { return num_blocks_; }
  char* keys(int index) const { return blocks_.keys(table_[index], layer_, head_); }

  // From block `index` to the one that is read a group of blocks later: to be fetched meanwhile.
  std::ptrdiff_t ahead(int index, const TaskKeys& next) const {
    const int later = index + TileAttention::kBlocksAtOnce;
    if (later < num_blocks_) return keys(later) - keys(index);
    const int first = index % TileAttention::kBlocksAtOnce;
    return first < next.num_blocks_ ? next.keys(first) - keys(index) : 0;
  }

 private:
  const std::int32_t* table_;
  int num_blocks_, layer_, head_;
  const KvBlocks& blocks_;
};

// `next`: this thread's next task, if it has one.
void attend_tile(const StepRows& rows, const AttentionPlan::Task& task,
                 const AttentionPlan::Task& next, const AttentionLayer& layer,
                 const KvBlocks& blocks, const DecoderKernels& kernels) {
  const KvShape& shape = blocks.shape();
  const int token = rows.row_starts[task.row] + task.first;
  const Queries queries = queries_of(token, task.head, layer, shape, kernels);
  float* const outputs = layer.outputs + token * layer.output_stride + task.head * shape.head_dim;
  for (int row = 0; row < task.count; ++row) {
    std::memset(outputs + row * layer.output_stride, 0, shape.head_dim * sizeof(float));
  }
  const int visible = rows.cache_lens[task.row] + task.first + 1;  // to the first query
  const TaskKeys here(rows, task, layer.layer, blocks), after(rows, next, layer.layer, blocks);
  TileAttention attention(blocks, layer, kernels, token, task.head, task.count);
  for (int first = 0; first < here.num_blocks(); first += TileAttention::kBlocksAtOnce) {
    const int last = std::min(first + TileAttention::kBlocksAtOnce, here.num_blocks());
    for (int at = first; at < last; ++at) {
      attention.score(at - first, here.keys(at), queries, here.ahead(at, after));
    }
    for (int at = first; at < last; ++at) {
      attention.add(at - first, here.keys(at), visible - at * kBlockTokens, here.ahead(at, after),
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
  const auto after = std::upper_bound(starts_.begin(), starts_.end(), index);
  const int row = static_cast<int>(after - starts_.begin()) - 1;
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
        attend_tile(rows, task, plan.task(std::min(index + 1, end - 1)), layer, blocks, kernels);
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
      attend_tile(rows, plan.task(index), plan.task(std::min(index + 1, end - 1)), layer, blocks,
                  kernels);
    }
  });
}

}  // namespace fastgen
