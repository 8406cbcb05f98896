// Which tokens a sampled row may draw, and with what weight; fastgen/sampling/filters.py is the
// definition.
//
// Nothing here sorts a vocabulary. top-k and top-h look only at blocks of logits whose highest
// value is among the k highest of such; top-p and typical find their threshold by weighted
// selection, which looks at half as many tokens each time.

#pragma once

#include <cstddef>
#include <cstdint>

#include "sampler/sampler_kernels.h"
#include "sampler/sampling_options.h"

namespace fastgen {

// The tokens that are left, in order of their ids.
struct Candidates {
  float* values;  // logits divided by the temperature
  std::int32_t* ids;
  double* weights;
  int count;
  double total;   // of the weights; before top_p also of tokens that it is known to remove
  float highest;  // of the whole row's values
};

// Buffers for one row at a time. One for each thread, given by the caller.
struct Scratch {
  float* scores;         // (V) the row's own copy of its logits
  float* values;         // (V)
  std::int32_t* ids;     // (V)
  double* weights;       // (V)
  double* keys;          // (V)
  double* key_weights;   // (V)
  float* block_highest;  // (blocks)
  float* block_order;    // (blocks)
  double* block_sums;    // (blocks)

  static std::size_t bytes(int vocab_size);
  static Scratch carve(unsigned char* memory, int vocab_size);  // 64-byte aligned
};

struct ProcessedLogits {  // of one row, after the processors
  const float* logits;
  int count;
  float highest;               // of the logits
  const float* block_highest;  // in scratch
};

// A whole row: its logits divided by the temperature, which may be the logits themselves, and the
// total of their weights. The weights and the sums of their blocks are in scratch.
struct Weighed {
  const float* values;
  double total;
};

Weighed weigh_row(const ProcessedLogits& scores, float temperature, Scratch& scratch,
                  const SamplerKernels& kernels);

// Whether the options filter at all; otherwise every token is a candidate.
bool filters(const SamplingOptions& options);

// The candidates that the filters leave, with their weights.
Candidates filtered(const SamplingOptions& options, const ProcessedLogits& scores, Scratch& scratch,
                    const SamplerKernels& kernels);

// At least the `wanted` highest values, and all equals of the last of them, in order of their ids;
// weights are not set. Values of -inf are left out.
Candidates best_candidates(const ProcessedLogits& scores, float temperature, int wanted,
                           Scratch& scratch);

}  // namespace fastgen
