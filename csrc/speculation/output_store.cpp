#include "speculation/output_store.h"

#include <algorithm>

namespace fastgen {

namespace {

constexpr std::uint64_t kSpread = 0x9E3779B97F4A7C15;

int bits_of(int capacity) {
  int bits = 6;
  while (bits < 30 && (1 << bits) < capacity) ++bits;
  return bits;
}

}  // namespace

OutputStore::OutputStore(int capacity) {
  const int bits = bits_of(capacity);
  const std::size_t size = std::size_t{1} << bits;
  mask_ = static_cast<std::uint32_t>(size - 1);
  shift_ = 64 - bits;
  Cursor counted(nullptr);
  counted.take<Place>(size);
  arena_ = Arena(counted.bytes());
  ring_ = Cursor(arena_.data()).take<Place>(size);
}

void OutputStore::add(const SaltDigest& salt, const std::int32_t* ids, std::size_t count) {
  if (count <= kMinMatch) return;  // nothing to find it by
  const std::size_t room = capacity() - kHeader;
  if (count > room) {
    ids += count - room;
    count = room;
  }
  for (int word = 0; word < kHeader; ++word) put(salt[word], word - kHeader);
  const std::uint32_t start = head_;
  for (std::size_t index = 0; index < count; ++index) put(ids[index], static_cast<int>(index));
  for (std::size_t end = kMinMatch; end < count; ++end) {  // what has a token after it
    const std::uint32_t place = (start + static_cast<std::uint32_t>(end) - 1) & mask_;
    std::int32_t& newest = ring_[bucket(salt, ids + end)].newest;
    at(place).previous = newest;
    newest = static_cast<std::int32_t>(place) + 1;
  }
}

OutputStore::Found OutputStore::find(const SaltDigest& salt, const std::int32_t* ids,
                                     std::size_t count) const {
  Found best;
  if (count < kMinMatch) return best;
  const std::int32_t* const end = ids + count;
  const int most = static_cast<int>(std::min<std::size_t>(count, kMaxMatch));
  std::int32_t followers[kMaxTries];
  int num_found = 0, best_at = 0;
  std::int64_t last_age = -1;
  std::int32_t next = ring_[bucket(salt, end)].newest;
  for (int tries = 0; next != 0 && tries < kMaxTries; ++tries) {
    const auto place = static_cast<std::uint32_t>(next - 1);
    if (age(place) <= last_age) break;  // overwritten: no longer what the chain led to
    last_age = age(place);
    const int length = common(salt, end, most, place);
    if (length >= kMinMatch) {
      if (length > best.match.length) {
        best.match.length = length;
        best.end = static_cast<int>(place);
        best_at = num_found;
      }
      followers[num_found++] = at(place + 1).word;
    }
    next = at(place).previous;
  }
  for (int other = 0; other < num_found; ++other) {
    if (other == best_at) continue;
    ++(followers[other] == followers[best_at] ? best.match.hits : best.match.misses);
  }
  return best;
}

int OutputStore::continuation(const Found& found, int count, std::int32_t* ids) const {
  auto place = static_cast<std::uint32_t>(found.end);
  int copied = 0;
  for (; copied < count && goes_on(place); ++copied) ids[copied] = at(++place).word;
  return copied;
}

// Whether the next place has the next token of the same output.
bool OutputStore::goes_on(std::uint32_t place) const {
  return age(place) > 0 && at(place + 1).offset == at(place).offset + 1;
}

void OutputStore::put(std::int32_t word, int offset) {
  Place& place = at(head_);
  place.word = word;
  place.offset = offset;
  place.previous = 0;
  head_ = (head_ + 1) & mask_;
  filled_ = std::min(filled_ + 1, mask_ + 1);
}

std::uint32_t OutputStore::bucket(const SaltDigest& salt, const std::int32_t* end) const {
  std::uint64_t hash = static_cast<std::uint32_t>(salt[0]);
  for (const std::int32_t* id = end - kMinMatch; id < end; ++id) {
    hash = (hash ^ static_cast<std::uint32_t>(*id)) * kSpread;
    hash ^= hash >> 29;
  }
  return static_cast<std::uint32_t>((hash * kSpread) >> shift_);
}

// How many tokens at the row's end are those at a place, which has a token after it.
int OutputStore::common(const SaltDigest& salt, const std::int32_t* end, int most,
                        std::uint32_t place) const {
  const int offset = at(place).offset;
  if (offset < 0 || !goes_on(place)) return 0;
  const auto before = static_cast<std::uint32_t>(offset + kHeader);
  if (std::uint64_t{age(place)} + before >= filled_) return 0;  // its salt has been overwritten
  for (int word = 0; word < kHeader; ++word) {
    if (at(place - before + word).word != salt[word]) return 0;
  }
  most = std::min(most, offset + 1);
  int length = 0;
  while (length < most && at(place - length).word == end[-1 - length]) ++length;
  return length;
}

}  // namespace fastgen
