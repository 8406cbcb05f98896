#include "decoder/cpu_decoder.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "common/parallel.h"

namespace fastgen {

namespace {

// Counts changes of what a weight becomes, or where it lies, that the rest of packed_layout() does
// not show. tests/decoders/test_packed_weights.py finds one that was not counted.
constexpr int kPackingVersion = 1;

KvShape kv_shape(const DecoderShape& shape) {
  return {shape.attention, shape.num_layers, shape.num_heads, shape.hidden_size / shape.num_heads};
}

// How an embedding of its own is kept: like the weights, but where those are int8.
Arithmetic embedding_arithmetic(const DecoderShape& shape) {
  return shape.linear == Arithmetic::kInt8 ? Arithmetic::kBFloat16Weights : shape.linear;
}

// Floats of a row whose neighbours are to fall on other sets of a cache.
std::size_t row_stride(int count) {
  const std::size_t lines = round_up(count * sizeof(float), kCacheLine) / kCacheLine;
  return (lines | 1) * kCacheLine / sizeof(float);
}

bool is_little_endian() {
  const std::uint16_t one = 1;
  unsigned char first;
  std::memcpy(&first, &one, 1);
  return first == 1;
}

}  // namespace

std::string packed_layout() {
  std::string text = std::to_string(kPackingVersion) + "/" + std::to_string(kPanel);
  for (int at = 0; at < kNumWeightArithmetics; ++at) {
    const StepShape shape = step_shape(static_cast<Arithmetic>(at));
    text += "/" + std::to_string(shape.values) + "x" + std::to_string(shape.bytes);
  }
  return text + (is_little_endian() ? "/little" : "/big");
}

void CpuDecoder::Weights::lay_out(const DecoderShape& shape, Cursor& cursor) {
  const int hidden = shape.hidden_size, inner = shape.inner_size;
  const auto take_norm = [&] {
    float* const gain = cursor.take<float>(hidden);
    return Norm{gain, cursor.take<float>(hidden)};
  };
  layers.resize(shape.num_layers);
  for (Layer& layer : layers) {
    layer.norms[0] = take_norm();
    layer.norms[1] = take_norm();
    PackedLinear* const projections = layer.projections;
    projections[0].lay_out(cursor, shape.linear, hidden, 3 * hidden);
    projections[1].lay_out(cursor, shape.linear, hidden, hidden);
    projections[2].lay_out(cursor, shape.linear, hidden, inner);
    projections[3].lay_out(cursor, shape.linear, inner, hidden);
  }
  last_norm = take_norm();
  head.lay_out(cursor, shape.linear, hidden, shape.vocab_size);
  positions = cursor.take<float>(static_cast<std::size_t>(shape.max_positions) * hidden);
  if (!shape.tied) {
    embedding.lay_out(cursor, embedding_arithmetic(shape), hidden, shape.vocab_size);
  }
}

void CpuDecoder::Scratch::lay_out(const DecoderShape& shape, const DecoderKernels& kernels,
                                  Cursor& cursor) {
  const std::size_t tokens = std::max(shape.max_tokens, shape.max_logits);
  const auto take_rows = [&](int count) {
    const std::size_t stride = row_stride(count);
    return Rows{cursor.take<float>(tokens * stride), stride};
  };
  hidden = take_rows(shape.hidden_size);
  normed = take_rows(shape.hidden_size);
  qkv = take_rows(3 * shape.hidden_size);
  inner = take_rows(shape.inner_size);
  rounded_stride = row_stride(2 * shape.num_heads * kv_shape(shape).padded_dim()) * 2;
  operand_stride =
      row_stride(std::max(shape.hidden_size, shape.inner_size) / 2 + 1) * sizeof(float);
  rounded = nullptr;
  if (shape.attention != Arithmetic::kFloat32) {
    rounded = cursor.take<std::uint16_t>(tokens * rounded_stride);
  }
  ranges.resize(kv_shape(shape).has_scales() ? shape.num_layers : 0);
  for (KvRanges& range : ranges) {
    for (KvRange* const one : {&range.keys, &range.values}) {
      one->centers = cursor.take<float>(shape.hidden_size);
      one->factors = cursor.take<float>(shape.hidden_size);
      one->inverses = cursor.take<float>(shape.hidden_size);
    }
  }
  operands = nullptr;
  if (shape.linear == Arithmetic::kInt8 ||
      (shape.linear == Arithmetic::kBFloat16 && kernels.bfloat16_input_bytes < 4)) {
    operands = cursor.take<char>(tokens * operand_stride);
  }
  row_scales = cursor.take<RowScale>(tokens);
  logits = cursor.take<float>(static_cast<std::size_t>(shape.max_logits) * shape.vocab_size);
}

std::vector<WeightSection> CpuDecoder::weight_sections(const DecoderShape& shape) {
  std::vector<std::size_t> starts;
  Cursor cursor(nullptr, &starts);
  Weights().lay_out(shape, cursor);
  starts.push_back(cursor.bytes());
  std::vector<WeightSection> sections;
  for (std::size_t at = 0; at + 1 < starts.size(); ++at) {
    sections.push_back({starts[at], starts[at + 1] - starts[at]});
  }
  return sections;
}

std::size_t CpuDecoder::weight_bytes(const DecoderShape& shape) {
  Cursor cursor(nullptr);
  Weights().lay_out(shape, cursor);
  return cursor.bytes();
}

std::size_t CpuDecoder::scratch_bytes(const DecoderShape& shape, const DecoderKernels& kernels) {
  Cursor cursor(nullptr);
  Scratch().lay_out(shape, kernels, cursor);
  return cursor.bytes();
}

std::size_t CpuDecoder::block_bytes(const DecoderShape& shape) {
  return kv_shape(shape).block_bytes();
}

CpuDecoder::CpuDecoder(const DecoderShape& shape, int num_blocks, int num_threads,
                       const DecoderKernels& kernels)
    : CpuDecoder(shape, num_blocks, num_threads, kernels, Arena(weight_bytes(shape))) {}

CpuDecoder::CpuDecoder(const DecoderShape& shape, int num_blocks, int num_threads,
                       const DecoderKernels& kernels, Arena weights)
    : shape_(shape),
      num_threads_(num_threads),
      kernels_(kernels),
      weight_memory_(std::move(weights)),
      scratch_memory_(scratch_bytes(shape, kernels)),
      blocks_(kv_shape(shape), num_blocks) {
  Cursor packed(weight_memory_.data()), scratch(scratch_memory_.data());
  weights_.lay_out(shape, packed);
  scratch_.lay_out(shape, kernels, scratch);
}

PackedLinear& CpuDecoder::projection(int layer, Projection which) {
  has_ranges_ = false;
  return weights_.layers[layer].projections[static_cast<int>(which)];
}

void CpuDecoder::set_norm(int layer, bool second, const float* gain, const float* bias) {
  has_ranges_ = false;
  const Norm& norm = layer < 0 ? weights_.last_norm : weights_.layers[layer].norms[second];
  std::copy(gain, gain + shape_.hidden_size, norm.gain);
  std::copy(bias, bias + shape_.hidden_size, norm.bias);
}

void CpuDecoder::set_positions(const float* values) {
  const std::size_t count = static_cast<std::size_t>(shape_.max_positions) * shape_.hidden_size;
  std::copy(values, values + count, weights_.positions);
}

void CpuDecoder::find_ranges() {
  if (has_ranges_) return;
  for (std::size_t index = 0; index < scratch_.ranges.size(); ++index) {
    const Layer& layer = weights_.layers[index];
    find_kv_ranges(layer.projections[static_cast<int>(Projection::kQkv)], layer.norms[0].gain,
                   layer.norms[0].bias, scratch_.ranges[index], num_threads_);
  }
  has_ranges_ = true;
}

const float* CpuDecoder::forward(const StepRows& rows, const std::int32_t* logits_at, int count) {
  find_ranges();
  embed(rows);
  const AttentionPlan plan(rows, shape_.num_heads, kernels_.max_rows);
  for (int layer = 0; layer < shape_.num_layers; ++layer) run_layer(layer, rows, plan);
  const LinearInputs inputs = normed_inputs(weights_.last_norm, weights_.head, logits_at, count);
  const Rows logits = {scratch_.logits, static_cast<std::size_t>(shape_.vocab_size)};
  project(weights_.head, inputs, count, logits, Ending::kStore);
  return scratch_.logits;
}

void CpuDecoder::embed(const StepRows& rows) {
  const PackedLinear& embedding = shape_.tied ? weights_.head : weights_.embedding;
  parallel_rows(rows.num_tokens, 1, num_threads_, [&](int begin, int end) {
    for (int token = begin; token < end; ++token) {
      const std::size_t position = rows.positions[token];
      float* const values = scratch_.hidden.row(token);
      embedding.read_column(rows.token_ids[token], values);
      kernels_.add(weights_.positions + position * shape_.hidden_size, shape_.hidden_size, values);
    }
  });
}

void CpuDecoder::run_layer(int index, const StepRows& rows, const AttentionPlan& plan) {
  const Layer& layer = weights_.layers[index];
  const int count = rows.num_tokens;
  const auto projection = [&](Projection which) -> const PackedLinear& {
    return layer.projections[static_cast<int>(which)];
  };
  const PackedLinear& qkv = projection(Projection::kQkv);
  const PackedLinear& attention_out = projection(Projection::kAttentionOut);
  const PackedLinear& mlp_in = projection(Projection::kMlpIn);
  const PackedLinear& mlp_out = projection(Projection::kMlpOut);
  project(qkv, normed_inputs(layer.norms[0], qkv, nullptr, count), count, scratch_.qkv,
          Ending::kStore);
  const Rows& attended = scratch_.normed;
  attend(
      rows, plan,
      {index, shape_.attention_scales[index], scratch_.qkv.data, scratch_.qkv.stride,
       scratch_.rounded, scratch_.rounded_stride,
       scratch_.ranges.empty() ? nullptr : &scratch_.ranges[index], attended.data, attended.stride},
      blocks_, kernels_, num_threads_);
  project(attention_out, inputs_of(attention_out, attended, count), count, scratch_.hidden,
          Ending::kAdd);
  project(mlp_in, normed_inputs(layer.norms[1], mlp_in, nullptr, count), count, scratch_.inner,
          Ending::kActivate);
  project(mlp_out, inputs_of(mlp_out, scratch_.inner, count), count, scratch_.hidden, Ending::kAdd);
}

void CpuDecoder::project(const PackedLinear& linear, const LinearInputs& inputs, int count,
                         const Rows& to, Ending ending) {
  multiply(linear, inputs, count, {to.data, to.stride, ending, shape_.activation}, kernels_,
           num_threads_);
}

// Layer norm of the hidden rows `which` (null: all, in order), as inputs of `linear`.
LinearInputs CpuDecoder::normed_inputs(const Norm& norm, const PackedLinear& linear,
                                       const std::int32_t* which, int count) {
  parallel_rows(count, 1, num_threads_, [&](int begin, int end) {
    for (int row = begin; row < end; ++row) {
      const float* const values = scratch_.hidden.row(which == nullptr ? row : which[row]);
      kernels_.layer_norm(values, norm.gain, norm.bias, shape_.epsilon, shape_.hidden_size,
                          scratch_.normed.row(row));
      convert_row(linear, scratch_.normed.row(row), row);
    }
  });
  return converted(scratch_.normed);
}

LinearInputs CpuDecoder::inputs_of(const PackedLinear& linear, const Rows& values, int count) {
  if (linear.arithmetic == Arithmetic::kBFloat16 || linear.arithmetic == Arithmetic::kInt8) {
    parallel_rows(count, 1, num_threads_, [&](int begin, int end) {
      for (int row = begin; row < end; ++row) convert_row(linear, values.row(row), row);
    });
  }
  return converted(values);
}

void CpuDecoder::convert_row(const PackedLinear& linear, float* values, int row) {
  char* to = reinterpret_cast<char*>(values);
  if (scratch_.operands != nullptr) to = scratch_.operands + row * scratch_.operand_stride;
  if (linear.arithmetic == Arithmetic::kBFloat16) {
    kernels_.round_bfloat16_inputs(values, linear.num_inputs, to);
    if (linear.num_inputs % 2 != 0) {  // the last pair has no second: no stale NaN there
      const int bytes = kernels_.bfloat16_input_bytes;
      std::memset(to + linear.num_inputs * bytes, 0, bytes);
    }
  } else if (linear.arithmetic == Arithmetic::kInt8) {
    scratch_.row_scales[row] = kernels_.quantize(values, linear.factors, linear.num_inputs,
                                                 reinterpret_cast<std::uint8_t*>(to));
  }
}

LinearInputs CpuDecoder::converted(const Rows& values) const {
  if (scratch_.operands == nullptr) {
    return {values.data, values.stride * sizeof(float), nullptr};
  }
  return {scratch_.operands, scratch_.operand_stride, scratch_.row_scales};
}

}  // namespace fastgen
