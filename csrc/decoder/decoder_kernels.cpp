#include "decoder/decoder_kernels.h"

namespace fastgen {

const DecoderKernels& decoder_kernels(const std::string& name) {
#if defined(__x86_64__)
  if (name == "avx512_bf16") return kAvx512Bf16Kernels;
  if (name == "avx512") return kAvx512Kernels;
  if (name == "avx2") return kAvx2Kernels;
#endif
  return kPortableKernels;
}

}  // namespace fastgen
