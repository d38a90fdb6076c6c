#include "python/functional.h"

#include <ATen/core/dispatch/Dispatcher.h>

#include "ops/checks.h"
#include "ops/cross_entropy.h"
#include "ops/linear.h"
#include "ops/linear_cross_entropy.h"
#include "ops/log_softmax.h"
#include "ops/mlp.h"
#include "ops/nll_loss.h"

namespace fastnn::python {
namespace {

// A function that calls the operator through the dispatcher. The kernel `like` gives its signature.
template <typename Result, typename... Args>
auto operator_named(const char* name, Result (* /*like*/)(Args...)) {
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Result(Args...)>();
  return [op](Args... args) { return op.call(args...); };
}

// A list as the dispatcher takes it.
template <typename T>
c10::List<T> as_list(const std::vector<T>& values) {
  c10::List<T> list;
  list.reserve(values.size());
  for (const auto& value : values) list.push_back(value);
  return list;
}

}  // namespace

void define_functional(pybind11::module_& m) {
  using no_gil = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.def("linear", &linear, no_gil());
  m.def("linear_relu", &linear_relu, no_gil());
  m.def(
      "mlp",
      [](const at::Tensor& input, const std::vector<at::Tensor>& weights,
         const std::vector<std::optional<at::Tensor>>& biases, const std::vector<bool>& relu) {
        return mlp(input, weights, as_list(biases), as_list(relu));
      },
      no_gil());
  m.def("log_softmax", &log_softmax, no_gil());
  m.def("nll_loss", operator_named("fastnn::nll_loss", as_nll_loss<nll_loss>), no_gil());
  m.def("cross_entropy", operator_named("fastnn::cross_entropy", as_cross_entropy<cross_entropy>),
        no_gil());
  m.def(
      "linear_cross_entropy",
      operator_named("fastnn::linear_cross_entropy", as_linear_cross_entropy<linear_cross_entropy>),
      no_gil());
  m.def("has_kernels", &has_kernels, "Whether there are kernels for the tensor.");
}

}  // namespace fastnn::python
