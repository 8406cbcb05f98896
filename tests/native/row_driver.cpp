// Checks what the decoder's kernels do to rows of floats against the same in double, on every path
// that this processor has; prints "checked PATH" for each.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "common/cpu_features.h"
#include "common/number_formats.h"
#include "driver_numbers.h"
#include "guarded_memory.h"
#include "require.h"

namespace {

using fastgen::Activation;
using fastgen::Arithmetic;
using fastgen::DecoderKernels;
using fastgen::Ending;
using fastgen::kPanel;

constexpr int kCounts[] = {1, 2, 3, 4, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 770};

// Normal numbers, infinities and NaN; what a path makes of smaller ones is its own.
void check_rounding(const DecoderKernels& kernels, Random& random) {
  for (const int count : kCounts) {
    Guarded<float> values(count);
    Guarded<std::uint16_t> rounded(count);
    for (float& value : values) {
      const std::uint32_t sign = random.below(2), exponent = 1 + random.below(255);
      const std::uint32_t rest = random.below(4) == 0 ? 0x8000 : random.below(1 << 23);  // a tie
      value = fastgen::float_of_bits(sign << 31 | exponent << 23 | rest);
    }
    kernels.round_bfloat16(values.data(), count, rounded.data());
    for (int at = 0; at < count; ++at) {
      if (std::isnan(values[at])) {
        REQUIRE(std::isnan(fastgen::widen_bfloat16(rounded[at])));
      } else {
        REQUIRE(rounded[at] == fastgen::round_to_bfloat16(values[at]));
      }
    }
  }
}

void check_layer_norm(const DecoderKernels& kernels, Random& random) {
  for (const int count : kCounts) {
    Guarded<float> values(count), gain(count), bias(count), normed(count);
    double mean = 0, variance = 0;
    for (int at = 0; at < count; ++at) {
      values[at] = 3 + random.value(), gain[at] = random.value(), bias[at] = random.value();
      mean += values[at] / static_cast<double>(count);
    }
    for (const float value : values) variance += (value - mean) * (value - mean) / count;
    kernels.layer_norm(values.data(), gain.data(), bias.data(), 1e-2f, count, normed.data());
    for (int at = 0; at < count; ++at) {
      const double wanted = (values[at] - mean) / std::sqrt(variance + 1e-2) * gain[at] + bias[at];
      REQUIRE(near(normed[at], wanted, 1e-5));
    }
  }
}

double activated(Activation which, double x) {
  const auto sigmoid = [](double of) { return 1 / (1 + std::exp(-of)); };
  switch (which) {
    case Activation::kGelu:
      return x * 0.5 * std::erfc(-x * std::sqrt(0.5));
    case Activation::kGeluTanh:
      return x * sigmoid(2 * std::sqrt(2 / std::acos(-1.0)) * (x + 0.044715 * x * x * x));
    case Activation::kQuickGelu:
      return x * sigmoid(1.702 * x);
    case Activation::kRelu:
      return std::max(x, 0.0);
    case Activation::kSigmoid:
      return sigmoid(x);
    case Activation::kSilu:
      return x * sigmoid(x);
    case Activation::kTanh:
      break;
  }
  return std::tanh(x);
}

// A tile's sums after each ending, for every number of columns, with nothing written beside them.
void check_endings(const DecoderKernels& kernels, Random& random) {
  const int rows = kernels.max_rows;
  std::vector<float> sums(rows * kPanel), bias(kPanel);
  for (float& sum : sums) sum = 12 * random.value();
  for (float& one : bias) one = random.value();
  for (int columns = 1; columns <= kPanel; ++columns) {
    for (int kind = 0; kind < 9; ++kind) {  // two endings, and one for each activation
      Guarded<float> outputs(rows * columns);
      std::fill(outputs.begin(), outputs.end(), 0.5f);
      fastgen::TileEnd end = {};
      end.bias = bias.data();
      end.ending = kind == 0 ? Ending::kStore : kind == 1 ? Ending::kAdd : Ending::kActivate;
      end.activation = static_cast<Activation>(std::max(0, kind - 2));
      end.outputs = outputs.data();
      end.stride = end.columns = columns;
      kernels.finish(sums.data(), rows, end);
      for (int at = 0; at < rows * columns; ++at) {
        const double x = sums[at / columns * kPanel + at % columns] + bias[at % columns];
        const double wanted = kind == 0 ? x : kind == 1 ? x + 0.5 : activated(end.activation, x);
        REQUIRE(near(outputs[at], wanted, 3e-6 * (1 + std::fabs(x))));
      }
    }
  }
}

// Codes of a row (inputs), read by the path's tile: each meets a weight of 1 in a column of its
// own.
std::vector<int> codes_of(const DecoderKernels& kernels, const std::uint8_t* row, int inputs) {
  const int steps = fastgen::num_steps(Arithmetic::kInt8, inputs);
  std::vector<int> codes;
  for (int first = 0; first < inputs; first += kPanel) {
    std::vector<std::int8_t> panel(steps * 4 * kPanel);
    std::int32_t sums[kPanel];
    const int last = std::min(first + kPanel, inputs);
    for (int k = first; k < last; ++k) panel[(k / 4 * kPanel + k - first) * 4 + k % 4] = 1;
    kernels.tiles[static_cast<int>(Arithmetic::kInt8)](row, 0, 1, panel.data(), steps, no_fetch(),
                                                       sums);
    codes.insert(codes.end(), sums, sums + last - first);
  }
  return codes;
}

// From floats to int8 and back: codes, zero and column sums as a path has them belong together.
void check_int8_values(const DecoderKernels& kernels, Random& random) {
  for (const int inputs : kCounts) {
    const int steps = fastgen::num_steps(Arithmetic::kInt8, inputs);
    Guarded<float> values(inputs), factors(inputs);
    Guarded<std::uint8_t> row_codes(steps * code_bytes(kernels));
    std::vector<std::int8_t> panel(steps * 4 * kPanel);
    std::vector<std::int32_t> sums(kPanel), column_sums(kPanel);
    std::vector<float> scales(kPanel, 0.01f), bias(kPanel, 0.25f), outputs(kPanel);
    std::vector<double> wanted(kPanel), sizes(kPanel);
    for (int k = 0; k < inputs; ++k) {
      values[k] = 2 * random.value() + 0.5f, factors[k] = 1 + random.value() * random.value();
    }
    const fastgen::RowScale row =
        kernels.quantize(values.data(), factors.data(), inputs, row_codes.data());
    const std::vector<int> codes = codes_of(kernels, row_codes.data(), inputs);
    for (int k = 0; k < inputs; ++k) {
      const double value = static_cast<double>(row.scale) * (codes[k] - row.zero);
      REQUIRE(near(value, values[k] * factors[k], 0.501 * row.scale));
      for (int column = 0; column < kPanel; ++column) {
        const int weight = random.below(255) - 127;
        panel[(k / 4 * kPanel + column) * 4 + k % 4] = static_cast<std::int8_t>(weight);
        column_sums[column] += weight;
        wanted[column] += value * weight * scales[column];
        sizes[column] += std::fabs(value * weight * scales[column]);
      }
    }
    kernels.tiles[static_cast<int>(Arithmetic::kInt8)](row_codes.data(), 0, 1, panel.data(), steps,
                                                       no_fetch(), sums.data());
    fastgen::TileEnd end = {bias.data(),    scales.data(),  column_sums.data(),
                            &row,           Ending::kStore, {},
                            outputs.data(), kPanel,         kPanel};
    kernels.finish(sums.data(), 1, end);
    for (int column = 0; column < kPanel; ++column) {
      REQUIRE(near(outputs[column], wanted[column] + 0.25, 1e-6 * (1 + sizes[column])));
    }
  }
}

// Two blocks of 32 keys, of which the second is seen in part: weights, totals, and what they do to
// sums that were made before.
void check_softmax(const DecoderKernels& kernels, Random& random) {
  constexpr float kFactor = 0.5f;
  const int rows = kernels.max_rows, visible[] = {kPanel, 3};
  Guarded<float> scores(rows * kPanel), weights(rows * kPanel);
  fastgen::Softmax softmax;
  std::fill(softmax.highest, softmax.highest + rows, -INFINITY);
  std::fill(softmax.total, softmax.total + rows, 0.0f);
  std::vector<double> totals(rows), highest(rows, -INFINITY);
  for (const int seen : visible) {
    for (float& score : scores) score = 20 * random.value();
    kernels.weigh_scores(scores.data(), rows, kFactor, seen, softmax, weights.data());
    for (int row = 0; row < rows; ++row) {
      const double before = highest[row];
      const int count = std::min(kPanel, seen + row);
      const float* const some = scores.data() + row * kPanel;
      for (int at = 0; at < count; ++at) {
        highest[row] = std::max(highest[row], static_cast<double>(kFactor * some[at]));
      }
      totals[row] *= std::exp(before - highest[row]);
      REQUIRE(softmax.highest[row] == highest[row]);
      REQUIRE(near(softmax.rescale[row], std::exp(before - highest[row]), 1e-6));
      for (int at = 0; at < kPanel; ++at) {
        const double wanted = at < count ? std::exp(kFactor * some[at] - highest[row]) : 0;
        REQUIRE(near(weights[row * kPanel + at], wanted, 1e-6));
        totals[row] += wanted;
      }
      REQUIRE(near(softmax.total[row], totals[row], 1e-5 * totals[row]));
    }
  }
}

// Rows to codes and back; a number that is not finite makes the scale NaN.
void check_codes(const DecoderKernels& kernels, Random& random) {
  for (const int count : kCounts) {
    Guarded<float> values(count), centers(count), factors(count);
    Guarded<std::int8_t> codes(count);
    Guarded<std::int16_t> wide(count);
    for (int at = 0; at < count; ++at) {
      values[at] = 5 + random.value(), centers[at] = 5, factors[at] = 1 + random.below(4);
    }
    const float scale =
        kernels.quantize_int8(values.data(), centers.data(), factors.data(), count, codes.data());
    const float wide_scale =
        kernels.quantize_int16(values.data(), factors.data(), count, 300, wide.data());
    int most = 0, most_wide = 0;
    for (int at = 0; at < count; ++at) {
      REQUIRE(near(codes[at] * static_cast<double>(scale),
                   (values[at] - centers[at]) * static_cast<double>(factors[at]), 0.501 * scale));
      REQUIRE(near(wide[at] * static_cast<double>(wide_scale),
                   values[at] * static_cast<double>(factors[at]), 0.501 * wide_scale));
      most = std::max(most, std::abs(static_cast<int>(codes[at])));
      most_wide = std::max(most_wide, std::abs(static_cast<int>(wide[at])));
    }
    REQUIRE(most == 127 && most_wide == 300);
    for (const float wrong : {INFINITY, -INFINITY, NAN}) {
      values[count - 1] = wrong;
      REQUIRE(std::isnan(kernels.quantize_int8(values.data(), centers.data(), factors.data(), count,
                                               codes.data())));
      REQUIRE(std::isnan(
          kernels.quantize_int16(values.data(), factors.data(), count, 300, wide.data())));
    }
    for (int at = 0; at < count; ++at) values[at] = centers[at];
    const float least =
        kernels.quantize_int8(values.data(), centers.data(), factors.data(), count, codes.data());
    REQUIRE(least > 0 &&
            std::all_of(codes.begin(), codes.end(), [](int code) { return code == 0; }));
  }
}

// As weigh_scores weighs the same scores as floats. Nothing is known of hidden columns' scales.
void check_int8_weights(const DecoderKernels& kernels, Random& random) {
  constexpr float kFactor = 0.5f;
  const int rows = kernels.max_rows;
  Guarded<std::int32_t> scores(rows * kPanel);
  Guarded<std::int16_t> codes(rows * kPanel);
  Guarded<float> key_scales(kPanel), value_scales(kPanel), factors(rows), code_scales(rows);
  std::vector<float> floats(rows * kPanel), weights(rows * kPanel);
  fastgen::Softmax softmax, wanted;
  for (fastgen::Softmax* const one : {&softmax, &wanted}) {
    std::fill(one->highest, one->highest + rows, -INFINITY);
    std::fill(one->total, one->total + rows, 0.0f);
  }
  for (const int seen : {kPanel, 3, 2 - rows}) {
    for (std::int32_t& score : scores) score = random.below(1 << 21) - (1 << 20);
    for (float& scale : key_scales) scale = 0x1p-16f * (1 + random.below(2));
    for (float& scale : value_scales) scale = 0.5f + random.below(8);
    for (float& factor : factors) factor = kFactor * (1 + random.below(2));
    const int known = std::clamp(seen + rows - 1, 0, kPanel);
    for (int column = known; column < kPanel; ++column) {
      key_scales[column] = value_scales[column] = column % 2 == 0 ? NAN : INFINITY;
    }
    for (int at = 0; at < rows * kPanel; ++at) {  // powers of two: no rounding of its own
      floats[at] = scores[at] * (key_scales[at % kPanel] * factors[at / kPanel] / kFactor);
    }
    kernels.weigh_scores(floats.data(), rows, kFactor, seen, wanted, weights.data());
    kernels.weigh_int8_scores(scores.data(), rows, factors.data(), seen, key_scales.data(),
                              value_scales.data(), softmax, codes.data(), code_scales.data());
    for (int row = 0; row < rows; ++row) {
      REQUIRE(softmax.highest[row] == wanted.highest[row]);
      REQUIRE(softmax.total[row] == wanted.total[row]);
      REQUIRE(softmax.rescale[row] == wanted.rescale[row]);
      for (int column = 0; column < kPanel; ++column) {
        const int code = codes[row * kPanel + column];
        const bool visible = column < seen + row;
        const double weight =
            visible ? static_cast<double>(weights[row * kPanel + column]) * value_scales[column]
                    : 0;
        REQUIRE(code >= 0 && (visible || code == 0));
        REQUIRE(
            near(code * static_cast<double>(code_scales[row]), weight, 0.51 * code_scales[row]));
      }
      if (seen == kPanel) {
        REQUIRE(*std::max_element(codes.data() + row * kPanel, codes.data() + (row + 1) * kPanel) ==
                32767);
      }
    }
  }
  value_scales[0] = NAN;
  kernels.weigh_int8_scores(scores.data(), rows, factors.data(), 1, key_scales.data(),
                            value_scales.data(), softmax, codes.data(), code_scales.data());
  for (const float scale : code_scales) REQUIRE(std::isnan(scale));
}

void check_int8_sums(const DecoderKernels& kernels, Random& random) {
  const int rows = 3;
  const float factors[rows] = {0, 1, 0.25f}, scales[rows] = {0x1p-20f, 0x1p-21f, 0x1p-22f};
  for (int columns = 1; columns <= kPanel; ++columns) {
    Guarded<std::int32_t> values(rows * kPanel);
    Guarded<float> sums(rows * columns), restored(columns), centers(columns);
    for (std::int32_t& value : values) value = random.below(1 << 24) - (1 << 23);
    for (float& sum : sums) sum = random.value();
    for (int at = 0; at < columns; ++at) restored[at] = 1 << random.below(4);
    for (float& center : centers) center = random.value();
    const std::vector<float> before(sums.begin(), sums.end());
    kernels.rescale_and_add_int8(values.data(), rows, factors, scales, columns, sums.data(),
                                 columns);
    kernels.restore(0.5f, restored.data(), centers.data(), columns, sums.data());
    for (int at = 0; at < rows * columns; ++at) {
      const int row = at / columns, column = at % columns;
      double wanted = before[at] * factors[row] +
                      values[row * kPanel + column] * static_cast<double>(scales[row]);
      if (row == 0) wanted = wanted * 0.5 * restored[column] + centers[column];
      REQUIRE(near(sums[at], wanted, 1e-5 * (1 + std::fabs(wanted))));
    }
  }
}

void check_sums(const DecoderKernels& kernels, Random& random) {
  for (int columns = 1; columns <= kPanel; ++columns) {
    const int rows = 3;
    Guarded<float> values(rows * kPanel), sums(rows * columns), more(columns);
    const float factors[rows] = {0, 1, 0.25f};
    for (float& value : values) value = random.value();
    for (float& sum : sums) sum = random.value();
    for (float& one : more) one = random.value();
    const std::vector<float> before(sums.begin(), sums.end());
    kernels.rescale_and_add(values.data(), rows, factors, columns, sums.data(), columns);
    kernels.add(more.data(), columns, sums.data());
    kernels.scale(-2, columns, sums.data());
    for (int at = 0; at < rows * columns; ++at) {
      const int row = at / columns, column = at % columns;
      double wanted = before[at] * factors[row] + values[row * kPanel + column];
      if (row == 0) wanted = -2 * (wanted + more[column]);
      REQUIRE(near(sums[at], wanted, 1e-6));
    }
  }
}

}  // namespace

int main() {
  for (const std::string& path : fastgen::instruction_sets()) {
    const DecoderKernels& kernels = fastgen::decoder_kernels(path);
    Random random(4);
    check_rounding(kernels, random);
    check_layer_norm(kernels, random);
    check_endings(kernels, random);
    check_int8_values(kernels, random);
    check_softmax(kernels, random);
    check_sums(kernels, random);
    check_codes(kernels, random);
    check_int8_weights(kernels, random);
    check_int8_sums(kernels, random);
    std::printf("checked %s\n", path.c_str());
  }
}
