// Which instruction sets this processor and compiler have.

#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__apple_build_version__) ? __clang_major__ >= 13 \
: defined(__clang__)                 ? __clang_major__ >= 12 \
                                     : __GNUC__ >= 11
#define FASTGEN_KNOWS_AVX_VNNI  // of this compiler; the processor is asked at run time
#endif
#elif defined(__aarch64__)
#include "common/arm_features.h"
#endif

namespace fastgen {

#if defined(__x86_64__)

// For which clang 14 knows no name.
inline bool has_avx_vnni_bit() {
  unsigned eax, ebx, ecx, edx;
  constexpr unsigned kAvxVnni = 1 << 4;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax & kAvxVnni) != 0;
}

#endif

// By the names that Linux gives them.
inline std::vector<std::string> cpu_features() {
  std::vector<std::string> names;
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
  if (__builtin_cpu_supports("avx2")) names.emplace_back("avx2");
  if (__builtin_cpu_supports("fma")) names.emplace_back("fma");
  if (__builtin_cpu_supports("avx2") && has_avx_vnni_bit()) names.emplace_back("avx_vnni");
  if (__builtin_cpu_supports("avx512f")) names.emplace_back("avx512f");
  if (__builtin_cpu_supports("avx512vnni")) names.emplace_back("avx512_vnni");
  if (__builtin_cpu_supports("avx512bf16")) names.emplace_back("avx512_bf16");
#elif defined(__aarch64__)
  names = arm_features();
#endif
  return names;
}

#if defined(__x86_64__)

// For which clang 14 knows no name.
inline bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}

inline bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}

inline bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}

inline bool has_avx512_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }

inline bool has_avx512_bf16() { return has_avx512_vnni() && __builtin_cpu_supports("avx512bf16"); }

inline bool has_avx_vnni() {
#if defined(FASTGEN_KNOWS_AVX_VNNI)
  return has_avx2() && has_avx_vnni_bit();
#else
  return false;
#endif
}

#endif

// The paths that can be taken here, the best first.
inline std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
#if defined(__x86_64__)
  if (has_avx512_bf16()) names.emplace_back("avx512_bf16");  // and VNNI
  if (has_avx512_vnni()) names.emplace_back("avx512_vnni");
  if (has_avx512()) names.emplace_back("avx512");
  if (has_avx_vnni()) names.emplace_back("avx_vnni");
  if (has_avx2()) names.emplace_back("avx2");
#elif defined(__aarch64__)
  names = arm_instruction_sets();
#endif
  names.emplace_back("portable");
  return names;
}

// The path that the environment variable FASTGEN_ISA names; the best without it.
inline std::string chosen_instruction_set() {
  const std::vector<std::string> names = instruction_sets();
  const char* const asked = std::getenv("FASTGEN_ISA");
  if (asked == nullptr || *asked == '\0') return names.front();
  std::string known;
  for (const std::string& name : names) {
    if (name == asked) return name;
    known += (known.empty() ? "" : ", ") + name;
  }
  throw std::invalid_argument("FASTGEN_ISA=" + std::string(asked) + ": this processor has " +
                              known);
}

// What a processor is good at can follow from who makes it, where no feature tells.
inline bool is_intel() {
#if defined(__x86_64__)
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(0, &eax, &ebx, &ecx, &edx) != 0 && ebx == signature_INTEL_ebx;
#else
  return false;
#endif
}

// The path of decoders with products of bfloat16, be it in attention alone: as chosen above, except
// that vdpbf16ps is used on Intel's only when FASTGEN_ISA asks for it: it is slower there than
// float32 (benchmarks/LOG.md).
inline std::string bfloat16_instruction_set() {
  const std::string chosen = chosen_instruction_set();
  const char* const asked = std::getenv("FASTGEN_ISA");
  const bool is_asked = asked != nullptr && *asked != '\0';
  const bool is_slow = chosen == "avx512_bf16" && is_intel();
  return is_slow && !is_asked ? "avx512_vnni" : chosen;
}

}  // namespace fastgen
