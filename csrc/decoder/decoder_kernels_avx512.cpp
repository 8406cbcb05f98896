// The decoder's kernels for AVX-512.

#if defined(__x86_64__)

#define FASTGEN_ISA avx512
#define FASTGEN_TARGET __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c")))
#define FASTGEN_BYTES 64
#define FASTGEN_SUMS 24
#define FASTGEN_DOTS 2
#include "decoder/decoder_kernels.inc"

namespace fastgen {

constexpr DecoderKernels kAvx512Kernels = avx512::kKernels;

}  // namespace fastgen

#endif
