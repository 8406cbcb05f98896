// The suffix automaton of one row's tokens, kept token by token: where the longest suffix of the
// row that occurred before did so, and what came after it. Amortised O(1) a token.
//
// A state stands for the substrings that end at the same places; its link leads to the longest
// proper suffix that also ends elsewhere. So the link of the whole row's state is the longest
// suffix that occurred before. n tokens make at most 2 n states and 3 n edges.

#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "speculation/suffix_match.h"

namespace fastgen {

class SuffixAutomaton {
 public:
  // 108 bytes each, for the next power of two of tokens; half as many more while it grows.
  static constexpr int kMaxTokens = 4096;

  // After max_tokens tokens, at least 2, it forgets all but the last half of them.
  explicit SuffixAutomaton(int max_tokens = kMaxTokens);

  void reserve(int more);  // for so many tokens, as far as they fit
  void add(std::int32_t token_id);

  // The longest suffix that occurred before: both may overlap.
  SuffixMatch match() const;
  // Of a match: the index, among all tokens that were added, of the occurrence's last.
  std::int64_t match_end() const { return forgotten_ + states_[states_[last_].link].recent; }
  // What may follow, after the match, into `most` places: how many. After the row's last token the
  // same tokens come again. It stops where the continuation was wrong more often than right; if the
  // row ends with the same tokens three times, only at kMaxDraft.
  int draft(int most, std::int32_t* ids) const;

  std::int64_t num_tokens() const { return forgotten_ + count(); }
  // The last tokens, as many as it has not forgotten.
  const std::vector<std::int32_t>& tokens() const { return tokens_; }
  std::size_t bytes() const;

 private:
  struct State {
    std::int32_t length;      // of its longest substring
    std::int32_t link;        // -1: of the root
    std::int32_t first_edge;  // its slot; -1: none
    std::int32_t recent;      // where an occurrence ends: the last that was looked at
    std::uint8_t hits, misses;
  };
  struct Edge {
    std::int32_t source;  // -1: the slot is free
    std::int32_t token_id, target;
    std::int32_t next;  // the slot of another of the same source; -1: none
  };
  static constexpr Edge kFree{-1, 0, 0, -1};

  int count() const { return static_cast<int>(tokens_.size()); }
  int period() const { return count() - 1 - states_[states_[last_].link].recent; }
  void grow(int capacity);
  void restart();
  void learn(std::int32_t token_id);
  void extend(std::int32_t token_id);
  int split(int source, std::int32_t token_id, int target);
  void add_edge(int source, std::int32_t token_id, int target);
  int slot_of(int source, std::int32_t token_id) const;

  int max_tokens_, capacity_ = 0, last_ = 0, shift_ = 0;
  std::int64_t forgotten_ = 0;
  std::vector<std::int32_t> tokens_;
  std::vector<State> states_;
  std::vector<Edge> slots_;  // open addressing, by source and token
};

}  // namespace fastgen
