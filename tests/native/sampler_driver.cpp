// Feeds the sampler bytes, as logits and as options, with no Python around it.
//
//   sampler_driver SECONDS SEED     random cases until the time is up, on two threads that share
//   the
//                                   pool; for ASan, UBSan and TSan
//   with -DLIBFUZZER -fsanitize=fuzzer: a libFuzzer target
//
// Every case is drawn twice, by one thread with portable code and by several threads with the best
// instructions there are; both must say the same, and only what the options allow.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "common/cpu_features.h"
#include "require.h"
#include "sampler/sampler.h"

namespace {

using fastgen::DrawStatus;
using fastgen::SamplingOptions;

// Bytes of a case; zeros behind the last.
class Bytes {
 public:
  Bytes(const std::uint8_t* data, std::size_t size) : data_(data), size_(size) {}

  template <typename Value>
  Value take() {
    Value value{};
    const std::size_t count = std::min(sizeof value, size_ - at_);
    std::memcpy(&value, data_ + at_, count);
    at_ += count;
    return value;
  }
  int below(int bound) { return static_cast<int>(take<std::uint32_t>() % bound); }
  double unit() { return take<std::uint32_t>() / 4294967296.0; }
  bool maybe(int one_in) { return below(one_in) == 0; }

 private:
  const std::uint8_t* data_;
  std::size_t size_, at_ = 0;
};

std::vector<std::int32_t> some_ids(Bytes& bytes, int vocab_size, int most) {
  std::vector<std::int32_t> ids(bytes.below(most + 1));
  for (std::int32_t& id : ids) id = bytes.below(vocab_size);
  return ids;
}

SamplingOptions some_options(Bytes& bytes, int vocab_size) {
  SamplingOptions options;
  options.seed = bytes.take<std::uint64_t>();
  const float temperatures[] = {0, 1, 1e-6f, 0.3f, 2.5f, 1e6f};
  options.temperature = temperatures[bytes.below(6)];
  if (bytes.maybe(4)) options.top_n_sigma = bytes.maybe(4) ? 1e6 : 4 * bytes.unit() + 1e-9;
  if (bytes.maybe(3)) options.top_h = bytes.maybe(4) ? 1 : bytes.unit() + 1e-9;
  if (bytes.maybe(2)) options.top_k = bytes.maybe(4) ? 1 << 30 : 1 + bytes.below(2 * vocab_size);
  if (bytes.maybe(2)) options.top_p = bytes.maybe(8) ? 1e-300 : 1 - bytes.unit();
  if (bytes.maybe(4)) options.min_p = bytes.maybe(4) ? 1 : bytes.unit();
  if (bytes.maybe(4)) options.typical_p = bytes.maybe(8) ? 1e-300 : 1 - bytes.unit();
  if (bytes.maybe(4)) options.epsilon_cutoff = bytes.unit();
  if (bytes.maybe(4)) options.eta_cutoff = bytes.unit();
  if (bytes.maybe(4)) options.repetition_penalty = bytes.maybe(2) ? 1e6f : 1.3f;
  if (bytes.maybe(4)) options.frequency_penalty = bytes.maybe(2) ? -1e6f : 0.7f;
  if (bytes.maybe(4)) options.presence_penalty = bytes.maybe(2) ? 1e6f : -0.4f;
  if (bytes.maybe(3)) options.no_repeat_ngram_size = bytes.maybe(8) ? 1 << 30 : bytes.below(6);
  if (bytes.maybe(4)) options.min_new_tokens = bytes.below(8);
  if (bytes.maybe(4)) {
    const double factor = bytes.maybe(2) ? 1e6 : bytes.unit() + 0.1;
    options.exponential_decay_length_penalty = {bytes.below(4), factor};
  }
  for (int words = bytes.maybe(3) ? bytes.below(5) : 0; words > 0; --words) {
    auto word = some_ids(bytes, vocab_size, 4);
    if (!word.empty()) options.bad_words.push_back(word);
  }
  if (bytes.maybe(4)) {
    for (const std::int32_t id : some_ids(bytes, vocab_size, 8)) {
      options.logit_bias.push_back({id, bytes.maybe(2) ? 1e10f : -3.5f});
    }
  }
  for (int words = bytes.maybe(3) ? bytes.below(5) : 0; words > 0; --words) {
    const auto word = some_ids(bytes, vocab_size, 4);
    if (!word.empty()) options.sequence_bias.push_back({word, bytes.maybe(2) ? -1e10f : 2.5f});
  }
  if (bytes.maybe(5)) {
    options.allowed_token_ids.assign(vocab_size, false);
    options.allowed_token_ids.add(bytes.below(vocab_size));
    for (const std::int32_t id : some_ids(bytes, vocab_size, 40)) options.allowed_token_ids.add(id);
  }
  if (bytes.maybe(4)) options.suppress_tokens = some_ids(bytes, vocab_size, 4);
  if (bytes.maybe(4)) options.begin_suppress_tokens = some_ids(bytes, vocab_size, 4);
  if (bytes.maybe(2)) options.ending_ids = some_ids(bytes, vocab_size, 3);
  if (bytes.maybe(4)) options.logprobs = bytes.below(vocab_size + 2);
  return options;
}

void fill_logits(Bytes& bytes, std::vector<float>& logits) {
  const int kind = bytes.below(6);
  std::mt19937 generator(bytes.take<std::uint32_t>());
  std::normal_distribution<float> normal(0, kind == 1 ? 1e-40f : 4);
  for (float& logit : logits) {
    logit = kind == 2 ? 0.5f : kind == 3 ? std::round(normal(generator)) : normal(generator);
  }
  if (kind == 4) {  // raw bits: NaN, infinities and subnormals too
    for (float& logit : logits) {
      const auto bits = generator();
      std::memcpy(&logit, &bits, sizeof logit);
    }
  }
  for (int count = bytes.below(5); count > 0; --count) {
    logits[bytes.below(static_cast<int>(logits.size()))] = bytes.take<float>();
  }
  if (kind == 5) std::fill(logits.begin() + 1, logits.end(), -INFINITY);
}

struct Results {
  std::vector<std::int32_t> ids, top_ids;
  std::vector<DrawStatus> statuses;
  std::vector<double> logprobs, top_logprobs;
};

Results draw(fastgen::Sampler& sampler, const std::vector<float>& logits,
             const std::vector<std::int32_t>& seats, const std::vector<std::int32_t>& drafts,
             int max_top) {
  const std::size_t count = seats.size();
  Results results{std::vector<std::int32_t>(count, -7), std::vector<std::int32_t>(count * max_top),
                  std::vector<DrawStatus>(count), std::vector<double>(count),
                  std::vector<double>(count * max_top)};
  sampler.draw({logits.data(), seats.data(), drafts.data(), static_cast<int>(count),
                results.ids.data(), results.statuses.data(), results.logprobs.data(), max_top,
                results.top_ids.data(), results.top_logprobs.data()});
  return results;
}

void check_draw(const SamplingOptions& options, const float* logits, int vocab_size, bool first,
                std::int32_t id, DrawStatus status) {
  REQUIRE(id >= 0 && id < vocab_size);
  bool usable = false, broken = false;
  for (int at = 0; at < vocab_size; ++at) {
    usable |= std::isfinite(logits[at]);
    broken |= std::isnan(logits[at]) || logits[at] == INFINITY;
  }
  if (broken || !usable) REQUIRE(status == DrawStatus::kFailed);
  if (status != DrawStatus::kDrawn) {
    REQUIRE(id == 0);
    return;
  }
  const auto in = [&](const std::vector<std::int32_t>& ids) {
    return std::find(ids.begin(), ids.end(), id) != ids.end();
  };
  REQUIRE(!in(options.suppress_tokens));
  REQUIRE(!(first && in(options.begin_suppress_tokens)));
  const auto& allowed = options.allowed_token_ids;
  if (allowed.given()) REQUIRE(allowed.word(id / 64) >> (id % 64) & 1);
}

void run_case(const std::uint8_t* data, std::size_t size) {
  Bytes bytes(data, size);
  const int sizes[] = {1, 2, 63, 64, 65, 130, 1000, 6500};
  const int vocab_size = sizes[bytes.below(8)], num_seats = 1 + bytes.below(6), max_tokens = 24;
  fastgen::Sampler plain(num_seats, vocab_size, max_tokens, 1,
                         fastgen::sampler_kernels("portable"));
  fastgen::Sampler best(num_seats, vocab_size, max_tokens, 3,
                        fastgen::sampler_kernels(fastgen::chosen_instruction_set()));
  std::vector<SamplingOptions> options;
  for (int seat = 0; seat < num_seats; ++seat) {
    options.push_back(some_options(bytes, vocab_size));
    const auto prompt = some_ids(bytes, std::min(vocab_size, 5), 12);
    for (fastgen::Sampler* sampler : {&plain, &best}) {
      sampler->bind(seat, options[seat], prompt.data(), static_cast<int>(prompt.size()));
    }
  }
  const int max_top = std::min(vocab_size, 70);
  std::vector<bool> drawn_before(num_seats);
  for (int step = 0; step < 4; ++step) {
    std::vector<std::int32_t> seats, drafts;
    for (int seat = 0; seat < num_seats; ++seat) {
      if (bytes.maybe(4)) continue;
      for (int draws = bytes.maybe(3) ? 3 : 1; draws > 0; --draws) {
        seats.push_back(seat);
        drafts.push_back(draws == 1 ? -1 : bytes.below(std::min(vocab_size, 3)));
      }
    }
    if (seats.empty()) continue;
    std::vector<float> logits(seats.size() * vocab_size);
    std::vector<float> row(vocab_size);
    for (std::size_t at = 0; at < seats.size(); ++at) {
      fill_logits(bytes, row);
      std::copy(row.begin(), row.end(), logits.begin() + at * vocab_size);
    }
    const std::vector<float> before = logits;
    const Results one = draw(plain, logits, seats, drafts, max_top);
    const Results two = draw(best, logits, seats, drafts, max_top);
    REQUIRE(std::memcmp(before.data(), logits.data(), logits.size() * sizeof(float)) == 0);
    REQUIRE(one.ids == two.ids && one.statuses == two.statuses);
    for (std::size_t at = 0; at < seats.size(); ++at) {
      if (one.statuses[at] == DrawStatus::kSkipped) continue;
      check_draw(options[seats[at]], logits.data() + at * vocab_size, vocab_size,
                 !drawn_before[seats[at]], one.ids[at], one.statuses[at]);
      if (one.statuses[at] == DrawStatus::kDrawn) drawn_before[seats[at]] = true;
    }
  }
}

}  // namespace

#ifdef LIBFUZZER

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  run_case(data, size);
  return 0;
}

#else

long run_for(double seconds, unsigned seed) {
  std::mt19937 generator(seed);
  const auto start = std::chrono::steady_clock::now();
  const auto elapsed = [&] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  long cases = 0;
  std::vector<std::uint8_t> data(2048);
  for (; elapsed() < seconds; ++cases) {
    for (std::uint8_t& byte : data) byte = static_cast<std::uint8_t>(generator());
    run_case(data.data(), data.size());
  }
  return cases;
}

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const double seconds = std::atof(argv[1]);
  const unsigned seed = static_cast<unsigned>(std::atoi(argv[2]));
  long others = 0;
  std::thread other([&] { others = run_for(seconds, seed + 1); });
  const long cases = run_for(seconds, seed);
  other.join();
  std::printf("%ld cases\n", cases + others);
}

#endif
