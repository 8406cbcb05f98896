// The decoder's kernels for AVX-512 with VNNI and BF16.

#if defined(__x86_64__)

#define FASTGEN_ISA avx512_bf16
#define FASTGEN_TARGET                                                            \
  __attribute__((                                                                 \
      target("avx512f,avx512dq,avx512bw,avx512vl,avx512vnni,avx512bf16,avx2,fma," \
             "f16c")))
#define FASTGEN_BYTES 64
#define FASTGEN_SUMS 24
#define FASTGEN_DOTS 3
#define FASTGEN_VNNI
#include "decoder/decoder_kernels.inc"

namespace fastgen {

constexpr DecoderKernels kAvx512Bf16Kernels = avx512_bf16::kKernels;

}  // namespace fastgen

#endif
