#include "bindings/decoder_shape.h"

#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "bindings/sampler_bindings.h"

namespace py = pybind11;

namespace fastgen {

namespace {

Activation activation_named(const std::string& name) {
  if (name == "gelu" || name == "gelu_python") return Activation::kGelu;
  if (name == "gelu_new" || name == "gelu_fast" || name == "gelu_pytorch_tanh") {
    return Activation::kGeluTanh;
  }
  if (name == "quick_gelu") return Activation::kQuickGelu;
  if (name == "relu") return Activation::kRelu;
  if (name == "sigmoid") return Activation::kSigmoid;
  if (name == "silu" || name == "swish") return Activation::kSilu;
  if (name == "tanh") return Activation::kTanh;
  throw py::value_error("activation: " + name + " is not known");
}

Arithmetic arithmetic_of(const std::string& dtype, const std::string& weights) {
  if (dtype != "float32" && dtype != "bfloat16") throw py::value_error("dtype: not " + dtype);
  if (weights != "float32" && weights != "float16" && weights != "bfloat16" && weights != "int8") {
    throw py::value_error("weights: not " + weights);
  }
  if (weights == "int8") return Arithmetic::kInt8;
  if (dtype == "bfloat16") return Arithmetic::kBFloat16;
  if (weights == "float16") return Arithmetic::kFloat16Weights;
  return weights == "bfloat16" ? Arithmetic::kBFloat16Weights : Arithmetic::kFloat32;
}

// Of keys and values, and of what they are multiplied with.
Arithmetic attention_of(const std::string& dtype, const std::string& kv_dtype) {
  if (kv_dtype == "int8") return Arithmetic::kInt8WideInputs;
  if (kv_dtype != dtype) throw py::value_error("kv_dtype: not " + kv_dtype);
  return dtype == "bfloat16" ? Arithmetic::kBFloat16 : Arithmetic::kFloat32;
}

int size_of(const py::dict& given, const char* name) {
  return at_least_one(name, given[name].cast<int>());
}

}  // namespace

DecoderShape shape_of(const py::dict& given) {
  DecoderShape shape;
  shape.vocab_size = size_of(given, "vocab_size");
  shape.max_positions = size_of(given, "max_positions");
  shape.hidden_size = size_of(given, "hidden_size");
  shape.num_layers = size_of(given, "num_layers");
  shape.num_heads = size_of(given, "num_heads");
  shape.inner_size = size_of(given, "inner_size");
  shape.activation = activation_named(given["activation"].cast<std::string>());
  shape.epsilon = given["layer_norm_epsilon"].cast<float>();
  shape.attention_scales = given["attention_scales"].cast<std::vector<float>>();
  const auto dtype = given["dtype"].cast<std::string>();
  shape.linear = arithmetic_of(dtype, given["weights"].cast<std::string>());
  shape.attention = attention_of(dtype, given["kv_dtype"].cast<std::string>());
  shape.tied = given["tied"].cast<bool>();
  shape.max_tokens = size_of(given, "max_tokens");
  shape.max_logits = size_of(given, "max_logits");
  if (shape.hidden_size % shape.num_heads != 0 ||
      static_cast<int>(shape.attention_scales.size()) != shape.num_layers) {
    throw py::value_error("num_heads or attention_scales do not fit");
  }
  return shape;
}

}  // namespace fastgen
