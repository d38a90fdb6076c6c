#include "python/sgd.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/python_variable.h>

#include "ops/sgd.h"
#include "python/optimizer_state.h"

namespace fastnn::python {
namespace {

namespace py = pybind11;

// Parameters that one call steps.
struct Batch {
  std::vector<at::Tensor> params;
  std::vector<at::Tensor> grads;
  std::vector<at::Tensor> buffers;
};

// A group's parameters that have a gradient.
struct Batches {
  Batch first;  // those that still need a momentum buffer
  std::vector<PyObject*> first_params;
  Batch later;
  py::list rest;  // those that the operator doesn't support
};

bool takes_buffer(const at::Tensor& param, const py::object& buffer) {
  return buffer.is_none() || (THPVariable_CheckExact(buffer.ptr()) &&
                              can_step_state(param, THPVariable_Unpack(buffer.ptr())));
}

Batches batches_of(const py::list& params, const py::dict& state, bool has_momentum) {
  Batches batches;
  StateReader reader(state);
  for (const py::handle object : params) {
    if (!THPVariable_CheckExact(object.ptr())) {
      if (has_gradient(object)) batches.rest.append(object);
      continue;
    }
    const at::Tensor& param = THPVariable_Unpack(object.ptr());
    const at::Tensor& grad = param.grad();
    if (!grad.defined()) continue;
    const py::object buffer =
        has_momentum ? reader.find(object.ptr(), momentum_buffer_key()) : py::none();
    if (!can_step(param) || !can_step_grad(param, grad) || !takes_buffer(param, buffer)) {
      batches.rest.append(object);
      continue;
    }
    const bool is_first_step = has_momentum && buffer.is_none();
    Batch& batch = is_first_step ? batches.first : batches.later;
    batch.params.push_back(param);
    batch.grads.push_back(grad);
    if (!buffer.is_none()) batch.buffers.push_back(THPVariable_Unpack(buffer.ptr()));
    if (is_first_step) batches.first_params.push_back(object.ptr());
  }
  return batches;
}

void step(const Batch& batch, const SGDOptions& options, const SGDScalars& scalars) {
  if (batch.params.empty()) return;
  py::gil_scoped_release no_gil;
  // The operator has no autograd kernel, and autograd's fallback would box every tensor.
  at::AutoDispatchBelowAutograd below_autograd;
  sgd_step_(sgd_lists(batch.params, batch.grads, batch.buffers, options, scalars), options,
            scalars);
}

}  // namespace

SGDOptions sgd_options(py::handle group) {
  return {.lr = 0,
          .momentum = number_in(group, "momentum"),
          .dampening = number_in(group, "dampening"),
          .weight_decay = number_in(group, "weight_decay"),
          .nesterov = truth_in(group, "nesterov"),
          .maximize = truth_in(group, "maximize"),
          .is_first_step = true};
}

bool has_float32_momentum(py::handle group) {
  return group.contains("float32_momentum") && truth_in(group, "float32_momentum");
}

py::handle momentum_buffer_key() {
  static PyObject* const key = PyUnicode_InternFromString("momentum_buffer");
  return key;
}

at::Tensor new_momentum_buffer(const at::Tensor& param, bool float32) {
  const bool is_float32 = float32 && is_state_dtype(at::kFloat, param);
  return at::empty_like(param, param.options().dtype(is_float32 ? at::kFloat : param.scalar_type()))
      .detach();
}

py::list sgd_step_group(const py::list& params, const py::dict& state, py::handle group,
                        const std::variant<double, at::Tensor>& lr,
                        const std::optional<at::Tensor>& grad_scale,
                        const std::optional<at::Tensor>& found_inf, bool float32_momentum,
                        bool all_or_nothing) {
  SGDOptions options = sgd_options(group);
  SGDScalars scalars{std::nullopt, grad_scale, found_inf};
  if (const double* number = std::get_if<double>(&lr)) {
    options.lr = *number;
  } else {
    scalars.lr = std::get<at::Tensor>(lr);
  }
  Batches batches = batches_of(params, state, options.momentum != 0);
  if (all_or_nothing && !batches.rest.empty()) return batches.rest;

  Batch& first = batches.first;
  for (const at::Tensor& param : first.params) {
    first.buffers.push_back(new_momentum_buffer(param, float32_momentum));
    // found_inf may skip the step and leave the buffer unwritten.
    if (found_inf) first.buffers.back().zero_();
  }
  step(first, options, scalars);
  for (size_t i = 0; i < batches.first_params.size(); ++i) {
    save_state(state, batches.first_params[i], momentum_buffer_key(), first.buffers[i]);
  }
  options.is_first_step = false;
  step(batches.later, options, scalars);
  return batches.rest;
}

}  // namespace fastnn::python
