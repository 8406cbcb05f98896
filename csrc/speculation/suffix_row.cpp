#include "speculation/suffix_row.h"

#include <algorithm>

namespace fastgen {

SuffixDraft SuffixRow::propose(int most) const {
  most = std::min(most, kMaxDraft);
  const SuffixMatch own = automaton_.match();
  SuffixDraft draft{std::vector<std::int32_t>(most), draft_level(own)};
  draft.ids.resize(automaton_.draft(most, draft.ids.data()));
  if (!draft.ids.empty() && own.length >= OutputStore::kMaxMatch) return draft;
  const auto& tokens = automaton_.tokens();
  const OutputStore::Found found = store_->find(salt_, tokens.data(), tokens.size());
  if (draft.ids.empty() || found.match.length > own.length) {
    draft.ids.resize(draft_length(found.match, most));
    const int wanted = static_cast<int>(draft.ids.size());
    draft.ids.resize(store_->continuation(found, wanted, draft.ids.data()));
    draft.level = draft_level(found.match);
  }
  return draft;
}

}  // namespace fastgen
