// The CPU decoder: GPT-2 from token ids to logits, one call a step. Knows nothing of Python.
//
// A step is a sequence of loops over panels, rows or heads, each shared among threads. What is
// computed for a row follows from that row alone, in one order: the same bits come out whatever
// else is in the batch, however a prompt is cut, with any number of threads.

#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "decoder/attention.h"
#include "decoder/packed_linear.h"

namespace fastgen {

struct DecoderShape {
  int vocab_size, max_positions, hidden_size, num_layers, num_heads, inner_size;
  Activation activation;
  float epsilon;
  std::vector<float> attention_scales;  // (num_layers)
  Arithmetic linear, attention;
  bool tied;                   // the embedding is read from the head's packed weights
  int max_tokens, max_logits;  // of a step
};

enum class Projection { kQkv, kAttentionOut, kMlpIn, kMlpOut };
constexpr int kNumProjections = 4;

// Names how packed weights lie in memory: files of them are read only where it is the same.
std::string packed_layout();

// A piece of the weights' memory, with what lies between it and the next.
struct WeightSection {
  std::size_t offset, bytes;
};

class CpuDecoder {
 public:
  CpuDecoder(const DecoderShape& shape, int num_blocks, int num_threads,
             const DecoderKernels& kernels);
  // `weights` has weight_bytes(shape) bytes, packed already.
  CpuDecoder(const DecoderShape& shape, int num_blocks, int num_threads,
             const DecoderKernels& kernels, Arena weights);

  // In order, without gaps.
  static std::vector<WeightSection> weight_sections(const DecoderShape& shape);
  static std::size_t weight_bytes(const DecoderShape& shape);
  static std::size_t scratch_bytes(const DecoderShape& shape, const DecoderKernels& kernels);
  static std::size_t block_bytes(const DecoderShape& shape);

  // Weights come one by one, in any order, before the first step.
  PackedLinear& projection(int layer, Projection which);
  PackedLinear& head() { return weights_.head; }
  PackedLinear& embedding() { return weights_.embedding; }  // of its own; none if tied
  // Of layer -1: the last norm.
  void set_norm(int layer, bool second, const float* gain, const float* bias);
  void set_positions(const float* values);  // (max_positions, hidden)
  // All of them, packed: weight_bytes(shape()) bytes.
  char* weights() const { return weight_memory_.data(); }
  // Of keys and values of 8 bits, from the weights, if that has not been done: else the first step
  // does it.
  void find_ranges();

  // Logits of the tokens at `logits_at` (count), in that order, each (vocab).
  const float* forward(const StepRows& rows, const std::int32_t* logits_at, int count);

  KvBlocks& blocks() { return blocks_; }
  const DecoderShape& shape() const { return shape_; }
  int num_threads() const { return num_threads_; }

 private:
  struct Norm {
    float *gain, *bias;
  };
  struct Layer {
    Norm norms[2];
    PackedLinear projections[kNumProjections];
  };
  struct Weights {
    std::vector<Layer> layers;
    Norm last_norm;
    PackedLinear head, embedding;  // the embedding is only read; empty if it is the head
    float* positions;
    void lay_out(const DecoderShape& shape, Cursor& cursor);
  };
  // Rows are `stride` floats apart, an odd number of cache lines, so that neighbours do not fall on
  // the same set of a cache.
  struct Rows {
    float* data;
    std::size_t stride;
    float* row(std::size_t index) const { return data + index * stride; }
  };
  struct Scratch {
    Rows hidden, normed, qkv, inner;
    std::uint16_t* rounded;  // qkv as bfloat16, or as codes: see AttentionLayer
    std::size_t rounded_stride;
    std::vector<KvRanges> ranges;  // of each layer's keys and values of 8 bits
    char* operands;  // rows as bfloat16 or int8 inputs; null if the rows themselves are inputs
    std::size_t operand_stride;
    RowScale* row_scales;
    float* logits;
    void lay_out(const DecoderShape& shape, const DecoderKernels& kernels, Cursor& cursor);
  };

  void embed(const StepRows& rows);
  LinearInputs normed_inputs(const Norm& norm, const PackedLinear& linear,
                             const std::int32_t* which, int count);
  LinearInputs inputs_of(const PackedLinear& linear, const Rows& values, int count);
  void convert_row(const PackedLinear& linear, float* values, int row);
  LinearInputs converted(const Rows& values) const;
  void run_layer(int index, const StepRows& rows, const AttentionPlan& plan);
  void project(const PackedLinear& linear, const LinearInputs& inputs, int count, const Rows& to,
               Ending ending);

  DecoderShape shape_;
  int num_threads_;
  const DecoderKernels& kernels_;
  Arena weight_memory_, scratch_memory_;
  Weights weights_;
  Scratch scratch_;
  KvBlocks blocks_;
  bool has_ranges_ = false;  // scratch_.ranges, of the weights that are there now
};

}  // namespace fastgen
