// Python's view of the drafts from a row's own tokens and from earlier outputs. Calls are short,
// and keep the GIL.

#include "bindings/speculation_bindings.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "speculation/suffix_row.h"

namespace py = pybind11;

namespace fastgen {

namespace {

std::int32_t token_id_of(PyObject* item) {
  int overflow = 0;
  const long long id = PyLong_Check(item) ? PyLong_AsLongLongAndOverflow(item, &overflow) : -1;
  if (overflow != 0 || id < 0 || id > std::numeric_limits<std::int32_t>::max()) {
    throw py::value_error("token_ids: must be integers from 0 to 2^31 - 1");
  }
  return static_cast<std::int32_t>(id);
}

py::ssize_t checked_start(const py::list& token_ids, std::int64_t start) {
  if (start < 0 || start > PyList_GET_SIZE(token_ids.ptr())) {
    throw py::value_error("token_ids: has fewer tokens than there were");
  }
  return static_cast<py::ssize_t>(start);
}

// Checked before the first is taken, so that a refused call changes nothing.
std::vector<std::int32_t> ids_from(const py::list& token_ids, std::int64_t start) {
  std::vector<std::int32_t> ids;
  const py::ssize_t size = PyList_GET_SIZE(token_ids.ptr());
  ids.reserve(size - checked_start(token_ids, start));
  for (py::ssize_t at = start; at < size; ++at) {
    ids.push_back(token_id_of(PyList_GET_ITEM(token_ids.ptr(), at)));
  }
  return ids;
}

void add_from(SuffixAutomaton& automaton, const py::list& token_ids, std::int64_t start) {
  const std::vector<std::int32_t> ids = ids_from(token_ids, start);
  if (ids.size() > 1)
    automaton.reserve(static_cast<int>(std::min<std::size_t>(ids.size(), 1 << 30)));
  for (const std::int32_t id : ids) automaton.add(id);
}

py::list to_list(const std::vector<std::int32_t>& ids) {
  py::list list(ids.size());
  for (std::size_t at = 0; at < ids.size(); ++at) {
    PyList_SET_ITEM(list.ptr(), static_cast<Py_ssize_t>(at), PyLong_FromLong(ids[at]));
  }
  return list;
}

int checked_most(int most) {
  if (most < 0) throw py::value_error("most: must not be negative");
  return most;
}

SaltDigest digest_of(const py::bytes& salt) {
  SaltDigest digest{};
  const std::string text = salt;
  if (text.size() != sizeof digest) throw py::value_error("salt: must be 32 bytes");
  std::memcpy(digest.data(), text.data(), sizeof digest);
  return digest;
}

std::shared_ptr<OutputStore> make_store(int capacity) {
  if (capacity < OutputStore::kMinCapacity || capacity > 1 << 28 ||
      (capacity & (capacity - 1)) != 0) {
    throw py::value_error("capacity: must be a power of two from 64 to 2^28");
  }
  return std::make_shared<OutputStore>(capacity);
}

void bind_automaton(py::module_& module) {
  py::class_<SuffixAutomaton>(module, "SuffixAutomaton", "See suffix_automaton.SuffixAutomaton.")
      .def(py::init([](int max_tokens) {
             if (max_tokens < 2 || max_tokens > 1 << 24) {
               throw py::value_error("max_tokens: must be from 2 to 2^24");
             }
             return SuffixAutomaton(max_tokens);
           }),
           py::arg("max_tokens") = static_cast<int>(SuffixAutomaton::kMaxTokens))
      .def(
          "add",
          [](SuffixAutomaton& automaton, const py::list& token_ids) {
            add_from(automaton, token_ids, 0);
          },
          py::arg("token_ids"))
      .def("match",
           [](const SuffixAutomaton& automaton) {
             const SuffixMatch match = automaton.match();
             const std::int64_t end = match.length > 0 ? automaton.match_end() : -1;
             return py::make_tuple(match.length, end, match.hits, match.misses);
           })
      .def(
          "draft",
          [](const SuffixAutomaton& automaton, int most) {
            std::vector<std::int32_t> ids(std::min(checked_most(most), kMaxDraft));
            ids.resize(automaton.draft(static_cast<int>(ids.size()), ids.data()));
            return to_list(ids);
          },
          py::arg("most"))
      .def_property_readonly("num_bytes", &SuffixAutomaton::bytes);
}

void bind_store(py::module_& module) {
  py::class_<OutputStore, std::shared_ptr<OutputStore>>(module, "OutputStore",
                                                        "See suffix_automaton.OutputStore.")
      .def(py::init(&make_store), py::arg("capacity"))
      .def(
          "add",
          [](OutputStore& store, const py::bytes& salt, const py::list& token_ids,
             std::int64_t start) {
            const std::vector<std::int32_t> ids = ids_from(token_ids, start);
            store.add(digest_of(salt), ids.data(), ids.size());
          },
          py::arg("salt"), py::arg("token_ids"), py::arg("start") = 0)
      .def(
          "find",
          [](const OutputStore& store, const py::bytes& salt, const py::list& token_ids,
             int count) {
            const std::vector<std::int32_t> ids = ids_from(token_ids, 0);
            const auto found = store.find(digest_of(salt), ids.data(), ids.size());
            std::vector<std::int32_t> next(
                found.end < 0 ? 0 : std::min(checked_most(count), kMaxDraft));
            next.resize(store.continuation(found, static_cast<int>(next.size()), next.data()));
            const auto [length, hits, misses] = found.match;
            return py::make_tuple(length, hits, misses, to_list(next));
          },
          py::arg("salt"), py::arg("token_ids"), py::arg("count"))
      .def_property_readonly(
          "num_bytes", [](const OutputStore& store) { return store.bytes(store.capacity()); });
}

}  // namespace

void bind_speculation(py::module_& module) {
  bind_automaton(module);
  bind_store(module);
  py::class_<SuffixRow>(module, "SuffixRow", "See suffix_automaton.SuffixRow.")
      .def(py::init([](std::shared_ptr<OutputStore> store, const py::bytes& salt) {
             return SuffixRow(std::move(store), digest_of(salt));
           }),
           py::arg("store"), py::arg("salt"))
      .def(
          "propose",
          [](SuffixRow& row, const py::list& token_ids, int most) {
            add_from(row.automaton(), token_ids, row.automaton().num_tokens());
            const SuffixDraft draft = row.propose(checked_most(most));
            return py::make_tuple(to_list(draft.ids), draft.level);
          },
          py::arg("token_ids"), py::arg("most"),
          "All tokens of the row, of which the new ones are read -> the ids that may follow, at "
          "most `most`, and their level.")
      .def_property_readonly("num_bytes", [](SuffixRow& row) { return row.automaton().bytes(); });
}

}  // namespace fastgen
