// A decoder's shape as Python gives it.

#pragma once

#include <pybind11/pybind11.h>

#include "decoder/cpu_decoder.h"

namespace fastgen {

// Of the dictionary that fastgen/decoders/cpu/plan.py makes. Raises ValueError, TypeError or
// KeyError for what is missing or wrong.
DecoderShape shape_of(const pybind11::dict& given);

}  // namespace fastgen
