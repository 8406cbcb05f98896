// Python's view of the sampler.

#include "bindings/sampler_bindings.h"

#include <pybind11/stl.h>

#include <functional>
#include <iterator>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "common/cpu_features.h"

namespace py = pybind11;

namespace fastgen {

namespace {

using WideIds = std::vector<std::int64_t>;

// What Python gave for an option, as the type that it has here.
class OptionReader {
 public:
  using Narrow = std::function<Ids(const char* name, const WideIds& ids)>;  // or raises

  OptionReader(Narrow narrow, int vocab_size)
      : narrow_(std::move(narrow)), vocab_size_(vocab_size) {}

  // None leaves the option as it is. Returns how many were found: 1, or KeyError.
  template <typename Option>
  int find(const py::dict& given, const char* name, Option& option) const {
    PyObject* const value = PyDict_GetItemString(given.ptr(), name);
    if (value == nullptr) throw py::key_error(std::string("option ") + name + " is missing");
    if (value != Py_None) read(name, py::reinterpret_borrow<py::object>(value), option);
    return 1;
  }

 private:
  template <typename Number>
  void read(const char*, const py::object& value, Number& option) const {
    option = value.cast<Number>();
  }
  void read(const char* name, const py::object& value, Ids& option) const {
    option = narrow_(name, value.cast<WideIds>());
  }
  void read(const char* name, const py::object& value, IdSet& option) const {
    option.assign(vocab_size_, false);
    for (const std::int32_t id : narrow_(name, value.cast<WideIds>())) option.add(id);
  }
  void read(const char* name, const py::object& value, std::vector<Ids>& option) const {
    for (const WideIds& word : value.cast<std::vector<WideIds>>()) {
      if (!word.empty()) option.push_back(narrow_(name, word));
    }
  }
  void read(const char* name, const py::object& value, std::vector<BiasedId>& option) const {
    for (const auto& [id, bias] : value.cast<std::vector<std::pair<std::int64_t, float>>>()) {
      option.push_back({narrow_(name, {id})[0], bias});
    }
  }
  void read(const char* name, const py::object& value, std::vector<BiasedSequence>& option) const {
    for (const auto& [ids, bias] : value.cast<std::vector<std::pair<WideIds, float>>>()) {
      if (!ids.empty()) option.push_back({narrow_(name, ids), bias});
    }
  }
  void read(const char*, const py::object& value, LengthPenalty& option) const {
    std::tie(option.start, option.factor) = value.cast<std::pair<int, double>>();
  }

  Narrow narrow_;
  int vocab_size_;
};

py::tuple option_names() {
#define FASTGEN_NAME(name, ...) #name,
  constexpr const char* kNames[] = {FASTGEN_SAMPLING_OPTIONS(FASTGEN_NAME)};
#undef FASTGEN_NAME
  py::tuple names(std::size(kNames));
  for (std::size_t at = 0; at < std::size(kNames); ++at) names[at] = kNames[at];
  return names;
}

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

void CheckedSampler::bind(int seat, const WideIds& prompt, const py::dict& given) {
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

Ids CheckedSampler::narrow(const char* name, const WideIds& ids) const {
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

SamplingOptions CheckedSampler::options_of(const py::dict& given) const {
  const OptionReader reader(
      [this](const char* name, const WideIds& ids) { return narrow(name, ids); },
      sampler_.vocab_size());
  SamplingOptions options;
  Py_ssize_t num_read = 0;
#define FASTGEN_READ(name, ...) num_read += reader.find(given, #name, options.name);
  FASTGEN_SAMPLING_OPTIONS(FASTGEN_READ)
#undef FASTGEN_READ
  if (PyDict_Size(given.ptr()) != num_read) {
    for (const auto& item : given) {
      const auto name = item.first.cast<std::string>();
      if (!option_names().contains(name)) throw py::key_error("option " + name + " is unknown");
    }
  }
  return options;
}

void bind_sampler(py::module_& module) {
  py::class_<CheckedSampler> sampler(module, "Sampler", "Draws for the rows of a step, by seat.");
  sampler.attr("options") = option_names();
  sampler
      .def(py::init<int, int, int, int>(), py::arg("num_seats"), py::arg("vocab_size"),
           py::arg("max_tokens"), py::arg("num_threads"))
      .def("reserve", &CheckedSampler::reserve, py::arg("num_seats"))
      .def("bind", &CheckedSampler::bind, py::arg("seat"), py::arg("prompt"), py::arg("options"),
           "Give a seat to a row: its prompt, and a value for each of `options`, by its name in "
           "SamplingParams, and ending_ids. KeyError: one is missing, or unknown.")
      .def("set_mask", &CheckedSampler::set_mask, py::arg("seat"), py::arg("allowed").none(true))
      .def("observe", &CheckedSampler::observe, py::arg("seat"), py::arg("token_id"))
      .def("draw", &CheckedSampler::draw, py::arg("logits").noconvert(),
           py::arg("seats").noconvert(), py::arg("drafts").noconvert(), py::arg("max_top"),
           "logits float32 (n, V), seats and drafts int32 (n,) -> ids int32 (n,), statuses uint8 "
           "(n,): 0 drawn, 1 failed, 2 skipped; logprobs float64 (n,), top_ids int32 and "
           "top_logprobs float64 (n, max_top), -1 after the last. Releases the GIL.");
  module.def("sampler_bytes", &Sampler::bytes, py::arg("num_seats"), py::arg("vocab_size"),
             py::arg("max_tokens"), py::arg("num_threads"),
             "Bytes that a Sampler allocates when it is made.");
}

}  // namespace fastgen
