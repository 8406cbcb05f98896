#include "decoder/decoder_kernels.h"

#include "common/cpu_features.h"

namespace fastgen {

const DecoderKernels& decoder_kernels(const std::string& name) {
#if defined(__x86_64__)
  if (name == "avx512_bf16") return kAvx512Bf16Kernels;
  if (name == "avx512") return kAvx512Kernels;
  if (name == "avx2") return kAvx2Kernels;
#elif defined(__aarch64__)
#if FASTGEN_KNOWS_ARM_DOTS
  if (name == "neon_i8mm") return kNeonI8mmKernels;
  if (name == "neon_dotprod") return kNeonDotprodKernels;
#endif
  if (name == "neon") return kNeonKernels;
#endif
  return kPortableKernels;
}

}  // namespace fastgen
