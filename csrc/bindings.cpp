// The only file that knows Python. Tensors come as addresses: the caller keeps them alive for the call.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "forward.h"
#include "kernels.h"
#include "parallel.h"
#include "watch.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

const void* input(Address address) { return reinterpret_cast<const void*>(address); }
void* output(Address address) { return reinterpret_cast<void*>(address); }

pvt::Norm norm(const py::tuple& t) {
  return {input(t[0].cast<Address>()), input(t[1].cast<Address>()), t[2].cast<float>()};
}
pvt::Linear linear(const py::tuple& t) { return {input(t[0].cast<Address>()), input(t[1].cast<Address>())}; }

const pvt::Factories& factories(const std::string& isa, bool bf16) {
  return pvt::factories(isa, bf16 ? pvt::DType::bf16 : pvt::DType::f32);
}

std::unique_ptr<pvt::PatchEmbed> patch_embed(const std::string& isa, bool bf16, const py::tuple& proj,
                                             const py::tuple& norm_weights, std::tuple<int, int, int, int> sizes,
                                             bool channels_last) {
  const auto [in_channels, channels, kernel, stride] = sizes;
  const pvt::PatchEmbedWeights w{linear(proj), norm(norm_weights), in_channels, channels, kernel, stride};
  return factories(isa, bf16).patch_embed(w, channels_last);
}

std::unique_ptr<pvt::ResidualOp> attention(const std::string& isa, bool bf16, const py::dict& w) {
  pvt::AttentionWeights weights{};
  weights.norm = norm(w["norm"]);
  weights.q = linear(w["q"]);
  weights.kv = linear(w["kv"]);
  weights.proj = linear(w["proj"]);
  if (!w["sr"].is_none()) {
    weights.sr = linear(w["sr"]);
    weights.sr_norm = norm(w["sr_norm"]);
  }
  weights.channels = w["channels"].cast<int>();
  weights.heads = w["heads"].cast<int>();
  weights.sr_ratio = w["sr_ratio"].cast<int>();
  weights.linear = w["linear"].cast<bool>();
  weights.scale = w["scale"].cast<float>();
  return factories(isa, bf16).attention(weights);
}

std::unique_ptr<pvt::ResidualOp> mlp(const std::string& isa, bool bf16, const py::dict& w) {
  const pvt::MlpWeights weights{norm(w["norm"]),       linear(w["fc1"]),          linear(w["dwconv"]),
                                linear(w["fc2"]),      w["channels"].cast<int>(), w["hidden"].cast<int>(),
                                w["relu"].cast<bool>()};
  return factories(isa, bf16).mlp(weights);
}

using Size = std::tuple<std::int64_t, std::int64_t, std::int64_t>;                   // batch, height, width
using Strides = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t>;  // of batch, channel, row, column

pvt::Image view(Address image, const Size& size, const Strides& strides) {
  const auto [batch, height, width] = size;
  const auto [stride_batch, stride_channel, stride_row, stride_column] = strides;
  return {input(image), batch, height, width, stride_batch, stride_channel, stride_row, stride_column};
}

// Facts about Python objects: their types, all names of their attributes, and the values of some; the same of dicts. A
// forward leaves nothing of these objects in the inner caches, so all are asked for before the first is looked at. The
// caller keeps them alive: references from here would be part of cycles that Python's collector cannot see.
class Facts {
 public:
  using Items = std::vector<std::pair<py::handle, py::handle>>;  // names and values in order; Ellipsis: any value
  using Object = std::tuple<py::handle, py::handle, Items>;      // None: the one that `hold` is given; type; attributes
  using Dict = std::pair<py::handle, Items>;

  Facts(std::vector<Object> objects, std::vector<Dict> dicts, std::vector<Address> soon)
      : objects_(std::move(objects)), dicts_(std::move(dicts)), soon_(std::move(soon)) {}

  bool hold(py::handle given) const {
    for (const Address address : soon_) __builtin_prefetch(input(address));
    for (const auto& [object, type, items] : objects_) prefetch(object.ptr(), items);
    for (const auto& [dict, items] : dicts_) prefetch(dict.ptr(), items);
    std::vector<PyObject*> attributes;
    attributes.reserve(objects_.size());
    for (const auto& [known, type, items] : objects_) {
      PyObject* object = known.is_none() ? given.ptr() : known.ptr();
      if (reinterpret_cast<const PyObject*>(Py_TYPE(object)) != type.ptr()) return false;
      const auto dict = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(object, nullptr));
      if (!dict) throw py::error_already_set();
      attributes.push_back(dict.ptr());  // it belongs to its object
      __builtin_prefetch(dict.ptr());
    }
    for (PyObject* dict : attributes) prefetch_values(dict);
    for (std::size_t i = 0; i < objects_.size(); ++i)
      if (!holds(attributes[i], std::get<Items>(objects_[i]))) return false;
    for (const auto& [dict, items] : dicts_)
      if (!holds(dict.ptr(), items)) return false;
    return true;
  }

 private:
  static void prefetch(const PyObject* object, const Items& items) {
    __builtin_prefetch(object);
    const char* first = reinterpret_cast<const char*>(items.data());
    for (std::size_t at = 0; at < items.size() * sizeof(Items::value_type); at += 64) __builtin_prefetch(first + at);
  }

  static void prefetch_values(PyObject* object) {
    const auto* dict = reinterpret_cast<const PyDictObject*>(object);
    const char* keys = reinterpret_cast<const char*>(dict->ma_keys);
    const char* values = reinterpret_cast<const char*>(dict->ma_values);
    for (int line = 0; line < 4; ++line) {
      __builtin_prefetch(keys + 64 * line);
      if (values != nullptr) __builtin_prefetch(values + 64 * line);
    }
  }

  static bool holds(PyObject* dict, const Items& items) {
    if (PyDict_Size(dict) != static_cast<Py_ssize_t>(items.size())) return false;
    Py_ssize_t position = 0;
    PyObject *name = nullptr, *value = nullptr;
    for (const auto& [known_name, known] : items) {
      if (!PyDict_Next(dict, &position, &name, &value) || name != known_name.ptr()) return false;
      if (known.ptr() != Py_Ellipsis && known.ptr() != value) return false;
    }
    return true;
  }

  std::vector<Object> objects_;
  std::vector<Dict> dicts_;
  std::vector<Address> soon_;
};

std::unique_ptr<pvt::Watch> watch(const std::vector<std::pair<Address, std::size_t>>& regions) {
  std::vector<pvt::Watch::Region> all;
  for (const auto& [address, bytes] : regions) {
    if (address == 0 && bytes != 0) throw std::invalid_argument("Watch: regions must have addresses, got a null one");
    all.push_back({static_cast<const unsigned char*>(input(address)), bytes});
  }
  return std::make_unique<pvt::Watch>(all);
}

// Memory that another object describes: refused before it is read where that cannot be so.
void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Packed ops of the cpp backend; see pvt_fast.cpp.";
  m.def("built_isas", &pvt::built_isas, "Instruction sets built in, best first.");
  m.def("runnable_isas", &pvt::runnable_isas, "Those that this CPU runs, best first.");
  m.def("threads", &pvt::max_threads, "Threads that the next op uses.");

  py::class_<pvt::PatchEmbed>(m, "PatchEmbed")
      .def(py::init(&patch_embed))
      .def("run", [](const pvt::PatchEmbed& op, Address image, const Size& size, const Strides& strides, Address out) {
        const pvt::Image from = view(image, size, strides);
        require(op.accepts(from), "PatchEmbed: image strides must fit the packed layout");
        require(from.batch == 0 || (image != 0 && out != 0), "PatchEmbed: image and out must have addresses");
        py::gil_scoped_release release;
        op.run(from, output(out));
      });
  py::class_<pvt::ResidualOp>(m, "ResidualOp")
      .def("run", [](const pvt::ResidualOp& op, Address x, std::int64_t batch, int height, int width,
                     Address residual_scale, Address out) {
        require(std::min(height, width) >= op.least_side(), "ResidualOp: map must be at least sr_ratio each way");
        require(batch == 0 || (x != 0 && out != 0), "ResidualOp: x and out must have addresses");
        py::gil_scoped_release release;
        op.run(input(x), {batch, height, width}, input(residual_scale), output(out));
      });
  m.def("attention", &attention);
  m.def("mlp", &mlp);
  py::class_<pvt::LayerNorm>(m, "LayerNorm")
      .def(py::init([](const std::string& isa, bool bf16, const py::tuple& weights, int channels) {
        return factories(isa, bf16).layer_norm(norm(weights), channels);
      }))
      .def("run", [](const pvt::LayerNorm& op, Address x, std::int64_t rows, Address out) {
        py::gil_scoped_release release;
        op.run(input(x), rows, output(out));
      });
  py::class_<pvt::Head>(m, "Head")
      .def(py::init([](const std::string& isa, bool bf16, const py::tuple& classifier, int channels, int classes) {
        return factories(isa, bf16).head(linear(classifier), channels, classes);
      }))
      .def("run", [](const pvt::Head& op, Address x, std::int64_t batch, std::int64_t tokens, Address out) {
        py::gil_scoped_release release;
        op.run(input(x), batch, tokens, output(out));
      });
  py::class_<Facts>(m, "Facts")
      .def(py::init<std::vector<Facts::Object>, std::vector<Facts::Dict>, std::vector<Address>>(), py::arg("objects"),
           py::arg("dicts"), py::arg("soon"))
      .def("hold", &Facts::hold, py::arg("given") = py::none(),
           "Is every (object, type, attributes) so, and every (dict, items)? Items are compared in their order.");
  py::class_<pvt::Watch>(m, "Watch")
      .def(py::init(&watch))
      .def_property_readonly_static("PARTS", [](const py::object&) { return pvt::Watch::kParts; })
      .def("next", &pvt::Watch::next, py::call_guard<py::gil_scoped_release>())
      .def("first_changed", &pvt::Watch::first_changed, py::call_guard<py::gil_scoped_release>());
  // its ops are the caller's to keep alive
  py::class_<pvt::Forward>(m, "Forward")
      .def(py::init(
          [](const std::vector<pvt::Op>& ops, bool bf16) { return std::make_unique<pvt::Forward>(ops, bf16 ? 2 : 4); }))
      .def_property_readonly("in_channels", &pvt::Forward::in_channels)
      .def_property_readonly("classes", &pvt::Forward::classes)
      .def("run", [](const pvt::Forward& op, Address image, const Size& size, const Strides& strides, Address out) {
        const pvt::Image from = view(image, size, strides);
        require(from.batch == 0 || (image != 0 && out != 0), "Forward: image and out must have addresses");
        py::gil_scoped_release release;
        op.run(from, output(out));
      });
}
