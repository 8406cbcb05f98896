#include "decoder/packed_linear.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "common/number_formats.h"
#include "common/parallel.h"

namespace fastgen {

namespace {

constexpr float kLargestCode = 127;
constexpr float kLeastScale = 1e-30f;  // of a column of zeros

constexpr int kChunk = 16;  // inputs that are read at a time: a cache line of a transposed matrix
constexpr int kPanelsAtOnce = 4;      // whose columns are neighbours in memory
constexpr float kCodeUnit = 0x1p24f;  // of what is rounded to a code

// A number of kCodeUnits to the nearest whole one, ties to even. |code| <= 127: it fits an int32,
// and what the conversion cuts off cannot decide. In whole numbers, since a product and a sum of
// floats may be fused where there is an instruction for it: processors would pack other codes.
std::int32_t code_of(float units) {
  const auto number = static_cast<std::int32_t>(units);
  return (number + 0x7fffff + (number >> 24 & 1)) >> 24;
}

struct Chunk {
  float values[kChunk][kPanel];  // by input and column; zeros beyond the matrix's edges
};

template <typename Stored, float widen(Stored)>
void read_chunk(const Source& source, const PackedLinear& linear, int first_input, int first_column,
                Chunk& chunk) {
  const int inputs = std::min(kChunk, linear.num_inputs - first_input);
  const int columns = std::min(kPanel, linear.num_columns - first_column);
  if (inputs < kChunk || columns < kPanel) chunk = Chunk{};
  const Stored* const from = static_cast<const Stored*>(source.data) +
                             first_input * source.input_stride +
                             first_column * source.column_stride;
  if (source.column_stride == 1) {
    for (int input = 0; input < inputs; ++input) {
      const Stored* const row = from + input * source.input_stride;
      for (int column = 0; column < columns; ++column) {
        chunk.values[input][column] = widen(row[column]);
      }
    }
    return;
  }
  for (int column = 0; column < columns; ++column) {
    const Stored* const row = from + column * source.column_stride;
    for (int input = 0; input < inputs; ++input) chunk.values[input][column] = widen(row[input]);
  }
}

float same(float value) { return value; }

using ReadChunk = void (*)(const Source&, const PackedLinear&, int, int, Chunk&);

ReadChunk reader_of(Source::Type type) {
  switch (type) {
    case Source::Type::kFloat32:
      return read_chunk<float, same>;
    case Source::Type::kFloat16:
      return read_chunk<std::uint16_t, widen_float16>;
    case Source::Type::kBFloat16:
      break;
  }
  return read_chunk<std::uint16_t, widen_bfloat16>;
}

// Where a chunk's steps go.
char* place_of(const PackedLinear& linear, int first_input, int panel) {
  const StepShape shape = step_shape(linear.arithmetic);
  return linear.panels + panel * linear.panel_bytes +
         static_cast<std::size_t>(first_input / shape.values) * shape.bytes;
}

int steps_in_chunk(const PackedLinear& linear, int first_input) {
  return num_steps(linear.arithmetic, std::min(kChunk, linear.num_inputs - first_input));
}

// False if a weight is too large for float16.
bool write_float16(const PackedLinear& linear, const Chunk& chunk, int first_input, int panel) {
  auto* const to = reinterpret_cast<std::uint16_t*>(place_of(linear, first_input, panel));
  const int steps = steps_in_chunk(linear, first_input);
  bool finite = true;
  for (int step = 0; step < steps; ++step) {
    for (int column = 0; column < kPanel; ++column) {
      const std::uint16_t half = round_to_float16(chunk.values[step][column]);
      to[step * kPanel + column] = half;
      finite = finite && is_finite_float16(half);
    }
  }
  return finite;
}

// Whether it fits the format.
bool write_chunk(const PackedLinear& linear, const Chunk& chunk, int first_input, int panel) {
  char* const to = place_of(linear, first_input, panel);
  const int steps = steps_in_chunk(linear, first_input);
  if (linear.arithmetic == Arithmetic::kFloat16Weights) {
    return write_float16(linear, chunk, first_input, panel);
  }
  if (linear.arithmetic == Arithmetic::kFloat32) {
    std::memcpy(to, chunk.values, steps * sizeof chunk.values[0]);
    return true;
  }
  auto* const pairs = reinterpret_cast<std::uint16_t*>(to);
  bool overflows = false;
  for (int step = 0; step < steps; ++step) {
    for (int column = 0; column < kPanel; ++column) {
      std::uint16_t* const pair = pairs + (step * kPanel + column) * 2;
      pair[0] = round_to_bfloat16(chunk.values[2 * step][column]);
      pair[1] = round_to_bfloat16(chunk.values[2 * step + 1][column]);
      overflows |= (pair[0] & 0x7F80) == 0x7F80 || (pair[1] & 0x7F80) == 0x7F80;
    }
  }
  return !overflows;
}

// Calls body(chunk, first input, panel) for some neighbouring panels, along the rows of the matrix.
template <typename Body>
void for_chunks(const PackedLinear& linear, const Source& source, int first_panel, int last_panel,
                const Body& body) {
  const ReadChunk read = reader_of(source.type);
  Chunk chunk;
  for (int input = 0; input < linear.num_inputs; input += kChunk) {
    for (int panel = first_panel; panel < last_panel; ++panel) {
      read(source, linear, input, panel * kPanel, chunk);
      body(chunk, input, panel);
    }
  }
}

bool pack_floats(const PackedLinear& linear, const Source& source, int first, int last) {
  bool fits = true;
  for_chunks(linear, source, first, last, [&](const Chunk& chunk, int input, int panel) {
    fits = write_chunk(linear, chunk, input, panel) && fits;
  });
  return fits;
}

// Each column has a scale of its own, of its largest weight.
bool pack_int8(const PackedLinear& linear, const Source& source, const float* smoothing, int first,
               int last) {
  float largest[kPanelsAtOnce][kPanel] = {}, inverse[kPanelsAtOnce][kPanel];
  std::int32_t sums[kPanelsAtOnce][kPanel] = {};
  const auto smooth_of = [&](int input) {
    return smoothing == nullptr || input >= linear.num_inputs ? 1.0f : smoothing[input];
  };
  for_chunks(linear, source, first, last, [&](const Chunk& chunk, int input, int panel) {
    float* const most = largest[panel - first];
    for (int at = 0; at < kChunk; ++at) {
      const float smooth = smooth_of(input + at);
      for (int column = 0; column < kPanel; ++column) {
        most[column] = std::max(most[column], std::fabs(chunk.values[at][column] * smooth));
      }
    }
  });
  for (int panel = first; panel < last; ++panel) {
    for (int column = 0; column < kPanel; ++column) {
      if (!std::isfinite(largest[panel - first][column])) return false;
      const float scale = std::max(largest[panel - first][column] / kLargestCode, kLeastScale);
      linear.scales[panel * kPanel + column] = scale;
      inverse[panel - first][column] = 1 / scale * kCodeUnit;
    }
  }
  for_chunks(linear, source, first, last, [&](const Chunk& chunk, int input, int panel) {
    auto* const to = reinterpret_cast<std::int8_t*>(place_of(linear, input, panel));
    const int values = steps_in_chunk(linear, input) * 4;
    for (int at = 0; at < values; ++at) {
      const float smooth = smooth_of(input + at);
      for (int column = 0; column < kPanel; ++column) {
        const std::int32_t code =
            code_of(chunk.values[at][column] * smooth * inverse[panel - first][column]);
        to[(at / 4 * kPanel + column) * 4 + at % 4] = static_cast<std::int8_t>(code);
        sums[panel - first][column] += code;
      }
    }
  });
  for (int panel = first; panel < last; ++panel) {
    std::copy(sums[panel - first], sums[panel - first] + kPanel,
              linear.column_sums + panel * kPanel);
  }
  return true;
}

// A panel's columns, to be read or written.
template <int kWritten, typename Value>
void prefetch(const Value* values) {
  __builtin_prefetch(values, kWritten);
  __builtin_prefetch(values + kPanel / 2, kWritten);
}

// Of a second-level cache, for weights or for inputs.
constexpr std::size_t kCacheShare = std::size_t{256} << 10;

constexpr std::ptrdiff_t kAhead = 8192;  // of weights, to be fetched

// For a tile that reads its panel from memory: what it reads itself soon.
Fetch fetch_own(const PackedLinear& linear, const char* panel) {
  return {panel + kAhead, step_shape(linear.arithmetic).bytes};
}

// For one of several tiles that follow each other on a panel that is in the cache: its part of the
// next panel, so that memory is read while all of them multiply, not while the first one waits.
Fetch fetch_next(const PackedLinear& linear, const char* panel, int tile, int num_tiles) {
  const std::ptrdiff_t pace = (step_shape(linear.arithmetic).bytes + num_tiles - 1) / num_tiles;
  return {panel + linear.panel_bytes + tile * pace * linear.num_steps, pace};
}

// A product's rows in tiles, all of about the same size.
class Product {
 public:
  Product(const PackedLinear& linear, const LinearInputs& inputs, int num_rows,
          const LinearOutputs& outputs, const DecoderKernels& kernels)
      : linear_(linear),
        inputs_(inputs),
        num_rows_(num_rows),
        num_tiles_((num_rows + kernels.max_rows - 1) / kernels.max_rows),
        outputs_(outputs),
        kernels_(kernels),
        tile_(kernels.tiles[static_cast<int>(linear.arithmetic)]) {}

  // Some panels and some tiles at a time, so that what is read again is still in the cache.
  void run(int first_panel, int last_panel) const {
    const int panels = at_once(linear_.panel_bytes);
    const int tiles = at_once(inputs_.stride * kernels_.max_rows);
    for (int panel = first_panel; panel < last_panel; panel += panels) {
      for (int tile = 0; tile < num_tiles_; tile += tiles) {
        for (int at = panel; at < std::min(panel + panels, last_panel); ++at) {
          run_panel(at, tile, std::min(tile + tiles, num_tiles_), at == first_panel);
        }
      }
    }
  }

 private:
  static int at_once(std::size_t bytes) {
    return static_cast<int>(std::max<std::size_t>(1, kCacheShare / bytes));
  }

  // `is_first`: nothing has fetched the panel yet.
  void run_panel(int panel, int first_tile, int last_tile, bool is_first) const {
    alignas(kCacheLine) float sums[kMaxTileRows * kPanel];
    const int column = panel * kPanel;
    const char* const weights = linear_.panels + panel * linear_.panel_bytes;
    const bool scaled = linear_.arithmetic == Arithmetic::kInt8;
    TileEnd end = {};
    end.bias = linear_.bias + column;
    end.scales = scaled ? linear_.scales + column : nullptr;
    end.column_sums = scaled ? linear_.column_sums + column : nullptr;
    end.ending = outputs_.ending;
    end.activation = outputs_.activation;
    end.stride = outputs_.stride;
    end.columns = std::min(kPanel, linear_.num_columns - column);
    prefetch<0>(end.bias);
    if (scaled) {
      prefetch<0>(end.scales);
      prefetch<0>(end.column_sums);
    }
    for (int tile = first_tile; tile < last_tile; ++tile) {
      const int first = part_start(num_rows_, tile, num_tiles_);
      const int count = part_start(num_rows_, tile + 1, num_tiles_) - first;
      end.outputs = outputs_.data + first * outputs_.stride + column;
      end.row_scales = inputs_.scales + (scaled ? first : 0);
      for (int row = 0; row < count && num_tiles_ > 1; ++row) {  // there when the sums are
        prefetch<1>(end.outputs + row * outputs_.stride);
      }
      const bool reads_memory = num_tiles_ == 1 || (is_first && tile == 0);
      const Fetch fetch =
          reads_memory ? fetch_own(linear_, weights)
                       : fetch_next(linear_, weights, tile - first_tile, last_tile - first_tile);
      tile_(static_cast<const char*>(inputs_.data) + first * inputs_.stride, inputs_.stride, count,
            weights, linear_.num_steps, fetch, sums);
      kernels_.finish(sums, count, end);
    }
  }

  const PackedLinear& linear_;
  const LinearInputs& inputs_;
  int num_rows_, num_tiles_;
  const LinearOutputs& outputs_;
  const DecoderKernels& kernels_;
  Tile tile_;
};

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
  std::atomic<bool> fits{true};
  const int panels = num_panels(num_columns);
  const int groups = (panels + kPanelsAtOnce - 1) / kPanelsAtOnce;
  parallel_for(groups, num_threads, [&](int begin, int end) {
    for (int group = begin; group < end; ++group) {
      const int first = group * kPanelsAtOnce, last = std::min(first + kPanelsAtOnce, panels);
      const bool packed = arithmetic == Arithmetic::kInt8
                              ? pack_int8(*this, source, smoothing, first, last)
                              : pack_floats(*this, source, first, last);
      if (!packed) fits = false;
    }
  });
  return fits;
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
      case Arithmetic::kInt8WideInputs:  // of no linear layer
      case Arithmetic::kInt8:
        values[input] = static_cast<signed char>(*from) * scales[column] * factors[input];
        break;
    }
  }
}

void multiply(const PackedLinear& linear, const LinearInputs& inputs, int num_rows,
              const LinearOutputs& outputs, const DecoderKernels& kernels, int num_threads) {
  if (num_rows == 0) return;
  const int panels = num_panels(linear.num_columns);
  if (splits_rows(num_rows, num_threads)) {
    parallel_rows(num_rows, 1, num_threads, [&](int begin, int end) {
      LinearInputs part = inputs;
      part.data = static_cast<const char*>(inputs.data) + begin * inputs.stride;
      if (inputs.scales != nullptr) part.scales += begin;
      LinearOutputs to = outputs;
      to.data += begin * outputs.stride;
      Product(linear, part, end - begin, to, kernels).run(0, panels);
    });
    return;
  }
  const Product product(linear, inputs, num_rows, outputs, kernels);
  parallel_for(panels, num_threads, [&](int begin, int end) { product.run(begin, end); });
}

}  // namespace fastgen
