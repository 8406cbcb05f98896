// What this machine can do at most: bytes read, and multiply-adds made, by threads together.
// peaks.py compiles it for the machine that it runs on and calls it through ctypes.

#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

double now() {
  using std::chrono::steady_clock;
  return std::chrono::duration<double>(steady_clock::now().time_since_epoch()).count();
}

void pin(int core) {
  cpu_set_t cores;
  CPU_ZERO(&cores);
  CPU_SET(core, &cores);
  sched_setaffinity(0, sizeof cores, &cores);
}

// Runs work(thread) on each core and returns the seconds from the first start to the last end.
template <class Work>
double together(const int* cores, int num_threads, const Work& work) {
  std::atomic<int> ready{0};
  std::vector<double> starts(num_threads), ends(num_threads);
  std::vector<std::thread> threads;
  for (int thread = 0; thread < num_threads; ++thread) {
    threads.emplace_back([&, thread] {
      pin(cores[thread]);
      ready.fetch_add(1);
      while (ready.load() < num_threads) std::this_thread::yield();
      starts[thread] = now();
      work(thread);
      ends[thread] = now();
    });
  }
  for (std::thread& thread : threads) thread.join();
  return *std::max_element(ends.begin(), ends.end()) -
         *std::min_element(starts.begin(), starts.end());
}

// ---------------------------------------------------------------------------- reading

using Line = std::int64_t __attribute__((vector_size(64)));  // one cache line
constexpr std::size_t kHugePage = 2 << 20;

// Memory of one thread, in huge pages where the system grants them.
struct Buffer {
  explicit Buffer(std::size_t bytes) : mapped(bytes + kHugePage), lines(bytes / sizeof(Line)) {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS;
    memory = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    const auto address = reinterpret_cast<std::uintptr_t>(memory);
    first = reinterpret_cast<Line*>((address + kHugePage - 1) / kHugePage * kHugePage);
    madvise(first, bytes, MADV_HUGEPAGE);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { munmap(memory, mapped); }

  void* memory;
  std::size_t mapped, lines;
  Line* first;
};

struct Buffers {
  std::vector<int> cores;
  std::vector<Buffer*> each;
};

// The whole buffer once, as `Streams` runs side by side, asking for memory `Ahead` lines early.
template <int Streams, int Ahead>
void read_once(const Buffer& buffer) {
  const std::size_t run = buffer.lines / Streams;
  Line sums[Streams] = {};
  for (std::size_t i = 0; i < run; ++i) {
    for (int stream = 0; stream < Streams; ++stream) {
      const Line* line = buffer.first + stream * run + i;
      if (Ahead > 0) __builtin_prefetch(line + Ahead);
      sums[stream] += *line;
    }
  }
  for (Line& sum : sums) asm volatile("" : : "m"(sum));
}

struct Reader {
  const char* name;
  void (*once)(const Buffer&);
};

constexpr Reader kReaders[] = {
    {"1 stream", read_once<1, 0>},  {"1 stream, prefetch", read_once<1, 32>},
    {"2 streams", read_once<2, 0>}, {"2 streams, prefetch", read_once<2, 32>},
    {"4 streams", read_once<4, 0>}, {"4 streams, prefetch", read_once<4, 32>},
    {"8 streams", read_once<8, 0>}, {"8 streams, prefetch", read_once<8, 32>},
};

// ---------------------------------------------------------------------------- multiply-adds

#if defined(__AVX512F__)
constexpr int kWidth = 64, kChains = 16;  // bytes of a register; sums that do not wait for another
#elif defined(__AVX__)
constexpr int kWidth = 32, kChains = 10;
#else
constexpr int kWidth = 16, kChains = 10;
#endif
#if defined(__x86_64__)
#define IN_REGISTER(value) asm volatile("" : "+v"(value))  // may have changed, for all C++ knows
#else
#define IN_REGISTER(value) asm volatile("" : "+w"(value))
#endif

struct Float32 {
  using Sum = float __attribute__((vector_size(kWidth)));
  using Operand = Sum;
#if defined(__AVX512F__)
  static constexpr const char* name = "AVX-512 FMA";
#elif defined(__FMA__)
  static constexpr const char* name = "AVX2 FMA";
#else
  static constexpr const char* name = "plain multiply and add";
#endif
  static constexpr int macs = kWidth / 4;
  static Operand operand() { return Operand{} + 0.5f; }
  static Sum add(Sum sum, Operand a, Operand b) { return sum + a * b; }
};

#if defined(__AVX512BF16__)
struct Bfloat16 {
  using Sum = __m512;
  using Operand = __m512i;
  static constexpr const char* name = "AVX-512 vdpbf16ps";
  static constexpr int macs = 32;
  static Operand operand() { return _mm512_set1_epi16(0x3f00); }  // 0.5
  static Sum add(Sum sum, Operand a, Operand b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
};
#else
using Bfloat16 = Float32;  // to which it would have to be widened
#endif

#if defined(__AVX512VNNI__)
struct Int8 {
  using Sum = __m512i;
  using Operand = __m512i;
  static constexpr const char* name = "AVX-512 vpdpbusd";
  static constexpr int macs = 64;
  static Operand operand() { return _mm512_set1_epi8(1); }
  static Sum add(Sum sum, Operand a, Operand b) { return _mm512_dpbusd_epi32(sum, a, b); }
};
#elif defined(__AVXVNNI__)
struct Int8 {
  using Sum = __m256i;
  using Operand = __m256i;
  static constexpr const char* name = "AVX vpdpbusd";
  static constexpr int macs = 32;
  static Operand operand() { return _mm256_set1_epi8(1); }
  static Sum add(Sum sum, Operand a, Operand b) { return _mm256_dpbusd_avx_epi32(sum, a, b); }
};
#elif defined(__AVX2__)
struct Int8 {
  using Sum = __m256i;
  using Operand = __m256i;
  static constexpr const char* name = "AVX2 vpmaddubsw, vpmaddwd, vpaddd";
  static constexpr int macs = 32;
  static Operand operand() { return _mm256_set1_epi8(1); }
  static Sum add(Sum sum, Operand a, Operand b) {
    const __m256i pairs = _mm256_maddubs_epi16(a, b);
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
};
#else
using Int8 = Float32;
#endif

// `rounds` times one instruction in each chain; nothing is read from memory.
template <class Kind>
void multiply_add(std::int64_t rounds) {
  typename Kind::Operand a = Kind::operand(), b = Kind::operand();
  typename Kind::Sum sums[kChains] = {};
  for (std::int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 16
    for (int chain = 0; chain < kChains; ++chain) {
      IN_REGISTER(a);
      sums[chain] = Kind::add(sums[chain], a, b);
    }
  }
  for (auto& sum : sums) IN_REGISTER(sum);
}

struct Multiplier {
  const char* name;
  int macs;  // of a round
  void (*run)(std::int64_t rounds);
};

template <class Kind>
constexpr Multiplier multiplier() {
  return {Kind::name, Kind::macs * kChains, multiply_add<Kind>};
}

constexpr Multiplier kMultipliers[] = {
    // in the order of peaks.py's KINDS
    multiplier<Float32>(),
    multiplier<Bfloat16>(),
    multiplier<Int8>(),
};

}  // namespace

extern "C" {

int reader_count() { return sizeof kReaders / sizeof *kReaders; }
const char* reader_name(int reader) { return kReaders[reader].name; }

// One buffer for each core, first touched there; null without the memory.
void* buffers_new(const int* cores, int num_threads, std::size_t bytes_each) try {
  auto* buffers = new Buffers{{cores, cores + num_threads}, {}};
  for (int thread = 0; thread < num_threads; ++thread) {
    buffers->each.push_back(new Buffer(bytes_each));
  }
  together(cores, num_threads, [&](int thread) {
    const Buffer& buffer = *buffers->each[thread];
    std::memset(buffer.first, 1, buffer.lines * sizeof(Line));
  });
  return buffers;
} catch (const std::bad_alloc&) {
  return nullptr;
}

void buffers_delete(void* handle) {
  auto* buffers = static_cast<Buffers*>(handle);
  for (Buffer* buffer : buffers->each) delete buffer;
  delete buffers;
}

// Seconds in which all threads read their buffers `times` times.
double read_seconds(void* handle, int reader, int times) {
  const auto& buffers = *static_cast<Buffers*>(handle);
  const int num_threads = static_cast<int>(buffers.cores.size());
  return together(buffers.cores.data(), num_threads, [&](int thread) {
    for (int time = 0; time < times; ++time) kReaders[reader].once(*buffers.each[thread]);
  });
}

const char* multiplier_name(int kind) { return kMultipliers[kind].name; }
int multiplier_macs(int kind) { return kMultipliers[kind].macs; }

// Seconds in which all threads make `rounds` rounds.
double multiply_seconds(const int* cores, int num_threads, int kind, std::int64_t rounds) {
  return together(cores, num_threads, [&](int) { kMultipliers[kind].run(rounds); });
}
}
