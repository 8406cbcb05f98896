#include "decoder/kv_ranges.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/parallel.h"

namespace fastgen {

namespace {

constexpr double kMostExponent = 60;  // of a factor

// Of a number whose mean square is `variance`: a power of two that is about its root.
float factor_of(double variance) {
  if (!(variance > 0) || !std::isfinite(variance)) return 1;
  int exponent;
  std::frexp(variance, &exponent);
  const double half = std::floor(exponent * 0.5);
  return static_cast<float>(
      std::ldexp(1.0, static_cast<int>(std::clamp(half, -kMostExponent, kMostExponent))));
}

}  // namespace

// A normed number, before gain and bias, has mean 0 and variance 1 over the inputs of a row; here
// each input is taken to have them over the rows, too, and apart from the others.
void find_kv_ranges(const PackedLinear& qkv, const float* gain, const float* bias,
                    const KvRanges& ranges, int num_threads) {
  const int hidden = qkv.num_inputs;
  std::vector<float> columns(static_cast<std::size_t>(num_threads) * hidden);  // one a thread
  run_tasks(num_threads, num_threads, [&](int part) {
    float* const weights = columns.data() + static_cast<std::size_t>(part) * hidden;
    const int end = part_start(2 * hidden, part + 1, num_threads);
    for (int column = part_start(2 * hidden, part, num_threads); column < end; ++column) {
      qkv.read_column(hidden + column, weights);
      double center = qkv.bias[hidden + column], variance = 0;
      for (int input = 0; input < hidden; ++input) {
        const double spread = static_cast<double>(gain[input]) * weights[input];
        center += static_cast<double>(bias[input]) * weights[input];
        variance += spread * spread;
      }
      const KvRange& range = column < hidden ? ranges.keys : ranges.values;
      const int at = column % hidden;
      range.centers[at] = static_cast<float>(center);
      range.factors[at] = factor_of(variance);
      range.inverses[at] = 1 / range.factors[at];
    }
  });
}

}  // namespace fastgen
