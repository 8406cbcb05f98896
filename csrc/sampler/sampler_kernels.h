// Loops over a whole row of logits, once for each instruction set; the best is chosen at run time.

#pragma once

#include <cstdint>
#include <string>

namespace fastgen {

constexpr int kBlock = 64;  // values that share one entry of block maxima and block sums

constexpr int kNumBounds = 4;

constexpr int num_blocks(int count) { return (count + kBlock - 1) / kBlock; }

struct SamplerKernels {
  // Highest of values (count), NaN if there is one among them; and that of each block.
  float (*highest)(const float* values, int count, float* block_highest);

  // scaled[i] = values[i] / temperature; the two may be the same array.
  void (*divide)(const float* values, int count, float temperature, float* scaled);

  // weights[i] = exp(values[i] - highest) in double, 0 below exp(-708); returns their sum, which is
  // that of the block sums in order. Equal values get equal weights, wherever they stand.
  double (*weigh)(const float* values, int count, float highest, double* weights,
                  double* block_sums);

  // masses[j] = sum of the weights below bounds[j].
  void (*mass_below)(const double* weights, int count, const double (&bounds)[kNumBounds],
                     double (&masses)[kNumBounds]);

  // Sum of weights[i] with keys[i] < pivot, and with keys[i] == pivot.
  void (*split_mass)(const double* keys, const double* weights, int count, double pivot,
                     double* below, double* equal);
};

// Those of the path that chosen_instruction_set() names.
const SamplerKernels& sampler_kernels(const std::string& name);

}  // namespace fastgen
