// Linear layers with weights packed for the tiles: one copy serves one token and a thousand.

#pragma once

#include <cstddef>
#include <cstdint>

#include "common/arena.h"
#include "decoder/decoder_kernels.h"

namespace fastgen {

// Weights as a checkpoint stores them: element (input, column) of a matrix.
struct Source {
  enum class Type { kFloat32, kFloat16, kBFloat16 };
  const void* data;
  Type type;
  std::size_t input_stride, column_stride;  // in elements
};

// columns = inputs * weights + bias. All pointers lie in the owner's arena.
struct PackedLinear {
  Arithmetic arithmetic = Arithmetic::kFloat32;
  int num_inputs = 0, num_columns = 0, num_steps = 0;
  std::size_t panel_bytes = 0;
  char* panels = nullptr;
  float* bias = nullptr;  // (padded columns)
  // kInt8: weight (k, n) = scales[n] * code(k, n) * factors[k]
  float* scales = nullptr;              // (padded columns)
  std::int32_t* column_sums = nullptr;  // (padded columns) of codes
  float* factors = nullptr;             // (inputs) on inputs before they are quantized

  void lay_out(Cursor& cursor, Arithmetic how, int inputs, int columns);

  // `bias` (columns) may be null; `smoothing` (inputs) is what weights are multiplied with before
  // they are quantized, null for 1. False if a weight is too large for the format.
  bool pack(const Source& source, const float* bias, const float* smoothing, int num_threads);

  // The weights of one column, (inputs): an embedding that shares them.
  void read_column(int column, float* values) const;
};

// Rows of inputs as the arithmetic wants them, `stride` bytes apart.
struct LinearInputs {
  const void* data;
  std::size_t stride;
  const RowScale* scales;  // kInt8: (rows)
};

// Where results go, `stride` floats apart, and how.
struct LinearOutputs {
  float* data;
  std::size_t stride;
  Ending ending;
  Activation activation = Activation::kRelu;
};

void multiply(const PackedLinear& linear, const LinearInputs& inputs, int num_rows,
              const LinearOutputs& outputs, const DecoderKernels& kernels, int num_threads);

}  // namespace fastgen
