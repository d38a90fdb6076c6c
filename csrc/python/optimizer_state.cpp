#include "python/optimizer_state.h"

#include <torch/csrc/autograd/python_variable.h>

namespace fastnn::python {

namespace py = pybind11;

StateReader::StateReader(const py::dict& state) : state_(state.ptr()) {
  advance();
}

py::object StateReader::find(PyObject* param, py::handle key) {
  PyObject* entry = find_entry(param);
  if (entry == nullptr) return py::none();
  if (!PyDict_CheckExact(entry)) return py::handle(entry).attr("get")(key);
  PyObject* value = PyDict_GetItemWithError(entry, key.ptr());
  if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
  return value == nullptr ? py::none() : py::reinterpret_borrow<py::object>(value);
}

PyObject* StateReader::find_entry(PyObject* param) {
  if (param != key_) {
    PyObject* entry = PyDict_GetItemWithError(state_, param);
    if (entry == nullptr && PyErr_Occurred()) throw py::error_already_set();
    if (entry == nullptr) return nullptr;
    // The entry belongs to another group, or the order differs: continue from here.
    while (key_ != nullptr && key_ != param) advance();
    if (key_ == nullptr) return entry;
  }
  PyObject* entry = entry_;
  advance();
  return entry;
}

void StateReader::advance() {
  if (PyDict_Next(state_, &position_, &key_, &entry_) == 0) key_ = nullptr;
}

void save_state(const py::dict& state, PyObject* param, py::handle key, const at::Tensor& tensor) {
  // Not PyDict_GetItem: the state is a defaultdict, which creates a missing entry.
  const auto entry = py::reinterpret_steal<py::object>(PyObject_GetItem(state.ptr(), param));
  if (!entry) throw py::error_already_set();
  const auto value = py::reinterpret_steal<py::object>(THPVariable_Wrap(tensor));
  if (PyObject_SetItem(entry.ptr(), key.ptr(), value.ptr()) != 0) throw py::error_already_set();
}

double number_in(py::handle group, const char* key) {
  const py::object value = group[key];
  const double number = PyFloat_AsDouble(value.ptr());
  if (number == -1 && PyErr_Occurred()) throw py::error_already_set();
  return number;
}

bool truth_in(py::handle group, const char* key) {
  const py::object value = group[key];
  const int truth = PyObject_IsTrue(value.ptr());
  if (truth < 0) throw py::error_already_set();
  return truth == 1;
}

bool has_gradient(py::handle param) {
  if (THPVariable_Check(param.ptr())) return THPVariable_Unpack(param.ptr()).grad().defined();
  return !param.attr("grad").is_none();
}

void clear_gradients(const py::list& params) {
  for (const py::handle param : params) {
    if (THPVariable_CheckExact(param.ptr())) {
      THPVariable_Unpack(param.ptr()).mutable_grad().reset();
    } else if (!param.attr("grad").is_none()) {
      py::setattr(param, "grad", py::none());
    }
  }
}

}  // namespace fastnn::python
