// Draws with the sampler's kernels of every path that this processor has, from logits and options
// that are the same wherever this runs, and prints what other processors' draws are compared with:
//
//   uniforms CHECKSUM       of the uniforms of some seeds and positions, as bits
//   draws PATH CHECKSUM     of ids; PATH is the first of those that share kernels
//
// Log-probabilities are compared here, with sums in double.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "common/cpu_features.h"
#include "common/philox.h"
#include "driver_numbers.h"
#include "require.h"
#include "sampler/sampler.h"

namespace {

using fastgen::DrawStatus;
using fastgen::SamplingOptions;
using Ids = std::vector<std::int32_t>;

constexpr int kMaxTokens = 40, kSteps = 12, kVocabSizes[] = {1, 65, 1000, 6500};

void print_uniforms() {
  std::vector<double> uniforms;
  for (const std::uint64_t seed : {0ull, 1ull, 0x123456789abcdefull, ~0ull}) {
    for (std::uint64_t position = 0; position < 1000; ++position) {
      uniforms.push_back(fastgen::uniform(seed, position * 4294967));
    }
  }
  std::printf("uniforms %016llx\n", checksum(uniforms));
}

using Set = void (*)(SamplingOptions&, int vocab_size);
const Set kSets[] = {
    [](SamplingOptions&, int) {},
    [](SamplingOptions& options, int) { options.temperature = 0; },
    [](SamplingOptions& options, int) { options.temperature = 0.3f; },
    [](SamplingOptions& options, int) { options.temperature = 2.5f, options.top_k = 50; },
    [](SamplingOptions& options, int) { options.top_p = 0.9; },
    [](SamplingOptions& options, int) { options.top_k = 40, options.top_p = 0.95; },
    [](SamplingOptions& options, int) { options.min_p = 0.02; },
    [](SamplingOptions& options, int) { options.typical_p = 0.8; },
    [](SamplingOptions& options, int) { options.epsilon_cutoff = 3e-4; },
    [](SamplingOptions& options, int) { options.eta_cutoff = 2e-3; },
    [](SamplingOptions& options, int) { options.top_n_sigma = 1.5; },
    [](SamplingOptions& options, int) { options.top_h = 0.5; },
    [](SamplingOptions& options, int) { options.repetition_penalty = 1.3f; },
    [](SamplingOptions& options, int) {
      options.frequency_penalty = 0.7f, options.presence_penalty = -0.4f;
    },
    [](SamplingOptions& options, int) {
      options.no_repeat_ngram_size = 2, options.min_new_tokens = 5, options.ending_ids = {0};
      options.exponential_decay_length_penalty = {3, 1.1};
    },
    [](SamplingOptions& options, int vocab_size) {
      options.logit_bias = {{0, 2.5f}, {vocab_size - 1, -3.5f}};
      options.suppress_tokens = {vocab_size / 2};
    },
};

// Logits (count, vocab_size) in [-8, 8); every third row has few different ones, and so ties.
std::vector<float> some_logits(int count, int vocab_size, Random& random) {
  std::vector<float> logits(static_cast<std::size_t>(count) * vocab_size);
  for (std::size_t at = 0; at < logits.size(); ++at) {
    const bool coarse = at / vocab_size % 3 == 2;
    logits[at] = coarse ? static_cast<float>(random.below(16)) : 8 * random.value();
  }
  return logits;
}

void check_logprob(const float* logits, int vocab_size, std::int32_t id, double found) {
  const double highest = *std::max_element(logits, logits + vocab_size);
  double total = 0;
  for (int at = 0; at < vocab_size; ++at) total += std::exp(logits[at] - highest);
  REQUIRE(near(found, logits[id] - highest - std::log(total), 1e-11));
}

// Ids of all steps, or -1 where nothing could be drawn.
Ids draws_of(const fastgen::SamplerKernels& kernels, int vocab_size) {
  const int count = sizeof kSets / sizeof kSets[0];
  fastgen::Sampler sampler(count, vocab_size, kMaxTokens, 2, kernels);
  Ids seats, drafts(count, -1), ids(count), all;
  for (int seat = 0; seat < count; ++seat) {
    SamplingOptions options;
    options.seed = 1000 + seat;
    options.logprobs = 0;
    kSets[seat](options, vocab_size);
    const std::int32_t prompt[] = {0, vocab_size / 2, vocab_size - 1};
    sampler.bind(seat, options, prompt, 3);
    seats.push_back(seat);
  }
  std::vector<DrawStatus> statuses(count);
  std::vector<double> logprobs(count);
  Random random(vocab_size);
  for (int step = 0; step < kSteps; ++step) {
    const std::vector<float> logits = some_logits(count, vocab_size, random);
    sampler.draw({logits.data(), seats.data(), drafts.data(), count, ids.data(), statuses.data(),
                  logprobs.data(), 0, nullptr, nullptr});
    for (int at = 0; at < count; ++at) {
      const bool drawn = statuses[at] == DrawStatus::kDrawn;
      all.push_back(drawn ? ids[at] : -1);
      const float* const row = logits.data() + static_cast<std::size_t>(at) * vocab_size;
      if (drawn) check_logprob(row, vocab_size, ids[at], logprobs[at]);
    }
  }
  return all;
}

}  // namespace

int main() {
  print_uniforms();
  std::vector<const fastgen::SamplerKernels*> done;
  for (const std::string& path : fastgen::instruction_sets()) {
    const fastgen::SamplerKernels& kernels = fastgen::sampler_kernels(path);
    if (std::find(done.begin(), done.end(), &kernels) != done.end()) continue;
    done.push_back(&kernels);
    Ids ids;
    for (const int vocab_size : kVocabSizes) {
      const Ids some = draws_of(kernels, vocab_size);
      ids.insert(ids.end(), some.begin(), some.end());
    }
    REQUIRE(std::count(ids.begin(), ids.end(), -1) * 4 < static_cast<long>(ids.size()));
    std::printf("draws %s %016llx\n", path.c_str(), checksum(ids));
  }
}
