#include "sampler_kernels.h"

#include <cstring>
#include <limits>

namespace fastgen {

namespace {

#define FASTGEN_ISA portable
#define FASTGEN_TARGET
#define FASTGEN_BYTES 16
#include "sampler_kernels.inc"
#undef FASTGEN_ISA
#undef FASTGEN_TARGET
#undef FASTGEN_BYTES

constexpr SamplerKernels kPortable = {"portable",      portable::highest,    portable::divide,
                                      portable::weigh, portable::mass_below, portable::split_mass};

#if defined(__x86_64__)

#define FASTGEN_ISA avx2
#define FASTGEN_TARGET __attribute__((target("avx2,fma")))
#define FASTGEN_BYTES 32
#include "sampler_kernels.inc"
#undef FASTGEN_ISA
#undef FASTGEN_TARGET
#undef FASTGEN_BYTES

#define FASTGEN_ISA avx512
#define FASTGEN_TARGET __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")))
#define FASTGEN_BYTES 64
#include "sampler_kernels.inc"
#undef FASTGEN_ISA
#undef FASTGEN_TARGET
#undef FASTGEN_BYTES

constexpr SamplerKernels kAvx2 = {"avx2",      avx2::highest,    avx2::divide,
                                  avx2::weigh, avx2::mass_below, avx2::split_mass};
constexpr SamplerKernels kAvx512 = {"avx512",      avx512::highest,    avx512::divide,
                                    avx512::weigh, avx512::mass_below, avx512::split_mass};

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}

#endif

}  // namespace

const SamplerKernels* find_sampler_kernels(const std::string& name) {
#if defined(__x86_64__)
  if ((name.empty() || name == "avx512") && has_avx512()) return &kAvx512;
  if ((name.empty() || name == "avx2") && has_avx2()) return &kAvx2;
#endif
  return name.empty() || name == "portable" ? &kPortable : nullptr;
}

}  // namespace fastgen
