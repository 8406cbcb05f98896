#include "decoder_kernels.h"

#include <cmath>
#include <cstring>
#include <limits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastgen {

namespace {

#define FASTGEN_ISA portable
#define FASTGEN_TARGET
#define FASTGEN_BYTES 16
#define FASTGEN_SUMS 12
#define FASTGEN_DOTS 0
#include "decoder_kernels.inc"

#if defined(__x86_64__)

#define FASTGEN_ISA avx2
#define FASTGEN_TARGET __attribute__((target("avx2,fma,f16c")))
#define FASTGEN_BYTES 32
#define FASTGEN_SUMS 12
#define FASTGEN_DOTS 1
#include "decoder_kernels.inc"

#define FASTGEN_ISA avx512
#define FASTGEN_TARGET __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c")))
#define FASTGEN_BYTES 64
#define FASTGEN_SUMS 24
#define FASTGEN_DOTS 2
#include "decoder_kernels.inc"

#define FASTGEN_ISA avx512_bf16
#define FASTGEN_TARGET                                                            \
  __attribute__((                                                                 \
      target("avx512f,avx512dq,avx512bw,avx512vl,avx512vnni,avx512bf16,avx2,fma," \
             "f16c")))
#define FASTGEN_BYTES 64
#define FASTGEN_SUMS 24
#define FASTGEN_DOTS 3
#include "decoder_kernels.inc"

#endif

}  // namespace

const DecoderKernels& decoder_kernels(const std::string& name) {
#if defined(__x86_64__)
  if (name == "avx512_bf16") return avx512_bf16::kKernels;
  if (name == "avx512") return avx512::kKernels;
  if (name == "avx2") return avx2::kKernels;
#endif
  return portable::kKernels;
}

}  // namespace fastgen
