#include "common/checksum.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "common/parallel.h"

namespace fastgen {

namespace {

constexpr std::uint64_t kPrime1 = 0x9E3779B185EBCA87, kPrime2 = 0xC2B2AE3D27D4EB4F,
                        kPrime3 = 0x165667B19E3779F9, kPrime4 = 0x85EBCA77C2B2AE63,
                        kPrime5 = 0x27D4EB2F165667C5;
constexpr std::size_t kStripe = 32;                   // bytes that the four lanes take at once
constexpr std::size_t kPiece = std::size_t{1} << 18;  // bytes that one thread takes

template <typename Word>
std::uint64_t load(const unsigned char* at) {
  Word word;
  std::memcpy(&word, at, sizeof word);
  return word;
}

std::uint64_t rotated(std::uint64_t value, int bits) {
  return (value << bits) | (value >> (64 - bits));
}

std::uint64_t round(std::uint64_t lane, std::uint64_t word) {
  return rotated(lane + word * kPrime2, 31) * kPrime1;
}

std::uint64_t merged(std::uint64_t sum, std::uint64_t lane) {
  return (sum ^ round(0, lane)) * kPrime1 + kPrime4;
}

// The sum of whole stripes, whose end is stored in `at`.
std::uint64_t sum_of_stripes(const unsigned char*& at, std::size_t bytes) {
  std::uint64_t a = kPrime1 + kPrime2, b = kPrime2, c = 0, d = 0 - kPrime1;
  for (const unsigned char* const end = at + bytes / kStripe * kStripe; at < end; at += kStripe) {
    a = round(a, load<std::uint64_t>(at));
    b = round(b, load<std::uint64_t>(at + 8));
    c = round(c, load<std::uint64_t>(at + 16));
    d = round(d, load<std::uint64_t>(at + 24));
  }
  const std::uint64_t sum = rotated(a, 1) + rotated(b, 7) + rotated(c, 12) + rotated(d, 18);
  return merged(merged(merged(merged(sum, a), b), c), d);
}

struct Piece {
  MemorySpan span;
  std::uint64_t sum;
};

std::vector<Piece> pieces_of(const MemorySpan* spans, int num_spans) {
  std::vector<Piece> pieces;
  for (int i = 0; i < num_spans; ++i) {
    const auto* const data = static_cast<const unsigned char*>(spans[i].data);
    for (std::size_t at = 0; at < spans[i].bytes; at += kPiece) {
      pieces.push_back({{data + at, std::min(kPiece, spans[i].bytes - at)}, 0});
    }
  }
  return pieces;
}

// sums[i] is the checksum of the sums of the pieces of spans[i].
template <typename SumOf>
void sum_pieces(const MemorySpan* spans, int num_spans, int num_threads, const SumOf& sum_of,
                std::uint64_t* sums) {
  std::vector<Piece> pieces = pieces_of(spans, num_spans);
  parallel_for(static_cast<int>(pieces.size()), num_threads, [&](int begin, int end) {
    for (int i = begin; i < end; ++i) pieces[i].sum = sum_of(pieces[i].span);
  });
  std::vector<std::uint64_t> own;  // of one span
  for (int i = 0, at = 0; i < num_spans; ++i) {
    own.clear();
    for (std::size_t done = 0; done < spans[i].bytes; done += kPiece)
      own.push_back(pieces[at++].sum);
    sums[i] = xxh64({own.data(), own.size() * sizeof own[0]});
  }
}

}  // namespace

std::uint64_t xxh64(MemorySpan span) {
  const auto* at = static_cast<const unsigned char*>(span.data);
  const unsigned char* const end = at + span.bytes;
  std::uint64_t sum = span.bytes >= kStripe ? sum_of_stripes(at, span.bytes) : kPrime5;
  sum += span.bytes;
  for (; end - at >= 8; at += 8) {
    sum = rotated(sum ^ round(0, load<std::uint64_t>(at)), 27) * kPrime1 + kPrime4;
  }
  for (; end - at >= 4; at += 4) {
    sum = rotated(sum ^ load<std::uint32_t>(at) * kPrime1, 23) * kPrime2 + kPrime3;
  }
  for (; at < end; ++at) sum = rotated(sum ^ *at * kPrime5, 11) * kPrime1;
  sum = (sum ^ sum >> 33) * kPrime2;
  sum = (sum ^ sum >> 29) * kPrime3;
  return sum ^ sum >> 32;
}

void checksums(const MemorySpan* spans, int num_spans, int num_threads, std::uint64_t* sums) {
  sum_pieces(spans, num_spans, num_threads, xxh64, sums);
}

bool filled_checksums(const MemorySpan* spans, int num_spans, int num_threads,
                      const std::function<bool(const MemorySpan&)>& fill, std::uint64_t* sums) {
  std::atomic<bool> filled{true};
  const auto sum_of = [&](const MemorySpan& piece) -> std::uint64_t {
    if (filled && !fill(piece)) filled = false;
    return filled ? xxh64(piece) : 0;
  };
  sum_pieces(spans, num_spans, num_threads, sum_of, sums);
  return filled;
}

}  // namespace fastgen
