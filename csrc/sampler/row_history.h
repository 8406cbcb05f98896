// What penalties and bans need to know of one row, kept token by token: nothing here looks at the
// whole row again, and nothing is allocated after `start`.

#pragma once

#include <cstdint>
#include <vector>

namespace fastgen {

// What of a row's tokens has to be kept, by the options of the row.
struct HistoryNeeds {
  bool seen = false;  // distinct ids, and how often each was generated
  int ngram = 0;      // n of no_repeat_ngram_size; 0: none
};

class RowHistory {
 public:
  explicit RowHistory(int max_tokens);

  void start(const HistoryNeeds& needs, const std::int32_t* prompt, int prompt_len);
  void add(std::int32_t token_id);  // at most max_tokens, prompt included

  int num_tokens() const { return num_tokens_; }
  int num_new() const { return num_tokens_ - prompt_len_; }
  int max_tokens() const { return max_tokens_; }

  // Distinct ids of the row, and how often each was generated (not: in the prompt).
  const std::vector<std::int32_t>& seen_ids() const { return seen_ids_; }
  const std::vector<std::int32_t>& generated_counts() const { return generated_counts_; }

  // Whether the row ends with these ids.
  bool ends_with(const std::int32_t* ids, int count) const;

  // Calls ban(id) for ids that would complete an n-gram that the row already has; known(id) says
  // that there is no need to.
  template <typename Known, typename Ban>
  void repeated_ngrams(Known known, Ban ban) const {
    if (needs_.ngram == 0 || num_tokens_ < needs_.ngram) return;
    const int length = needs_.ngram - 1;
    const std::int32_t* suffix = tokens_.data() + num_tokens_ - length;
    for (int at = heads_[bucket()]; at >= 0; at = previous_[at]) {
      if (known(tokens_[at])) continue;  // what repeats, repeats often
      if (same(tokens_.data() + at - length, suffix, length)) ban(tokens_[at]);
    }
  }

  static std::size_t bytes(int max_tokens);  // of one row's buffers

 private:
  static bool same(const std::int32_t* left, const std::int32_t* right, int count) {
    for (int at = count - 1; at >= 0; --at) {
      if (left[at] != right[at]) return false;
    }
    return true;
  }
  std::uint64_t bucket() const { return (prefix_hash_ * kSpread) >> shift_; }
  void count_seen(std::int32_t token_id, bool generated);
  void index_ngram(std::int32_t token_id);

  static constexpr std::uint64_t kBase = 0x9E3779B97F4A7C15;  // odd: of the rolling hash
  static constexpr std::uint64_t kSpread = 0xD6E8FEB86659FD93;

  int max_tokens_, table_bits_, shift_;
  HistoryNeeds needs_;
  int prompt_len_ = 0, num_tokens_ = 0;
  std::vector<std::int32_t> tokens_;
  // open addressing: index into seen_ids_, or -1
  std::vector<std::int32_t> slots_, seen_ids_, generated_counts_;
  // positions of tokens after equal-hashed (n-1)-grams, as chains
  std::vector<std::int32_t> heads_, previous_;
  std::uint64_t prefix_hash_ = 0;  // of the last n - 1 tokens
  std::uint64_t leaving_ = 1;      // kBase^(n - 1): the weight of the token that leaves the hash
};

}  // namespace fastgen
