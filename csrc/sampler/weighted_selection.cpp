#include "sampler/weighted_selection.h"

#include <algorithm>
#include <cstdint>
#include <limits>

namespace fastgen {

namespace {

// Of keys at places that differ from round to round, so that no order of the keys is a bad one.
double median_of_sample(const double* keys, int count, std::uint32_t& random) {
  constexpr int kSample = 15;
  double sample[kSample];
  for (double& key : sample) {
    random = random * 1664525u + 1013904223u;  // a linear congruential generator
    key = keys[static_cast<std::uint64_t>(random) * static_cast<std::uint32_t>(count) >> 32];
  }
  std::nth_element(sample, sample + kSample / 2, sample + kSample);
  return sample[kSample / 2];
}

template <typename Predicate>
int compact(double* keys, double* weights, int count, Predicate pred) {
  int kept = 0;
  for (int at = 0; at < count; ++at) {
    const double key = keys[at];
    keys[kept] = key;
    weights[kept] = weights[at];
    kept += pred(key);
  }
  return kept;
}

Threshold select_among_few(double* keys, double* weights, int count, double goal, double below) {
  for (int at = 1; at < count; ++at) {  // insertion sort
    const double key = keys[at], weight = weights[at];
    int to = at;
    for (; to > 0 && keys[to - 1] > key; --to) {
      keys[to] = keys[to - 1];
      weights[to] = weights[to - 1];
    }
    keys[to] = key;
    weights[to] = weight;
  }
  double mass = below;
  for (int at = 0; at < count;) {
    const double key = keys[at], before = mass;
    for (; at < count && keys[at] == key; ++at) mass += weights[at];
    if (mass >= goal || at == count) return {key, before};
  }
  return {std::numeric_limits<double>::infinity(), below};
}

}  // namespace

Threshold select_mass(double* keys, double* weights, int count, double goal,
                      const SamplerKernels& kernels) {
  constexpr int kFew = 24;
  double below = 0;
  std::uint32_t random = 1;
  while (count > kFew) {
    const double pivot = median_of_sample(keys, count, random);
    double less, equal;
    kernels.split_mass(keys, weights, count, pivot, &less, &equal);
    if (below + less >= goal) {
      count = compact(keys, weights, count, [=](double key) { return key < pivot; });
      continue;
    }
    const double reached = below + less + equal;
    if (reached >= goal) return {pivot, below + less};
    const int kept = compact(keys, weights, count, [=](double key) { return key > pivot; });
    if (kept == 0) return {pivot, below + less};  // the goal was missed by a rounding
    below = reached;
    count = kept;
  }
  return select_among_few(keys, weights, count, goal, below);
}

}  // namespace fastgen
