// Where the keys and values of a layer lie, and how widely, as far as the weights tell: what is
// taken off them and what they are divided by before they become codes of 8 bits.
//
// A token and head has one scale, so a dimension that is far larger than the others leaves those
// few codes. In GPT-2's keys some are, most of all by an offset that is the same for all tokens. An
// offset of keys adds the same to all scores of a query, which softmax does not see; one of values
// adds itself to their mean, for weights sum to 1. So offsets go, and are added again to what
// attention puts out. Factors are powers of two: they change no bit but those of the codes.

#pragma once

#include "decoder/packed_linear.h"

namespace fastgen {

// Each (hidden), heads side by side: number = center + factor * (what becomes a code).
struct KvRange {
  float *centers, *factors, *inverses;  // inverses of the factors
};

struct KvRanges {
  KvRange keys, values;
};

// Of the layer with these packed projections, after a norm (hidden) of this gain and bias.
void find_kv_ranges(const PackedLinear& qkv, const float* gain, const float* bias,
                    const KvRanges& ranges, int num_threads);

}  // namespace fastgen
