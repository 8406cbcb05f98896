// Memory that is taken once and lives as long as its owner: whole pages, zero, huge where the
// system has such.

#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <utility>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#else
#include <cstdlib>
#endif

namespace fastgen {

constexpr std::size_t kCacheLine = 64;

constexpr std::size_t round_up(std::size_t count, std::size_t multiple) {
  return (count + multiple - 1) / multiple * multiple;
}

class Arena {
 public:
  Arena() = default;

  explicit Arena(std::size_t bytes) : mapped_bytes_(bytes + kHugePage) {
#if defined(__unix__) || defined(__APPLE__)
    mapped_ = mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
    if (mapped_ == MAP_FAILED) {
      mapped_ = nullptr;
      throw std::bad_alloc();
    }
#else
    mapped_ = std::calloc(mapped_bytes_, 1);
    if (mapped_ == nullptr) throw std::bad_alloc();
#endif
    data_ = reinterpret_cast<char*>(round_up(reinterpret_cast<std::uintptr_t>(mapped_), kHugePage));
#if defined(MADV_HUGEPAGE)
    madvise(data_, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);  // it works without, too
#endif
  }

  // The bytes of a file from `offset` on, a multiple of the size of a page. They are shared with
  // every process that maps them, and only to be read. Empty where the system refuses, with errno
  // set.
  static Arena of_file(int file, std::size_t offset, std::size_t bytes) {
    Arena arena;
#if defined(__unix__) || defined(__APPLE__)
#if defined(MAP_POPULATE)
    constexpr int kFlags = MAP_SHARED | MAP_POPULATE;  // no page fault within a step
#else
    constexpr int kFlags = MAP_SHARED;
#endif
    void* const mapped = mmap(nullptr, bytes, PROT_READ, kFlags, file, static_cast<off_t>(offset));
    if (mapped == MAP_FAILED) return arena;
    arena.mapped_ = mapped;
    arena.mapped_bytes_ = bytes;
    arena.data_ = static_cast<char*>(mapped);
#endif
    return arena;
  }

  Arena(Arena&& other) noexcept { swap(other); }

  Arena& operator=(Arena&& other) noexcept {
    swap(other);
    return *this;
  }

  ~Arena() {
    if (mapped_ == nullptr) return;
#if defined(__unix__) || defined(__APPLE__)
    munmap(mapped_, mapped_bytes_);
#else
    std::free(mapped_);
#endif
  }

  char* data() const { return data_; }

 private:
  static constexpr std::size_t kHugePage = std::size_t{2} << 20;

  void swap(Arena& other) {
    std::swap(mapped_, other.mapped_);
    std::swap(mapped_bytes_, other.mapped_bytes_);
    std::swap(data_, other.data_);
  }

  void* mapped_ = nullptr;
  std::size_t mapped_bytes_ = 0;
  char* data_ = nullptr;
};

// Hands out an arena piece by piece, each at a cache line's start. Without an arena it only counts:
// so one function both plans memory and lays it out. `starts`, if given, gets each piece's offset.
class Cursor {
 public:
  explicit Cursor(char* base, std::vector<std::size_t>* starts = nullptr)
      : base_(base), starts_(starts) {}

  template <typename Value>
  Value* take(std::size_t count) {
    if (starts_ != nullptr) starts_->push_back(bytes_);
    char* const place = base_ == nullptr ? nullptr : base_ + bytes_;
    bytes_ += round_up(count * sizeof(Value), kCacheLine);
    return reinterpret_cast<Value*>(place);
  }

  std::size_t bytes() const { return bytes_; }

 private:
  char* base_;
  std::vector<std::size_t>* starts_;
  std::size_t bytes_ = 0;
};

}  // namespace fastgen
