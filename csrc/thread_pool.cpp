#include "thread_pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace fastgen {

namespace {

constexpr auto kSpinTime = std::chrono::microseconds(50);  // before a worker goes to sleep

inline void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

struct Job {
  void (*task)(void*, int) = nullptr;
  void* context = nullptr;
  int num_tasks = 0, seats = 0;  // seats: workers that may still join
  std::atomic<int> next{0};

  void work() {
    for (int index; (index = next.fetch_add(1)) < num_tasks;) task(context, index);
  }
};

class ThreadPool {
 public:
  // False if another thread is using the pool.
  bool try_run(int num_tasks, int num_threads, void (*task)(void*, int), void* context) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn.owns_lock()) return false;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      while (num_workers_ < num_threads - 1 && start_worker()) {
      }
      job_.task = task;
      job_.context = context;
      job_.num_tasks = num_tasks;
      job_.seats = num_threads - 1;
      job_.next = 0;
      open_ = true;
      generation_.fetch_add(1);
    }
    wake_.notify_all();
    job_.work();
    std::unique_lock<std::mutex> lock(mutex_);
    open_ = false;  // who wakes up only now has nothing left to do
    done_.wait(lock, [this] { return num_active_ == 0; });
    return true;
  }

 private:
  bool start_worker() {
    try {
      std::thread([this] { serve(); }).detach();
    } catch (const std::system_error&) {
      return false;  // no more threads are granted: those that there are do the work
    }
    ++num_workers_;
    return true;
  }

  [[noreturn]] void serve() {
    unsigned seen = 0;
    for (;;) {
      wait_for_job(seen);
      std::unique_lock<std::mutex> lock(mutex_);
      seen = generation_;
      if (!open_ || job_.seats == 0) continue;
      --job_.seats;
      ++num_active_;
      lock.unlock();
      job_.work();
      lock.lock();
      if (--num_active_ == 0) done_.notify_one();
    }
  }

  void wait_for_job(unsigned seen) {
    const auto until = std::chrono::steady_clock::now() + kSpinTime;
    while (std::chrono::steady_clock::now() < until) {
      if (generation_ != seen) return;
      pause_briefly();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    wake_.wait(lock, [&] { return generation_ != seen; });
  }

  std::mutex turn_;   // whose job it is
  std::mutex mutex_;  // guards all below but the atomics
  std::condition_variable wake_, done_;
  Job job_;
  std::atomic<unsigned> generation_{0};
  bool open_ = false;
  int num_workers_ = 0, num_active_ = 0;
};

std::atomic<ThreadPool*> current_pool{nullptr};

// Never destroyed: its threads may outlive main, and a child has none of its parent's threads.
ThreadPool* make_pool() {
#if defined(__unix__) || defined(__APPLE__)
  static const int once = pthread_atfork(nullptr, nullptr, [] { current_pool.store(nullptr); });
  (void)once;
#endif
  auto* const made = new ThreadPool;
  ThreadPool* expected = nullptr;
  if (current_pool.compare_exchange_strong(expected, made)) return made;
  delete made;
  return expected;
}

}  // namespace

void run_in_parallel(int num_tasks, int num_threads, void (*task)(void*, int), void* context) {
  if (num_tasks > 1 && num_threads > 1) {
    ThreadPool* pool = current_pool.load();
    if (pool == nullptr) pool = make_pool();
    if (pool->try_run(num_tasks, num_threads, task, context)) return;
  }
  for (int index = 0; index < num_tasks; ++index) task(context, index);
}

}  // namespace fastgen
