// What changes logits before anything is drawn; fastgen/sampling/processors.py is the
// definition.

#pragma once

#include "sampler/row_history.h"
#include "sampler/sampling_options.h"

namespace fastgen {

// Whether this draw's logits are changed at all.
bool changes_logits(const SamplingOptions& options, const RowHistory& row, const IdSet& mask);

// Changes a row's own copy of its logits (vocab_size) in place.
void process(const SamplingOptions& options, const RowHistory& row, const IdSet& mask,
             float* scores, int vocab_size);

}  // namespace fastgen
