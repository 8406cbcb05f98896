// The threshold at which sorted weights reach a mass, found without sorting.

#pragma once

#include "sampler/sampler_kernels.h"

namespace fastgen {

struct Threshold {
  double key;         // the smallest with mass(keys <= key) >= goal
  double mass_below;  // of the keys below it
};

// Weighted selection: halves the keys until few are left. Destroys both arrays.
Threshold select_mass(double* keys, double* weights, int count, double goal,
                      const SamplerKernels& kernels);

}  // namespace fastgen
