// The decoder's kernels for 64-bit Arm with int8 matrix products and BF16.

#include "common/cpu_features.h"

#if defined(__aarch64__) && FASTGEN_KNOWS_ARM_DOTS

#define FASTGEN_ISA neon_i8mm
#define FASTGEN_TARGET __attribute__((target("arch=armv8.2-a+dotprod+i8mm+bf16")))
#define FASTGEN_BYTES 16
#define FASTGEN_SUMS 24
#define FASTGEN_NEON 3
#include "decoder/decoder_kernels.inc"

namespace fastgen {

constexpr DecoderKernels kNeonI8mmKernels = neon_i8mm::kKernels;

}  // namespace fastgen

#endif
