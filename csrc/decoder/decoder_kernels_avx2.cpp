// The decoder's kernels for AVX2.

#if defined(__x86_64__)

#define FASTGEN_ISA avx2
#define FASTGEN_TARGET __attribute__((target("avx2,fma,f16c")))
#define FASTGEN_BYTES 32
#define FASTGEN_SUMS 12
#define FASTGEN_DOTS 1
#include "decoder/decoder_kernels.inc"

namespace fastgen {

constexpr DecoderKernels kAvx2Kernels = avx2::kKernels;

}  // namespace fastgen

#endif
