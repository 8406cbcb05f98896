#pragma once

#include <pybind11/pybind11.h>

namespace fastgen {

void bind_speculation(pybind11::module_& module);

}  // namespace fastgen
