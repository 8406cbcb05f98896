#include "common/thread_pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>

#include "common/default_floats.h"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <signal.h>
#endif

namespace fastgen {

namespace {

using Clock = std::chrono::steady_clock;

// A step of the decoder is some hundred calls, microseconds apart: a worker that slept between them
// would wake too late for each. Between steps it may give its core away, and when idle it must.
constexpr auto kPauseTime = std::chrono::microseconds(80);   // looks with only a pause between them
constexpr auto kAwakeTime = std::chrono::microseconds(200);  // with yields after that, then sleep
constexpr int kLooksPerClock = 32;       // reading the clock costs as much as some looks
constexpr int kCallsUntilRetry = 10000;  // after a thread was refused: asking costs microseconds
constexpr int kCacheLine = 64;

// Whether this thread is running a task. What that task calls, it does itself: it may hold up the
// very call that it would wait for, and its thread is one of those that its caller allowed.
thread_local bool in_task = false;

inline void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// What a thread does between two looks at what it waits for.
class Patience {
 public:
  void wait() {
    if (waited_ >= kPauseTime) {
      std::this_thread::yield();
    } else {
      pause_briefly();
      if (++looks_ % kLooksPerClock != 0) return;
    }
    const auto now = Clock::now();
    if (start_ == Clock::time_point()) start_ = now;  // a short wait reads no clock
    waited_ = now - start_;
  }
  bool over() const { return waited_ >= kAwakeTime; }

 private:
  int looks_ = 0;
  Clock::time_point start_;
  Clock::duration waited_{0};
};

// The state of the pool, in one word, so that a worker joins the call under way or none:
//   generation (32 bits)   which call it is
//   seats (16 bits)        workers that may still join; 0 once the call is closed
//   active (16 bits)       workers that have joined and are not done
constexpr std::uint64_t kActive = 1, kSeat = 1 << 16, kGeneration = std::uint64_t{1} << 32;
constexpr int kMaxWorkers = kSeat / kActive - 1;

std::uint32_t generation(std::uint64_t state) { return state / kGeneration; }
std::uint64_t num_seats(std::uint64_t state) { return state % kGeneration / kSeat; }
std::uint64_t num_active(std::uint64_t state) { return state % kSeat; }

struct Job {
  void (*task)(void*, int);
  void* context;
  int num_tasks;
};

class ThreadPool {
 public:
  // False if another thread's call is under way.
  bool try_run(const Job& job, int num_threads) {
    if (busy_.load(std::memory_order_relaxed)) return false;
    if (busy_.exchange(true, std::memory_order_acquire)) return false;
    job_ = job;  // no worker is active, so none reads it
    next_.store(1, std::memory_order_relaxed);
    open(have_workers(std::min(num_threads, job.num_tasks) - 1));
    work(0);
    close();
    busy_.store(false, std::memory_order_release);
    return true;
  }

 private:
  // How many of `wanted` workers there are, after starting those that are missing.
  int have_workers(int wanted) {
    wanted = std::min(wanted, kMaxWorkers);
    if (num_workers_ >= wanted) return wanted;
    if (calls_until_retry_ > 0) {
      --calls_until_retry_;
      return num_workers_;
    }
    while (num_workers_ < wanted && start_worker()) ++num_workers_;
    if (num_workers_ < wanted) calls_until_retry_ = kCallsUntilRetry;
    return num_workers_;
  }

  void open(int seats) {
    const std::uint64_t last = state_.load(std::memory_order_relaxed) / kGeneration * kGeneration;
    // Sequentially consistent, as are the accesses in sleep(): either this thread sees the sleeper
    // below, or the sleeper sees the call.
    state_.store(last + kGeneration + seats * kSeat);
    const int num_awake = num_workers_ - num_asleep_.load();
    if (num_awake < seats) wake(seats);
  }

  // Whoever has not joined by now never touches this call's job. Those that have are waited for.
  void close() {
    std::uint64_t state = state_.fetch_and(~(kGeneration - kSeat), std::memory_order_acquire);
    for (Patience patience; num_active(state) > 0; patience.wait()) {
      state = state_.load(std::memory_order_acquire);
    }
  }

  unsigned claim() { return next_.fetch_add(1, std::memory_order_relaxed); }

  void work(unsigned claimed) {
    const Job job = job_;
    for (; claimed < static_cast<unsigned>(job.num_tasks); claimed = claim()) {
      job.task(job.context, static_cast<int>(claimed));
    }
  }

  bool start_worker();

  [[noreturn]] void serve() {
    in_task = true;
    for (std::uint32_t seen = 0;;) {
      seen = join(seen);
      work(claim());
      state_.fetch_sub(kActive, std::memory_order_release);
    }
  }

  static bool joinable(std::uint64_t state, std::uint32_t seen) {
    return num_seats(state) > 0 && generation(state) != seen;
  }

  // Takes a seat in a call other than `seen`; returns which.
  std::uint32_t join(std::uint32_t seen) {
    Patience patience;
    for (;;) {
      std::uint64_t state = state_.load(std::memory_order_relaxed);
      if (joinable(state, seen)) {
        const std::uint64_t joined = state - kSeat + kActive;
        if (state_.compare_exchange_weak(state, joined, std::memory_order_acquire,
                                         std::memory_order_relaxed)) {
          return generation(state);
        }
      } else if (patience.over()) {
        sleep(seen);
        patience = Patience();  // the next call may be microseconds away, if this one is missed
      } else {
        patience.wait();
      }
    }
  }

  void sleep(std::uint32_t seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    num_asleep_.fetch_add(1);  // before the look: see open()
    if (joinable(state_.load(), seen)) {
      num_asleep_.fetch_sub(1);
      return;
    }
    wake_.wait(lock, [this] { return num_woken_ > 0; });
    --num_woken_;
  }

  // So many that `seats` workers are awake. They count as awake from here on: the next call, which
  // may come before they run, does not pay for waking them again.
  void wake(int seats) {
    int count = 0;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const int num_asleep = num_asleep_.load(std::memory_order_relaxed);
      count = std::max(0, seats - (num_workers_ - num_asleep));
      num_asleep_.fetch_sub(count, std::memory_order_relaxed);
      num_woken_ += count;
    }
    for (; count > 0; --count) wake_.notify_one();
  }

  // Each group on lines of its own: a write takes the line away from the cores that use the rest.
  alignas(kCacheLine) std::atomic<bool> busy_{false};
  int num_workers_ = 0, calls_until_retry_ = 0;  // used by whoever set busy_
  alignas(kCacheLine) Job job_{};                // written by whoever set busy_, read by who joined
  alignas(kCacheLine) std::atomic<unsigned> next_{0};  // the task to be claimed
  alignas(kCacheLine) std::atomic<std::uint64_t> state_{0};
  alignas(kCacheLine) std::atomic<int> num_asleep_{0};  // written under the mutex
  std::mutex mutex_;
  std::condition_variable wake_;
  int num_woken_ = 0;  // that have not noticed; under the mutex
};

#if defined(__unix__) || defined(__APPLE__)

// Signals sent to the process go to the threads that know what to do with them, which are Python's.
// A thread's own faults stay its own: where they are blocked, no handler could report them.
class SignalsBlocked {
 public:
  SignalsBlocked() {
    sigset_t blocked;
    sigfillset(&blocked);
    for (const int fault : {SIGBUS, SIGFPE, SIGILL, SIGSEGV}) sigdelset(&blocked, fault);
    pthread_sigmask(SIG_SETMASK, &blocked, &before_);
  }
  ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

 private:
  sigset_t before_;
};

#else

struct SignalsBlocked {};

#endif

bool ThreadPool::start_worker() {
  [[maybe_unused]] const SignalsBlocked for_the_worker_to_inherit;
  try {
    std::thread([this] {
#if defined(__linux__)
      pthread_setname_np(pthread_self(), "fastgen");
#endif
      const DefaultFloats floats;
      serve();
    }).detach();
  } catch (const std::exception&) {
    return false;  // no thread is granted, or no memory for one: those that there are do the work
  }
  return true;
}

std::atomic<ThreadPool*> current_pool{nullptr};

#if defined(__unix__) || defined(__APPLE__)
// A child has none of its parent's threads.
[[maybe_unused]] const int at_fork =
    pthread_atfork(nullptr, nullptr, [] { current_pool.store(nullptr); });
#endif

// Never destroyed: its threads may outlive main.
ThreadPool* make_pool() {
  auto* const made = new ThreadPool;
  ThreadPool* expected = nullptr;
  if (current_pool.compare_exchange_strong(expected, made)) return made;
  delete made;
  return expected;
}

bool try_pool(const Job& job, int num_threads) {
  ThreadPool* pool = current_pool.load(std::memory_order_acquire);
  if (pool == nullptr) pool = make_pool();
  return pool->try_run(job, num_threads);
}

}  // namespace

void run_in_parallel(int num_tasks, int num_threads, void (*task)(void*, int), void* context) {
  const bool alone = in_task || num_tasks < 2 || num_threads < 2;
  const bool before = std::exchange(in_task, true);
  if (alone || !try_pool({task, context, num_tasks}, num_threads)) {
    for (int index = 0; index < num_tasks; ++index) task(context, index);
  }
  in_task = before;
}

}  // namespace fastgen
