#include "packed_linear.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "number_formats.h"
#include "parallel.h"

namespace fastgen {

namespace {

constexpr float kLargestCode = 127;
constexpr float kLeastScale = 1e-30f;  // of a column of zeros
constexpr std::uint16_t kInfiniteHalf = 0x7c00;

// One step of a panel, as floats: values[v * 32 + c], zeros behind the matrix's edges.
template <typename Stored, float widen(Stored)>
void read_step(const Source& source, const PackedLinear& linear, int step, int first_column,
               float* values) {
  const int num_values = step_shape(linear.arithmetic).values;
  const int columns = std::min(kPanel, linear.num_columns - first_column);
  for (int value = 0; value < num_values; ++value) {
    float* const row = values + value * kPanel;
    const int input = step * num_values + value;
    if (input >= linear.num_inputs) {
      std::fill(row, row + kPanel, 0.0f);
      continue;
    }
    const Stored* from = static_cast<const Stored*>(source.data) + input * source.input_stride +
                         first_column * source.column_stride;
    for (int column = 0; column < columns; ++column, from += source.column_stride) {
      row[column] = widen(*from);
    }
    std::fill(row + columns, row + kPanel, 0.0f);
  }
}

float same(float value) { return value; }

using ReadStep = void (*)(const Source&, const PackedLinear&, int, int, float*);

ReadStep reader_of(Source::Type type) {
  switch (type) {
    case Source::Type::kFloat32:
      return read_step<float, same>;
    case Source::Type::kFloat16:
      return read_step<std::uint16_t, widen_float16>;
    case Source::Type::kBFloat16:
      break;
  }
  return read_step<std::uint16_t, widen_bfloat16>;
}

// Whatever fits: weights that are too large for float16 become infinite.
bool pack_float_panel(const PackedLinear& linear, const Source& source, int panel) {
  const ReadStep read = reader_of(source.type);
  const StepShape shape = step_shape(linear.arithmetic);
  char* to = linear.panels + panel * linear.panel_bytes;
  bool finite = true;
  float values[2 * kPanel];
  for (int step = 0; step < linear.num_steps; ++step, to += shape.bytes) {
    read(source, linear, step, panel * kPanel, values);
    if (linear.arithmetic == Arithmetic::kFloat32) {
      std::memcpy(to, values, kPanel * sizeof(float));
      continue;
    }
    std::uint16_t halves[2 * kPanel];
    for (int value = 0; value < shape.values; ++value) {
      for (int column = 0; column < kPanel; ++column) {
        const float weight = values[value * kPanel + column];
        std::uint16_t& half = halves[column * shape.values + value];
        if (linear.arithmetic == Arithmetic::kFloat16Weights) {
          half = round_to_float16(weight);
          finite = finite && (half & kInfiniteHalf) != kInfiniteHalf;
        } else {
          half = round_to_bfloat16(weight);
        }
      }
    }
    std::memcpy(to, halves, shape.bytes);
  }
  return finite;
}

// Each column has a scale of its own, of its largest weight.
void pack_int8_panel(const PackedLinear& linear, const Source& source, int panel) {
  const ReadStep read = reader_of(source.type);
  const int first = panel * kPanel;
  float values[4 * kPanel], largest[kPanel] = {}, inverse[kPanel];
  const auto smooth = [&](int step) {
    read(source, linear, step, first, values);
    for (int value = 0; value < 4 && step * 4 + value < linear.num_inputs; ++value) {
      const float factor = linear.factors[step * 4 + value];
      for (int column = 0; column < kPanel; ++column) values[value * kPanel + column] /= factor;
    }
  };
  for (int step = 0; step < linear.num_steps; ++step) {
    smooth(step);
    for (int at = 0; at < 4 * kPanel; ++at) {
      largest[at % kPanel] = std::max(largest[at % kPanel], std::fabs(values[at]));
    }
  }
  std::int32_t sums[kPanel] = {};
  for (int column = 0; column < kPanel; ++column) {
    const float scale = std::max(largest[column] / kLargestCode, kLeastScale);
    linear.scales[first + column] = scale;
    inverse[column] = 1 / scale;
  }
  auto* to = reinterpret_cast<std::int8_t*>(linear.panels + panel * linear.panel_bytes);
  for (int step = 0; step < linear.num_steps; ++step, to += 4 * kPanel) {
    smooth(step);
    for (int value = 0; value < 4; ++value) {
      for (int column = 0; column < kPanel; ++column) {
        const float code = std::nearbyint(values[value * kPanel + column] * inverse[column]);
        to[column * 4 + value] = static_cast<std::int8_t>(code);
        sums[column] += static_cast<std::int32_t>(code);
      }
    }
  }
  std::copy(sums, sums + kPanel, linear.column_sums + first);
}

}  // namespace

void PackedLinear::lay_out(Cursor& cursor, Arithmetic how, int inputs, int columns) {
  arithmetic = how;
  num_inputs = inputs;
  num_columns = columns;
  num_steps = fastgen::num_steps(how, inputs);
  panel_bytes = static_cast<std::size_t>(num_steps) * step_shape(how).bytes;
  const std::size_t padded = static_cast<std::size_t>(num_panels(columns)) * kPanel;
  panels = cursor.take<char>(panel_bytes * num_panels(columns));
  bias = cursor.take<float>(padded);
  if (how != Arithmetic::kInt8) return;
  scales = cursor.take<float>(padded);
  column_sums = cursor.take<std::int32_t>(padded);
  factors = cursor.take<float>(inputs);
}

bool PackedLinear::pack(const Source& source, const float* own_bias, const float* smoothing,
                        int num_threads) {
  if (own_bias != nullptr) std::copy(own_bias, own_bias + num_columns, bias);
  if (arithmetic == Arithmetic::kInt8) {
    for (int input = 0; input < num_inputs; ++input) {
      factors[input] = smoothing == nullptr ? 1 : 1 / smoothing[input];
    }
  }
  std::atomic<bool> finite{true};
  parallel_for(num_panels(num_columns), num_threads, [&](int begin, int end) {
    for (int panel = begin; panel < end; ++panel) {
      if (arithmetic == Arithmetic::kInt8) {
        pack_int8_panel(*this, source, panel);
      } else if (!pack_float_panel(*this, source, panel)) {
        finite = false;
      }
    }
  });
  return finite;
}

void PackedLinear::read_column(int column, float* values) const {
  const StepShape shape = step_shape(arithmetic);
  const char* const panel = panels + column / kPanel * panel_bytes;
  const int bytes = shape.bytes / kPanel / shape.values;  // of a weight
  for (int input = 0; input < num_inputs; ++input) {
    const char* const from = panel + static_cast<std::size_t>(input / shape.values) * shape.bytes +
                             (column % kPanel * shape.values + input % shape.values) * bytes;
    std::uint16_t half = 0;
    if (bytes == 2) std::memcpy(&half, from, sizeof half);
    switch (arithmetic) {
      case Arithmetic::kFloat32:
        std::memcpy(&values[input], from, sizeof(float));
        break;
      case Arithmetic::kFloat16Weights:
        values[input] = widen_float16(half);
        break;
      case Arithmetic::kBFloat16Weights:
      case Arithmetic::kBFloat16:
        values[input] = widen_bfloat16(half);
        break;
      case Arithmetic::kInt8:
        values[input] = static_cast<signed char>(*from) * scales[column] * factors[input];
        break;
    }
  }
}

void multiply(const PackedLinear& linear, const LinearInputs& inputs, int num_rows,
              const LinearOutputs& outputs, const DecoderKernels& kernels, int num_threads) {
  const Tile tile = kernels.tiles[static_cast<int>(linear.arithmetic)];
  const int num_tiles = (num_rows + kernels.max_rows - 1) / kernels.max_rows;
  const bool scaled = linear.arithmetic == Arithmetic::kInt8;
  parallel_for(num_panels(linear.num_columns), num_threads, [&](int begin, int end) {
    alignas(kCacheLine) float sums[kMaxTileRows * kPanel];
    for (int panel = begin; panel < end; ++panel) {
      const int first_column = panel * kPanel;
      const char* const weights = linear.panels + panel * linear.panel_bytes;
      TileEnd tile_end = {linear.bias + first_column,
                          scaled ? linear.scales + first_column : nullptr,
                          scaled ? linear.column_sums + first_column : nullptr,
                          nullptr,
                          outputs.ending,
                          outputs.activation,
                          nullptr,
                          outputs.stride,
                          std::min(kPanel, linear.num_columns - first_column)};
      for (int index = 0; index < num_tiles; ++index) {
        const int first = static_cast<int>(static_cast<std::int64_t>(num_rows) * index / num_tiles);
        const int last =
            static_cast<int>(static_cast<std::int64_t>(num_rows) * (index + 1) / num_tiles);
        tile_end.outputs = outputs.data + first * outputs.stride + first_column;
        for (int row = 0; row < last - first; ++row) {  // there when the sums are
          __builtin_prefetch(tile_end.outputs + row * outputs.stride, 1);
          __builtin_prefetch(tile_end.outputs + row * outputs.stride + 16, 1);
        }
        tile(static_cast<const char*>(inputs.data) + first * inputs.stride, inputs.stride,
             last - first, weights, linear.num_steps, sums);
        tile_end.row_scales = scaled ? inputs.scales + first : nullptr;
        kernels.finish(sums, last - first, tile_end);
      }
    }
  });
}

}  // namespace fastgen
