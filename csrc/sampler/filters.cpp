#include "sampler/filters.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "sampler/weighted_selection.h"

namespace fastgen {

namespace {

constexpr int kTopHCandidates = 100;
constexpr double kTypicalSteps = 0x1p40;  // to a nat: nearer distances to the entropy are equal
constexpr double kRounder = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer
constexpr double kEdge = 1e-12;  // top_h, top_n_sigma: what is this near to an edge is within
constexpr float kRuledOut = -std::numeric_limits<float>::infinity();

// Keep the candidates that pred(index) names, in their order.
template <typename Predicate>
void keep_if(Candidates& candidates, Predicate pred) {
  int kept = 0;
  double total = 0;
  for (int at = 0; at < candidates.count; ++at) {
    const bool keep = pred(at);
    const double weight = candidates.weights[at];
    candidates.values[kept] = candidates.values[at];
    candidates.ids[kept] = candidates.ids[at];
    candidates.weights[kept] = weight;
    total += keep ? weight : 0;
    kept += keep;
  }
  candidates.count = kept;
  candidates.total = total;
}

// Keep values above `edge` and the first `num_equal` of those equal to it.
void keep_highest(Candidates& candidates, float edge, double num_equal) {
  double equal = 0;
  keep_if(candidates, [&](int at) {
    const float value = candidates.values[at];
    return value > edge || (value == edge && equal++ < num_equal);
  });
}

Threshold select_value(const Candidates& candidates, const double* weights, double goal,
                       Scratch& scratch, const SamplerKernels& kernels) {
  for (int at = 0; at < candidates.count; ++at) {
    scratch.keys[at] = -static_cast<double>(candidates.values[at]);
    scratch.key_weights[at] = weights == nullptr ? 1 : weights[at];
  }
  return select_mass(scratch.keys, scratch.key_weights, candidates.count, goal, kernels);
}

// The top_k highest; all equals of the k-th stay unless `exactly`: then the lowest ids of them.
void keep_top_k(Candidates& candidates, int top_k, bool exactly, Scratch& scratch,
                const SamplerKernels& kernels) {
  if (candidates.count <= top_k) return;
  const Threshold kth = select_value(candidates, nullptr, top_k, scratch, kernels);
  const double num_equal = exactly ? top_k - kth.mass_below : candidates.count;
  keep_highest(candidates, static_cast<float>(-kth.key), num_equal);
}

void weigh(Candidates& candidates, Scratch& scratch, const SamplerKernels& kernels) {
  candidates.total = kernels.weigh(candidates.values, candidates.count, candidates.highest,
                                   candidates.weights, scratch.block_sums);
}

double gap(const Candidates& candidates, int at) {
  return static_cast<double>(candidates.values[at]) - static_cast<double>(candidates.highest);
}

double mean_gap(const Candidates& candidates) {
  double sum = 0;
  for (int at = 0; at < candidates.count; ++at) {
    if (candidates.weights[at] > 0) sum += candidates.weights[at] * gap(candidates, at);
  }
  return sum / candidates.total;
}

void keep_top_h(Candidates& candidates, double top_h) {
  const int count = candidates.count;
  int order[kTopHCandidates];
  for (int at = 0; at < count; ++at) order[at] = at;
  std::sort(order, order + count, [&](int left, int right) {
    const float a = candidates.values[left], b = candidates.values[right];
    return a > b || (a == b && left < right);
  });
  const double log_total = std::log(candidates.total);
  double entropy[kTopHCandidates], sum = 0;
  for (int at = 0; at < count; ++at) {
    const double weight = candidates.weights[order[at]];
    if (weight > 0) sum += weight * (log_total - gap(candidates, order[at]));
    entropy[at] = sum;
  }
  const double share = top_h * sum * (1 + kEdge);
  int size = 1;
  while (size < count && entropy[size] <= share) ++size;
  const float edge = candidates.values[order[size - 1]];
  int num_equal = 0;
  for (int at = 0; at < size; ++at) num_equal += candidates.values[order[at]] == edge;
  keep_highest(candidates, edge, num_equal);
}

void keep_top_p(Candidates& candidates, double top_p, Scratch& scratch,
                const SamplerKernels& kernels) {
  const double goal = top_p * candidates.total;
  const Threshold edge = select_value(candidates, candidates.weights, goal, scratch, kernels);
  const float value = static_cast<float>(-edge.key);
  double weight = 0;
  for (int at = 0; at < candidates.count && weight == 0; ++at) {
    if (candidates.values[at] == value) weight = candidates.weights[at];
  }
  const double num_equal = weight > 0 ? std::ceil((goal - edge.mass_below) / weight) : 1;
  keep_highest(candidates, value, std::max(1.0, num_equal));
}

void keep_typical(Candidates& candidates, double typical_p, Scratch& scratch,
                  const SamplerKernels& kernels) {
  const double mean = mean_gap(candidates);
  const auto distance = [&](int at) {
    return (std::fabs(gap(candidates, at) - mean) * kTypicalSteps + kRounder) - kRounder;
  };
  for (int at = 0; at < candidates.count; ++at) {
    scratch.keys[at] = distance(at);
    scratch.key_weights[at] = candidates.weights[at];
  }
  const double farthest = select_mass(scratch.keys, scratch.key_weights, candidates.count,
                                      typical_p * candidates.total, kernels)
                              .key;
  keep_if(candidates, [&](int at) { return distance(at) <= farthest; });
}

void keep_at_least(Candidates& candidates, double least) {
  float highest = kRuledOut;
  for (int at = 0; at < candidates.count; ++at) {
    highest = std::max(highest, candidates.values[at]);
  }
  keep_if(candidates, [&](int at) {
    return candidates.weights[at] >= least || candidates.values[at] == highest;
  });
}

// A weight below which top_p removes everything: what weighs less has a mass below 1 - top_p
// together. (1 - top_p) * total / count is such a bound, whatever the weights are; higher ones are
// tried.
double bound_of_top_p(double top_p, const double* weights, int count, double total,
                      const SamplerKernels& kernels) {
  const double removed = (1 - top_p) * (1 - 1e-9) * total;
  double bound = removed / count, bounds[kNumBounds], masses[kNumBounds];
  for (int of = 0; of < kNumBounds; ++of) bounds[of] = bound * (4 << (2 * of));
  kernels.mass_below(weights, count, bounds, masses);
  for (int of = 0; of < kNumBounds && masses[of] < removed; ++of) bound = bounds[of];
  return bound;
}

// Every token with a weight, but for those that top_p is known to remove; `total` is that of all.
void take_all(const ProcessedLogits& scores, const SamplingOptions& options, Candidates& candidates,
              Scratch& scratch, const SamplerKernels& kernels) {
  const Weighed row = weigh_row(scores, options.temperature, scratch, kernels);
  double least = std::numeric_limits<double>::denorm_min();
  if (options.top_p < 1) {
    least = std::max(
        least, bound_of_top_p(options.top_p, scratch.weights, scores.count, row.total, kernels));
  }
  int kept = 0;
  for (int start = 0; start < scores.count; start += kBlock) {
    if (scratch.block_sums[start / kBlock] < least) continue;
    const int end = std::min(start + kBlock, scores.count);
    for (int at = start; at < end; ++at) {  // ids first: they are few
      scratch.ids[kept] = at;
      kept += scratch.weights[at] >= least;
    }
  }
  for (int at = 0; at < kept; ++at) {
    scratch.weights[at] = scratch.weights[scratch.ids[at]];
    scratch.values[at] = row.values[scratch.ids[at]];
  }
  candidates.count = kept;
  candidates.total = row.total;
}

// Candidates with values of at least `least`, from blocks that have any.
void gather(const ProcessedLogits& scores, float temperature, float least, Candidates& candidates,
            Scratch& scratch) {
  int kept = 0;
  for (int start = 0; start < scores.count; start += kBlock) {
    if (!(scores.block_highest[start / kBlock] / temperature >= least)) continue;
    const int end = std::min(start + kBlock, scores.count);
    for (int at = start; at < end; ++at) {
      const float value = scores.logits[at] / temperature;
      scratch.values[kept] = value;
      scratch.ids[kept] = at;
      kept += value >= least && value > kRuledOut;
    }
  }
  candidates.count = kept;
}

// The sum of term(index), in lanes that do not wait for each other.
template <typename Term>
double sum_of(int count, Term term) {
  constexpr int kLanes = 8;
  double lanes[kLanes] = {}, sum = 0;
  int at = 0;
  for (; at + kLanes <= count; at += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += term(at + lane);
  }
  for (int lane = 0; at < count; ++at, ++lane) lanes[lane] += term(at);
  for (const double part : lanes) sum += part;
  return sum;
}

// The standard deviation of the finite values: the population's.
double deviation_of(const float* values, int count, float highest) {
  const auto finite = [=](int at) { return values[at] > kRuledOut; };
  const auto below = [=](int at) { return static_cast<double>(values[at]) - highest; };
  const double num_finite = sum_of(count, [=](int at) { return finite(at) ? 1.0 : 0.0; });
  const double mean =
      sum_of(count, [=](int at) { return finite(at) ? below(at) : 0; }) / num_finite;
  const double squares = sum_of(count, [=](int at) {
    const double from_mean = below(at) - mean;
    return finite(at) ? from_mean * from_mean : 0;
  });
  return std::sqrt(squares / num_finite);
}

// Candidates at most `top_n_sigma` standard deviations below the highest; weights are not set.
void take_within(const ProcessedLogits& scores, const SamplingOptions& options,
                 Candidates& candidates, Scratch& scratch, const SamplerKernels& kernels) {
  const float* values = scores.logits;
  if (options.temperature != 1) {
    kernels.divide(values, scores.count, options.temperature, scratch.values);
    values = scratch.values;
  }
  const double deviation = deviation_of(values, scores.count, candidates.highest);
  const double least = -options.top_n_sigma * deviation * (1 + kEdge);
  const double lowest = std::numeric_limits<float>::lowest();
  const float about = static_cast<float>(std::max(candidates.highest + least, lowest));
  const float slack = std::fabs(about) * 1e-6f + 1e-6f;
  gather(scores, options.temperature, about - slack, candidates, scratch);
  keep_if(candidates, [&](int at) { return gap(candidates, at) >= least; });
}

Candidates no_candidates(const ProcessedLogits& scores, float temperature, Scratch& scratch) {
  return {scratch.values, scratch.ids, scratch.weights, 0, 0, scores.highest / temperature};
}

}  // namespace

Candidates best_candidates(const ProcessedLogits& scores, float temperature, int wanted,
                           Scratch& scratch) {
  Candidates candidates = no_candidates(scores, temperature, scratch);
  const int blocks = num_blocks(scores.count);
  float least = kRuledOut;
  if (wanted < blocks) {  // at least `wanted` values reach the block maximum of that rank
    std::copy(scores.block_highest, scores.block_highest + blocks, scratch.block_order);
    float* const rank = scratch.block_order + wanted - 1;
    std::nth_element(scratch.block_order, rank, scratch.block_order + blocks,
                     [](float left, float right) { return left > right; });
    least = *rank / temperature;
  }
  gather(scores, temperature, least, candidates, scratch);
  return candidates;
}

Weighed weigh_row(const ProcessedLogits& scores, float temperature, Scratch& scratch,
                  const SamplerKernels& kernels) {
  const float* values = scores.logits;
  if (temperature != 1) {
    kernels.divide(values, scores.count, temperature, scratch.values);
    values = scratch.values;
  }
  return {values, kernels.weigh(values, scores.count, scores.highest / temperature, scratch.weights,
                                scratch.block_sums)};
}

bool filters(const SamplingOptions& options) {
  return options.top_n_sigma > 0 || options.top_h > 0 || options.top_k > 0 || options.top_p < 1 ||
         options.min_p > 0 || options.typical_p < 1 || options.epsilon_cutoff > 0 ||
         options.eta_cutoff > 0;
}

Candidates filtered(const SamplingOptions& options, const ProcessedLogits& scores, Scratch& scratch,
                    const SamplerKernels& kernels) {
  const float temperature = options.temperature;
  const bool has_top_k = options.top_k > 0 && options.top_k < scores.count;
  const bool has_top_n_sigma = options.top_n_sigma > 0;
  Candidates candidates = no_candidates(scores, temperature, scratch);
  if (has_top_n_sigma) take_within(scores, options, candidates, scratch, kernels);
  if (options.top_h > 0) {
    if (!has_top_n_sigma) {
      candidates = best_candidates(scores, temperature, kTopHCandidates, scratch);
    }
    keep_top_k(candidates, kTopHCandidates, true, scratch, kernels);
    weigh(candidates, scratch, kernels);
    keep_top_h(candidates, options.top_h);
    if (has_top_k) keep_top_k(candidates, options.top_k, false, scratch, kernels);
  } else if (has_top_n_sigma) {
    if (has_top_k) keep_top_k(candidates, options.top_k, false, scratch, kernels);
    weigh(candidates, scratch, kernels);
  } else if (has_top_k) {
    candidates = best_candidates(scores, temperature, options.top_k, scratch);
    keep_top_k(candidates, options.top_k, false, scratch, kernels);
    weigh(candidates, scratch, kernels);
  } else if (options.top_p == 1 && options.min_p > 0) {  // few are near enough to the highest
    const double least = candidates.highest + std::log(options.min_p);
    const float slack = std::fabs(static_cast<float>(least)) * 1e-6f + 1e-6f;
    gather(scores, temperature, static_cast<float>(least) - slack, candidates, scratch);
    weigh(candidates, scratch, kernels);
  } else {
    take_all(scores, options, candidates, scratch, kernels);
  }
  if (options.top_p < 1) keep_top_p(candidates, options.top_p, scratch, kernels);
  if (options.min_p > 0) {
    keep_if(candidates, [&](int at) { return candidates.weights[at] >= options.min_p; });
  }
  if (options.typical_p < 1) keep_typical(candidates, options.typical_p, scratch, kernels);
  if (options.epsilon_cutoff > 0) {
    keep_at_least(candidates, options.epsilon_cutoff * candidates.total);
  }
  if (options.eta_cutoff > 0) {  // exp(-entropy) = exp(mean gap) / total
    const double eta = options.eta_cutoff;
    keep_at_least(candidates, std::min(eta * candidates.total,
                                       std::sqrt(eta) * std::exp(mean_gap(candidates))));
  }
  return candidates;
}

std::size_t Scratch::bytes(int vocab_size) {
  const std::size_t values = num_blocks(vocab_size) * std::size_t{kBlock};
  return values * (2 * sizeof(float) + sizeof(std::int32_t) + 3 * sizeof(double)) +
         3 * (num_blocks(vocab_size) * sizeof(double) + kBlock);
}

Scratch Scratch::carve(unsigned char* memory, int vocab_size) {
  const std::size_t values = num_blocks(vocab_size) * std::size_t{kBlock};
  const std::size_t blocks = num_blocks(vocab_size);
  const auto take = [&](std::size_t bytes) {
    unsigned char* const start = memory;
    memory += (bytes + kBlock - 1) / kBlock * kBlock;
    return static_cast<void*>(start);
  };
  Scratch scratch;
  scratch.scores = static_cast<float*>(take(values * sizeof(float)));
  scratch.values = static_cast<float*>(take(values * sizeof(float)));
  scratch.ids = static_cast<std::int32_t*>(take(values * sizeof(std::int32_t)));
  scratch.weights = static_cast<double*>(take(values * sizeof(double)));
  scratch.keys = static_cast<double*>(take(values * sizeof(double)));
  scratch.key_weights = static_cast<double*>(take(values * sizeof(double)));
  scratch.block_highest = static_cast<float*>(take(blocks * sizeof(float)));
  scratch.block_order = static_cast<float*>(take(blocks * sizeof(float)));
  scratch.block_sums = static_cast<double*>(take(blocks * sizeof(double)));
  return scratch;
}

}  // namespace fastgen
