// int8 products for AVX-512 with VNNI; all else is AVX-512's.

#if defined(__x86_64__)

#define FASTGEN_ISA avx512_vnni
#define FASTGEN_TARGET \
  __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")))
#define FASTGEN_BYTES 64
#define FASTGEN_SUMS 24
#define FASTGEN_DOTS 2
#define FASTGEN_VNNI
#define FASTGEN_INT8_ONLY
#include "decoder/decoder_kernels.inc"

namespace fastgen {

constexpr Int8Kernels kAvx512VnniKernels = avx512_vnni::kInt8Kernels;

}  // namespace fastgen

#endif
