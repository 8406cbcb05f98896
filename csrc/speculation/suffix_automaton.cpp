#include "speculation/suffix_automaton.h"

#include <algorithm>

namespace fastgen {

namespace {

constexpr std::uint64_t kSpread = 0x9E3779B97F4A7C15;
constexpr int kFirstCapacity = 64;
constexpr int kRecentLinks = 4;   // states whose last occurrence is kept up to date with a token
constexpr int kMaxEvidence = 32;  // hits and misses; then both count half

}  // namespace

SuffixAutomaton::SuffixAutomaton(int max_tokens) : max_tokens_(std::max(2, max_tokens)) {
  grow(std::min(kFirstCapacity, max_tokens_));
  states_.push_back({0, -1, -1, -1, 0, 0});
}

void SuffixAutomaton::reserve(int more) {
  const std::int64_t wanted = std::min<std::int64_t>(max_tokens_, std::int64_t{count()} + more);
  if (wanted > capacity_) grow(static_cast<int>(wanted));
}

void SuffixAutomaton::add(std::int32_t token_id) {
  if (count() == max_tokens_) restart();
  if (count() == capacity_) grow(std::min(max_tokens_, 2 * capacity_));
  learn(token_id);
  extend(token_id);
}

SuffixMatch SuffixAutomaton::match() const {
  const int link = states_[last_].link;
  if (link <= 0) return {};
  return {states_[link].length, states_[link].hits, states_[link].misses};
}

int SuffixAutomaton::draft(int most, std::int32_t* ids) const {
  const SuffixMatch matched = match();
  if (matched.length == 0) return 0;
  const int distance = period();
  const bool repeats = matched.length >= 2 * distance;
  int limit = draft_length(matched, most);
  if (limit > 0 && repeats) limit = std::min(most, kMaxDraft);
  const std::int32_t* const after = tokens_.data() + count() - distance;
  int state = states_[last_].link;
  for (int at = 0; at < limit; ++at) {
    if (state >= 0 && at > 0 && !repeats && states_[state].misses > states_[state].hits) return at;
    ids[at] = at < distance ? after[at] : ids[at - distance];
    const int edge = state < 0 ? -1 : slots_[slot_of(state, ids[at])] - 1;
    state = edge < 0 ? -1 : edges_[edge].target;
  }
  return limit;
}

std::size_t SuffixAutomaton::bytes() const {
  return tokens_.capacity() * sizeof(std::int32_t) + states_.capacity() * sizeof(State) +
         edges_.capacity() * sizeof(Edge) + slots_.capacity() * sizeof(std::int32_t);
}

// The table has between four and eight slots a token: at most three in four are taken.
void SuffixAutomaton::grow(int capacity) {
  capacity_ = capacity;
  tokens_.reserve(capacity);
  states_.reserve(2 * static_cast<std::size_t>(capacity) + 1);
  edges_.reserve(3 * static_cast<std::size_t>(capacity));
  int bits = 2;
  while ((std::int64_t{1} << bits) < 4 * std::int64_t{capacity}) ++bits;
  shift_ = 64 - bits;
  slots_ = {};
  slots_.resize(std::size_t{1} << bits);
  for (std::size_t edge = 0; edge < edges_.size(); ++edge) {
    slots_[slot_of(edges_[edge].source, edges_[edge].token_id)] = static_cast<int>(edge) + 1;
  }
}

void SuffixAutomaton::restart() {
  const int kept = max_tokens_ / 2;
  const std::vector<std::int32_t> ids(tokens_.end() - kept, tokens_.end());
  forgotten_ += count() - kept;
  tokens_.clear();
  edges_.clear();
  states_.assign(1, {0, -1, -1, -1, 0, 0});
  std::fill(slots_.begin(), slots_.end(), 0);
  last_ = 0;
  for (const std::int32_t token_id : ids) {
    learn(token_id);
    extend(token_id);
  }
}

// The next token tells whether the match's continuation was right. Then the row's end is the last
// occurrence of the match and of its suffixes.
void SuffixAutomaton::learn(std::int32_t token_id) {
  int at = states_[last_].link;
  if (at <= 0) return;
  State& matched = states_[at];
  ++(tokens_[matched.recent + 1] == token_id ? matched.hits : matched.misses);
  if (matched.hits + matched.misses == kMaxEvidence) {
    matched.hits /= 2;
    matched.misses /= 2;
  }
  for (int links = 0; links < kRecentLinks && at > 0; ++links, at = states_[at].link) {
    states_[at].recent = count() - 1;
  }
}

void SuffixAutomaton::extend(std::int32_t token_id) {
  const int position = count(), added = static_cast<int>(states_.size());
  tokens_.push_back(token_id);
  states_.push_back({position + 1, 0, -1, position, 0, 0});
  for (int at = last_; at >= 0; at = states_[at].link) {
    const int edge = slots_[slot_of(at, token_id)] - 1;
    if (edge >= 0) {
      states_[added].link = split(at, token_id, edges_[edge].target);
      break;
    }
    add_edge(at, token_id, added);
  }
  last_ = added;
}

// The state of the source's longest substring and the token: the target, unless that has longer
// ones; then the shorter get a state of their own.
int SuffixAutomaton::split(int source, std::int32_t token_id, int target) {
  const int length = states_[source].length + 1;
  if (states_[target].length == length) return target;
  const int shorter = static_cast<int>(states_.size());
  State state = states_[target];
  state.length = length;
  state.first_edge = -1;
  states_.push_back(state);
  for (int edge = states_[target].first_edge; edge >= 0; edge = edges_[edge].next) {
    add_edge(shorter, edges_[edge].token_id, edges_[edge].target);
  }
  states_[target].link = shorter;
  for (int at = source; at >= 0; at = states_[at].link) {
    Edge& edge = edges_[slots_[slot_of(at, token_id)] - 1];
    if (edge.target != target) break;
    edge.target = shorter;
  }
  return shorter;
}

void SuffixAutomaton::add_edge(int source, std::int32_t token_id, int target) {
  const std::size_t slot = slot_of(source, token_id);
  edges_.push_back({source, token_id, target, states_[source].first_edge});
  states_[source].first_edge = static_cast<int>(edges_.size()) - 1;
  slots_[slot] = static_cast<int>(edges_.size());
}

// Where the edge is, or would be.
std::size_t SuffixAutomaton::slot_of(int source, std::int32_t token_id) const {
  const std::size_t mask = slots_.size() - 1;
  const std::uint64_t key =
      static_cast<std::uint64_t>(source) << 32 | static_cast<std::uint32_t>(token_id);
  std::size_t slot = (key * kSpread) >> shift_;
  while (slots_[slot] != 0) {
    const Edge& edge = edges_[slots_[slot] - 1];
    if (edge.source == source && edge.token_id == token_id) break;
    slot = (slot + 1) & mask;
  }
  return slot;
}

}  // namespace fastgen
