// Loops over items, shared among threads.

#pragma once

#include <algorithm>

#include "thread_pool.h"

namespace fastgen {

// How items are cut: three quarters in one large piece for each thread, so that each reads one long
// run of memory; the rest in small ones, for whoever is done first.
class WorkSplit {
 public:
  WorkSplit(int num_items, int num_threads) : num_items_(num_items) {
    if (num_threads == 1) num_large_ = 1, large_ = num_items;
    if (num_threads == 1) return;
    large_ = num_items * 3 / 4 / num_threads;
    num_large_ = large_ > 0 ? num_threads : 0;
    const int rest = num_items - num_large_ * large_;
    small_ = std::max(1, rest / (num_threads * kSmallPieces));
    num_small_ = (rest + small_ - 1) / small_;
  }

  int num_tasks() const { return num_large_ + num_small_; }

  void range(int task, int& begin, int& end) const {
    if (task < num_large_) {
      begin = task * large_;
      end = begin + large_;
    } else {
      begin = num_large_ * large_ + (task - num_large_) * small_;
      end = std::min(begin + small_, num_items_);
    }
  }

 private:
  static constexpr int kSmallPieces = 8;  // for each thread

  int num_items_;
  int num_large_ = 0, large_ = 0, num_small_ = 0, small_ = 1;
};

// Calls body(begin, end) for ranges that make up [0, num_items), on up to num_threads threads.
template <typename Body>
void parallel_for(int num_items, int num_threads, const Body& body) {
  if (num_items == 0) return;
  struct Shared {
    const Body& body;
    WorkSplit split;
  } shared{body, WorkSplit(num_items, std::min(num_items, num_threads))};
  const auto task = [](void* context, int index) {
    const Shared& all = *static_cast<const Shared*>(context);
    int begin, end;
    all.split.range(index, begin, end);
    all.body(begin, end);
  };
  run_in_parallel(shared.split.num_tasks(), num_threads, task, &shared);
}

}  // namespace fastgen
