#include "sampler/sampler_kernels.h"

#include <cstring>
#include <limits>

namespace fastgen {

namespace {

#define FASTGEN_ISA portable
#define FASTGEN_TARGET
#define FASTGEN_BYTES 16
#include "sampler/sampler_kernels.inc"

#if defined(__x86_64__)

#define FASTGEN_ISA avx2
#define FASTGEN_TARGET __attribute__((target("avx2,fma")))
#define FASTGEN_BYTES 32
#include "sampler/sampler_kernels.inc"

#define FASTGEN_ISA avx512
#define FASTGEN_TARGET __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")))
#define FASTGEN_BYTES 64
#include "sampler/sampler_kernels.inc"

#endif

}  // namespace

const SamplerKernels& sampler_kernels([[maybe_unused]] const std::string& name) {
#if defined(__x86_64__)
  if (name == "avx512" || name == "avx512_vnni" || name == "avx512_bf16") return avx512::kKernels;
  if (name == "avx2" || name == "avx_vnni") return avx2::kKernels;
#endif
  return portable::kKernels;
}

}  // namespace fastgen
