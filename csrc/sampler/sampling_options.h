// The options of one row, as fastgen.SamplingParams has them; ids are within the vocabulary.

#pragma once

#include <cstdint>
#include <vector>

namespace fastgen {

// A set of token ids, one bit each.
class IdSet {
 public:
  void assign(int vocab_size, bool all) {
    words_.assign((vocab_size + 63) / 64, all ? ~std::uint64_t{0} : 0);
  }
  void clear() { words_.clear(); }
  bool given() const { return !words_.empty(); }
  void add(std::int32_t id) { words_[id / 64] |= std::uint64_t{1} << (id % 64); }
  std::uint64_t word(int index) const { return words_[index]; }

 private:
  std::vector<std::uint64_t> words_;
};

struct BiasedId {
  std::int32_t id;
  float bias;
};

struct BiasedSequence {
  std::vector<std::int32_t> ids;  // at least one
  float bias;
};

struct LengthPenalty {
  int start = -1;  // -1: none
  double factor = 1;
};

using Ids = std::vector<std::int32_t>;

// Every option: its name in SamplingParams, its type, and its value where Python has None. From
// this list follow the struct and how it is filled, so that none can be left out of either.
#define FASTGEN_SAMPLING_OPTIONS(OPTION)                      \
  OPTION(seed, std::uint64_t, {0})                            \
  OPTION(logit_bias, std::vector<BiasedId>, {})               \
  OPTION(sequence_bias, std::vector<BiasedSequence>, {})      \
  OPTION(repetition_penalty, float, {1})                      \
  OPTION(frequency_penalty, float, {0})                       \
  OPTION(presence_penalty, float, {0})                        \
  OPTION(no_repeat_ngram_size, int, {0})                      \
  OPTION(bad_words, std::vector<Ids>, {})                     \
  OPTION(min_new_tokens, int, {0})                            \
  OPTION(allowed_token_ids, IdSet, {})                        \
  OPTION(exponential_decay_length_penalty, LengthPenalty, {}) \
  OPTION(suppress_tokens, Ids, {})                            \
  OPTION(begin_suppress_tokens, Ids, {})                      \
  OPTION(ending_ids, Ids, {})                                 \
  OPTION(temperature, float, {1})                             \
  OPTION(top_n_sigma, double, {0})                            \
  OPTION(top_h, double, {0})                                  \
  OPTION(top_k, int, {0})                                     \
  OPTION(top_p, double, {1})                                  \
  OPTION(min_p, double, {0})                                  \
  OPTION(typical_p, double, {1})                              \
  OPTION(epsilon_cutoff, double, {0})                         \
  OPTION(eta_cutoff, double, {0})                             \
  OPTION(logprobs, int, {-1})

struct SamplingOptions {
#define FASTGEN_FIELD(name, type, ...) type name __VA_ARGS__;
  FASTGEN_SAMPLING_OPTIONS(FASTGEN_FIELD)
#undef FASTGEN_FIELD

  bool counts_seen() const {
    return repetition_penalty != 1 || frequency_penalty != 0 || presence_penalty != 0;
  }
};

}  // namespace fastgen
