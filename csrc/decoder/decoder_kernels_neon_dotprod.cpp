// The decoder's kernels for 64-bit Arm with int8 dot products.

#include "common/cpu_features.h"

#if defined(__aarch64__) && FASTGEN_KNOWS_ARM_DOTS

#define FASTGEN_ISA neon_dotprod
#define FASTGEN_TARGET __attribute__((target("arch=armv8.2-a+dotprod")))
#define FASTGEN_BYTES 16
#define FASTGEN_SUMS 24
#define FASTGEN_NEON 2
#include "decoder/decoder_kernels.inc"

namespace fastgen {

constexpr DecoderKernels kNeonDotprodKernels = neon_dotprod::kKernels;

}  // namespace fastgen

#endif
