#include "sampler/row_history.h"

#include <algorithm>

namespace fastgen {

namespace {

int bits_for(int entries) {  // of a table that stays at most half full
  int bits = 4;
  while ((1 << bits) < 2 * entries) ++bits;
  return bits;
}

}  // namespace

RowHistory::RowHistory(int max_tokens)
    : max_tokens_(max_tokens),
      table_bits_(bits_for(max_tokens)),
      shift_(64 - table_bits_),
      tokens_(max_tokens),
      slots_(std::size_t{1} << table_bits_),
      heads_(std::size_t{1} << table_bits_),
      previous_(max_tokens) {
  seen_ids_.reserve(max_tokens);
  generated_counts_.reserve(max_tokens);
}

std::size_t RowHistory::bytes(int max_tokens) {
  const std::size_t table = std::size_t{1} << bits_for(max_tokens);
  return sizeof(std::int32_t) * (2 * table + 4 * static_cast<std::size_t>(max_tokens));
}

void RowHistory::start(const HistoryNeeds& needs, const std::int32_t* prompt, int prompt_len) {
  needs_ = needs;
  num_tokens_ = 0;
  prompt_len_ = prompt_len;
  seen_ids_.clear();
  generated_counts_.clear();
  if (needs.seen) std::fill(slots_.begin(), slots_.end(), -1);
  if (needs.ngram > max_tokens_) needs_.ngram = 0;  // no row is long enough
  if (needs_.ngram > 0) {
    std::fill(heads_.begin(), heads_.end(), -1);
    prefix_hash_ = 0;
    leaving_ = 1;
    for (int power = 1; power < needs_.ngram; ++power) leaving_ *= kBase;
  }
  for (int at = 0; at < prompt_len; ++at) add(prompt[at]);
}

void RowHistory::add(std::int32_t token_id) {
  if (needs_.seen) count_seen(token_id, num_tokens_ >= prompt_len_);
  if (needs_.ngram > 0) index_ngram(token_id);
  tokens_[num_tokens_++] = token_id;
}

bool RowHistory::ends_with(const std::int32_t* ids, int count) const {
  return count <= num_tokens_ && same(tokens_.data() + num_tokens_ - count, ids, count);
}

void RowHistory::count_seen(std::int32_t token_id, bool generated) {
  const std::size_t mask = slots_.size() - 1;
  std::size_t at = (static_cast<std::uint64_t>(token_id) * kSpread) >> shift_;
  while (slots_[at] >= 0 && seen_ids_[slots_[at]] != token_id) at = (at + 1) & mask;
  if (slots_[at] < 0) {
    slots_[at] = static_cast<std::int32_t>(seen_ids_.size());
    seen_ids_.push_back(token_id);
    generated_counts_.push_back(0);
  }
  generated_counts_[slots_[at]] += generated;
}

void RowHistory::index_ngram(std::int32_t token_id) {
  const int length = needs_.ngram - 1;
  if (num_tokens_ >= length) {
    std::int32_t& head = heads_[bucket()];
    previous_[num_tokens_] = head;
    head = num_tokens_;
  }
  if (length == 0) return;
  prefix_hash_ = prefix_hash_ * kBase + static_cast<std::uint64_t>(token_id) + 1;
  if (num_tokens_ >= length) {
    const std::int32_t left = tokens_[num_tokens_ - length];
    prefix_hash_ -= (static_cast<std::uint64_t>(left) + 1) * leaving_;
  }
}

}  // namespace fastgen
