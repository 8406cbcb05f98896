// Runs the suffix automaton and the store of outputs on random texts, with no Python around them;
// for ASan and UBSan.
//
//   speculation_driver SECONDS SEED
//
// What they find is compared with a search through the text. Cases have long and short texts, of
// few ids and of many, rings that are soon full, rows that are longer than is remembered.

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "require.h"
#include "speculation/suffix_row.h"

namespace {

using fastgen::OutputStore;
using fastgen::SaltDigest;
using fastgen::SuffixAutomaton;
using fastgen::SuffixRow;
using Ids = std::vector<std::int32_t>;

class Cases {
 public:
  explicit Cases(unsigned seed) : generator_(seed) {}

  int below(int bound) { return static_cast<int>(generator_() % static_cast<unsigned>(bound)); }

  // Text that repeats itself now and then.
  Ids text(int most) {
    const int kinds[] = {1, 2, 3, 20, 1 << 30};
    const int num_ids = kinds[below(5)];
    Ids ids;
    const int count = below(most + 1);
    while (static_cast<int>(ids.size()) < count) {
      if (!ids.empty() && below(10) == 0) {
        const int start = below(static_cast<int>(ids.size())), length = below(20);
        for (int at = 0; at < length; ++at) ids.push_back(ids[start + at]);
      }
      ids.push_back(below(num_ids) + (below(50) == 0 ? 0x7fffffff - num_ids : 0));
    }
    return ids;
  }

 private:
  std::mt19937 generator_;
};

// How many tokens before `end` are those at the row's end.
int common(const Ids& ids, int end, const Ids& row) {
  int length = 0;
  const int most = std::min(end, static_cast<int>(row.size()));
  while (length < most && ids[end - 1 - length] == row[row.size() - 1 - length]) ++length;
  return length;
}

int longest_suffix(const Ids& ids) {
  int longest = 0;
  for (int end = 1; end < static_cast<int>(ids.size()); ++end) {
    longest = std::max(longest, common(ids, end, ids));
  }
  return longest;
}

void check_automaton(Cases& cases) {
  const int sizes[] = {2, 3, 50, 64, 65, SuffixAutomaton::kMaxTokens};
  const int max_tokens = sizes[cases.below(6)];
  SuffixAutomaton automaton(max_tokens);
  if (cases.below(2) == 0) automaton.reserve(cases.below(300));
  Ids seen;
  for (const std::int32_t id : cases.text(300)) {
    automaton.add(id);
    seen.push_back(id);
    if (cases.below(8) != 0) continue;
    const int count = static_cast<int>(seen.size());
    const int length = automaton.match().length, longest = longest_suffix(seen);
    REQUIRE(count <= max_tokens ? length == longest : length <= longest);
    REQUIRE(length <= 0 || automaton.match_end() < count - 1);
    REQUIRE(length <= 0 ||
            common(seen, static_cast<int>(automaton.match_end()) + 1, seen) >= length);
    Ids draft(cases.below(100));
    const int drafted = automaton.draft(static_cast<int>(draft.size()), draft.data());
    REQUIRE(drafted <= static_cast<int>(draft.size()) && (length > 0 || drafted == 0));
    for (int at = 0; at < drafted; ++at) {
      const int place = static_cast<int>(automaton.match_end()) + 1 + at;
      REQUIRE(draft[at] == (place < count ? seen[place] : draft[place - count]));
    }
  }
  REQUIRE(automaton.num_tokens() == static_cast<std::int64_t>(seen.size()));
}

struct Output {
  SaltDigest salt;
  Ids ids;
};

// Whether some output with this salt has these tokens.
bool has(const std::vector<Output>& outputs, const SaltDigest& salt, const Ids& part) {
  return std::any_of(outputs.begin(), outputs.end(), [&](const Output& output) {
    const Ids& ids = output.ids;
    return output.salt == salt &&
           std::search(ids.begin(), ids.end(), part.begin(), part.end()) != ids.end();
  });
}

void check_store(Cases& cases) {
  const SaltDigest salts[] = {{1, 2, 3}, {1, 2, 4}, {5}};  // two are alike in the index
  auto store = std::make_shared<OutputStore>(64 << cases.below(4));
  std::vector<Output> outputs;
  std::vector<SuffixRow> rows;
  for (const SaltDigest& salt : salts) rows.emplace_back(store, salt);
  for (int step = 0; step < 60; ++step) {
    const SaltDigest& salt = salts[cases.below(3)];
    outputs.push_back({salt, cases.text(step % 10 == 0 ? 700 : 60)});
    store->add(salt, outputs.back().ids.data(), outputs.back().ids.size());
    const Output& asked =
        outputs[outputs.size() - 1 - cases.below(std::min<int>(outputs.size(), 4))];
    const int end = cases.below(static_cast<int>(asked.ids.size()) + 1);
    const Ids row(asked.ids.begin() + cases.below(end + 1), asked.ids.begin() + end);
    for (const SaltDigest& other : salts) {
      const auto found = store->find(other, row.data(), row.size());
      if (found.match.length == 0) continue;
      REQUIRE(found.match.length >= OutputStore::kMinMatch);
      REQUIRE(found.match.hits + found.match.misses < OutputStore::kMaxTries);
      Ids told(row.end() - found.match.length, row.end());
      told.resize(told.size() + 20);
      const int drafted = store->continuation(found, 20, told.data() + found.match.length);
      REQUIRE(drafted > 0);
      told.resize(found.match.length + drafted);
      REQUIRE(has(outputs, other, told));
    }
    const int at = cases.below(3);
    for (const std::int32_t id : row) rows[at].automaton().add(id);
    const int most = cases.below(30);
    const fastgen::SuffixDraft draft = rows[at].propose(most);
    REQUIRE(static_cast<int>(draft.ids.size()) <= most);
    REQUIRE(draft.level >= 0 && draft.level <= 15);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int seconds = argc > 1 ? std::atoi(argv[1]) : 10;
  Cases cases(argc > 2 ? static_cast<unsigned>(std::atoi(argv[2])) : 1);
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(seconds);
  int done = 0;
  for (; std::chrono::steady_clock::now() < end; ++done) {
    check_automaton(cases);
    check_store(cases);
  }
  std::printf("%d cases\n", done);
  return 0;
}
