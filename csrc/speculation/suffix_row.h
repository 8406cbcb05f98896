// What one row's own tokens and the store of earlier outputs say about its next tokens.

#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "speculation/output_store.h"
#include "speculation/suffix_automaton.h"

namespace fastgen {

struct SuffixDraft {
  std::vector<std::int32_t> ids;
  int level = 0;  // see draft_level
};

class SuffixRow {
 public:
  SuffixRow(std::shared_ptr<const OutputStore> store, const SaltDigest& salt)
      : store_(std::move(store)), salt_(salt) {}

  SuffixAutomaton& automaton() { return automaton_; }

  // After the longer match; after the row's own if both are equally long.
  SuffixDraft propose(int most) const;

 private:
  std::shared_ptr<const OutputStore> store_;
  SaltDigest salt_;
  SuffixAutomaton automaton_;
};

}  // namespace fastgen
