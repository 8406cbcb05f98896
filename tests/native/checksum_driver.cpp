// Sums memory of random sizes, at random places and by random numbers of threads, with no Python
// around it, and compares with XXH64 written byte by byte; for ASan, UBSan and TSan.
//
//   checksum_driver SECONDS SEED

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "common/checksum.h"
#include "require.h"

namespace {

using fastgen::MemorySpan;
using Clock = std::chrono::steady_clock;

constexpr std::size_t kPiece = std::size_t{1} << 18;
constexpr std::uint64_t kP1 = 11400714785074694791u, kP2 = 14029467366897019727u,
                        kP3 = 1609587929392839161u, kP4 = 9650029242287828579u,
                        kP5 = 2870177450012600261u;

std::uint64_t word_at(const unsigned char* at, int num_bytes) {
  std::uint64_t word = 0;
  for (int i = num_bytes; i-- > 0;) word = word << 8 | at[i];
  return word;
}

std::uint64_t turned(std::uint64_t value, int bits) { return value << bits | value >> (64 - bits); }

std::uint64_t next_lane(std::uint64_t lane, std::uint64_t word) {
  return turned(lane + word * kP2, 31) * kP1;
}

// XXH64 with seed 0, as its specification has it.
std::uint64_t reference(const unsigned char* data, std::size_t num_bytes) {
  std::size_t done = 0;
  std::uint64_t sum = kP5;
  if (num_bytes >= 32) {
    std::uint64_t lanes[] = {kP1 + kP2, kP2, 0, 0 - kP1};
    for (; num_bytes - done >= 32; done += 32) {
      for (int i = 0; i < 4; ++i) lanes[i] = next_lane(lanes[i], word_at(data + done + 8 * i, 8));
    }
    sum = turned(lanes[0], 1) + turned(lanes[1], 7) + turned(lanes[2], 12) + turned(lanes[3], 18);
    for (const std::uint64_t lane : lanes) sum = (sum ^ next_lane(0, lane)) * kP1 + kP4;
  }
  sum += num_bytes;
  for (; num_bytes - done >= 8; done += 8) {
    sum = turned(sum ^ next_lane(0, word_at(data + done, 8)), 27) * kP1 + kP4;
  }
  for (; num_bytes - done >= 4; done += 4) {
    sum = turned(sum ^ word_at(data + done, 4) * kP1, 23) * kP2 + kP3;
  }
  for (; done < num_bytes; ++done) sum = turned(sum ^ data[done] * kP5, 11) * kP1;
  sum = (sum ^ sum >> 33) * kP2;
  sum = (sum ^ sum >> 29) * kP3;
  return sum ^ sum >> 32;
}

std::uint64_t reference_of_pieces(const unsigned char* data, std::size_t num_bytes) {
  std::vector<unsigned char> sums;
  for (std::size_t at = 0; at < num_bytes; at += kPiece) {
    const std::uint64_t sum = reference(data + at, std::min(kPiece, num_bytes - at));
    for (int i = 0; i < 8; ++i) sums.push_back(static_cast<unsigned char>(sum >> (8 * i)));
  }
  return reference(sums.data(), sums.size());
}

// Bytes in memory of exactly their size, so that a read past them is seen; and a copy at an odd
// address.
struct Bytes {
  Bytes(std::size_t num_bytes, std::mt19937_64& random)
      : size(num_bytes), data(new unsigned char[num_bytes]), odd(new unsigned char[num_bytes + 1]) {
    for (std::size_t i = 0; i < size; ++i) data[i] = static_cast<unsigned char>(random());
    std::copy_n(data.get(), size, odd.get() + 1);
  }

  std::size_t size;
  std::unique_ptr<unsigned char[]> data, odd;
};

std::size_t random_size(std::mt19937_64& random) {
  switch (random() % 8) {
    case 0:
      return 0;
    case 1:
      return kPiece * (random() % 4);
    case 2:
      return kPiece * (random() % 3) + random() % 100;
    default:
      return random() % 200;
  }
}

// The same sums come out of memory that is filled while it is summed; and a piece that cannot be
// filled is told.
void check_filled(const std::vector<MemorySpan>& sources, const std::vector<std::uint64_t>& sums,
                  int num_threads, std::mt19937_64& random) {
  std::size_t total = 0;
  for (const MemorySpan& source : sources) total += source.bytes;
  const std::unique_ptr<unsigned char[]> from(new unsigned char[total]);
  const std::unique_ptr<unsigned char[]> to(new unsigned char[total]);
  std::vector<MemorySpan> spans;
  std::size_t at = 0;
  for (const MemorySpan& source : sources) {
    std::copy_n(static_cast<const unsigned char*>(source.data), source.bytes, from.get() + at);
    spans.push_back({to.get() + at, source.bytes});
    at += source.bytes;
  }
  const std::size_t bad = total > 0 && random() % 2 ? random() % total : total;
  const auto fill = [&](const MemorySpan& piece) {
    const std::size_t place = static_cast<const unsigned char*>(piece.data) - to.get();
    std::copy_n(from.get() + place, piece.bytes, to.get() + place);
    return bad < place || bad >= place + piece.bytes;
  };
  std::vector<std::uint64_t> found(spans.size());
  const bool whole = fastgen::filled_checksums(spans.data(), static_cast<int>(spans.size()),
                                               num_threads, fill, found.data());
  REQUIRE(whole == (bad == total));
  if (whole) REQUIRE(found == sums);
}

void check_case(std::mt19937_64& random) {
  std::vector<Bytes> all;
  std::vector<MemorySpan> spans;
  for (auto left = random() % 6; left-- > 0;) {
    all.emplace_back(random_size(random), random);
    const Bytes& bytes = all.back();
    spans.push_back({random() % 2 ? bytes.data.get() : bytes.odd.get() + 1, bytes.size});
  }
  std::vector<std::uint64_t> sums(spans.size());
  const int num_threads = 1 + static_cast<int>(random() % 5);
  fastgen::checksums(spans.data(), static_cast<int>(spans.size()), num_threads, sums.data());
  for (std::size_t i = 0; i < all.size(); ++i) {
    REQUIRE(sums[i] == reference_of_pieces(all[i].data.get(), all[i].size));
    REQUIRE(fastgen::xxh64(spans[i]) == reference(all[i].data.get(), all[i].size));
  }
  check_filled(spans, sums, num_threads, random);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  REQUIRE(reference(reinterpret_cast<const unsigned char*>("abc"), 3) == 0x44BC2CF5AD770999);
  std::mt19937_64 random(static_cast<unsigned>(std::atoi(argv[2])));
  const auto end = Clock::now() + std::chrono::duration<double>(std::atof(argv[1]));
  long cases = 0;
  for (; Clock::now() < end; ++cases) check_case(random);
  std::printf("%ld cases\n", cases);
}
