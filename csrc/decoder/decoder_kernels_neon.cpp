// The decoder's kernels for 64-bit Arm.

#if defined(__aarch64__)

#define FASTGEN_ISA neon
#define FASTGEN_TARGET
#define FASTGEN_BYTES 16
#define FASTGEN_SUMS 24
#define FASTGEN_NEON 1
#include "decoder/decoder_kernels.inc"

namespace fastgen {

constexpr DecoderKernels kNeonKernels = neon::kKernels;

}  // namespace fastgen

#endif
