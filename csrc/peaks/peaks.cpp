#include "peaks/peaks.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <string>
#include <thread>
#include <utility>

#include "common/cpu_features.h"
#include "common/default_floats.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#if defined(__linux__)
#include <sched.h>
#endif

namespace fastgen {

namespace {

// ------------------------------------------------------------------------------------ threads

double now() {
  using std::chrono::steady_clock;
  return std::chrono::duration<double>(steady_clock::now().time_since_epoch()).count();
}

// Where that is refused, the scheduler is trusted to keep the threads apart.
void stay_on([[maybe_unused]] int core) {
#if defined(__linux__)
  cpu_set_t cores;
  CPU_ZERO(&cores);
  CPU_SET(core, &cores);
  sched_setaffinity(0, sizeof cores, &cores);
#endif
}

// Threads that begin together.
class Start {
 public:
  explicit Start(int num_threads) : missing_(num_threads) {}

  // False if not all threads could be had.
  bool wait() {
    missing_.fetch_sub(1);
    while (missing_.load() > 0) std::this_thread::yield();
    return !given_up_.load();
  }

  void give_up() {
    given_up_.store(true);
    missing_.store(0);
  }

 private:
  std::atomic<int> missing_;
  std::atomic<bool> given_up_{false};
};

// Runs work(thread) on each core and returns the seconds from the first start to the last end.
template <typename Work>
double together(const std::vector<int>& cores, const Work& work) {
  const int num_threads = static_cast<int>(cores.size());
  std::vector<double> starts(num_threads), ends(num_threads);
  std::vector<std::thread> threads;
  threads.reserve(num_threads);
  Start start(num_threads);
  const auto run = [&](int thread) {
    stay_on(cores[thread]);
    const DefaultFloats floats;
    if (!start.wait()) return;
    starts[thread] = now();
    work(thread);
    ends[thread] = now();
  };
  const auto join = [&] {
    for (std::thread& thread : threads) thread.join();
  };
  try {
    for (int thread = 0; thread < num_threads; ++thread) threads.emplace_back(run, thread);
  } catch (...) {
    start.give_up();
    join();
    throw;
  }
  join();
  return *std::max_element(ends.begin(), ends.end()) -
         *std::min_element(starts.begin(), starts.end());
}

// -------------------------------------------------------------------------------------- loops

// For all that C++ knows, the value is needed and may change here: so it is made, in a register.
#if defined(__x86_64__)
#define FASTGEN_IN_REGISTER(value) asm volatile("" : "+v"(value))
#elif defined(__aarch64__)
#define FASTGEN_IN_REGISTER(value) asm volatile("" : "+w"(value))
#else
#define FASTGEN_IN_REGISTER(value) asm volatile("" : "+m"(value))
#endif

typedef float FourFloats __attribute__((vector_size(16)));

#if defined(__aarch64__)
#define FASTGEN_PLAIN "NEON multiply and add"
#define FASTGEN_PLAIN_CHAINS 16  // four units, each with a latency of four cycles
#else
#define FASTGEN_PLAIN "plain multiply and add"
#define FASTGEN_PLAIN_CHAINS 10
#endif

#define FASTGEN_ISA portable
#define FASTGEN_TARGET
#define FASTGEN_BYTES 16
#include "peaks/peak_reader.inc"

#define FASTGEN_ISA portable
#define FASTGEN_TARGET
#define FASTGEN_HOW FASTGEN_PLAIN
#define FASTGEN_MACS 4
#define FASTGEN_SUM FourFloats
#define FASTGEN_OPERAND FourFloats
#define FASTGEN_FACTOR FourFloats{} + 0.5f
#define FASTGEN_ADD(sum, a, b) (sum) + (a) * (b)
#define FASTGEN_CHAINS FASTGEN_PLAIN_CHAINS
#include "peaks/peak_multiplier.inc"

#if defined(__x86_64__)

#define FASTGEN_ISA avx2
#define FASTGEN_TARGET __attribute__((target("avx2")))
#define FASTGEN_BYTES 32
#include "peaks/peak_reader.inc"

#define FASTGEN_ISA avx512
#define FASTGEN_TARGET __attribute__((target("avx512f")))
#define FASTGEN_BYTES 64
#include "peaks/peak_reader.inc"

#define FASTGEN_ISA avx2_float32
#define FASTGEN_TARGET __attribute__((target("avx2,fma")))
#define FASTGEN_HOW "AVX2 FMA"
#define FASTGEN_MACS 8
#define FASTGEN_SUM __m256
#define FASTGEN_OPERAND __m256
#define FASTGEN_FACTOR _mm256_set1_ps(0.5f)
#define FASTGEN_ADD(sum, a, b) _mm256_fmadd_ps(a, b, sum)
#define FASTGEN_CHAINS 10
#include "peaks/peak_multiplier.inc"

#define FASTGEN_ISA avx512_float32
#define FASTGEN_TARGET __attribute__((target("avx512f")))
#define FASTGEN_HOW "AVX-512 FMA"
#define FASTGEN_MACS 16
#define FASTGEN_SUM __m512
#define FASTGEN_OPERAND __m512
#define FASTGEN_FACTOR _mm512_set1_ps(0.5f)
#define FASTGEN_ADD(sum, a, b) _mm512_fmadd_ps(a, b, sum)
#define FASTGEN_CHAINS 16
#include "peaks/peak_multiplier.inc"

#define FASTGEN_ISA avx512_bfloat16
#define FASTGEN_TARGET __attribute__((target("avx512f,avx512bw,avx512bf16")))
#define FASTGEN_HOW "AVX-512 vdpbf16ps"
#define FASTGEN_MACS 32
#define FASTGEN_SUM __m512
#define FASTGEN_OPERAND __m512i
#define FASTGEN_FACTOR _mm512_set1_epi16(0x3f00)
#define FASTGEN_ADD(sum, a, b) _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b)
#define FASTGEN_CHAINS 16
#include "peaks/peak_multiplier.inc"

#define FASTGEN_ISA avx512_int8
#define FASTGEN_TARGET __attribute__((target("avx512f,avx512bw,avx512vnni")))
#define FASTGEN_HOW "AVX-512 vpdpbusd"
#define FASTGEN_MACS 64
#define FASTGEN_SUM __m512i
#define FASTGEN_OPERAND __m512i
#define FASTGEN_FACTOR _mm512_set1_epi8(1)
#define FASTGEN_ADD(sum, a, b) _mm512_dpbusd_epi32(sum, a, b)
#define FASTGEN_CHAINS 16
#include "peaks/peak_multiplier.inc"

#if defined(FASTGEN_KNOWS_AVX_VNNI)
#define FASTGEN_ISA avx_vnni_int8
#define FASTGEN_TARGET __attribute__((target("avx2,avxvnni")))
#define FASTGEN_HOW "AVX vpdpbusd"
#define FASTGEN_MACS 32
#define FASTGEN_SUM __m256i
#define FASTGEN_OPERAND __m256i
#define FASTGEN_FACTOR _mm256_set1_epi8(1)
#define FASTGEN_ADD(sum, a, b) _mm256_dpbusd_avx_epi32(sum, a, b)
#define FASTGEN_CHAINS 10
#include "peaks/peak_multiplier.inc"
#endif

#define FASTGEN_ISA avx2_int8
#define FASTGEN_TARGET __attribute__((target("avx2")))
#define FASTGEN_HOW "AVX2 vpsignb, vpmaddubsw, vpmaddwd, vpaddd"
#define FASTGEN_MACS 32
#define FASTGEN_SUM __m256i
#define FASTGEN_OPERAND __m256i
#define FASTGEN_FACTOR _mm256_set1_epi8(1)
#define FASTGEN_ADD(sum, a, b)                                                             \
  _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(a, _mm256_sign_epi8(b, a)), \
                                          _mm256_set1_epi16(1)))
#define FASTGEN_CHAINS 10
#include "peaks/peak_multiplier.inc"

// Without what widens the weights, once for all rows of a tile.
#define FASTGEN_ISA avx512_int16
#define FASTGEN_TARGET __attribute__((target("avx512f,avx512bw")))
#define FASTGEN_HOW "AVX-512 vpmaddwd, vpaddd"
#define FASTGEN_MACS 64
#define FASTGEN_SUM __m512i
#define FASTGEN_OPERAND __m512i
#define FASTGEN_FACTOR _mm512_set1_epi16(1)
#define FASTGEN_ADD(sum, a, b) \
  _mm512_add_epi32(_mm512_add_epi32(sum, _mm512_madd_epi16(a, b)), _mm512_madd_epi16(a, a))
#define FASTGEN_CHAINS 16
#include "peaks/peak_multiplier.inc"

PeakMultiplier float32_multiplier(const std::string& path) {
  if (path == "avx512" || path == "avx512_vnni" || path == "avx512_bf16") {
    return avx512_float32::kMultiplier;
  }
  return path == "avx2" || path == "avx_vnni" ? avx2_float32::kMultiplier : portable::kMultiplier;
}

PeakMultiplier bfloat16_multiplier(const std::string& path) {
  if (path == "avx512_bf16") return avx512_bfloat16::kMultiplier;
  return float32_multiplier(path);  // to which it is widened
}

PeakMultiplier int8_multiplier(const std::string& path) {
  if (path == "avx512_vnni" || path == "avx512_bf16") return avx512_int8::kMultiplier;
  if (path == "avx512") return avx512_int16::kMultiplier;
#if defined(FASTGEN_KNOWS_AVX_VNNI)
  if (path == "avx_vnni") return avx_vnni_int8::kMultiplier;
#endif
  return path == "avx2" ? avx2_int8::kMultiplier : portable::kMultiplier;
}

#elif defined(__aarch64__)
#include "peaks/peak_multipliers_neon.inc"
#endif

}  // namespace

const std::array<PeakReader, kNumPeakReaders>& peak_readers() {
#if defined(__x86_64__)
  if (has_avx512()) return avx512::kReaders;
  if (has_avx2()) return avx2::kReaders;
#endif
  return portable::kReaders;
}

std::array<PeakMultiplier, kNumPeakMultipliers> peak_multipliers(
    [[maybe_unused]] const std::string& path) {
#if defined(__x86_64__)
  return {float32_multiplier(path), bfloat16_multiplier(path), int8_multiplier(path)};
#elif defined(__aarch64__)
  return {portable::kMultiplier, bfloat16_multiplier(path), int8_multiplier(path)};
#else
  return {portable::kMultiplier, portable::kMultiplier, portable::kMultiplier};
#endif
}

PeakBuffers::PeakBuffers(std::vector<int> cores, std::size_t bytes_each)
    : cores_(std::move(cores)), bytes_each_(bytes_each) {
  for (std::size_t thread = 0; thread < cores_.size(); ++thread) buffers_.emplace_back(bytes_each);
  together(cores_, [&](int thread) { std::memset(buffers_[thread].data(), 1, bytes_each_); });
}

double PeakBuffers::read_seconds(const PeakReader& reader, int times) const {
  return together(cores_, [&](int thread) {
    for (int time = 0; time < times; ++time) reader.once(buffers_[thread].data(), bytes_each_);
  });
}

double multiply_seconds(const std::vector<int>& cores, const PeakMultiplier& multiplier,
                        std::int64_t rounds) {
  return together(cores, [&](int) { multiplier.run(rounds); });
}

}  // namespace fastgen
