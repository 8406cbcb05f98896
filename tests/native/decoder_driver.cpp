// Runs the CPU decoder on random models and steps, with no Python around it; for ASan, UBSan and
// TSan.
//
//   decoder_driver SECONDS SEED    random cases until the time is up, on two threads that share
//                                  the pool
//
// A case is a model of odd sizes, with random weights, and some rows. Each row is computed alone,
// whole, on one thread; then all of them in steps of random pieces and orders, on several threads,
// in blocks that are scattered, copied and more and more. Both must give the same bits.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "common/cpu_features.h"
#include "common/number_formats.h"
#include "decoder/cpu_decoder.h"
#include "require.h"

namespace {

using fastgen::Arithmetic;
using fastgen::CpuDecoder;
using fastgen::DecoderShape;
using fastgen::kBlockTokens;
using fastgen::Source;
using Ids = std::vector<std::int32_t>;

constexpr int kMaxLen = 90;

class Chance {
 public:
  explicit Chance(unsigned seed) : generator_(seed) {}

  int below(int bound) { return static_cast<int>(generator_() % bound); }
  bool once_in(int count) { return below(count) == 0; }
  int some(const std::vector<int>& values) {
    return values[below(static_cast<int>(values.size()))];
  }
  float value(float scale) { return scale * normal_(generator_); }
  template <typename Value>
  void shuffle(std::vector<Value>& values) {
    std::shuffle(values.begin(), values.end(), generator_);
  }

 private:
  std::mt19937 generator_;
  std::normal_distribution<float> normal_;
};

DecoderShape some_shape(Chance& chance) {
  DecoderShape shape;
  const int head_dim = chance.some({1, 2, 3, 5, 8, 16, 25, 32, 33, 64, 80});
  shape.num_heads = 1 + chance.below(std::min(5, 160 / head_dim));
  shape.hidden_size = shape.num_heads * head_dim;
  shape.inner_size = 1 + chance.below(chance.once_in(8) ? 700 : 150);
  shape.num_layers = 1 + chance.below(3);
  shape.vocab_size = 1 + chance.below(150);
  shape.max_positions = kMaxLen + chance.below(10);
  shape.activation = static_cast<fastgen::Activation>(chance.below(7));
  shape.epsilon = chance.once_in(4) ? 1e-2f : 1e-5f;
  for (int layer = 0; layer < shape.num_layers; ++layer) {
    shape.attention_scales.push_back(1 / std::sqrt(static_cast<float>(head_dim)) / (layer + 1));
  }
  shape.linear = static_cast<Arithmetic>(chance.below(fastgen::kNumWeightArithmetics));
  const bool rounds = shape.linear == Arithmetic::kBFloat16 ||
                      (shape.linear == Arithmetic::kInt8 && chance.once_in(2));
  shape.attention = rounds ? Arithmetic::kBFloat16 : Arithmetic::kFloat32;
  if (chance.once_in(3)) shape.attention = Arithmetic::kInt8WideInputs;
  shape.tied = chance.once_in(2);
  shape.max_tokens = kMaxLen + chance.below(60);
  shape.max_logits = shape.max_tokens - chance.below(2) * chance.below(60);
  return shape;
}

// A matrix as a file may hold it, (rows, columns); `transposed` where its rows are the outputs.
struct Matrix {
  Matrix(Chance& chance, int rows, int columns, bool transposed)
      : floats(static_cast<std::size_t>(rows) * columns), halves(floats.size()) {
    const float scale = 1 / std::sqrt(static_cast<float>(transposed ? columns : rows));
    source.type = static_cast<Source::Type>(chance.below(3));
    for (std::size_t at = 0; at < floats.size(); ++at) {
      floats[at] = chance.value(scale);
      halves[at] = source.type == Source::Type::kFloat16 ? fastgen::round_to_float16(floats[at])
                                                         : fastgen::round_to_bfloat16(floats[at]);
    }
    source.data = source.type == Source::Type::kFloat32 ? static_cast<const void*>(floats.data())
                                                        : halves.data();
    source.input_stride = transposed ? 1 : columns;
    source.column_stride = transposed ? columns : 1;
  }

  std::vector<float> floats;
  std::vector<std::uint16_t> halves;
  Source source;
};

std::vector<float> some_values(Chance& chance, int count, float mean, float scale) {
  std::vector<float> values(count);
  for (float& value : values) value = mean + chance.value(scale);
  return values;
}

// The same weights for the same chance.
void fill(CpuDecoder& decoder, Chance chance) {
  const DecoderShape& shape = decoder.shape();
  const int hidden = shape.hidden_size;
  const auto pack = [&](fastgen::PackedLinear& linear, bool transposed) {
    const int inputs = linear.num_inputs, columns = linear.num_columns;
    const Matrix matrix(chance, transposed ? columns : inputs, transposed ? inputs : columns,
                        transposed);
    const std::vector<float> bias = some_values(chance, columns, 0, 0.1f);
    std::vector<float> smoothing(inputs);
    for (float& factor : smoothing) factor = std::ldexp(1.0f, chance.below(5) - 1);
    const float* const factors = chance.once_in(2) ? smoothing.data() : nullptr;
    REQUIRE(linear.pack(matrix.source, transposed ? nullptr : bias.data(), factors,
                        decoder.num_threads()));
  };
  const auto set_norm = [&](int layer, bool second) {
    const std::vector<float> gain = some_values(chance, hidden, 1, 0.2f);
    decoder.set_norm(layer, second, gain.data(), some_values(chance, hidden, 0, 0.1f).data());
  };
  decoder.set_positions(some_values(chance, shape.max_positions * hidden, 0, 0.5f).data());
  if (!shape.tied) pack(decoder.embedding(), true);
  for (int layer = 0; layer < shape.num_layers; ++layer) {
    set_norm(layer, false);
    set_norm(layer, true);
    for (int which = 0; which < fastgen::kNumProjections; ++which) {
      pack(decoder.projection(layer, static_cast<fastgen::Projection>(which)), false);
    }
  }
  set_norm(-1, false);
  pack(decoder.head(), true);
}

struct Row {
  Ids ids, blocks;
  int fed = 0, taken = 0;  // tokens in the cache, and how many of them another row put there
  std::vector<float> logits = {};  // (ids, vocab)
};

// A decoder and the blocks that no row has yet.
class Runner {
 public:
  Runner(const DecoderShape& shape, int num_threads, const fastgen::DecoderKernels& kernels,
         Chance weights, int num_blocks)
      : decoder_(shape, num_blocks, num_threads, kernels), free_(num_blocks) {
    fill(decoder_, weights);
    std::iota(free_.begin(), free_.end(), 0);
  }

  void give_blocks(Row& row, Chance& chance) {
    const int needed = (static_cast<int>(row.ids.size()) + kBlockTokens - 1) / kBlockTokens;
    if (static_cast<int>(free_.size()) < needed) {
      const int before = decoder_.blocks().num_blocks();
      decoder_.blocks().grow(before + needed + chance.below(4));
      for (int block = before; block < decoder_.blocks().num_blocks(); ++block) {
        free_.push_back(block);
      }
    }
    chance.shuffle(free_);
    row.blocks.assign(free_.end() - needed, free_.end());
    free_.resize(free_.size() - needed);
  }

  // The first `count` tokens are those of `other`, which has computed them.
  void take_beginning(Row& row, const Row& other, int count) {
    std::vector<std::int32_t> pairs;
    for (int at = 0; at * kBlockTokens < count; ++at) {
      pairs.push_back(other.blocks[at]);
      pairs.push_back(row.blocks[at]);
    }
    decoder_.blocks().copy(reinterpret_cast<const std::int32_t (*)[2]>(pairs.data()),
                           static_cast<int>(pairs.size() / 2), decoder_.num_threads());
    row.fed = row.taken = count;
  }

  // Feeds each row its next tokens.
  void step(const std::vector<Row*>& rows, const Ids& counts, Chance& chance) {
    const DecoderShape& shape = decoder_.shape();
    Ids ids, positions, starts = {0}, cached, order;
    std::size_t width = 0;
    for (const Row* row : rows) width = std::max(width, row->blocks.size());
    Ids tables(width * rows.size(), -1);
    for (std::size_t at = 0; at < rows.size(); ++at) {
      const Row& row = *rows[at];
      for (int index = row.fed; index < row.fed + counts[at]; ++index) {
        ids.push_back(row.ids[index]);
        positions.push_back(index);
      }
      starts.push_back(starts.back() + counts[at]);
      cached.push_back(row.fed);
      std::copy(row.blocks.begin(), row.blocks.end(), tables.begin() + at * width);
    }
    const int tokens = starts.back();
    const fastgen::StepRows batch = {tokens,
                                     static_cast<int>(rows.size()),
                                     static_cast<int>(width),
                                     ids.data(),
                                     positions.data(),
                                     starts.data(),
                                     cached.data(),
                                     tables.data()};
    std::vector<float> found(static_cast<std::size_t>(tokens) * shape.vocab_size);
    order.resize(tokens);
    std::iota(order.begin(), order.end(), 0);
    chance.shuffle(order);
    // Computing a step again changes nothing: so all the logits can be had in pieces.
    for (int first = 0; first < tokens; first += shape.max_logits) {
      const int count = std::min(shape.max_logits, tokens - first);
      const float* const logits = decoder_.forward(batch, order.data() + first, count);
      for (int at = 0; at < count; ++at) {
        std::copy(logits + static_cast<std::size_t>(at) * shape.vocab_size,
                  logits + static_cast<std::size_t>(at + 1) * shape.vocab_size,
                  found.begin() + static_cast<std::size_t>(order[first + at]) * shape.vocab_size);
      }
    }
    for (std::size_t at = 0; at < rows.size(); ++at) {
      const auto begin = found.begin() + static_cast<std::size_t>(starts[at]) * shape.vocab_size;
      const auto size = static_cast<std::size_t>(counts[at]) * shape.vocab_size;
      rows[at]->logits.insert(rows[at]->logits.end(), begin, begin + size);
      rows[at]->fed += counts[at];
    }
  }

 private:
  CpuDecoder decoder_;
  Ids free_;
};

std::vector<Row> some_rows(int vocab_size, Chance& chance) {
  std::vector<Row> rows(1 + chance.below(6));
  for (Row& row : rows) {
    row.ids.resize(1 + chance.below(kMaxLen));
    for (std::int32_t& id : row.ids) id = chance.below(vocab_size);
    const Row& other = rows[chance.below(static_cast<int>(rows.size()))];
    if (chance.once_in(2)) continue;
    const std::size_t same = chance.below(1 + std::min(row.ids.size(), other.ids.size()));
    std::copy(other.ids.begin(), other.ids.begin() + same, row.ids.begin());
  }
  return rows;
}

int same_beginning(const Row& row, const Row& other) {
  const int most = std::min(static_cast<int>(row.ids.size()) - 1, other.fed);
  const auto behind = std::mismatch(row.ids.begin(), row.ids.begin() + most, other.ids.begin());
  return static_cast<int>(behind.first - row.ids.begin());
}

void run_together(Runner& runner, std::vector<Row>& rows, int max_tokens, Chance& chance) {
  for (;;) {
    std::vector<Row*> chosen;
    Ids counts;
    int room = max_tokens;
    const int longest = chance.some({1, 2, 7, 33, kMaxLen});
    for (Row& row : rows) {
      const int left = static_cast<int>(row.ids.size()) - row.fed;
      if (left == 0 || room == 0 || chance.once_in(4)) continue;
      if (row.blocks.empty()) {
        runner.give_blocks(row, chance);
        const Row& other = rows[chance.below(static_cast<int>(rows.size()))];
        const int same = same_beginning(row, other);
        if (&other != &row && same > 0) runner.take_beginning(row, other, same);
      }
      const int most = std::min({longest, static_cast<int>(row.ids.size()) - row.fed, room});
      chosen.push_back(&row);
      counts.push_back(1 + chance.below(most));
      room -= counts.back();
    }
    if (!chosen.empty()) runner.step(chosen, counts, chance);
    const auto whole = [](const Row& row) { return row.fed == static_cast<int>(row.ids.size()); };
    if (std::all_of(rows.begin(), rows.end(), whole)) return;
  }
}

void run_case(Chance& chance) {
  const DecoderShape shape = some_shape(chance);
  const std::vector<std::string> paths = fastgen::instruction_sets();
  const std::string& path = paths[chance.below(static_cast<int>(paths.size()))];
  const fastgen::DecoderKernels& kernels = fastgen::decoder_kernels(path);
  const Chance weights = chance;
  Runner alone(shape, 1, kernels, weights, (kMaxLen + kBlockTokens - 1) / kBlockTokens);
  Runner together(shape, 1 + chance.below(4), kernels, weights, 1);
  std::vector<Row> rows = some_rows(shape.vocab_size, chance);
  run_together(together, rows, shape.max_tokens, chance);
  for (const Row& row : rows) {
    Row whole = {row.ids, {2, 0, 1}};
    alone.step({&whole}, {static_cast<int>(row.ids.size())}, chance);
    const std::size_t taken = static_cast<std::size_t>(row.taken) * shape.vocab_size;
    REQUIRE(row.logits.size() + taken == whole.logits.size());
    for (const float logit : row.logits) REQUIRE(std::isfinite(logit));
    REQUIRE(std::memcmp(row.logits.data(), whole.logits.data() + taken,
                        row.logits.size() * sizeof(float)) == 0);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const double seconds = std::atof(argv[1]);
  const unsigned seed = static_cast<unsigned>(std::atoi(argv[2]));
  const auto start = std::chrono::steady_clock::now();
  const auto cases = [&](unsigned own_seed) {
    long count = 0;
    for (Chance chance(own_seed);; ++count) {
      const std::chrono::duration<double> passed = std::chrono::steady_clock::now() - start;
      if (passed.count() >= seconds) return count;
      run_case(chance);
    }
  };
  long others = 0;
  std::thread other([&] { others = cases(seed + 1); });
  const long own = cases(seed);
  other.join();
  std::printf("%ld cases\n", own + others);
}
