// Runs the thread pool hard, with no Python around it; for ASan, UBSan and TSan.
//
//   pool_driver SECONDS SEED
//
// A quarter of the time goes to one thread, in calls that end only if all the threads asked for
// come; the rest to several threads that share the pool, with forks between (but under TSan, which
// knows no fork).
//
// Once all threads have begun, nothing is allocated: ASan's allocator may be locked by another
// thread when one forks, and stay so in the child.

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <random>
#include <thread>
#include <vector>

#include "common/thread_pool.h"
#include "require.h"

#ifdef __linux__
#include <pthread.h>
#endif

#if defined(__SANITIZE_THREAD__)
#define UNDER_TSAN
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define UNDER_TSAN
#endif
#endif

namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;

#ifdef UNDER_TSAN
constexpr bool kForks = false;
#else
constexpr bool kForks = true;
#endif
constexpr int kMaxThreads = 5, kMaxTasks = 200, kNumCallers = 4;
constexpr auto kHelpComes = std::chrono::seconds(10);  // or else never

void spin(microseconds time) {
  for (const auto until = Clock::now() + time; Clock::now() < until;) {
  }
}

// What a task leaves behind, in plain memory: TSan sees who reads it too early.
struct Trace {
  int num_runs = 0, value = 0;
  long tick = 0;  // of the thread that ran it
  std::thread::id thread;
};

struct Call {
  Call(int num_tasks, int num_threads) : num_tasks(num_tasks), num_threads(num_threads) {}

  int num_tasks, num_threads;
  Trace traces[kMaxTasks];
  bool all_meet = false;    // the tasks wait until each has begun
  int nests_at = -1;        // this task makes a call of its own
  microseconds longest{0};  // of a task
  std::thread::id caller = std::this_thread::get_id();
  std::atomic<int> num_met{0};
};

void run_task(void* context, int index);

// Returns how many threads took part.
int run_and_check(Call& call) {
  fastgen::run_in_parallel(call.num_tasks, call.num_threads, run_task, &call);
  const Trace* lasts[kMaxThreads];  // of each thread
  int took_part = 0;
  for (const Trace* trace = call.traces; trace < call.traces + call.num_tasks; ++trace) {
    REQUIRE(trace->num_runs == 1);
    REQUIRE(trace->value == trace - call.traces + 1);
    const Trace** const end = lasts + took_part;
    const Trace** const last = std::find_if(
        lasts, end, [=](const Trace* other) { return other->thread == trace->thread; });
    if (last < end) REQUIRE((*last)->tick < trace->tick);  // a thread claims its tasks in order
    if (last == end) REQUIRE(++took_part <= std::max(1, call.num_threads));
    *last = trace;
  }
  return took_part;
}

void check_worker() {
#ifdef __linux__
  char name[16];
  REQUIRE(pthread_getname_np(pthread_self(), name, sizeof name) == 0);
  REQUIRE(std::strcmp(name, "fastgen") == 0);
#endif
  sigset_t blocked;
  REQUIRE(pthread_sigmask(SIG_SETMASK, nullptr, &blocked) == 0);
  for (const int sent : {SIGINT, SIGTERM, SIGALRM, SIGCHLD, SIGUSR1}) {
    REQUIRE(sigismember(&blocked, sent) == 1);
  }
}

void check_nested() {
  Call nested(7, kMaxThreads);
  REQUIRE(run_and_check(nested) == 1);
  REQUIRE(nested.traces[0].thread == std::this_thread::get_id());
}

void run_task(void* context, int index) {
  static thread_local long tick = 0;
  static thread_local bool checked = false;
  Call& call = *static_cast<Call*>(context);
  Trace& trace = call.traces[index];
  ++trace.num_runs;
  trace.thread = std::this_thread::get_id();
  trace.tick = ++tick;
  if (trace.thread != call.caller && !checked) {
    check_worker();
    checked = true;
  }
  if (index == call.nests_at) check_nested();
  if (call.all_meet) {
    const auto until = Clock::now() + kHelpComes;
    call.num_met.fetch_add(1, std::memory_order_relaxed);
    while (call.num_met.load(std::memory_order_relaxed) < call.num_tasks) {
      REQUIRE(Clock::now() < until);  // all the threads came
      std::this_thread::yield();
    }
  }
  spin(call.longest * (index % 5) / 4);
  trace.value = index + 1;
}

struct Counts {
  long calls = 0, shared = 0, forks = 0;
};

class Caller {
 public:
  explicit Caller(unsigned seed) : generator_(seed) {}

  // No thread but this may use the pool meanwhile.
  void run_alone(double seconds) {
    for (const auto until = after(seconds); Clock::now() < until;) {
      // Workers that have waited 200 microseconds go to sleep: most pauses end near that.
      pause(below(8) == 0 ? 2000 : 180 + below(120));
      const int num_threads = 2 + below(kMaxThreads - 1);
      Call call(num_threads, num_threads);
      call.all_meet = true;
      REQUIRE(count(run_and_check(call)) == num_threads);
    }
  }

  void run_among_others(double seconds, bool forks) {
    for (const auto until = after(seconds); Clock::now() < until;) {
      if (forks && below(2) == 0) check_child();
      const int longest_pause = some({0, 0, 20, 100, 250, 2000});
      for (int calls = 50; calls > 0 && Clock::now() < until; --calls) {
        if (longest_pause > 0) pause(below(longest_pause));
        run_random_call();
      }
    }
  }

  const Counts& counts() const { return counts_; }

 private:
  int below(int bound) { return static_cast<int>(generator_() % bound); }
  int some(std::initializer_list<int> values) { return values.begin()[below(values.size())]; }

  static Clock::time_point after(double seconds) {
    return Clock::now() + microseconds(static_cast<long>(seconds * 1e6));
  }

  void pause(int time) {
    if (below(2) == 0) {
      spin(microseconds(time));
    } else {
      std::this_thread::sleep_for(microseconds(time));
    }
  }

  int count(int took_part) {
    ++counts_.calls;
    counts_.shared += took_part > 1;
    return took_part;
  }

  void run_random_call() {
    Call call(some({0, 1, 2, 2, 3, 8, 30, kMaxTasks}), some({0, 1, 2, 2, 3, kMaxThreads}));
    call.longest = microseconds(call.num_tasks > 30 ? 0 : some({0, 0, 3, 20, 100}));
    if (call.num_tasks > 0 && below(4) == 0) call.nests_at = below(call.num_tasks);
    count(run_and_check(call));
  }

  // The child has a pool of its own, and workers.
  void check_child() {
    const pid_t child = fork();
    REQUIRE(child >= 0);
    if (child == 0) {
      alarm(60);  // the end of a child that hangs
      run_alone(0.01);
      for (int calls = 10; calls > 0; --calls) run_random_call();
      _exit(0);
    }
    int status = 0;
    REQUIRE(waitpid(child, &status, 0) == child);
    REQUIRE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    ++counts_.forks;
  }

  std::mt19937 generator_;
  Counts counts_;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const double seconds = std::atof(argv[1]);
  const unsigned seed = static_cast<unsigned>(std::atoi(argv[2]));
  std::vector<Caller> callers;
  for (int at = 0; at < kNumCallers; ++at) callers.emplace_back(seed + at);
  callers[0].run_alone(seconds / 4);
  std::atomic<int> num_begun{1};
  std::vector<std::thread> others;
  for (int at = 1; at < kNumCallers; ++at) {
    others.emplace_back([&, at] {
      ++num_begun;
      callers[at].run_among_others(seconds * 3 / 4, false);
    });
  }
  while (num_begun < kNumCallers) std::this_thread::yield();
  callers[0].run_among_others(seconds * 3 / 4, kForks);
  for (std::thread& other : others) other.join();
  Counts all;
  for (const Caller& caller : callers) {
    all.calls += caller.counts().calls;
    all.shared += caller.counts().shared;
    all.forks += caller.counts().forks;
  }
  std::printf("%ld calls, %ld shared, %ld forks\n", all.calls, all.shared, all.forks);
}
