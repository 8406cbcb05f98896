#include "sampler_kernels.h"

#include <cstring>
#include <limits>

namespace fastgen {

namespace {

#define FASTGEN_ISA portable
#define FASTGEN_TARGET
#define FASTGEN_BYTES 16
#include "sampler_kernels.inc"

#if defined(__x86_64__)

#define FASTGEN_ISA avx2
#define FASTGEN_TARGET __attribute__((target("avx2,fma")))
#define FASTGEN_BYTES 32
#include "sampler_kernels.inc"

#define FASTGEN_ISA avx512
#define FASTGEN_TARGET __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")))
#define FASTGEN_BYTES 64
#include "sampler_kernels.inc"

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}

#endif

}  // namespace

const SamplerKernels* find_sampler_kernels(const std::string& name) {
#if defined(__x86_64__)
  if ((name.empty() || name == "avx512") && has_avx512()) return &avx512::kKernels;
  if ((name.empty() || name == "avx2") && has_avx2()) return &avx2::kKernels;
#endif
  return name.empty() || name == "portable" ? &portable::kKernels : nullptr;
}

}  // namespace fastgen
