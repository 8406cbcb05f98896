// Memory that ends where a page begins that nobody may touch: a step past its end ends the program,
// without a sanitizer, also under an emulator.

#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>

#include "require.h"

template <typename Value>
class Guarded {
 public:
  explicit Guarded(std::size_t count) : count_(count) {
    const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    const std::size_t usable = (count * sizeof(Value) + page - 1) / page * page;
    mapped_bytes_ = usable + page;
    mapped_ = static_cast<char*>(
        mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    REQUIRE(mapped_ != MAP_FAILED);
    REQUIRE(mprotect(mapped_ + usable, page, PROT_NONE) == 0);
    data_ = reinterpret_cast<Value*>(mapped_ + usable - count * sizeof(Value));
  }
  ~Guarded() { munmap(mapped_, mapped_bytes_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  std::size_t size() const { return count_; }
  Value* data() const { return data_; }
  Value* begin() const { return data_; }
  Value* end() const { return data_ + count_; }
  Value& operator[](std::size_t at) const { return data_[at]; }
  Value* last(std::size_t count) const { return data_ + count_ - count; }

 private:
  std::size_t count_, mapped_bytes_;
  char* mapped_;
  Value* data_;
};
