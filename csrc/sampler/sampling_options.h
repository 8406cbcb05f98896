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

struct SamplingOptions {
  std::uint64_t seed = 0;

  std::vector<BiasedId> logit_bias;
  std::vector<BiasedSequence> sequence_bias;
  float repetition_penalty = 1, frequency_penalty = 0, presence_penalty = 0;
  int no_repeat_ngram_size = 0;
  std::vector<std::vector<std::int32_t>> bad_words;
  int min_new_tokens = 0;
  IdSet allowed;
  int length_start = -1;  // of exponential_decay_length_penalty; -1: none
  double length_factor = 1;
  std::vector<std::int32_t> suppress, begin_suppress, ending_ids;

  float temperature = 1;
  double top_h = 0;  // 0: off
  int top_k = 0;
  double top_p = 1, min_p = 0, typical_p = 1, epsilon_cutoff = 0, eta_cutoff = 0;

  int num_logprobs = -1;  // -1: none

  bool counts_seen() const {
    return repetition_penalty != 1 || frequency_penalty != 0 || presence_penalty != 0;
  }
};

}  // namespace fastgen
