// How far to trust a guess that continues an earlier occurrence of a row's last tokens.

#pragma once

#include <algorithm>

namespace fastgen {

struct SuffixMatch {
  int length = 0;  // tokens at the row's end that are those of the occurrence; 0: there is none
  int hits = 0;    // how often its continuation was right,
  int misses = 0;  // and wrong
};

constexpr int kMaxDraft = 1024;  // tokens, whatever is asked for

// 0 to 15. A match of one token has level 0; a longer one three levels by its length (2, up to 4,
// 8, 16, and more): of these the lowest if its continuation was wrong more often than right, the
// highest if it was right more often.
inline int draft_level(const SuffixMatch& match) {
  if (match.length < 2) return 0;
  int bucket = 0;
  for (int longest = 2; bucket < 4 && match.length > longest; longest *= 2) ++bucket;
  const int evidence = 1 + (match.hits > match.misses) - (match.hits < match.misses);
  return 1 + 3 * bucket + evidence;
}

// How many tokens to guess: none if fewer than one in ten is likely to be right, one if it was
// wrong more often than right, else twice as many as match.
inline int draft_length(const SuffixMatch& match, int most) {
  if (match.length == 0 || 10 * (match.hits + 1) < match.hits + match.misses + 2) return 0;
  return std::min({most, kMaxDraft, match.misses > match.hits ? 1 : 2 * match.length});
}

}  // namespace fastgen
