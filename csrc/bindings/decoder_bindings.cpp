// Python's view of the CPU decoder: checks types, shapes, ids and blocks, then hands over plain
// pointers.

#include "bindings/decoder_bindings.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings/decoder_shape.h"
#include "bindings/packed_weights.h"
#include "bindings/sampler_bindings.h"
#include "common/cpu_features.h"
#include "common/default_floats.h"
#include "decoder/cpu_decoder.h"

namespace py = pybind11;

namespace fastgen {

namespace {

using Int32s = Array<std::int32_t>;
using Floats = Array<float>;
using Held = std::shared_ptr<CpuDecoder>;  // while it is used, also if it is closed meanwhile

constexpr std::int64_t kLongestRow = std::int64_t{1} << 30;  // tokens: ints hold what is made of it

const DecoderKernels& kernels_for(const DecoderShape& shape) {
  const bool bfloat16 =
      shape.attention == Arithmetic::kBFloat16 || shape.linear == Arithmetic::kBFloat16;
  return decoder_kernels(bfloat16 ? bfloat16_instruction_set() : chosen_instruction_set());
}

py::tuple decoder_bytes(const py::dict& given) {
  const DecoderShape shape = shape_of(given);
  return py::make_tuple(CpuDecoder::weight_bytes(shape),
                        CpuDecoder::scratch_bytes(shape, kernels_for(shape)),
                        CpuDecoder::block_bytes(shape));
}

// A matrix (rows, columns) of float32, float16, or bfloat16 as uint16; `transposed` where its rows
// are the outputs.
Source source_of(const py::array& matrix, int rows, int columns, bool transposed) {
  if (matrix.ndim() != 2 || matrix.shape(0) != rows || matrix.shape(1) != columns ||
      !(matrix.flags() & py::array::c_style)) {
    throw py::value_error("weight: must be (" + std::to_string(rows) + ", " +
                          std::to_string(columns) + "), in C order");
  }
  Source source;
  source.data = matrix.data();
  const char kind = matrix.dtype().kind();
  const auto bytes = matrix.dtype().itemsize();
  if (kind == 'f' && bytes == 4) {
    source.type = Source::Type::kFloat32;
  } else if (kind == 'f' && bytes == 2) {
    source.type = Source::Type::kFloat16;
  } else if (kind == 'u' && bytes == 2) {
    source.type = Source::Type::kBFloat16;
  } else {
    throw py::type_error("weight: must be float32, float16, or bfloat16 as uint16");
  }
  source.input_stride = transposed ? 1 : columns;
  source.column_stride = transposed ? columns : 1;
  return source;
}

const float* floats_of(const Floats& values, py::ssize_t count, const char* name) {
  if (values.size() != count) throw py::value_error(std::string(name) + ": has another size");
  return values.data();
}

// The decoder, and what Python may do wrong with it: calls wait for each other.
class CheckedDecoder {
 public:
  CheckedDecoder(const py::dict& shape, int num_blocks, int num_threads,
                 const std::optional<FilePart>& mapped)
      : CheckedDecoder(shape_of(shape), num_blocks, num_threads, mapped) {}

  CheckedDecoder(const DecoderShape& shape, int num_blocks, int num_threads,
                 const std::optional<FilePart>& mapped)
      : decoder_(std::make_shared<CpuDecoder>(shape, at_least_one("num_blocks", num_blocks),
                                              at_least_one("num_threads", num_threads),
                                              kernels_for(shape), weight_memory(shape, mapped))),
        is_mapped_(mapped.has_value()) {}

  bool pack_projection(int layer, int which, const py::array& weight, const Floats& bias,
                       const py::object& smoothing) {
    const Held decoder = writable();
    check_layer(*decoder, layer, 0);
    if (which < 0 || which >= kNumProjections) throw py::index_error("no such projection");
    PackedLinear& linear = decoder->projection(layer, static_cast<Projection>(which));
    const Source source = source_of(weight, linear.num_inputs, linear.num_columns, false);
    return pack(*decoder, linear, source, floats_of(bias, linear.num_columns, "bias"), smoothing);
  }

  bool pack_head(const py::array& weight, const py::object& smoothing) {
    const Held decoder = writable();
    return pack_columns(*decoder, decoder->head(), weight, smoothing);
  }

  bool set_embedding(const py::array& weight) {
    const Held decoder = writable();
    if (decoder->shape().tied) throw py::value_error("embedding: is the head's");
    return pack_columns(*decoder, decoder->embedding(), weight, py::none());
  }

  void set_norm(int layer, bool second, const Floats& gain, const Floats& bias) {
    const Held decoder = writable();
    check_layer(*decoder, layer, -1);
    const int hidden = decoder->shape().hidden_size;
    decoder->set_norm(layer, second, floats_of(gain, hidden, "gain"),
                      floats_of(bias, hidden, "bias"));
  }

  void set_positions(const Floats& values) {
    const Held decoder = writable();
    const DecoderShape& shape = decoder->shape();
    decoder->set_positions(floats_of(
        values, static_cast<py::ssize_t>(shape.max_positions) * shape.hidden_size, "positions"));
  }

  // Bytes that are only to be read. They keep the decoder's memory.
  py::array_t<std::uint8_t> weights() const {
    const Held decoder = open();
    const std::size_t bytes = CpuDecoder::weight_bytes(decoder->shape());
    py::array_t<std::uint8_t> view(static_cast<py::ssize_t>(bytes),
                                   reinterpret_cast<const std::uint8_t*>(decoder->weights()),
                                   owner_of(decoder));
    view.attr("setflags")(py::arg("write") = false);
    return view;
  }

  std::vector<std::uint64_t> checksums() const {
    const Held decoder = open();
    const py::gil_scoped_release released;
    return weight_checksums(*decoder);
  }

  std::vector<std::uint64_t> read(int file, std::size_t offset) {
    const Held decoder = writable();
    const py::gil_scoped_release released;
    const std::lock_guard<std::mutex> lock(mutex_);
    return read_weights(*decoder, {file, offset});
  }

  // Logits (count, vocab_size): a view, valid until the next call.
  py::array_t<float> forward(const Int32s& token_ids, const Int32s& positions,
                             const Int32s& row_starts, const Int32s& cache_lens,
                             const Int32s& block_tables, const Int32s& logits_at) {
    const Held decoder = open();
    const StepRows rows = checked_rows(*decoder, token_ids, positions, row_starts, cache_lens,
                                       block_tables, logits_at);
    const float* logits;
    {
      const py::gil_scoped_release released;
      const DefaultFloats floats;
      const std::lock_guard<std::mutex> lock(mutex_);
      logits = decoder->forward(rows, logits_at.data(), static_cast<int>(logits_at.size()));
    }
    return view_of(decoder, logits, logits_at.size());
  }

  // forward, then draws at the first len(seats) of `logits_at`; also all logits.
  py::tuple step(const Int32s& token_ids, const Int32s& positions, const Int32s& row_starts,
                 const Int32s& cache_lens, const Int32s& block_tables, const Int32s& logits_at,
                 CheckedSampler& sampler, const Int32s& seats, const Int32s& drafts, int max_top) {
    const Held decoder = open();
    const StepRows rows = checked_rows(*decoder, token_ids, positions, row_starts, cache_lens,
                                       block_tables, logits_at);
    sampler.check_draws(seats, drafts, max_top);
    if (seats.size() > logits_at.size() || sampler.vocab_size() != decoder->shape().vocab_size) {
      throw py::value_error("step: the draws do not fit the logits");
    }
    Draws draws(seats.size(), max_top);
    const float* logits;
    {
      const py::gil_scoped_release released;
      const DefaultFloats floats;
      const std::lock_guard<std::mutex> lock(mutex_);
      logits = decoder->forward(rows, logits_at.data(), static_cast<int>(logits_at.size()));
      sampler.draw_checked(draws.batch(logits, seats.data(), drafts.data()));
    }
    return py::make_tuple(draws.arrays(), view_of(decoder, logits, logits_at.size()));
  }

  void warmup() {
    const Held decoder = open();
    const py::gil_scoped_release released;
    const DefaultFloats floats;
    const std::lock_guard<std::mutex> lock(mutex_);
    decoder->find_ranges();
  }

  void copy_blocks(const Int32s& pairs) {
    const Held decoder = open();
    KvBlocks& blocks = decoder->blocks();
    if (pairs.ndim() != 2 || pairs.shape(1) != 2) throw py::value_error("pairs: must be (n, 2)");
    for (py::ssize_t at = 0; at < pairs.size(); ++at) {
      check_block(*decoder, pairs.data()[at]);
    }
    const py::gil_scoped_release released;
    const std::lock_guard<std::mutex> lock(mutex_);
    blocks.copy(reinterpret_cast<const std::int32_t (*)[2]>(pairs.data()),
                static_cast<int>(pairs.shape(0)), decoder->num_threads());
  }

  void reserve(int num_blocks) {
    const Held decoder = open();
    const std::lock_guard<std::mutex> lock(mutex_);
    decoder->blocks().grow(num_blocks);
  }

  void close() {
    const std::lock_guard<std::mutex> lock(mutex_);
    decoder_.reset();
  }

 private:
  Held open() const {
    if (decoder_ == nullptr) throw std::runtime_error("this decoder has been closed");
    return decoder_;
  }

  // To change its weights.
  Held writable() const {
    if (is_mapped_) throw std::runtime_error("this decoder's weights are a file's");
    return open();
  }

  static void check_layer(const CpuDecoder& decoder, int layer, int least) {
    if (layer < least || layer >= decoder.shape().num_layers) {
      throw py::index_error("no such layer");
    }
  }

  static void check_block(CpuDecoder& decoder, std::int32_t block) {
    if (block < 0 || block >= decoder.blocks().num_blocks()) {
      throw py::index_error("no such block");
    }
  }

  // A matrix whose rows are the columns of `linear`.
  static bool pack_columns(CpuDecoder& decoder, PackedLinear& linear, const py::array& weight,
                           const py::object& smoothing) {
    const Source source = source_of(weight, linear.num_columns, linear.num_inputs, true);
    return pack(decoder, linear, source, nullptr, smoothing);
  }

  static bool pack(CpuDecoder& decoder, PackedLinear& linear, const Source& source,
                   const float* bias, const py::object& smoothing) {
    Floats factors;
    const float* smooth = nullptr;
    if (!smoothing.is_none()) {
      factors = smoothing.cast<Floats>();
      smooth = floats_of(factors, linear.num_inputs, "smoothing");
    }
    const py::gil_scoped_release released;
    const DefaultFloats floats;
    return linear.pack(source, bias, smooth, decoder.num_threads());
  }

  // It keeps the decoder's memory, also after close().
  static py::array_t<float> view_of(const Held& decoder, const float* logits, py::ssize_t count) {
    return py::array_t<float>({count, static_cast<py::ssize_t>(decoder->shape().vocab_size)},
                              logits, owner_of(decoder));
  }

  static py::capsule owner_of(const Held& decoder) {
    return py::capsule(new Held(decoder),
                       [](void* pointer) { delete static_cast<Held*>(pointer); });
  }

  static StepRows checked_rows(CpuDecoder& decoder, const Int32s& token_ids,
                               const Int32s& positions, const Int32s& row_starts,
                               const Int32s& cache_lens, const Int32s& block_tables,
                               const Int32s& logits_at) {
    const DecoderShape& shape = decoder.shape();
    const py::ssize_t tokens = token_ids.size(), rows = cache_lens.size();
    const bool fits = block_tables.ndim() == 2 && block_tables.shape(0) == rows &&
                      positions.size() == tokens && row_starts.size() == rows + 1 && tokens > 0 &&
                      tokens <= shape.max_tokens && logits_at.size() <= shape.max_logits &&
                      row_starts.data()[0] == 0 && row_starts.data()[rows] == tokens;
    if (!fits) throw py::value_error("step: the batch's arrays do not fit together");
    for (py::ssize_t at = 0; at < tokens; ++at) {
      const std::int32_t id = token_ids.data()[at], position = positions.data()[at];
      if (id < 0 || id >= shape.vocab_size || position < 0 || position >= shape.max_positions) {
        throw py::index_error("step: token id or position out of range");
      }
    }
    for (py::ssize_t at = 0; at < logits_at.size(); ++at) {
      if (logits_at.data()[at] < 0 || logits_at.data()[at] >= tokens) {
        throw py::index_error("step: logits_at out of range");
      }
    }
    const int width = static_cast<int>(block_tables.shape(1));
    for (py::ssize_t row = 0; row < rows; ++row) {
      const std::int64_t added = std::int64_t{row_starts.data()[row + 1]} - row_starts.data()[row];
      const std::int64_t length = cache_lens.data()[row] + added;
      if (added < 0 || added > tokens || cache_lens.data()[row] < 0 || length > kLongestRow ||
          (length + kBlockTokens - 1) / kBlockTokens > width) {
        throw py::index_error("step: a row is longer than its block table");
      }
      for (int at = 0; at * kBlockTokens < length; ++at) {
        check_block(decoder, block_tables.data()[row * width + at]);
      }
    }
    return {static_cast<int>(tokens), static_cast<int>(rows), width,
            token_ids.data(),         positions.data(),       row_starts.data(),
            cache_lens.data(),        block_tables.data()};
  }

  Held decoder_;
  bool is_mapped_;
  std::mutex mutex_;
};

}  // namespace

void bind_decoder(py::module_& module) {
  using Decoder = CheckedDecoder;
  py::class_<Decoder>(module, "CpuDecoder", "GPT-2 from token ids to logits and draws, on the CPU.")
      .def(py::init<const py::dict&, int, int, const std::optional<FilePart>&>(), py::arg("shape"),
           py::arg("num_blocks"), py::arg("num_threads"), py::arg("mapped") = py::none(),
           "`mapped`: a descriptor, and the offset at which its file has the weights, packed; they "
           "stay there. OSError if it cannot be mapped.")
      .def("pack_projection", &Decoder::pack_projection, py::arg("layer"), py::arg("which"),
           py::arg("weight").noconvert(), py::arg("bias"), py::arg("smoothing").none(true),
           "weight (in, out), float32, float16, or bfloat16 as uint16; False if it does not fit "
           "float16. `which`: 0 c_attn, 1 attention's c_proj, 2 c_fc, 3 the MLP's c_proj.")
      .def("pack_head", &Decoder::pack_head, py::arg("weight").noconvert(),
           py::arg("smoothing").none(true), "weight (vocab_size, hidden)")
      .def("set_norm", &Decoder::set_norm, py::arg("layer"), py::arg("second"), py::arg("gain"),
           py::arg("bias"), "A layer's first or second layer norm; layer -1 is the last norm.")
      .def("set_positions", &Decoder::set_positions, py::arg("values"))
      .def("set_embedding", &Decoder::set_embedding, py::arg("weight").noconvert())
      .def("weights", &Decoder::weights, "The packed weights, uint8, read-only.")
      .def("weight_checksums", &Decoder::checksums, "Of each of weight_sections(shape).")
      .def("read_weights", &Decoder::read, py::arg("file"), py::arg("offset"),
           "Packed weights from a descriptor's file; the checksums of what was read, none if the "
           "file has fewer bytes. Releases the GIL.")
      .def("forward", &Decoder::forward, py::arg("token_ids").noconvert(),
           py::arg("positions").noconvert(), py::arg("row_starts").noconvert(),
           py::arg("cache_lens").noconvert(), py::arg("block_tables").noconvert(),
           py::arg("logits_at").noconvert())
      .def("step", &Decoder::step, py::arg("token_ids").noconvert(),
           py::arg("positions").noconvert(), py::arg("row_starts").noconvert(),
           py::arg("cache_lens").noconvert(), py::arg("block_tables").noconvert(),
           py::arg("logits_at").noconvert(), py::arg("sampler"), py::arg("seats").noconvert(),
           py::arg("drafts").noconvert(), py::arg("max_top"),
           "forward, and Sampler.draw at the first len(seats) of logits_at: its results, and the "
           "logits of the others. Releases the GIL.")
      .def("warmup", &Decoder::warmup, "What the first step would do once.")
      .def("copy_blocks", &Decoder::copy_blocks, py::arg("pairs").noconvert())
      .def("reserve", &Decoder::reserve, py::arg("num_blocks"))
      .def("close", &Decoder::close);
  module.def("decoder_bytes", &decoder_bytes, py::arg("shape"),
             "Bytes of a CpuDecoder's weights, of its scratch, and of one KV block.");
  module.def("instruction_sets", &instruction_sets,
             "Paths that FASTGEN_ISA can choose here, the best first.");
  module.def("chosen_instruction_set", &chosen_instruction_set, "The one that is taken.");
  module.def("bfloat16_instruction_set", &bfloat16_instruction_set,
             "The one that a decoder takes that has products of bfloat16, be it in attention.");
}

}  // namespace fastgen
