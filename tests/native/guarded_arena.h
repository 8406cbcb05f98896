// In place of csrc/arena.h under AddressSanitizer: every piece of an arena stands apart, and what
// lies between and behind is poisoned, so that a step over a piece's end is seen.

#pragma once

#include <sanitizer/asan_interface.h>

#include <cerrno>
#include <cstddef>
#include <cstdlib>
#include <new>
#include <utility>
#include <vector>

namespace fastgen {

constexpr std::size_t kCacheLine = 64;

constexpr std::size_t round_up(std::size_t count, std::size_t multiple) {
  return (count + multiple - 1) / multiple * multiple;
}

class Arena {
 public:
  Arena() = default;

  explicit Arena(std::size_t bytes) : bytes_(bytes) {
    void* place = nullptr;
    if (posix_memalign(&place, kCacheLine, bytes == 0 ? 1 : bytes) != 0) throw std::bad_alloc();
    data_ = static_cast<char*>(place);
    for (std::size_t at = 0; at < bytes; ++at) data_[at] = 0;
  }

  // A file's pieces do not stand apart.
  static Arena of_file(int, std::size_t, std::size_t) {
    errno = ENOSYS;
    return Arena();
  }

  Arena(Arena&& other) noexcept { swap(other); }

  Arena& operator=(Arena&& other) noexcept {
    swap(other);
    return *this;
  }

  ~Arena() {
    if (data_ == nullptr) return;
    ASAN_UNPOISON_MEMORY_REGION(data_, bytes_);
    std::free(data_);
  }

  char* data() const { return data_; }

 private:
  void swap(Arena& other) {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
  }

  char* data_ = nullptr;
  std::size_t bytes_ = 0;
};

class Cursor {
 public:
  explicit Cursor(char* base, std::vector<std::size_t>* starts = nullptr)
      : base_(base), starts_(starts) {}

  template <typename Value>
  Value* take(std::size_t count) {
    if (starts_ != nullptr) starts_->push_back(bytes_);
    const std::size_t size = count * sizeof(Value), whole = round_up(size, kCacheLine) + kCacheLine;
    char* const place = base_ == nullptr ? nullptr : base_ + bytes_;
    if (place != nullptr) ASAN_POISON_MEMORY_REGION(place + size, whole - size);
    bytes_ += whole;
    return reinterpret_cast<Value*>(place);
  }

  std::size_t bytes() const { return bytes_; }

 private:
  char* base_;
  std::vector<std::size_t>* starts_;
  std::size_t bytes_ = 0;
};

}  // namespace fastgen
