#include "python/mlp_step.h"

#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/variable.h>

#include <string>
#include <string_view>
#include <vector>

#include "cpu/mlp_step.h"
#include "ops/tensor_lists.h"
#include "python/optimizer_state.h"
#include "python/sgd.h"

namespace fastnn::python {
namespace {

namespace py = pybind11;

// The parameters as the optimizer steps them, with the momentum buffers that a first step makes.
class OptimizerState {
 public:
  // Where it `stores` gradients, no parameter is stepped.
  OptimizerState(const py::dict& state, bool stores)
      : state_(state), reader_(state), stores_(stores) {
  }

  // A parameter of this group, or of none.
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
  // A group's options, read once for parameters that follow each other.
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

// Whether the backward of an ordinary loop would call anything for this parameter.
bool has_hooks(const at::Tensor& param) {
  const auto accumulator = torch::autograd::impl::try_get_grad_accumulator(param);
  return accumulator && !(accumulator->post_hooks().empty() && accumulator->pre_hooks().empty() &&
                          accumulator->tensor_pre_hooks().empty());
}

// Why a parameter can't be stepped in place; empty where it can.
const char* why_not_param(const at::Tensor& param, const at::Tensor& first) {
  if (!param.is_cpu() || !can_step(param)) return "a parameter is no plain tensor on the CPU";
  if (param.scalar_type() != first.scalar_type()) return "parameters have several dtypes";
  if (!param.is_contiguous()) return "a parameter is not contiguous";
  return has_hooks(param) ? "hooks on a parameter's gradient" : "";
}

// Likewise for what the optimizer remembers of it.
const char* why_not_buffer(const py::object& buffer, const at::Tensor& param) {
  if (buffer.is_none()) return "";
  if (!THPVariable_CheckExact(buffer.ptr())) return "a momentum buffer is no plain tensor";
  const at::Tensor& tensor = THPVariable_Unpack(buffer.ptr());
  const bool fits = can_step_state(param, tensor) && tensor.is_contiguous();
  return fits ? "" : "a momentum buffer is laid out unlike its parameter";
}

std::string why_not(const py::list& params, const py::dict& state) {
  StateReader reader(state);
  std::vector<at::Tensor> tensors, buffers;
  for (const py::handle object : params) {
    if (object.is_none()) continue;
    const at::Tensor& param = THPVariable_Unpack(object.ptr());
    const py::object buffer = reader.find(object.ptr(), momentum_buffer_key());
    tensors.push_back(param);
    for (const std::string_view why :
         {why_not_param(param, tensors[0]), why_not_buffer(buffer, param)}) {
      if (!why.empty()) return std::string(why);
    }
    if (!buffer.is_none()) buffers.push_back(THPVariable_Unpack(buffer.ptr()));
  }
  const TensorLists lists{tensors, {}, {{"momentum_buffers", buffers}}};
  return any_share_memory(lists) ? "parameters share memory" : "";
}

std::string why_not_batch(const at::Tensor& input, const at::Tensor& target,
                          const at::Tensor& param) {
  if (!input.is_cpu() || !can_step(input)) return "the input is no plain tensor on the CPU";
  if (input.scalar_type() != param.scalar_type()) return "the input has another dtype";
  if (input.dim() < 2 || input.size(0) == 0) return "the input is no batch";
  if (input.requires_grad()) return "the input requires a gradient";
  const bool is_plain = target.is_cpu() && target.layout() == at::kStrided && !target.is_nested();
  if (!is_plain || target.is_neg() || target._is_zerotensor()) {
    return "the target is no plain tensor on the CPU";
  }
  return target.requires_grad() ? "the target requires a gradient" : "";
}

// The stored gradients, in the order of the parameters; None where there is none.
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
      .def_static("why_not", &why_not, py::arg("params"), py::arg("state"),
                  "Why such parameters can't be trained on; empty where they can. None is skipped.")
      .def_static("why_not_batch", &why_not_batch, py::arg("input"), py::arg("target"),
                  py::arg("param"), "Why such a batch can't be trained on; empty where it can.")
      .def("run", &run, py::arg("input"), py::arg("target"), py::kw_only(), py::arg("params"),
           py::arg("relu"), py::arg("groups"), py::arg("state"), py::arg("weight"),
           py::arg("ignore_index"), py::arg("reduction"), py::arg("label_smoothing"),
           py::arg("stores"), py::arg("scale"),
           "Trains on a batch; returns its loss and the gradients. params: each layer's weight and "
           "bias, which may be None; groups: each parameter's group in the optimizer, None where "
           "it is frozen; stores: whether the gradients are stored, instead of stepped along; "
           "scale: what the loss's are multiplied by.");
}

}  // namespace fastnn::python
