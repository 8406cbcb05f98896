// Python's view of the C++ parts: checks types and shapes, then hands over plain pointers.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>

#include "bindings/checksum_bindings.h"
#include "bindings/decoder_bindings.h"
#include "bindings/packed_weights.h"
#include "bindings/peaks_bindings.h"
#include "bindings/sampler_bindings.h"
#include "bindings/speculation_bindings.h"
#include "common/cpu_features.h"
#include "common/philox.h"

namespace py = pybind11;

namespace {

using Int64s = py::array_t<std::int64_t, py::array::c_style | py::array::forcecast>;

py::array_t<double> uniforms(const Int64s& seeds, const Int64s& positions) {
  if (seeds.ndim() != 1 || positions.ndim() != 1 || seeds.size() != positions.size()) {
    throw py::value_error("uniforms: seeds and positions must be 1-D and equally long");
  }
  py::array_t<double> result(seeds.size());
  const std::int64_t* seed = seeds.data();
  const std::int64_t* position = positions.data();
  double* out = result.mutable_data();
  for (py::ssize_t row = 0; row < seeds.size(); ++row) {
    out[row] = fastgen::uniform(static_cast<std::uint64_t>(seed[row]),
                                static_cast<std::uint64_t>(position[row]));
  }
  return result;
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "C++ parts of fastgen.";
  module.def("uniforms", &uniforms, py::arg("seeds"), py::arg("positions"),
             "The uniform in [0, 1), float64 (R,), of each row: seeds int64 (R,), the bits of an "
             "unsigned seed; positions int64 (R,), the index of the token that is drawn.");
  fastgen::bind_sampler(module);
  fastgen::bind_decoder(module);
  fastgen::bind_packed_weights(module);
  fastgen::bind_peaks(module);
  fastgen::bind_checksums(module);
  fastgen::bind_speculation(module);
  module.def("cpu_features", &fastgen::cpu_features,
             "Instruction sets of this processor that matter here, as Linux names them.");
}
