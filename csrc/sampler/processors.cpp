#include "sampler/processors.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace fastgen {

namespace {

constexpr float kRuledOut = -std::numeric_limits<float>::infinity();
constexpr double kMaxRise = 1e30;

// left * right in float32. Written so that no compiler may fuse it with what is done to it next:
// the definition rounds after each operation. The product of two floats is exact in double.
float product(float left, float right) {
  return static_cast<float>(static_cast<double>(left) * static_cast<double>(right));
}

// What is added to one logit is summed first.
void add_biases(const SamplingOptions& options, const RowHistory& row, float* scores) {
  if (options.sequence_bias.empty()) {
    for (const BiasedId& biased : options.logit_bias) scores[biased.id] += biased.bias;
    return;
  }
  std::vector<BiasedId> sums = options.logit_bias;
  for (const BiasedSequence& sequence : options.sequence_bias) {
    const int before = static_cast<int>(sequence.ids.size()) - 1;
    if (!row.ends_with(sequence.ids.data(), before)) continue;
    const std::int32_t last = sequence.ids[before];
    const auto same = [last](const BiasedId& biased) { return biased.id == last; };
    const auto found = std::find_if(sums.begin(), sums.end(), same);
    if (found == sums.end()) {
      sums.push_back({last, sequence.bias});
    } else {
      found->bias += sequence.bias;
    }
  }
  for (const BiasedId& biased : sums) scores[biased.id] += biased.bias;
}

void penalize(const SamplingOptions& options, const RowHistory& row, float* scores) {
  const auto& ids = row.seen_ids();
  const auto& counts = row.generated_counts();
  const float penalty = options.repetition_penalty;
  if (penalty != 1) {
    for (const std::int32_t id : ids) {
      scores[id] = scores[id] < 0 ? scores[id] * penalty : scores[id] / penalty;
    }
  }
  if (options.frequency_penalty == 0 && options.presence_penalty == 0) return;
  for (std::size_t at = 0; at < ids.size(); ++at) {
    if (counts[at] == 0) continue;  // of the prompt only
    const float each = product(options.frequency_penalty, static_cast<float>(counts[at]));
    const float after = scores[ids[at]] - each;
    scores[ids[at]] = after - options.presence_penalty;
  }
}

void ban_bad_words(const SamplingOptions& options, const RowHistory& row, float* scores) {
  const auto& ending = options.ending_ids;
  for (const auto& word : options.bad_words) {
    const int before = static_cast<int>(word.size()) - 1;
    const bool ends = std::find(ending.begin(), ending.end(), word[before]) != ending.end();
    if (before == 0 && ends) continue;  // a row must be able to end
    if (row.ends_with(word.data(), before)) scores[word[before]] = kRuledOut;
  }
}

// Calls act(id) for each id whose bit is set in word_at(id / 64), until one returns true.
template <typename Words, typename Act>
bool any_of(int vocab_size, Words word_at, Act act) {
  for (int start = 0; start < vocab_size; start += 64) {
    std::uint64_t word = word_at(start / 64);
    if (vocab_size - start < 64) word &= (std::uint64_t{1} << (vocab_size - start)) - 1;
    for (; word != 0; word &= word - 1) {
      if (act(start + __builtin_ctzll(word))) return true;
    }
  }
  return false;
}

void allow_only(const IdSet& allowed, const IdSet& mask, float* scores, int vocab_size) {
  if (!allowed.given() && !mask.given()) return;
  const auto both = [&](int index) {
    const std::uint64_t every = ~std::uint64_t{0};
    return (allowed.given() ? allowed.word(index) : every) &
           (mask.given() ? mask.word(index) : every);
  };
  const auto neither = [&](int index) { return ~both(index); };
  const auto set = [&](float value) {
    return [scores, value](int id) {
      scores[id] = value;
      return false;
    };
  };
  any_of(vocab_size, neither, set(kRuledOut));
  const bool left = any_of(vocab_size, both, [&](int id) { return scores[id] != kRuledOut; });
  if (!left) any_of(vocab_size, both, set(0));  // all of them were ruled out: then any of them
}

void raise_ending(const SamplingOptions& options, const RowHistory& row, float* scores) {
  const LengthPenalty& penalty = options.exponential_decay_length_penalty;
  const int since = row.num_new() - penalty.start;
  if (penalty.start < 0 || since <= 0) return;
  const double rise = std::min(std::pow(penalty.factor, since) - 1, kMaxRise);
  for (const std::int32_t id : options.ending_ids) {
    if (std::isfinite(scores[id])) {
      scores[id] += product(std::fabs(scores[id]), static_cast<float>(rise));
    }
  }
}

void rule_out(const std::vector<std::int32_t>& ids, float* scores) {
  for (const std::int32_t id : ids) scores[id] = kRuledOut;
}

}  // namespace

bool changes_logits(const SamplingOptions& options, const RowHistory& row, const IdSet& mask) {
  return !options.logit_bias.empty() || !options.sequence_bias.empty() || options.counts_seen() ||
         options.no_repeat_ngram_size > 0 || !options.bad_words.empty() ||
         row.num_new() < options.min_new_tokens || options.allowed_token_ids.given() ||
         mask.given() || options.exponential_decay_length_penalty.start >= 0 ||
         !options.suppress_tokens.empty() ||
         (row.num_new() == 0 && !options.begin_suppress_tokens.empty());
}

void process(const SamplingOptions& options, const RowHistory& row, const IdSet& mask,
             float* scores, int vocab_size) {
  add_biases(options, row, scores);
  if (options.counts_seen()) penalize(options, row, scores);
  row.repeated_ngrams([&](std::int32_t id) { return scores[id] == kRuledOut; },
                      [&](std::int32_t id) { scores[id] = kRuledOut; });
  ban_bad_words(options, row, scores);
  if (row.num_new() < options.min_new_tokens) rule_out(options.ending_ids, scores);
  allow_only(options.allowed_token_ids, mask, scores, vocab_size);
  raise_ending(options, row, scores);
  rule_out(options.suppress_tokens, scores);
  if (row.num_new() == 0) rule_out(options.begin_suppress_tokens, scores);
}

}  // namespace fastgen
