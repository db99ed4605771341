// What was seen of Python objects: their types, all names of their attributes, and the values of some; the same of
// dicts. `Guard` of pvt_fast/accelerate/guard.py is the specification, in Python; this gives its answer at each call.
//
// A forward leaves nothing of some 3,000 objects in the inner caches, and one miss after another took 0.25 ms of a b0's
// call. So all are prefetched before the first is compared: 0.07 ms (benchmarks/CPU_NOTES.md). What is prefetched of a
// dict is CPython's own layout; a wrong address would cost time, and no answer.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <cstdint>
#include <tuple>
#include <utility>
#include <vector>

namespace pvt {

// The caller keeps the objects alive: references from here would be part of cycles that Python's collector cannot see.
class AttributeSnapshot {
 public:
  using Items =
      std::vector<std::pair<pybind11::handle, pybind11::handle>>;  // names and values in order; Ellipsis: any value
  using Object = std::tuple<pybind11::handle, pybind11::handle, Items>;  // None: the owner; type; attributes
  using Dict = std::pair<pybind11::handle, Items>;

  AttributeSnapshot(std::vector<Object> objects, std::vector<Dict> dicts, std::vector<std::uintptr_t> soon)
      : objects_(std::move(objects)), dicts_(std::move(dicts)), soon_(std::move(soon)) {}

  bool holds(pybind11::handle owner) const {
    for (const std::uintptr_t address : soon_) __builtin_prefetch(reinterpret_cast<const void*>(address));
    for (const auto& [object, type, items] : objects_) prefetch(object.ptr(), items);
    for (const auto& [dict, items] : dicts_) prefetch(dict.ptr(), items);
    std::vector<PyObject*> attributes;
    attributes.reserve(objects_.size());
    for (const auto& [known, type, items] : objects_) {
      PyObject* object = known.is_none() ? owner.ptr() : known.ptr();
      if (reinterpret_cast<const PyObject*>(Py_TYPE(object)) != type.ptr()) return false;
      const auto dict = pybind11::reinterpret_steal<pybind11::object>(PyObject_GenericGetDict(object, nullptr));
      if (!dict) throw pybind11::error_already_set();
      attributes.push_back(dict.ptr());  // it belongs to its object
      __builtin_prefetch(dict.ptr());
    }
    for (PyObject* dict : attributes) prefetch_values(dict);
    for (std::size_t i = 0; i < objects_.size(); ++i)
      if (!equal(attributes[i], std::get<Items>(objects_[i]))) return false;
    for (const auto& [dict, items] : dicts_)
      if (!equal(dict.ptr(), items)) return false;
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

  static bool equal(PyObject* dict, const Items& items) {
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
  std::vector<std::uintptr_t> soon_;
};

}  // namespace pvt
