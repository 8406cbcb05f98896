// Which instructions an Arm processor has, by what Linux or macOS says of it, and the paths that
// follow. Included by cpu_features.h.

#pragma once

#include <cstddef>
#include <initializer_list>
#include <string>
#include <vector>

#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

// Whether the compiler has these intrinsics for single functions: gcc does from 10 on, clang from
// 16, which Apple numbers 15.
#if defined(__apple_build_version__)
#define FASTGEN_KNOWS_ARM_DOTS (__clang_major__ >= 15)
#elif defined(__clang__)
#define FASTGEN_KNOWS_ARM_DOTS (__clang_major__ >= 16)
#else
#define FASTGEN_KNOWS_ARM_DOTS (__GNUC__ >= 10)
#endif

namespace fastgen {

struct ArmFeature {
  const char* name;                       // Linux'
  unsigned long hwcap, hwcap2;            // its bits of AT_HWCAP and AT_HWCAP2, of which one is set
  [[maybe_unused]] const char* mac_name;  // macOS's
};

constexpr ArmFeature kArmFeatures[] = {
    {"asimd", 1ul << 1, 0, "hw.optional.AdvSIMD"},
    {"fphp", 1ul << 9, 0, "hw.optional.arm.FEAT_FP16"},
    {"asimddp", 1ul << 20, 0, "hw.optional.arm.FEAT_DotProd"},
    {"i8mm", 0, 1ul << 13, "hw.optional.arm.FEAT_I8MM"},
    {"bf16", 0, 1ul << 14, "hw.optional.arm.FEAT_BF16"},
};

// False where the system does not say.
inline bool has_arm_feature([[maybe_unused]] const ArmFeature& feature) {
#if defined(__linux__)
  return (getauxval(AT_HWCAP) & feature.hwcap) != 0 || (getauxval(AT_HWCAP2) & feature.hwcap2) != 0;
#elif defined(__APPLE__)
  int value = 0;
  std::size_t size = sizeof value;
  return sysctlbyname(feature.mac_name, &value, &size, nullptr, 0) == 0 && value != 0;
#else
  return false;
#endif
}

inline std::vector<std::string> arm_features() {
  std::vector<std::string> names;
  for (const ArmFeature& feature : kArmFeatures) {
    if (has_arm_feature(feature)) names.emplace_back(feature.name);
  }
  return names;
}

inline bool has_arm_features(std::initializer_list<const char*> wanted) {
  for (const char* const name : wanted) {
    for (const ArmFeature& feature : kArmFeatures) {
      if (std::string(feature.name) == name && !has_arm_feature(feature)) return false;
    }
  }
  return true;
}

// The best first. NEON itself is part of every 64-bit Arm processor.
inline std::vector<std::string> arm_instruction_sets() {
  std::vector<std::string> names;
#if FASTGEN_KNOWS_ARM_DOTS
  if (has_arm_features({"asimddp", "i8mm", "bf16"})) names.emplace_back("neon_i8mm");  // and BF16
  if (has_arm_features({"asimddp"})) names.emplace_back("neon_dotprod");
#endif
  names.emplace_back("neon");
  return names;
}

}  // namespace fastgen
