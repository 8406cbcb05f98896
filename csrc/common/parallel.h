// Loops over items, shared among threads.

#pragma once

#include <algorithm>
#include <cstdint>

#include "common/cpu_features.h"
#include "common/thread_pool.h"

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

// The first of `num_items` items in part `part`, where they are cut into parts of about one size.
inline int part_start(int num_items, int part, int num_parts) {
  return static_cast<int>(static_cast<std::int64_t>(num_items) * part / num_parts);
}

// run_in_parallel for what can be called with an index.
template <typename Body>
void run_tasks(int num_tasks, int num_threads, const Body& body) {
  const auto task = [](void* context, int index) { (*static_cast<const Body*>(context))(index); };
  run_in_parallel(num_tasks, num_threads, task, const_cast<Body*>(&body));
}

// Calls body(begin, end) for ranges that make up [0, num_items), on up to num_threads threads.
template <typename Body>
void parallel_for(int num_items, int num_threads, const Body& body) {
  if (num_items == 0) return;
  const WorkSplit split(num_items, std::min(num_items, num_threads));
  run_tasks(split.num_tasks(), num_threads, [&](int task) {
    int begin, end;
    split.range(task, begin, end);
    body(begin, end);
  });
}

// Whether each thread should take a part of a step's rows through all of its loops, rather than a
// part of each matrix. Then no core reads what another has written, but each core reads all
// weights. That pays from 8 rows a thread on AMD's processors, from 64 on Intel's
// (benchmarks/LOG.md). No bit of a result depends on it.
inline bool splits_rows(int num_rows, int num_threads) {
  static const int rows_each = is_intel() ? 64 : 8;
  return num_threads > 1 && num_rows >= rows_each * num_threads;
}

// parallel_for over a step's rows, or over `each` items for each row.
template <typename Body>
void parallel_rows(int num_rows, int each, int num_threads, const Body& body) {
  if (!splits_rows(num_rows, num_threads)) return parallel_for(num_rows * each, num_threads, body);
  run_tasks(num_threads, num_threads, [&](int part) {
    body(part_start(num_rows, part, num_threads) * each,
         part_start(num_rows, part + 1, num_threads) * each);
  });
}

}  // namespace fastgen
