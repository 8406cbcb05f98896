// Multiplies rows of 8-bit codes with matrices of 8-bit weights on every path, with no Python
// around it, and compares with sums made one by one in 64 bits; for ASan and UBSan.
//
//   int8_driver SECONDS SEED
//
// Rows that span 255 and columns whose largest weight is 127 have scales of 1 and zero points that
// are known: outputs are then the sums themselves.

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "common/arena.h"
#include "common/cpu_features.h"
#include "decoder/packed_linear.h"
#include "require.h"

namespace {

using fastgen::Arithmetic;
using fastgen::DecoderKernels;
using Clock = std::chrono::steady_clock;

constexpr int kMostInputs = 66'311;  // whose products' sum fits 32 bits

class Chance {
 public:
  explicit Chance(unsigned seed) : generator_(seed) {}

  int below(int bound) { return static_cast<int>(generator_() % bound); }
  int between(int lowest, int highest) { return lowest + below(highest - lowest + 1); }

 private:
  std::mt19937 generator_;
};

// All the lowest, all the highest, one of both, or anything.
std::vector<float> some_numbers(Chance& chance, int count, int lowest, int highest) {
  const int kind = chance.below(4);
  std::vector<float> numbers(count);
  for (float& number : numbers) {
    int chosen = kind == 1 ? highest : lowest;
    if (kind == 2) chosen = chance.below(2) != 0 ? highest : lowest;
    if (kind == 3) chosen = chance.between(lowest, highest);
    number = static_cast<float>(chosen);
  }
  return numbers;
}

int some_length(Chance& chance) {
  switch (chance.below(40)) {
    case 0:
      return kMostInputs - chance.below(5);
    case 1:
    case 2:
    case 3:
      return chance.between(1, 3100);
    case 4:
    case 5:
    case 6:
      return 1024 * chance.between(1, 3) + chance.between(-9, 9);
    default:
      return chance.between(1, 150);
  }
}

// A column of weights whose largest is 127.
std::vector<float> some_column(Chance& chance, int length) {
  std::vector<float> column = some_numbers(chance, length, -127, 127);
  column[chance.below(length)] = chance.below(2) != 0 ? 127.0f : -127.0f;
  return column;
}

// A row of inputs, which is codes less a zero point.
std::vector<float> some_row(Chance& chance, int length) {
  const int zero = length == 1 ? 255 * chance.below(2) : chance.below(256);
  std::vector<float> row = some_numbers(chance, length, 0, 255);
  const int first = chance.below(length);
  if (zero > 0) row[first] = 0;
  if (zero < 255) row[zero > 0 ? (first + 1) % length : first] = 255;
  for (float& value : row) value -= static_cast<float>(zero);
  return row;
}

class Matrix {
 public:
  Matrix(Chance& chance, int length, int num_columns) {
    for (int column = 0; column < num_columns; ++column) {
      const std::vector<float> weights = some_column(chance, length);
      columns_.insert(columns_.end(), weights.begin(), weights.end());
    }
    fastgen::Cursor counted(nullptr);
    linear_.lay_out(counted, Arithmetic::kInt8, length, num_columns);
    memory_ = fastgen::Arena(counted.bytes());
    fastgen::Cursor cursor(memory_.data());
    linear_.lay_out(cursor, Arithmetic::kInt8, length, num_columns);
    const fastgen::Source source = {columns_.data(), fastgen::Source::Type::kFloat32, 1,
                                    static_cast<std::size_t>(length)};
    REQUIRE(linear_.pack(source, nullptr, nullptr, 1));
  }

  const fastgen::PackedLinear& linear() const { return linear_; }

  float sum(const std::vector<float>& row, int column) const {
    const float* const weights = columns_.data() + static_cast<std::size_t>(column) * row.size();
    std::int64_t sum = 0;
    for (std::size_t at = 0; at < row.size(); ++at) {
      sum += static_cast<std::int64_t>(row[at]) * static_cast<std::int64_t>(weights[at]);
    }
    return static_cast<float>(sum);
  }

 private:
  std::vector<float> columns_;  // one after the other
  fastgen::Arena memory_;
  fastgen::PackedLinear linear_;
};

// Rows as inputs, in memory of exactly their size, so that a write past them is seen.
class Inputs {
 public:
  Inputs(const std::vector<std::vector<float>>& rows, const fastgen::PackedLinear& linear,
         const DecoderKernels& kernels)
      : stride_(8 * static_cast<std::size_t>(linear.num_steps)) {
    for (const std::vector<float>& row : rows) {
      const std::unique_ptr<std::uint8_t[]> codes(new std::uint8_t[stride_]());
      scales_.push_back(
          kernels.quantize(row.data(), linear.factors, linear.num_inputs, codes.get()));
      REQUIRE(scales_.back().scale == 1);
      all_.insert(all_.end(), codes.get(), codes.get() + stride_);
    }
    all_.shrink_to_fit();
  }

  fastgen::LinearInputs get() const { return {all_.data(), stride_, scales_.data()}; }

 private:
  std::size_t stride_;
  std::vector<std::uint8_t> all_;
  std::vector<fastgen::RowScale> scales_;
};

void check_case(Chance& chance) {
  const int length = some_length(chance);
  const int num_columns = length > 4000 ? 1 : chance.between(1, 100);
  const int num_rows = length > 4000 ? chance.between(1, 3) : chance.between(1, 30);
  const Matrix matrix(chance, length, num_columns);
  std::vector<std::vector<float>> rows;
  for (int row = 0; row < num_rows; ++row) rows.push_back(some_row(chance, length));
  std::vector<float> wanted, found(static_cast<std::size_t>(num_rows) * num_columns);
  for (const std::vector<float>& row : rows) {
    for (int column = 0; column < num_columns; ++column) wanted.push_back(matrix.sum(row, column));
  }
  for (const std::string& path : fastgen::instruction_sets()) {
    const DecoderKernels& kernels = fastgen::decoder_kernels(path);
    const Inputs inputs(rows, matrix.linear(), kernels);
    const fastgen::LinearOutputs outputs = {found.data(), static_cast<std::size_t>(num_columns),
                                            fastgen::Ending::kStore};
    std::fill(found.begin(), found.end(), -1.0f);
    fastgen::multiply(matrix.linear(), inputs.get(), num_rows, outputs, kernels,
                      chance.between(1, 2));
    REQUIRE(found == wanted);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  Chance chance(static_cast<unsigned>(std::atoi(argv[2])));
  const auto end = Clock::now() + std::chrono::duration<double>(std::atof(argv[1]));
  long cases = 0;
  for (; Clock::now() < end; ++cases) check_case(chance);
  std::printf("%ld cases\n", cases);
}
