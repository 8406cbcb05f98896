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
  int capacity = capacity_;
  while (capacity < wanted) capacity = std::min(max_tokens_, 2 * capacity);
  if (capacity > capacity_) grow(capacity);
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
  int state = repeats ? -1 : states_[last_].link;
  for (int at = 0; at < limit; ++at) {
    if (at > 0 && state >= 0 && states_[state].misses > states_[state].hits) return at;
    ids[at] = at < distance ? after[at] : ids[at - distance];
    if (state < 0) continue;
    const Edge& edge = slots_[slot_of(state, ids[at])];
    state = edge.source < 0 ? -1 : edge.target;
  }
  return limit;
}

std::size_t SuffixAutomaton::bytes() const {
  return tokens_.capacity() * sizeof(std::int32_t) + states_.capacity() * sizeof(State) +
         slots_.capacity() * sizeof(Edge);
}

// At most three in four slots are taken.
void SuffixAutomaton::grow(int capacity) {
  capacity_ = capacity;
  tokens_.reserve(capacity);
  states_.reserve(2 * static_cast<std::size_t>(capacity) + 1);
  int bits = 3;
  while ((1 << bits) < 4 * capacity) ++bits;
  shift_ = 64 - bits;
  std::vector<Edge> edges(std::size_t{1} << bits, kFree);
  edges.swap(slots_);
  for (State& state : states_) state.first_edge = -1;
  for (const Edge& edge : edges) {
    if (edge.source >= 0) add_edge(edge.source, edge.token_id, edge.target);
  }
}

void SuffixAutomaton::restart() {
  const int kept = max_tokens_ / 2;
  const std::vector<std::int32_t> ids(tokens_.end() - kept, tokens_.end());
  forgotten_ += count() - kept;
  tokens_.clear();
  states_.assign(1, {0, -1, -1, -1, 0, 0});
  std::fill(slots_.begin(), slots_.end(), kFree);
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
    const Edge& edge = slots_[slot_of(at, token_id)];
    if (edge.source >= 0) {
      states_[added].link = split(at, token_id, edge.target);
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
  for (int slot = states_[target].first_edge; slot >= 0; slot = slots_[slot].next) {
    add_edge(shorter, slots_[slot].token_id, slots_[slot].target);
  }
  states_[target].link = shorter;
  for (int at = source; at >= 0; at = states_[at].link) {
    Edge& edge = slots_[slot_of(at, token_id)];
    if (edge.target != target) break;
    edge.target = shorter;
  }
  return shorter;
}

void SuffixAutomaton::add_edge(int source, std::int32_t token_id, int target) {
  const int slot = slot_of(source, token_id);
  slots_[slot] = {source, token_id, target, states_[source].first_edge};
  states_[source].first_edge = slot;
}

// Where the edge is, or would be.
int SuffixAutomaton::slot_of(int source, std::int32_t token_id) const {
  const std::size_t mask = slots_.size() - 1;
  const std::uint64_t key =
      static_cast<std::uint64_t>(source) << 32 | static_cast<std::uint32_t>(token_id);
  std::size_t slot = (key * kSpread) >> shift_;
  while (slots_[slot].source >= 0 &&
         (slots_[slot].source != source || slots_[slot].token_id != token_id)) {
    slot = (slot + 1) & mask;
  }
  return static_cast<int>(slot);
}

}  // namespace fastgen
