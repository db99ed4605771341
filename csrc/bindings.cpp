// The only file, with attributes.h, that knows Python. Tensors come as spans of memory: the caller keeps them alive for
// the call, and has checked them. This is the second wall: nothing is read of a span before it is known to hold what
// the op will read.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "attributes.h"
#include "runtime/forward.h"
#include "kernels.h"
#include "runtime/memory.h"
#include "runtime/parallel.h"
#include "runtime/watch.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;
using Span = std::pair<Address, std::size_t>;  // where a tensor begins, and the bytes from there to its memory's end

void require(bool holds, const std::string& what) {
  if (!holds) throw std::invalid_argument(what);
}

// The product of sizes; std::invalid_argument where one is negative or the product does not fit.
std::int64_t elements(std::initializer_list<std::int64_t> sizes) {
  std::int64_t product = 1;
  for (const std::int64_t size : sizes)
    require(size >= 0 && !__builtin_mul_overflow(product, size, &product), "sizes must be those of a tensor");
  return product;
}

void* memory(const Span& span, std::int64_t bytes, const char* what) {
  require(std::uint64_t(bytes) <= span.second && (bytes == 0 || span.first != 0),
          std::string(what) + " must have " + std::to_string(bytes) + " bytes of memory, got " +
              std::to_string(span.first ? span.second : 0));
  return reinterpret_cast<void*>(span.first);
}

void* memory(const Span& span, std::int64_t count, pvt::DType dtype, const char* what) {
  return memory(span, elements({count, std::int64_t(pvt::element_size(dtype))}), what);
}

// Reads weights: matrices of one element type, norms and biases of floats.
class Weights {
 public:
  explicit Weights(pvt::DType dtype) : dtype_(dtype) {}

  const pvt::Factories& factories(const std::string& isa) const { return pvt::factories(isa, dtype_); }
  pvt::DType dtype() const { return dtype_; }

  pvt::Norm norm(const py::tuple& t, std::int64_t channels) const {
    return {floats(t[0].cast<Span>(), channels, "norm weight"), floats(t[1].cast<Span>(), channels, "norm bias"),
            t[2].cast<float>()};
  }
  pvt::Linear linear(const py::tuple& t, std::int64_t out, std::int64_t in) const {
    const auto bias = t[1].cast<std::optional<Span>>();
    return {memory(t[0].cast<Span>(), elements({out, in}), dtype_, "weight"),
            bias ? floats(*bias, out, "bias") : nullptr};
  }

 private:
  static const float* floats(const Span& span, std::int64_t count, const char* what) {
    return static_cast<const float*>(memory(span, count, pvt::DType::f32, what));
  }

  pvt::DType dtype_;
};

// An op and the element type of its activations.
template <class Op>
struct Packed {
  std::shared_ptr<const Op> op;
  pvt::DType dtype;

  Packed(std::unique_ptr<Op> made, const Weights& from) : op(std::move(made)), dtype(from.dtype()) {}
};

void require_positive(std::initializer_list<int> sizes) {
  for (const int size : sizes) require(size >= 1, "sizes must be at least 1");
}

pvt::PatchEmbedWeights patch_embed_weights(const Weights& from, const py::tuple& proj, const py::tuple& norm,
                                           std::tuple<int, int, int, int> sizes) {
  const auto [in_channels, channels, kernel, stride] = sizes;
  require_positive({in_channels, channels, kernel, stride});
  return {from.linear(proj, channels, elements({in_channels, kernel, kernel})),
          from.norm(norm, channels),
          in_channels,
          channels,
          kernel,
          stride};
}

Packed<pvt::PatchEmbed> patch_embed(const std::string& isa, pvt::DType dtype, const py::tuple& proj,
                                    const py::tuple& norm, std::tuple<int, int, int, int> sizes, bool channels_last) {
  const Weights from(dtype);
  return {from.factories(isa).patch_embed(patch_embed_weights(from, proj, norm, sizes), channels_last), from};
}

Packed<pvt::PatchEmbedGradients> patch_embed_gradients(const std::string& isa, pvt::DType dtype, const py::tuple& proj,
                                                       const py::tuple& norm, std::tuple<int, int, int, int> sizes,
                                                       bool channels_last) {
  const Weights from(dtype);
  return {from.factories(isa).patch_embed_gradients(patch_embed_weights(from, proj, norm, sizes), channels_last), from};
}

pvt::AttentionWeights attention_weights(const Weights& from, const py::dict& w) {
  pvt::AttentionWeights weights{};
  const int channels = weights.channels = w["channels"].cast<int>();
  weights.heads = w["heads"].cast<int>();
  weights.sr_ratio = w["sr_ratio"].cast<int>();
  weights.linear = w["linear"].cast<bool>();
  weights.scale = w["scale"].cast<float>();
  require_positive({channels, weights.heads, weights.sr_ratio});
  require(channels % weights.heads == 0, "channels must be divisible by heads");
  require(!w["sr"].is_none() || (weights.sr_ratio == 1 && !weights.linear), "sr must be there to reduce the map");
  require(!weights.linear || weights.sr_ratio == 1, "sr must be 1x1 in the linear form");
  weights.norm = from.norm(w["norm"], channels);
  weights.q = from.linear(w["q"], channels, channels);
  weights.kv = from.linear(w["kv"], 2 * std::int64_t{channels}, channels);
  weights.proj = from.linear(w["proj"], channels, channels);
  if (!w["sr"].is_none()) {
    weights.sr = from.linear(w["sr"], channels, elements({channels, weights.sr_ratio, weights.sr_ratio}));
    weights.sr_norm = from.norm(w["sr_norm"], channels);
  }
  return weights;
}

Packed<pvt::ResidualOp> attention(const std::string& isa, pvt::DType dtype, const py::dict& w) {
  const Weights from(dtype);
  return {from.factories(isa).attention(attention_weights(from, w)), from};
}

Packed<pvt::ResidualGradients> attention_gradients(const std::string& isa, pvt::DType dtype, const py::dict& w) {
  const Weights from(dtype);
  return {from.factories(isa).attention_gradients(attention_weights(from, w)), from};
}

pvt::MlpWeights mlp_weights(const Weights& from, const py::dict& w) {
  const int channels = w["channels"].cast<int>(), hidden = w["hidden"].cast<int>();
  require_positive({channels, hidden});
  return {from.norm(w["norm"], channels),
          from.linear(w["fc1"], hidden, channels),
          from.linear(w["dwconv"], hidden, 9),
          from.linear(w["fc2"], channels, hidden),
          channels,
          hidden,
          w["relu"].cast<bool>()};
}

Packed<pvt::ResidualOp> mlp(const std::string& isa, pvt::DType dtype, const py::dict& w) {
  const Weights from(dtype);
  return {from.factories(isa).mlp(mlp_weights(from, w)), from};
}

Packed<pvt::ResidualGradients> mlp_gradients(const std::string& isa, pvt::DType dtype, const py::dict& w) {
  const Weights from(dtype);
  return {from.factories(isa).mlp_gradients(mlp_weights(from, w)), from};
}

Packed<pvt::LayerNorm> layer_norm(const std::string& isa, pvt::DType dtype, const py::tuple& norm, int channels) {
  require_positive({channels});
  const Weights from(dtype);
  return {from.factories(isa).layer_norm(from.norm(norm, channels), channels), from};
}

Packed<pvt::Head> head(const std::string& isa, pvt::DType dtype, const std::optional<py::tuple>& classifier,
                       int channels, int classes) {
  require_positive({channels, classes});
  const Weights from(dtype);
  const pvt::Linear linear = classifier ? from.linear(*classifier, classes, channels) : pvt::Linear{};
  return {from.factories(isa).head(linear, channels, classes), from};
}

Packed<pvt::LayerNormGradients> layer_norm_gradients(const std::string& isa, pvt::DType dtype, const py::tuple& norm,
                                                     int channels) {
  require_positive({channels});
  const Weights from(dtype);
  return {from.factories(isa).layer_norm_gradients(from.norm(norm, channels), channels), from};
}

Packed<pvt::HeadGradients> head_gradients(const std::string& isa, pvt::DType dtype,
                                          const std::optional<py::tuple>& classifier, int channels, int classes) {
  require_positive({channels, classes});
  const Weights from(dtype);
  const pvt::Linear linear = classifier ? from.linear(*classifier, classes, channels) : pvt::Linear{};
  return {from.factories(isa).head_gradients(linear, channels, classes), from};
}

// While an op runs: other Python threads may, too; and what a huge image needed is given back.
struct Running {
  py::gil_scoped_release release;
  ~Running() { pvt::trim_scratch(); }
};

using Size = std::tuple<std::int64_t, std::int64_t, std::int64_t>;                   // batch, height, width
using Strides = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t>;  // of batch, channel, row, column

pvt::Image view(const char* op, const Span& image, const Size& size, const Strides& strides, std::int64_t channels,
                pvt::DType dtype) {
  const auto [batch, height, width] = size;
  const auto [stride_batch, stride_channel, stride_row, stride_column] = strides;
  require(std::min(height, width) >= 1 && std::max(height, width) <= pvt::kMaxSide,
          std::string(op) + ": image must have sides of 1 to 2^20 pixels");
  std::int64_t needed = elements({batch, 1});
  if (batch > 0)
    needed = 1 + elements({batch - 1, stride_batch}) + elements({channels - 1, stride_channel}) +
             elements({height - 1, stride_row}) + elements({width - 1, stride_column});
  return {memory(image, needed, dtype, (std::string(op) + ": image").c_str()),
          batch,
          height,
          width,
          stride_batch,
          stride_channel,
          stride_row,
          stride_column};
}

// The image, and what the tokens that come of it take.
template <class Op>
std::pair<pvt::Image, std::int64_t> embedded(const Packed<Op>& packed, const Span& image, const Size& size,
                                             const Strides& strides) {
  const Op& op = *packed.op;
  const pvt::Image from = view("PatchEmbed", image, size, strides, op.in_channels(), packed.dtype);
  require(op.accepts(from), "PatchEmbed: image strides must fit the packed layout");
  const pvt::Map map = op.map(from);
  require(pvt::fits(map, op.channels()), "PatchEmbed: map must have fewer than 2^31 elements");
  return {from, elements({map.batch, map.height, map.width, op.channels()})};
}

void run_patch_embed(const Packed<pvt::PatchEmbed>& packed, const Span& image, const Size& size, const Strides& strides,
                     const Span& out) {
  const auto [from, count] = embedded(packed, image, size, strides);
  void* to = memory(out, count, packed.dtype, "out");
  const Running running;
  packed.op->run(from, to);
}

void run_residual(const Packed<pvt::ResidualOp>& packed, const Span& x, std::int64_t batch, int height, int width,
                  const std::optional<Span>& residual_scale, const Span& out) {
  const pvt::ResidualOp& op = *packed.op;
  require(std::min(height, width) >= op.min_side(), "ResidualOp: map must be at least sr_ratio each way");
  require(pvt::fits({batch, height, width}, op.channels()), "ResidualOp: map must have fewer than 2^31 elements");
  const std::int64_t count = elements({batch, height, width, op.channels()});
  const void* from = memory(x, count, packed.dtype, "x");
  void* to = memory(out, count, packed.dtype, "out");
  const void* scale = residual_scale ? memory(*residual_scale, batch, packed.dtype, "residual_scale") : nullptr;
  const Running running;
  pvt::with_team([&] { op.run(from, {batch, height, width}, scale, to); });
}

// Where gradients go, in the order of the op's sizes; null for those that are not wanted.
std::vector<float*> gradients(const std::vector<std::size_t>& sizes, const std::vector<std::optional<Span>>& to) {
  require(to.size() == sizes.size(),
          "gradients must be " + std::to_string(sizes.size()) + ", got " + std::to_string(to.size()));
  std::vector<float*> addresses;
  for (std::size_t i = 0; i < sizes.size(); ++i)
    addresses.push_back(to[i] ? static_cast<float*>(memory(*to[i], std::int64_t(sizes[i]), pvt::DType::f32, "gradient"))
                              : nullptr);
  return addresses;
}

void run_patch_embed_gradients(const Packed<pvt::PatchEmbedGradients>& packed, const Span& image, const Size& size,
                               const Strides& strides, const Span& grad_out, const std::optional<Span>& grad_image,
                               const std::vector<std::optional<Span>>& grads) {
  const pvt::PatchEmbedGradients& op = *packed.op;
  const auto [from, count] = embedded(packed, image, size, strides);
  const void* grad = memory(grad_out, count, packed.dtype, "grad_out");
  const std::int64_t pixels = elements({from.batch, from.height, from.width, op.in_channels()});
  void* to = grad_image ? memory(*grad_image, pixels, packed.dtype, "grad_image") : nullptr;
  const std::vector<float*> addresses = gradients(op.sizes(), grads);
  const Running running;
  pvt::with_team([&, from = from] { op.run(from, grad, to, addresses.data()); });
}

void run_layer_norm_gradients(const Packed<pvt::LayerNormGradients>& packed, const Span& x, std::int64_t rows,
                              const Span& grad_out, const std::optional<Span>& grad_x,
                              const std::vector<std::optional<Span>>& grads) {
  require(rows < pvt::kMaxElements, "LayerNormGradients: x must have fewer than 2^31 rows");
  const std::int64_t count = elements({rows, packed.op->channels()});
  const void* from = memory(x, count, packed.dtype, "x");
  const void* grad = memory(grad_out, count, packed.dtype, "grad_out");
  void* to = grad_x ? memory(*grad_x, count, packed.dtype, "grad_x") : nullptr;
  const std::vector<float*> addresses = gradients(packed.op->sizes(), grads);
  const Running running;
  packed.op->run(from, rows, grad, to, addresses.data());
}

void run_head_gradients(const Packed<pvt::HeadGradients>& packed, const Span& x, std::int64_t batch,
                        std::int64_t tokens, const Span& grad_out, const std::optional<Span>& grad_x,
                        const std::vector<std::optional<Span>>& grads) {
  const pvt::HeadGradients& op = *packed.op;
  require(batch < pvt::kMaxElements / std::max(op.channels(), op.classes()), "HeadGradients: batch must be smaller");
  const std::int64_t count = elements({batch, tokens, op.channels()});
  const void* from = memory(x, count, packed.dtype, "x");
  const void* grad = memory(grad_out, elements({batch, op.classes()}), packed.dtype, "grad_out");
  void* to = grad_x ? memory(*grad_x, count, packed.dtype, "grad_x") : nullptr;
  const std::vector<float*> addresses = gradients(op.sizes(), grads);
  const Running running;
  pvt::with_team([&] { op.run(from, batch, tokens, grad, to, addresses.data()); });
}

void run_residual_gradients(const Packed<pvt::ResidualGradients>& packed, const Span& x, std::int64_t batch, int height,
                            int width, const std::optional<Span>& residual_scale, const Span& grad_out,
                            const std::optional<Span>& grad_x, const std::vector<std::optional<Span>>& grads) {
  const pvt::ResidualGradients& op = *packed.op;
  require(std::min(height, width) >= op.min_side(), "ResidualGradients: map must be at least sr_ratio each way");
  require(pvt::fits({batch, height, width}, op.channels()),
          "ResidualGradients: map must have fewer than 2^31 elements");
  const std::int64_t count = elements({batch, height, width, op.channels()});
  const void* from = memory(x, count, packed.dtype, "x");
  const void* grad = memory(grad_out, count, packed.dtype, "grad_out");
  void* to = grad_x ? memory(*grad_x, count, packed.dtype, "grad_x") : nullptr;
  const void* scale = residual_scale ? memory(*residual_scale, batch, packed.dtype, "residual_scale") : nullptr;
  const std::vector<float*> addresses = gradients(op.sizes(), grads);
  const Running running;
  pvt::with_team([&] { op.run(from, {batch, height, width}, scale, grad, to, addresses.data()); });
}

void run_layer_norm(const Packed<pvt::LayerNorm>& packed, const Span& x, std::int64_t rows, const Span& out) {
  require(rows < pvt::kMaxElements, "LayerNorm: x must have fewer than 2^31 rows");
  const std::int64_t count = elements({rows, packed.op->channels()});
  const void* from = memory(x, count, packed.dtype, "x");
  void* to = memory(out, count, packed.dtype, "out");
  const Running running;
  packed.op->run(from, rows, to);
}

void run_head(const Packed<pvt::Head>& packed, const Span& x, std::int64_t batch, std::int64_t tokens,
              const Span& out) {
  const void* from = memory(x, elements({batch, tokens, packed.op->channels()}), packed.dtype, "x");
  void* to = memory(out, elements({batch, packed.op->classes()}), packed.dtype, "out");
  const Running running;
  packed.op->run(from, batch, tokens, to);
}

// A model's ops, held for as long as it is.
class Forward {
 public:
  explicit Forward(const py::iterable& ops) {
    std::vector<pvt::Op> all;
    for (const py::handle op : ops) all.push_back(add(op));
    forward_ = std::make_unique<pvt::Forward>(all, dtype_ ? pvt::element_size(*dtype_) : 0);
  }
  int in_channels() const { return forward_->in_channels(); }
  int classes() const { return forward_->classes(); }

  void run(const Span& image, const Size& size, const Strides& strides, const Span& out) const {
    const pvt::Image from = view("Forward", image, size, strides, in_channels(), *dtype_);
    void* to = memory(out, elements({from.batch, classes()}), *dtype_, "out");
    const Running running;
    forward_->run(from, to);
  }

 private:
  pvt::Op add(const py::handle op) {
    if (py::isinstance<Packed<pvt::PatchEmbed>>(op)) return hold(op.cast<Packed<pvt::PatchEmbed>>());
    if (py::isinstance<Packed<pvt::ResidualOp>>(op)) return hold(op.cast<Packed<pvt::ResidualOp>>());
    if (py::isinstance<Packed<pvt::LayerNorm>>(op)) return hold(op.cast<Packed<pvt::LayerNorm>>());
    return hold(op.cast<Packed<pvt::Head>>());
  }

  template <class Op>
  const Op* hold(const Packed<Op>& packed) {
    require(!dtype_ || *dtype_ == packed.dtype, "Forward: ops must be of one element type");
    dtype_ = packed.dtype;
    held_.push_back(packed.op);
    return packed.op.get();
  }

  std::vector<std::shared_ptr<const void>> held_;
  std::optional<pvt::DType> dtype_;
  std::unique_ptr<pvt::Forward> forward_;
};

std::unique_ptr<pvt::Watch> watch(const std::vector<Span>& regions) {
  std::vector<pvt::Watch::Region> all;
  for (const Span& region : regions)
    all.push_back({static_cast<const unsigned char*>(memory(region, elements({std::int64_t(region.second)}), "region")),
                   region.second});
  return std::make_unique<pvt::Watch>(all);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Packed ops of the cpp backend; see pvt_fast.cpp.";
  m.def("built_isas", &pvt::built_isas, "Instruction sets built in, best first.");
  m.def("runnable_isas", &pvt::runnable_isas, "Those that this CPU runs, best first.");
  m.def("threads", &pvt::max_threads, "Threads that the next op uses.");

  py::enum_<pvt::DType>(m, "DType")
      .value("f32", pvt::DType::f32)
      .value("bf16", pvt::DType::bf16)
      .value("mixed", pvt::DType::mixed);
  py::class_<Packed<pvt::PatchEmbed>>(m, "PatchEmbed").def(py::init(&patch_embed)).def("run", &run_patch_embed);
  py::class_<Packed<pvt::ResidualOp>>(m, "ResidualOp").def("run", &run_residual);
  py::class_<Packed<pvt::LayerNorm>>(m, "LayerNorm").def(py::init(&layer_norm)).def("run", &run_layer_norm);
  py::class_<Packed<pvt::Head>>(m, "Head").def(py::init(&head)).def("run", &run_head);
  m.def("attention", &attention);
  m.def("mlp", &mlp);
  py::class_<Packed<pvt::ResidualGradients>>(m, "ResidualGradients").def("run", &run_residual_gradients);
  py::class_<Packed<pvt::PatchEmbedGradients>>(m, "PatchEmbedGradients")
      .def(py::init(&patch_embed_gradients))
      .def("run", &run_patch_embed_gradients);
  py::class_<Packed<pvt::LayerNormGradients>>(m, "LayerNormGradients")
      .def(py::init(&layer_norm_gradients))
      .def("run", &run_layer_norm_gradients);
  py::class_<Packed<pvt::HeadGradients>>(m, "HeadGradients")
      .def(py::init(&head_gradients))
      .def("run", &run_head_gradients);
  m.def("attention_gradients", &attention_gradients);
  m.def("mlp_gradients", &mlp_gradients);
  using pvt::AttributeSnapshot;
  py::class_<AttributeSnapshot>(m, "AttributeSnapshot")
      .def(py::init<std::vector<AttributeSnapshot::Object>, std::vector<AttributeSnapshot::Dict>,
                    std::vector<std::uintptr_t>>(),
           py::arg("objects"), py::arg("dicts"), py::arg("soon"))
      .def("holds", &AttributeSnapshot::holds, py::arg("owner") = py::none(),
           "Is every (object, type, attributes) so, and every (dict, items)? Items are compared in their order.");
  py::class_<pvt::Watch>(m, "Watch")
      .def(py::init(&watch))
      .def_property_readonly_static("PARTS", [](const py::object&) { return pvt::Watch::kParts; })
      .def("next", &pvt::Watch::next, py::call_guard<py::gil_scoped_release>())
      .def("first_changed", &pvt::Watch::first_changed, py::call_guard<py::gil_scoped_release>());
  py::class_<Forward>(m, "Forward")
      .def(py::init<py::iterable>())
      .def_property_readonly("in_channels", &Forward::in_channels)
      .def_property_readonly("classes", &Forward::classes)
      .def("run", &Forward::run);
}
