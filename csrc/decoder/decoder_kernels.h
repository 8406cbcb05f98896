// Inner loops of the decoder, once for each instruction set; the best is chosen at run time.
//
// Packed matrices are panels of 32 columns. A panel is a run of steps; a step holds, for each of
// its columns, the weights of one to four neighbouring inputs ("values"), so that one instruction
// multiplies them all: float32 and float16 one, bfloat16 two, int8 four. Keys and values of a block
// of 32 tokens are panels, too: attention is made of the same tiles as the linear layers.

#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace fastgen {

constexpr int kPanel = 32;
constexpr int kMaxTileRows = 12;
constexpr int kSecondLevel = 2;  // the cache to fetch into (benchmarks/LOG.md)

// What is multiplied with what, and how the sum is kept.
enum class Arithmetic {
  kFloat32,          // float32 weights and inputs
  kFloat16Weights,   // float16 weights, widened; float32 inputs
  kBFloat16Weights,  // bfloat16 weights, widened; float32 inputs
  kBFloat16,         // bfloat16 weights and inputs, float32 sums
  kInt8,             // int8 weights, uint8 (or int8: RowScale) inputs, int32 sums
  kInt8WideInputs,   // int8 keys or values, int16 inputs, int32 sums
};
constexpr int kNumArithmetics = 6;
constexpr int kNumWeightArithmetics = 5;  // the first: those that linear layers can have

enum class Activation { kGelu, kGeluTanh, kQuickGelu, kRelu, kSigmoid, kSilu, kTanh };

// Values of a step, bytes of a step.
struct StepShape {
  int values, bytes;
};

constexpr StepShape step_shape(Arithmetic arithmetic) {
  switch (arithmetic) {
    case Arithmetic::kFloat32:
      return {1, 4 * kPanel};
    case Arithmetic::kFloat16Weights:
      return {1, 2 * kPanel};
    case Arithmetic::kBFloat16Weights:
    case Arithmetic::kBFloat16:
      return {2, 4 * kPanel};
    case Arithmetic::kInt8WideInputs:
      return {2, 2 * kPanel};
    case Arithmetic::kInt8:
      break;
  }
  return {4, 4 * kPanel};
}

constexpr int num_steps(Arithmetic arithmetic, int inputs) {
  const int values = step_shape(arithmetic).values;
  return (inputs + values - 1) / values;
}

constexpr int num_panels(int columns) { return (columns + kPanel - 1) / kPanel; }

// A row of 8-bit inputs: value = scale * (code - zero). Codes are uint8. A path that multiplies
// int8 with int8 alone has int8 codes: code and zero are both 128 less, which changes no value.
struct RowScale {
  float scale;
  std::int32_t zero;
};

// What a tile fetches into the cache while it works: from `from` on, `pace` bytes further on with
// each step. A step fetches as many bytes as it reads, so that a lower pace only fetches some
// twice.
struct Fetch {
  const char* from;
  std::ptrdiff_t pace;
};

// sums (rows, 32) of float, int32 where weights are int8: the inputs' rows, `stride` bytes apart,
// times a panel. Every sum is made step by step in order, in blocks of steps that do not depend on
// `rows`.
using Tile = void (*)(const void* inputs, std::size_t stride, int rows, const void* panel,
                      int steps, Fetch fetch, void* sums);

// What becomes of a tile's sums.
enum class Ending {
  kStore,     // outputs = sums + bias
  kAdd,       // outputs += sums + bias
  kActivate,  // outputs = activation(sums + bias)
};

struct TileEnd {
  const float* bias;                // (32)
  const float* scales;              // (32) of int8 columns; null for the other arithmetics
  const std::int32_t* column_sums;  // (32)
  const RowScale* row_scales;       // (rows)
  Ending ending;
  Activation activation;
  float* outputs;      // of the tile's first row and column
  std::size_t stride;  // floats
  int columns;         // up to 32
};

// The running softmax of a tile's queries.
struct Softmax {
  float highest[kMaxTileRows], total[kMaxTileRows];
  float rescale[kMaxTileRows];  // on what was summed before the last block
};

struct DecoderKernels {
  int max_rows;                 // of a tile
  Tile tiles[kNumArithmetics];  // by Arithmetic
  // Of an input of kBFloat16's tile: 2, or 4 where it is a float again, so that the tile does not
  // widen each input once for each panel.
  int bfloat16_input_bytes;
  // sums as a tile left them; row.scale * scales[n] * (sums[n] - row.zero * column_sums[n]) is the
  // value of an int8 one.
  void (*finish)(const void* sums, int rows, const TileEnd& end);

  void (*layer_norm)(const float* values, const float* gain, const float* bias, float epsilon,
                     int count, float* normed);
  void (*add)(const float* values, int count, float* sums);  // sums += values
  void (*round_bfloat16)(const float* values, int count, std::uint16_t* rounded);
  // values as inputs of kBFloat16's tile; `inputs` may be `values` where both are floats
  void (*round_bfloat16_inputs)(const float* values, int count, void* inputs);
  // codes of values[i] * factors[i], as the path's tile of kInt8 takes them
  RowScale (*quantize)(const float* values, const float* factors, int count, std::uint8_t* codes);

  // Scores (rows, 32) of a tile's queries for a block of keys, of which the first query sees
  // `visible` and each next one more: turns them into weights exp(factor * score - highest) and
  // takes them into the softmax.
  void (*weigh_scores)(const float* scores, int rows, float factor, int visible, Softmax& softmax,
                       float* weights);
  // sums[row] = sums[row] * factors[row] + values[row], for rows of 32 values, `stride` floats
  // apart in sums, where they have `columns`.
  void (*rescale_and_add)(const float* values, int rows, const float* factors, int columns,
                          float* sums, std::size_t stride);
  void (*scale)(float factor, int count, float* values);

  // Keys and values of 8 bits. Codes (count) of (values - centers) * factors, from -127 to 127;
  // returns what a code is multiplied with to be such a number again, NaN if one is not finite.
  float (*quantize_int8)(const float* values, const float* centers, const float* factors, int count,
                         std::int8_t* codes);
  // The same of queries: codes of values * factors, up to `highest`.
  float (*quantize_int16)(const float* values, const float* factors, int count, int highest,
                          std::int16_t* codes);
  // weigh_scores of int32 scores, each times factors[row] * key_scales[column]. The weights, times
  // value_scales, become codes (rows, 32) of code_scales[row]; hidden columns' are 0.
  void (*weigh_int8_scores)(const void* scores, int rows, const float* factors, int visible,
                            const float* key_scales, const float* value_scales, Softmax& softmax,
                            std::int16_t* codes, float* code_scales);
  // rescale_and_add of int32 values, which are multiplied with value_scales[row].
  void (*rescale_and_add_int8)(const void* values, int rows, const float* factors,
                               const float* value_scales, int columns, float* sums,
                               std::size_t stride);
  // values = values * factor * factors + centers
  void (*restore)(float factor, const float* factors, const float* centers, int count,
                  float* values);
};

// One for each instruction set, in files of their own; those of the first line but kPortableKernels
// are for x86-64 only.
extern const DecoderKernels kPortableKernels, kAvx2Kernels, kAvx512Kernels, kAvx512Bf16Kernels;
extern const DecoderKernels kNeonKernels, kNeonDotprodKernels, kNeonI8mmKernels;  // 64-bit Arm

// Of paths that differ from another one in int8 products alone.
struct Int8Kernels {
  Tile tile, wide_inputs_tile;
  RowScale (*quantize)(const float* values, const float* factors, int count, std::uint8_t* codes);
};
extern const Int8Kernels kAvxVnniKernels, kAvx512VnniKernels;

// Those of the path that chosen_instruction_set() names.
const DecoderKernels& decoder_kernels(const std::string& name);

}  // namespace fastgen
