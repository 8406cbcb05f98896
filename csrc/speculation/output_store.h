// The ends of earlier rows, shared by all rows of a model: a ring of tokens of a fixed size, with
// an index of three tokens at a time. The oldest make room for the newest; nothing is allocated
// after construction.
//
// An output is found only by rows with the same salt: the salt's digest stands in the ring before
// the output's tokens, and is compared whole, as are the tokens. So neither equal hashes nor
// entries of the index that lead to what has been overwritten find anything that does not match.

#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "common/arena.h"
#include "speculation/suffix_match.h"

namespace fastgen {

using SaltDigest = std::array<std::int32_t, 8>;  // SHA-256, as it lies in memory

class OutputStore {
 public:
  static constexpr int kMinMatch = 3;   // tokens
  static constexpr int kMaxMatch = 64;  // a longer one is told as so long
  static constexpr int kMaxTries = 8;   // occurrences that are looked at
  static constexpr int kMinCapacity = 64;

  struct Found {
    SuffixMatch match;  // hits, misses: of the other occurrences, those that go on like this one
    int end = -1;       // where in the ring the occurrence ends
  };

  // capacity: of the ring, in tokens; a power of two, at least kMinCapacity. An output takes 8 more
  // than it has.
  explicit OutputStore(int capacity);

  static std::size_t bytes(int capacity) {
    return sizeof(Place) * static_cast<std::size_t>(capacity);
  }
  int capacity() const { return static_cast<int>(mask_) + 1; }

  void add(const SaltDigest& salt, const std::int32_t* ids, std::size_t count);

  // The longest match of a row's end, among the newest occurrences; of equally long ones, the
  // newest.
  Found find(const SaltDigest& salt, const std::int32_t* ids, std::size_t count) const;
  // The tokens after an occurrence, up to the end of its output: how many.
  int continuation(const Found& found, int count, std::int32_t* ids) const;

 private:
  static constexpr int kHeader = 8;  // places before an output, for its salt

  // What is asked together lies together: a place that is looked at is seldom in a cache.
  struct Place {
    std::int32_t word;      // a token, or part of a salt
    std::int32_t offset;    // of a token, its index in its output; negative in a header
    std::int32_t previous;  // the next older place in the same bucket plus 1; 0: none
    std::int32_t newest;    // of the bucket of this number: its newest place plus 1; 0: none
  };

  Place& at(std::uint32_t place) { return ring_[place & mask_]; }
  const Place& at(std::uint32_t place) const { return ring_[place & mask_]; }
  std::uint32_t age(std::uint32_t place) const { return (head_ - 1 - place) & mask_; }
  bool goes_on(std::uint32_t place) const;
  void put(std::int32_t word, int offset);
  std::uint32_t bucket(const SaltDigest& salt, const std::int32_t* end) const;
  int common(const SaltDigest& salt, const std::int32_t* end, int most, std::uint32_t place) const;

  std::uint32_t mask_, head_ = 0, filled_ = 0;
  int shift_;
  Arena arena_;
  Place* ring_;  // (capacity)
};

}  // namespace fastgen
