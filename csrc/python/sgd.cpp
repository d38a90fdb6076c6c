#include "python/sgd.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/python_variable.h>

#include "ops/sgd.h"

namespace fastnn::python {
namespace {

namespace py = pybind11;

// Parameters that take the same form of the step.
struct Batch {
  std::vector<at::Tensor> params;
  std::vector<at::Tensor> grads;
  std::vector<at::Tensor> buffers;
};

PyObject* momentum_buffer_key() {
  static PyObject* const key = PyUnicode_InternFromString("momentum_buffer");
  return key;
}

// The optimizer's state, read in the order of its entries. Usually that is the order of the
// parameters, and a pointer's comparison finds each: a tensor's hash is a Python function, which
// costs more than the step of a small parameter.
class StateReader {
 public:
  explicit StateReader(const py::dict& state) : state_(state.ptr()) {
    advance();
  }

  // The parameter's momentum buffer; None where it has none yet.
  py::object find_buffer(PyObject* param) {
    PyObject* entry = find_entry(param);
    if (entry == nullptr) return py::none();
    const py::handle key = momentum_buffer_key();
    if (!PyDict_CheckExact(entry)) return py::handle(entry).attr("get")(key);
    PyObject* buffer = PyDict_GetItemWithError(entry, key.ptr());
    if (buffer == nullptr && PyErr_Occurred()) throw py::error_already_set();
    return buffer == nullptr ? py::none() : py::reinterpret_borrow<py::object>(buffer);
  }

 private:
  PyObject* find_entry(PyObject* param) {
    if (param != key_) {
      PyObject* entry = PyDict_GetItemWithError(state_, param);
      if (entry == nullptr && PyErr_Occurred()) throw py::error_already_set();
      if (entry == nullptr) return nullptr;
      // Of another group's parameters, or in another order: go on from here.
      while (key_ != nullptr && key_ != param) advance();
      if (key_ == nullptr) return entry;
    }
    PyObject* entry = entry_;
    advance();
    return entry;
  }

  void advance() {
    if (PyDict_Next(state_, &position_, &key_, &entry_) == 0) key_ = nullptr;
  }

  PyObject* state_;
  Py_ssize_t position_ = 0;
  PyObject* key_ = nullptr;
  PyObject* entry_ = nullptr;
};

void save_buffer(const py::dict& state, PyObject* param, const at::Tensor& buffer) {
  // Not PyDict_GetItem: the state is a defaultdict, which makes the parameter's entry.
  const auto entry = py::reinterpret_steal<py::object>(PyObject_GetItem(state.ptr(), param));
  if (!entry) throw py::error_already_set();
  const auto value = py::reinterpret_steal<py::object>(THPVariable_Wrap(buffer));
  if (PyObject_SetItem(entry.ptr(), momentum_buffer_key(), value.ptr()) != 0) {
    throw py::error_already_set();
  }
}

bool has_gradient(py::handle param) {
  if (THPVariable_Check(param.ptr())) return THPVariable_Unpack(param.ptr()).grad().defined();
  return !param.attr("grad").is_none();  // whatever it is: for torch's own path, and its errors
}

}  // namespace

py::list sgd_step_group(const py::list& params, const py::dict& state,
                        const std::variant<double, at::Tensor>& lr, double momentum,
                        double dampening, double weight_decay, bool nesterov, bool maximize,
                        bool all_or_nothing, bool float32_momentum,
                        const std::optional<at::Tensor>& grad_scale,
                        const std::optional<at::Tensor>& found_inf) {
  const bool has_momentum = momentum != 0;
  Batch first, later;
  std::vector<PyObject*> first_params;
  py::list rest;
  StateReader state_reader(state);
  for (const py::handle object : params) {
    if (!THPVariable_CheckExact(object.ptr())) {
      if (has_gradient(object)) rest.append(object);
      continue;
    }
    const at::Tensor& param = THPVariable_Unpack(object.ptr());
    const at::Tensor& grad = param.grad();
    if (!grad.defined()) continue;
    const py::object buffer = has_momentum ? state_reader.find_buffer(object.ptr()) : py::none();
    const bool fits =
        sgd_takes(param) && sgd_takes_grad(param, grad) &&
        (buffer.is_none() || (THPVariable_CheckExact(buffer.ptr()) &&
                              sgd_takes_buffer(param, THPVariable_Unpack(buffer.ptr()))));
    if (!fits) {
      rest.append(object);
      continue;
    }
    const bool is_first_step = has_momentum && buffer.is_none();
    Batch& batch = is_first_step ? first : later;
    batch.params.push_back(param);
    batch.grads.push_back(grad);
    if (!buffer.is_none()) batch.buffers.push_back(THPVariable_Unpack(buffer.ptr()));
    if (is_first_step) first_params.push_back(object.ptr());
  }
  if (all_or_nothing && !rest.empty()) return rest;

  for (const at::Tensor& param : first.params) {
    const bool is_float32 = float32_momentum && is_buffer_dtype(at::kFloat, param);
    const auto options = param.options().dtype(is_float32 ? at::kFloat : param.scalar_type());
    first.buffers.push_back(found_inf ? at::zeros_like(param, options)
                                      : at::empty_like(param, options));
  }
  const auto step = [&](const Batch& batch, bool is_first_step) {
    if (batch.params.empty()) return;
    py::gil_scoped_release no_gil;
    // Autograd has no kernel for it, and its fallback would box every tensor.
    at::AutoDispatchBelowAutograd below_autograd;
    std::visit(
        [&](const auto& lr) {
          sgd_step_(batch.params, batch.grads, batch.buffers, lr, momentum, dampening, weight_decay,
                    nesterov, maximize, is_first_step, grad_scale, found_inf);
        },
        lr);
  };
  step(first, /*is_first_step=*/true);
  for (size_t i = 0; i < first_params.size(); ++i) {
    save_buffer(state, first_params[i], first.buffers[i].detach());
  }
  step(later, /*is_first_step=*/false);
  return rest;
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
