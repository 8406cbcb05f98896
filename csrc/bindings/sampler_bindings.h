// Python's view of the sampler: checks types, shapes and ids, then hands over plain pointers.

#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "sampler/sampler.h"

namespace fastgen {

template <typename Value>
using Array = pybind11::array_t<Value, pybind11::array::c_style>;

// What the draws of a step come back in.
class Draws {
 public:
  Draws(pybind11::ssize_t count, int max_top);
  DrawBatch batch(const float* logits, const std::int32_t* seats, const std::int32_t* drafts);
  pybind11::tuple arrays() const;

 private:
  int max_top_;
  Array<std::int32_t> ids_, top_ids_;
  Array<std::uint8_t> statuses_;
  Array<double> logprobs_, top_logprobs_;
};

// The sampler, and what Python may do wrong with it: a call waits for one that draws without the
// GIL.
class CheckedSampler {
 public:
  CheckedSampler(int num_seats, int vocab_size, int max_tokens, int num_threads);

  void reserve(int num_seats);
  void bind(int seat, const std::vector<std::int64_t>& prompt, const pybind11::dict& options);
  void set_mask(int seat, const pybind11::object& allowed);
  void observe(int seat, std::int64_t token_id);
  pybind11::tuple draw(const Array<float>& logits, const Array<std::int32_t>& seats,
                       const Array<std::int32_t>& drafts, int max_top);

  void check_draws(const Array<std::int32_t>& seats, const Array<std::int32_t>& drafts,
                   int max_top) const;
  void draw_checked(const DrawBatch& batch);  // without the GIL
  int vocab_size() const { return sampler_.vocab_size(); }

 private:
  void check_seat(int seat) const;
  Ids narrow(const char* name, const std::vector<std::int64_t>& ids) const;
  SamplingOptions options_of(const pybind11::dict& given) const;

  Sampler sampler_;
  std::mutex mutex_;
};

int at_least_one(const char* name, int value);  // or raises

void bind_sampler(pybind11::module_& module);

}  // namespace fastgen
