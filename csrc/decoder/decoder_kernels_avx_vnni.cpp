// int8 products for AVX2 with AVX-VNNI; all else is AVX2's.

#include "common/cpu_features.h"

#if defined(FASTGEN_KNOWS_AVX_VNNI)

#define FASTGEN_ISA avx_vnni
#define FASTGEN_TARGET __attribute__((target("avx2,fma,f16c,avxvnni")))
#define FASTGEN_BYTES 32
#define FASTGEN_SUMS 12
#define FASTGEN_DOTS 1
#define FASTGEN_VNNI
#define FASTGEN_INT8_ONLY
#include "decoder/decoder_kernels.inc"

namespace fastgen {

constexpr Int8Kernels kAvxVnniKernels = avx_vnni::kInt8Kernels;

}  // namespace fastgen

#endif
