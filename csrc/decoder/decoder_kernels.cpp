#include "decoder/decoder_kernels.h"

#include "common/cpu_features.h"

namespace fastgen {

namespace {

[[maybe_unused]] DecoderKernels with_int8(DecoderKernels kernels, const Int8Kernels& int8) {
  kernels.tiles[static_cast<int>(Arithmetic::kInt8)] = int8.tile;
  kernels.tiles[static_cast<int>(Arithmetic::kInt8WideInputs)] = int8.wide_inputs_tile;
  kernels.quantize = int8.quantize;
  return kernels;
}

}  // namespace

const DecoderKernels& decoder_kernels(const std::string& name) {
#if defined(__x86_64__)
  if (name == "avx512_bf16") return kAvx512Bf16Kernels;
  if (name == "avx512_vnni") {
    static const DecoderKernels kernels = with_int8(kAvx512Kernels, kAvx512VnniKernels);
    return kernels;
  }
  if (name == "avx512") return kAvx512Kernels;
#if defined(FASTGEN_KNOWS_AVX_VNNI)
  if (name == "avx_vnni") {
    static const DecoderKernels kernels = with_int8(kAvx2Kernels, kAvxVnniKernels);
    return kernels;
  }
#endif
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
