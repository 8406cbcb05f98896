// Python's view of the sampler.

#include "bindings/sampler_bindings.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "common/cpu_features.h"

namespace py = pybind11;

namespace fastgen {

namespace {

using Ids = std::vector<std::int64_t>;

}  // namespace

int at_least_one(const char* name, int value) {
  if (value < 1) throw py::value_error(std::string(name) + ": must be at least 1");
  return value;
}

Draws::Draws(py::ssize_t count, int max_top)
    : max_top_(max_top),
      ids_(count),
      top_ids_({count, static_cast<py::ssize_t>(max_top)}),
      statuses_(count),
      logprobs_(count),
      top_logprobs_({count, static_cast<py::ssize_t>(max_top)}) {}

DrawBatch Draws::batch(const float* logits, const std::int32_t* seats, const std::int32_t* drafts) {
  return {logits,
          seats,
          drafts,
          static_cast<int>(ids_.size()),
          ids_.mutable_data(),
          reinterpret_cast<DrawStatus*>(statuses_.mutable_data()),
          logprobs_.mutable_data(),
          max_top_,
          top_ids_.mutable_data(),
          top_logprobs_.mutable_data()};
}

py::tuple Draws::arrays() const {
  return py::make_tuple(ids_, statuses_, logprobs_, top_ids_, top_logprobs_);
}

CheckedSampler::CheckedSampler(int num_seats, int vocab_size, int max_tokens, int num_threads)
    : sampler_(at_least_one("num_seats", num_seats), at_least_one("vocab_size", vocab_size),
               at_least_one("max_tokens", max_tokens), at_least_one("num_threads", num_threads),
               sampler_kernels(chosen_instruction_set())) {}

void CheckedSampler::reserve(int num_seats) {
  const std::lock_guard<std::mutex> lock(mutex_);
  sampler_.reserve(num_seats);
}

void CheckedSampler::bind(int seat, const Ids& prompt, const py::dict& given) {
  check_seat(seat);
  if (static_cast<int>(prompt.size()) > sampler_.max_tokens()) {
    throw py::value_error("prompt: longer than max_tokens");
  }
  const std::vector<std::int32_t> ids = narrow("prompt", prompt);
  SamplingOptions options = options_of(given);
  const std::lock_guard<std::mutex> lock(mutex_);
  sampler_.bind(seat, std::move(options), ids.data(), static_cast<int>(ids.size()));
}

void CheckedSampler::set_mask(int seat, const py::object& allowed) {
  check_seat(seat);
  IdSet mask;
  if (!allowed.is_none()) {
    const auto flags = allowed.cast<Array<bool>>();
    if (flags.ndim() != 1 || flags.size() != sampler_.vocab_size()) {
      throw py::value_error("allowed: must be bool (vocab_size,)");
    }
    mask.assign(sampler_.vocab_size(), false);
    for (int id = 0; id < sampler_.vocab_size(); ++id) {
      if (flags.data()[id]) mask.add(id);
    }
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  sampler_.set_mask(seat, std::move(mask));
}

void CheckedSampler::observe(int seat, std::int64_t token_id) {
  check_seat(seat);
  const std::int32_t id = narrow("token_id", {token_id})[0];
  const std::lock_guard<std::mutex> lock(mutex_);
  if (sampler_.num_tokens(seat) >= sampler_.max_tokens()) {
    throw py::value_error("observe: the row is full");
  }
  sampler_.observe(seat, id);
}

py::tuple CheckedSampler::draw(const Array<float>& logits, const Array<std::int32_t>& seats,
                               const Array<std::int32_t>& drafts, int max_top) {
  if (logits.ndim() != 2 || logits.shape(0) != seats.size() ||
      logits.shape(1) != sampler_.vocab_size()) {
    throw py::value_error("draw: logits must be (n, vocab_size), seats and drafts (n,)");
  }
  check_draws(seats, drafts, max_top);
  Draws draws(seats.size(), max_top);
  {
    const py::gil_scoped_release released;
    draw_checked(draws.batch(logits.data(), seats.data(), drafts.data()));
  }
  return draws.arrays();
}

// Each seat's draws stand together: rows are drawn by several threads.
void CheckedSampler::check_draws(const Array<std::int32_t>& seats,
                                 const Array<std::int32_t>& drafts, int max_top) const {
  if (seats.ndim() != 1 || drafts.ndim() != 1 || drafts.size() != seats.size() || max_top < 0) {
    throw py::value_error("draw: logits must be (n, vocab_size), seats and drafts (n,)");
  }
  std::vector<bool> drawn(sampler_.num_seats());
  for (py::ssize_t at = 0; at < seats.size(); ++at) {
    const std::int32_t seat = seats.data()[at];
    check_seat(seat);
    if (at > 0 && seat == seats.data()[at - 1]) continue;
    if (drawn[seat]) throw py::value_error("draw: a seat's draws must stand together");
    drawn[seat] = true;
  }
}

void CheckedSampler::draw_checked(const DrawBatch& batch) {
  const std::lock_guard<std::mutex> lock(mutex_);
  sampler_.draw(batch);
}

void CheckedSampler::check_seat(int seat) const {
  if (seat < 0 || seat >= sampler_.num_seats()) throw py::index_error("there is no such seat");
}

std::vector<std::int32_t> CheckedSampler::narrow(const char* name, const Ids& ids) const {
  std::vector<std::int32_t> narrowed;
  narrowed.reserve(ids.size());
  for (const std::int64_t id : ids) {
    if (id < 0 || id >= sampler_.vocab_size()) {
      throw py::value_error(std::string(name) + ": token id " + std::to_string(id) +
                            " is outside the vocabulary");
    }
    narrowed.push_back(static_cast<std::int32_t>(id));
  }
  return narrowed;
}

std::vector<std::int32_t> CheckedSampler::ids_of(const py::dict& given, const char* name) const {
  return narrow(name, given[name].cast<Ids>());
}

SamplingOptions CheckedSampler::options_of(const py::dict& given) const {
  SamplingOptions options;
  options.seed = given["seed"].cast<std::uint64_t>();
  for (const auto& [id, bias] :
       given["logit_bias"].cast<std::vector<std::pair<std::int64_t, float>>>()) {
    options.logit_bias.push_back({narrow("logit_bias", {id})[0], bias});
  }
  for (const auto& [ids, bias] :
       given["sequence_bias"].cast<std::vector<std::pair<Ids, float>>>()) {
    if (!ids.empty()) options.sequence_bias.push_back({narrow("sequence_bias", ids), bias});
  }
  options.repetition_penalty = given["repetition_penalty"].cast<float>();
  options.frequency_penalty = given["frequency_penalty"].cast<float>();
  options.presence_penalty = given["presence_penalty"].cast<float>();
  options.no_repeat_ngram_size = std::max(0, given["no_repeat_ngram_size"].cast<int>());
  for (const Ids& word : given["bad_words"].cast<std::vector<Ids>>()) {
    if (!word.empty()) options.bad_words.push_back(narrow("bad_words", word));
  }
  options.min_new_tokens = given["min_new_tokens"].cast<int>();
  if (!given["allowed_token_ids"].is_none()) {
    options.allowed.assign(sampler_.vocab_size(), false);
    for (const std::int32_t id : ids_of(given, "allowed_token_ids")) options.allowed.add(id);
  }
  if (!given["exponential_decay_length_penalty"].is_none()) {
    std::tie(options.length_start, options.length_factor) =
        given["exponential_decay_length_penalty"].cast<std::pair<int, double>>();
  }
  options.suppress = ids_of(given, "suppress_tokens");
  options.begin_suppress = ids_of(given, "begin_suppress_tokens");
  options.ending_ids = ids_of(given, "ending_ids");
  options.temperature = given["temperature"].cast<float>();
  options.top_h = given["top_h"].is_none() ? 0 : given["top_h"].cast<double>();
  options.top_k = std::max(0, given["top_k"].cast<int>());
  options.top_p = given["top_p"].cast<double>();
  options.min_p = given["min_p"].cast<double>();
  options.typical_p = given["typical_p"].cast<double>();
  options.epsilon_cutoff = given["epsilon_cutoff"].cast<double>();
  options.eta_cutoff = given["eta_cutoff"].cast<double>();
  options.num_logprobs = given["logprobs"].is_none() ? -1 : given["logprobs"].cast<int>();
  return options;
}

void bind_sampler(py::module_& module) {
  py::class_<CheckedSampler>(module, "Sampler", "Draws for the rows of a step, by seat.")
      .def(py::init<int, int, int, int>(), py::arg("num_seats"), py::arg("vocab_size"),
           py::arg("max_tokens"), py::arg("num_threads"))
      .def("reserve", &CheckedSampler::reserve, py::arg("num_seats"))
      .def("bind", &CheckedSampler::bind, py::arg("seat"), py::arg("prompt"), py::arg("options"),
           "Give a seat to a row: its prompt, and its options by the names of SamplingParams, with "
           "ending_ids besides.")
      .def("set_mask", &CheckedSampler::set_mask, py::arg("seat"), py::arg("allowed").none(true))
      .def("observe", &CheckedSampler::observe, py::arg("seat"), py::arg("token_id"))
      .def("draw", &CheckedSampler::draw, py::arg("logits").noconvert(),
           py::arg("seats").noconvert(), py::arg("drafts").noconvert(), py::arg("max_top"),
           "logits float32 (n, V), seats and drafts int32 (n,) -> ids int32 (n,), statuses uint8 "
           "(n,): 0 drawn, 1 failed, 2 skipped; logprobs float64 (n,), top_ids int32 and "
           "top_logprobs float64 (n, max_top), -1 behind the last. Releases the GIL.");
  module.def("sampler_bytes", &Sampler::bytes, py::arg("num_seats"), py::arg("vocab_size"),
             py::arg("max_tokens"), py::arg("num_threads"),
             "Bytes that a Sampler allocates when it is made.");
}

}  // namespace fastgen
