// Checks the tiles of every path that this processor has against plain C++, and says what other
// processors' are to be compared with:
//
//   features NAME...          as cpu_features() has them
//   paths NAME...             those that can be taken, the best first
//   chosen NAME               the one that is
//   sums PATH NAME CHECKSUM   of sums of floats, as bits; PATH "fused" is std::fma, step by step
//   packed NAME CHECKSUM      of packed weights: the same on every processor
//
// Sums of int8 are equal to a scalar's on every path, so they need no line.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "common/cpu_features.h"
#include "common/number_formats.h"
#include "decoder/packed_linear.h"
#include "driver_numbers.h"
#include "guarded_memory.h"
#include "require.h"

namespace {

using fastgen::Arithmetic;
using fastgen::DecoderKernels;
using fastgen::kMaxTileRows;
using fastgen::kPanel;
using fastgen::Source;

// ---------------------------------------------------------------------------------------- tiles

using Pick = int (*)(Random&);
int any_weight(Random& random) { return random.below(255) - 127; }
int extreme_weight(Random& random) { return random.below(2) * 254 - 127; }
int any_code(Random& random) { return random.below(256); }
int extreme_code(Random& random) { return random.below(2) * 255; }
template <int kValue>
int always(Random&) {
  return kValue;
}
constexpr Pick kPicks[][2] = {
    {any_weight, any_code},      {extreme_weight, extreme_code}, {always<127>, always<255>},
    {always<-127>, always<255>}, {always<127>, always<0>},       {always<-127>, always<0>},
};

// Rows whose highest number is 255 or 0 are their own codes. `inputs`: how many, of which the last
// step's others meet weights of 0.
void check_int8_sums(const DecoderKernels& kernels, int inputs, Pick weight, Pick code,
                     Random& random) {
  const int steps = fastgen::num_steps(Arithmetic::kInt8, inputs), rows = kernels.max_rows;
  const int stride = steps * code_bytes(kernels);
  Guarded<std::int8_t> panel(static_cast<std::size_t>(steps) * 4 * kPanel);
  Guarded<std::uint8_t> codes(static_cast<std::size_t>(stride) * rows);
  const std::vector<float> ones(inputs, 1.0f);
  std::vector<float> numbers(inputs);
  std::vector<std::int32_t> wanted(rows * kPanel), column_sums(kPanel), zeros(rows);
  for (int k = 0; k < inputs; ++k) {
    for (int column = 0; column < kPanel; ++column) {
      const int picked = weight(random);
      panel[(k / 4 * kPanel + column) * 4 + k % 4] = static_cast<std::int8_t>(picked);
      column_sums[column] += picked;
    }
  }
  for (int row = 0; row < rows; ++row) {
    for (float& number : numbers) number = static_cast<float>(code(random));
    const float highest = *std::max_element(numbers.begin(), numbers.end());
    if (highest > 0) *std::find(numbers.begin(), numbers.end(), highest) = 255;
    zeros[row] =
        kernels.quantize(numbers.data(), ones.data(), inputs, codes.data() + row * stride).zero;
    for (int at = 0; at < inputs * kPanel; ++at) {
      const int k = at / kPanel, column = at % kPanel;
      wanted[row * kPanel + column] +=
          panel[(k / 4 * kPanel + column) * 4 + k % 4] * static_cast<int>(numbers[k]);
    }
  }
  for (int count = 1; count <= rows; ++count) {
    Guarded<std::int32_t> sums(count * kPanel);
    kernels.tiles[static_cast<int>(Arithmetic::kInt8)](
        codes.last(count * stride), stride, count, panel.data(), steps, no_fetch(), sums.data());
    for (int at = 0; at < count * kPanel; ++at) {
      const int row = rows - count + at / kPanel, column = at % kPanel;
      REQUIRE(sums[at] - zeros[row] * column_sums[column] == wanted[row * kPanel + column]);
    }
  }
}

// Codes of 8 bits with inputs of 16, the largest of which, summed, just fit 32 bits.
void check_wide_sums(const DecoderKernels& kernels, int inputs, bool extreme, Random& random) {
  const int steps = fastgen::num_steps(Arithmetic::kInt8WideInputs, inputs);
  const int rows = kernels.max_rows, values = 2 * steps,
            highest = std::min(32767, INT32_MAX / 127 / values);
  Guarded<std::int8_t> panel(static_cast<std::size_t>(values) * kPanel);
  Guarded<std::int16_t> fed(static_cast<std::size_t>(values) * rows);
  const auto some = [&](int most) {
    return extreme ? random.below(2) * 2 * most - most : random.below(2 * most + 1) - most;
  };
  for (std::int8_t& code : panel) code = static_cast<std::int8_t>(some(127));
  for (std::int16_t& input : fed) input = static_cast<std::int16_t>(some(highest));
  if (extreme) {  // two rows that meet nothing but the largest, of one sign, in two columns
    for (int k = 0; k < values; ++k) {
      panel[k / 2 * 2 * kPanel + k % 2] = 127, panel[(k / 2 * kPanel + 1) * 2 + k % 2] = -127;
      fed[k] = static_cast<std::int16_t>(highest);
      fed[(rows - 1) * values + k] = static_cast<std::int16_t>(-highest);
    }
  }
  for (int count = 1; count <= rows; ++count) {
    Guarded<std::int32_t> sums(count * kPanel);
    const std::int16_t* const last = fed.last(count * values);
    kernels.tiles[static_cast<int>(Arithmetic::kInt8WideInputs)](
        last, values * sizeof(std::int16_t), count, panel.data(), steps, no_fetch(), sums.data());
    for (int at = 0; at < count * kPanel; ++at) {
      std::int64_t wanted = 0;
      for (int k = 0; k < values; ++k) {
        wanted += last[at / kPanel * values + k] *
                  std::int64_t{panel[(k / 2 * kPanel + at % kPanel) * 2 + k % 2]};
      }
      REQUIRE(sums[at] == wanted);
    }
  }
}

struct Format {
  Arithmetic arithmetic;
  const char* name;
  bool rounds_weights, rounds_inputs;
  std::uint16_t (*rounded)(float);
  float (*widened)(std::uint16_t);
};

const Format kFormats[] = {
    {Arithmetic::kFloat32, "float32", false, false, nullptr, nullptr},
    {Arithmetic::kFloat16Weights, "float16_weights", true, false, fastgen::round_to_float16,
     fastgen::widen_float16},
    {Arithmetic::kBFloat16Weights, "bfloat16_weights", true, false, fastgen::round_to_bfloat16,
     fastgen::widen_bfloat16},
    {Arithmetic::kBFloat16, "bfloat16", true, true, fastgen::round_to_bfloat16,
     fastgen::widen_bfloat16},
};

// Stores a value as the format has it, in so many bytes, and returns what it is then.
float put(const Format& format, bool rounds, std::size_t bytes, float value, char* to,
          std::size_t index) {
  const std::uint16_t half = rounds ? format.rounded(value) : 0;
  if (rounds) value = format.widened(half);
  if (bytes == sizeof half) {
    std::memcpy(to + index * bytes, &half, bytes);
  } else {
    std::memcpy(to + index * bytes, &value, bytes);
  }
  return value;
}

constexpr int kComparedRows = 4;  // which a tile of every path has
constexpr int kBlockSteps = 256;  // whose sum is made apart: see decoder_kernels.inc

struct FloatSums {
  std::vector<float> found, fused;

  void append(const FloatSums& more) {
    found.insert(found.end(), more.found.begin(), more.found.end());
    fused.insert(fused.end(), more.fused.begin(), more.fused.end());
  }
};

// weights (values, kPanel), inputs (rows, values)
std::vector<float> fused_sums(const std::vector<float>& weights, const std::vector<float>& inputs,
                              int values, int block) {
  std::vector<float> sums(kComparedRows * kPanel);
  for (int at = 0; at < kComparedRows * kPanel; ++at) {
    for (int begin = 0; begin < values; begin += block) {
      float sum = 0;
      for (int k = begin; k < std::min(begin + block, values); ++k) {
        sum = std::fma(inputs[at / kPanel * values + k], weights[k * kPanel + at % kPanel], sum);
      }
      sums[at] = begin == 0 ? sum : sums[at] + sum;
    }
  }
  return sums;
}

// Sums that are near those in double, and of the same bits whatever else is in the tile.
FloatSums float_sums(const DecoderKernels& kernels, const Format& format, int steps,
                     Random& random) {
  const fastgen::StepShape shape = fastgen::step_shape(format.arithmetic);
  const int rows = kernels.max_rows, values = steps * shape.values;
  const std::size_t weight_bytes = shape.bytes / shape.values / kPanel;
  const std::size_t input_bytes = format.rounds_inputs ? kernels.bfloat16_input_bytes : 4;
  const std::size_t stride = values * input_bytes;
  Guarded<char> panel(static_cast<std::size_t>(steps) * shape.bytes), inputs(stride * rows);
  std::vector<double> wanted(rows * kPanel), sizes(rows * kPanel);
  std::vector<float> weights(values * kPanel), fed(rows * values), found(rows * kPanel);
  for (int k = 0; k < values; ++k) {
    for (int column = 0; column < kPanel; ++column) {
      const int at = (k / shape.values * kPanel + column) * shape.values + k % shape.values;
      weights[k * kPanel + column] =
          put(format, format.rounds_weights, weight_bytes, random.value(), panel.data(), at);
    }
  }
  for (int row = 0; row < kMaxTileRows; ++row) {  // as many numbers on every path
    for (int k = 0; k < values; ++k) {
      const float value = random.value();
      if (row >= rows) continue;
      const int at = row * values + k;
      const double input = fed[at] =
          put(format, format.rounds_inputs, input_bytes, value, inputs.data(), at);
      for (int column = 0; column < kPanel; ++column) {
        const double product = input * weights[k * kPanel + column];
        wanted[row * kPanel + column] += product;
        sizes[row * kPanel + column] += std::fabs(product);
      }
    }
  }
  const fastgen::Tile tile = kernels.tiles[static_cast<int>(format.arithmetic)];
  for (int row = 0; row < rows; ++row) {
    tile(inputs.data() + row * stride, stride, 1, panel.data(), steps, no_fetch(),
         found.data() + row * kPanel);
  }
  for (int at = 0; at < rows * kPanel; ++at) REQUIRE(near(found[at], wanted[at], 1e-5 * sizes[at]));
  for (int count = 2; count <= rows; ++count) {
    Guarded<float> sums(count * kPanel);
    tile(inputs.last(count * stride), stride, count, panel.data(), steps, no_fetch(), sums.data());
    REQUIRE(std::memcmp(sums.data(), found.data() + (rows - count) * kPanel,
                        sums.size() * sizeof(float)) == 0);
  }
  found.resize(kComparedRows * kPanel);
  return {found, fused_sums(weights, fed, values, kBlockSteps * shape.values)};
}

void check_tiles(const std::string& path, const DecoderKernels& kernels) {
  Random random(1), floats(2);
  for (const int inputs : {1, 2, 3, 4, 5, 7, 8, 9, 12, 63, 64, 65, 255, 1021, 1024, 1025, 2052}) {
    for (const auto& [weight, code] : kPicks) {
      check_int8_sums(kernels, inputs, weight, code, random);
    }
  }
  for (const int inputs : {1, 2, 3, 4, 5, 31, 32, 33, 64, 80, 128, 255, 256, 511, 513, 1025}) {
    for (const bool extreme : {false, true}) check_wide_sums(kernels, inputs, extreme, random);
  }
  for (const Format& format : kFormats) {
    FloatSums sums;
    for (const int steps : {1, 2, 3, 64, 255, 256, 257, 513}) {
      sums.append(float_sums(kernels, format, steps, floats));
    }
    std::printf("sums %s %s %016llx\n", path.c_str(), format.name, checksum(sums.found));
    std::printf("sums fused %s %016llx\n", format.name, checksum(sums.fused));
  }
}

// Every finite float16, times 1.
void check_widening(const DecoderKernels& kernels) {
  const float one = 1;
  for (int first = 0; first < 1 << 16; first += kPanel) {
    std::uint16_t halves[kPanel];
    float sums[kPanel];
    for (int at = 0; at < kPanel; ++at) halves[at] = static_cast<std::uint16_t>(first + at);
    if (!fastgen::is_finite_float16(halves[0])) continue;
    kernels.tiles[static_cast<int>(Arithmetic::kFloat16Weights)](&one, 4, 1, halves, 1, no_fetch(),
                                                                 sums);
    for (int at = 0; at < kPanel; ++at) REQUIRE(sums[at] == fastgen::widen_float16(halves[at]));
  }
}

// -------------------------------------------------------------------------------------- packing

struct Packing {
  const char* name;
  Arithmetic arithmetic;
  Source::Type type;
  bool transposed;
  int inputs, columns;
};

const Packing kPackings[] = {
    {"float32", Arithmetic::kFloat32, Source::Type::kFloat32, false, 37, 70},
    {"float16", Arithmetic::kFloat16Weights, Source::Type::kFloat32, true, 37, 70},
    {"bfloat16", Arithmetic::kBFloat16, Source::Type::kFloat32, false, 37, 70},
    {"float32_of_float16", Arithmetic::kFloat32, Source::Type::kFloat16, true, 37, 70},
    {"float32_of_bfloat16", Arithmetic::kFloat32, Source::Type::kBFloat16, false, 37, 70},
    {"int8_of_bfloat16", Arithmetic::kInt8, Source::Type::kBFloat16, true, 37, 70},
    // So many that some of them, divided by their column's scale, are rounded to a half.
    {"int8", Arithmetic::kInt8, Source::Type::kFloat32, false, 4000, 256},
};

// Codes are the nearest to what was rounded once before.
void check_codes(const fastgen::PackedLinear& linear, const std::vector<float>& weights) {
  for (int at = 0; at < linear.num_inputs * linear.num_columns; ++at) {
    const int input = at / linear.num_columns, column = at % linear.num_columns;
    const float inverse = 1 / linear.scales[column];
    const volatile float rounded = weights[at] * inverse;
    const char* const panel = linear.panels + column / kPanel * linear.panel_bytes;
    const auto code =
        static_cast<std::int8_t>(panel[(input / 4 * kPanel + column % kPanel) * 4 + input % 4]);
    REQUIRE(code == std::nearbyint(rounded));
  }
}

void check_packing(const Packing& packing) {
  Random random(3);
  std::vector<float> floats(static_cast<std::size_t>(packing.inputs) * packing.columns);
  std::vector<std::uint16_t> halves(floats.size());
  for (std::size_t at = 0; at < floats.size(); ++at) {
    floats[at] = random.value();
    halves[at] = packing.type == Source::Type::kFloat16 ? fastgen::round_to_float16(floats[at])
                                                        : fastgen::round_to_bfloat16(floats[at]);
  }
  Source source = {floats.data(), packing.type, 1, 1};
  if (packing.type != Source::Type::kFloat32) source.data = halves.data();
  (packing.transposed ? source.column_stride : source.input_stride) =
      packing.transposed ? packing.inputs : packing.columns;
  fastgen::PackedLinear linear;
  fastgen::Cursor counted(nullptr);
  linear.lay_out(counted, packing.arithmetic, packing.inputs, packing.columns);
  const fastgen::Arena arena(counted.bytes());
  fastgen::Cursor cursor(arena.data());
  linear.lay_out(cursor, packing.arithmetic, packing.inputs, packing.columns);
  REQUIRE(linear.pack(source, nullptr, nullptr, 2));
  if (packing.arithmetic == Arithmetic::kInt8 && packing.type == Source::Type::kFloat32) {
    check_codes(linear, floats);
  }
  std::printf("packed %s %016llx\n", packing.name,
              static_cast<unsigned long long>(fastgen::xxh64({arena.data(), counted.bytes()})));
}

void print_names(const char* what, const std::vector<std::string>& names) {
  std::printf("%s", what);
  for (const std::string& name : names) std::printf(" %s", name.c_str());
  std::printf("\n");
}

}  // namespace

int main() {
  print_names("features", fastgen::cpu_features());
  print_names("paths", fastgen::instruction_sets());
  print_names("chosen", {fastgen::chosen_instruction_set()});
  for (const std::string& path : fastgen::instruction_sets()) {
    const DecoderKernels& kernels = fastgen::decoder_kernels(path);
    check_tiles(path, kernels);
    check_widening(kernels);
  }
  for (const Packing& packing : kPackings) check_packing(packing);
}
