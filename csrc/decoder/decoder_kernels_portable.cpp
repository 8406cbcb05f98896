// The decoder's kernels for any processor.

#define FASTGEN_ISA portable
#define FASTGEN_TARGET
#define FASTGEN_BYTES 16
#define FASTGEN_SUMS 12
#define FASTGEN_DOTS 0
#include "decoder/decoder_kernels.inc"

namespace fastgen {

constexpr DecoderKernels kPortableKernels = portable::kKernels;

}  // namespace fastgen
