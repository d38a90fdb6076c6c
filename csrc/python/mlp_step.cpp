#include "python/mlp_step.h"

#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/variable.h>

#include <string_view>
#include <variant>
#include <vector>

#include "cpu/mlp_step.h"
#include "ops/tensor_lists.h"
#include "python/optimizer_state.h"
#include "python/sgd.h"

namespace fastnn::python {
namespace {

namespace py = pybind11;

// Reads the optimizer's options and momentum buffers, and makes the buffers of a first step.
class OptimizerState {
 public:
  // If `stores`, gradients are stored and no parameter is stepped.
  OptimizerState(const py::dict& state, bool stores)
      : state_(state), reader_(state), stores_(stores) {
  }

  // The step of a parameter in this group; a frozen one has the group None.
  cpu::StepParam step_of(PyObject* object, py::handle group) {
    cpu::StepParam of{};
    of.param = THPVariable_Unpack(object);
    if (group.is_none()) return of;
    if (stores_) {
      of.grad = at::empty_like(of.param).detach();
      return of;
    }
    of.options = options_of(group);
    if (of.options->momentum == 0) return of;
    const py::object buffer = reader_.find(object, momentum_buffer_key());
    of.options->is_first_step = buffer.is_none();
    if (of.options->is_first_step) {
      of.momentum_buffer = new_momentum_buffer(of.param, has_float32_momentum(group));
      made_.emplace_back(object, of.momentum_buffer);
    } else {
      of.momentum_buffer = THPVariable_Unpack(buffer.ptr());
    }
    return of;
  }

  void save_made() const {
    for (const auto& [param, buffer] : made_) {
      save_state(state_, param, momentum_buffer_key(), buffer);
    }
  }

 private:
  // A group's options, read once for consecutive parameters.
  SGDOptions options_of(py::handle group) {
    if (group.ptr() != group_) {
      options_ = sgd_options(group);
      options_.lr = number_in(group, "lr");
      group_ = group.ptr();
    }
    return options_;
  }

  const py::dict& state_;
  StateReader reader_;
  bool stores_;
  PyObject* group_ = nullptr;
  SGDOptions options_{};
  std::vector<std::pair<PyObject*, at::Tensor>> made_;
};

std::vector<cpu::StepLayer> step_layers(const py::list& params, const py::list& groups,
                                        const std::vector<bool>& relu, OptimizerState& state) {
  std::vector<cpu::StepLayer> layers(relu.size());
  for (size_t i = 0; i < layers.size(); ++i) {
    const size_t weight = 2 * i, bias = 2 * i + 1;
    layers[i].weight = state.step_of(py::handle(params[weight]).ptr(), groups[weight]);
    if (!params[bias].is_none()) {
      layers[i].bias = state.step_of(py::handle(params[bias]).ptr(), groups[bias]);
    }
    layers[i].relu = relu[i];
  }
  return layers;
}

// Whether an ordinary backward would call a hook for this parameter.
bool has_hooks(py::handle object, const at::Tensor& param) {
  namespace autograd = torch::autograd::impl;
  if (!autograd::hooks(param).empty() || autograd::post_acc_grad_hooks(param)) {
    // Removed hooks leave empty dicts behind.
    for (const char* name : {"_backward_hooks", "_post_accumulate_grad_hooks"}) {
      if (py::cast<bool>(py::bool_(object.attr(name)))) return true;
    }
  }
  const auto accumulator = autograd::try_get_grad_accumulator(param);
  return accumulator && !(accumulator->post_hooks().empty() && accumulator->pre_hooks().empty() &&
                          accumulator->tensor_pre_hooks().empty());
}

// Why a parameter can't be stepped in place; empty if it can.
std::string_view why_not_param(py::handle object, const at::Tensor& param,
                               const at::Tensor& first) {
  if (!param.is_cpu() || !can_step(param)) return "a parameter is not a plain CPU tensor";
  if (param.scalar_type() != first.scalar_type()) return "parameters have several dtypes";
  if (!param.is_contiguous()) return "a parameter is not contiguous";
  return has_hooks(object, param) ? "hooks on a parameter" : "";
}

// The same for its momentum buffer.
std::string_view why_not_buffer(const py::object& buffer, const at::Tensor& param) {
  if (buffer.is_none()) return "";
  if (!THPVariable_CheckExact(buffer.ptr())) return "a momentum buffer is not a plain tensor";
  const at::Tensor& tensor = THPVariable_Unpack(buffer.ptr());
  const bool fits = tensor.is_cpu() && can_step_state(param, tensor) && tensor.is_contiguous();
  return fits ? "" : "a momentum buffer doesn't match its parameter";
}

// Maps an optimizer's parameters to their groups.
class Owners {
 public:
  explicit Owners(const py::list& param_groups) {
    for (const py::handle group : param_groups) {
      for (const py::handle param : py::list(group["params"])) {
        owners_.emplace_back(param.ptr(), group.ptr());
      }
    }
  }
  // Parameters usually come in the optimizer's order, so each search resumes where the last ended.
  PyObject* find(PyObject* param) {
    for (size_t tried = 0; tried < owners_.size(); ++tried) {
      const auto& [owned, group] = owners_[next_];
      next_ = next_ + 1 == owners_.size() ? 0 : next_ + 1;
      if (owned == param) return group;
    }
    return nullptr;
  }

 private:
  std::vector<std::pair<PyObject*, PyObject*>> owners_;
  size_t next_ = 0;
};

// Each parameter's group, None if it is frozen or missing; or why the parameters can't be trained.
std::variant<py::list, std::string_view> groups_of(const py::list& params,
                                                   const py::list& param_groups,
                                                   const py::dict& state) {
  StateReader reader(state);
  Owners owners(param_groups);
  py::list groups;
  std::vector<at::Tensor> tensors, buffers;
  for (const py::handle object : params) {
    if (object.is_none()) {
      groups.append(py::none());
      continue;
    }
    const at::Tensor& param = THPVariable_Unpack(object.ptr());
    PyObject* const group = param.requires_grad() ? owners.find(object.ptr()) : Py_None;
    if (group == nullptr) return "a parameter doesn't belong to the optimizer";
    groups.append(py::handle(group));
    tensors.push_back(param);
    const py::object buffer = reader.find(object.ptr(), momentum_buffer_key());
    for (const auto why :
         {why_not_param(object, param, tensors[0]), why_not_buffer(buffer, param)}) {
      if (!why.empty()) return why;
    }
    if (!buffer.is_none()) buffers.push_back(THPVariable_Unpack(buffer.ptr()));
  }
  const TensorLists lists{tensors, {}, {{"momentum_buffers", buffers}}};
  if (any_share_memory(lists)) return "parameters share memory";
  return groups;
}

std::string_view why_not_batch(const at::Tensor& input, const at::Tensor& target,
                               const at::Tensor& param) {
  if (!input.is_cpu() || !can_step(input)) return "the input is not a plain CPU tensor";
  if (input.scalar_type() != param.scalar_type()) return "the input has another dtype";
  if (input.dim() < 2 || input.size(0) == 0) return "the input is not a batch";
  if (input.requires_grad()) return "the input requires a gradient";
  const bool is_plain = target.is_cpu() && target.layout() == at::kStrided && !target.is_nested();
  if (!is_plain || target.is_neg() || target._is_zerotensor()) {
    return "the target is not a plain CPU tensor";
  }
  return target.requires_grad() ? "the target requires a gradient" : "";
}

// The stored gradients, in the order of the parameters; None for those without one.
py::list gradients_of(const std::vector<cpu::StepLayer>& layers) {
  py::list grads;
  const auto add = [&](const at::Tensor& grad) {
    grads.append(grad.defined() ? py::cast(grad) : py::none());
  };
  for (const cpu::StepLayer& layer : layers) {
    add(layer.weight.grad);
    add(layer.bias ? layer.bias->grad : at::Tensor());
  }
  return grads;
}

std::pair<at::Tensor, py::list> run(cpu::MLPStep& step, const at::Tensor& input,
                                    const at::Tensor& target, const py::list& params,
                                    const std::vector<bool>& relu, const py::list& groups,
                                    const py::dict& state, const std::optional<at::Tensor>& weight,
                                    int64_t ignore_index, std::string_view reduction,
                                    double label_smoothing, bool stores, double scale) {
  OptimizerState optimizer(state, stores);
  const auto layers = step_layers(params, groups, relu, optimizer);
  const LossOptions loss{weight, ignore_index, parse_reduction(reduction), label_smoothing};
  const at::Tensor result = [&] {
    py::gil_scoped_release no_gil;
    return step.run(input, target, layers, loss, scale);
  }();
  optimizer.save_made();
  return {result, gradients_of(layers)};
}

}  // namespace

void define_mlp_step(py::module_& m) {
  py::class_<cpu::MLPStep>(m, "MLPStep", "Training steps of a chain of linear layers.")
      .def(py::init<>())
      .def_static("groups_of", &groups_of, py::arg("params"), py::arg("param_groups"),
                  py::arg("state"),
                  "Each parameter's group, None if it is frozen or missing; or a string: why the "
                  "parameters can't be trained.")
      .def_static("why_not_batch", &why_not_batch, py::arg("input"), py::arg("target"),
                  py::arg("param"), "Why the batch can't be trained on; empty if it can.")
      .def("run", &run, py::arg("input"), py::arg("target"), py::kw_only(), py::arg("params"),
           py::arg("relu"), py::arg("groups"), py::arg("state"), py::arg("weight"),
           py::arg("ignore_index"), py::arg("reduction"), py::arg("label_smoothing"),
           py::arg("stores"), py::arg("scale"),
           "Trains on a batch; returns its loss and the gradients. params: each layer's weight and "
           "bias, which may be None; groups: each parameter's group in the optimizer, None if it "
           "is frozen; stores: whether to store the gradients instead of stepping the parameters; "
           "scale: the factor of the gradients.");
}

}  // namespace fastnn::python
