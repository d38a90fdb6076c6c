// sgd_step_ on the CPU.
#include "ops/sgd.h"

#include <torch/library.h>

#include "cpu/multi_tensor.h"

namespace fastnn::cpu {
namespace {

void step_run(const SteppedRun& run, const SGDOptions& options, double grad_scale) {
  const SteppedTensors& of = run.of;
  const bool has_buffer = !of.state_dtypes.empty();
  const bool is_wide = has_buffer && of.state_dtypes[0] != of.dtype;
  dispatch(of.dtype, "sgd_step_", [&]<typename T>() {
    const auto step = [&]<typename B>(auto kernel, std::type_identity<B>) {
      kernel(run.param<T>(), run.grad<T>(), has_buffer ? run.state<B>(0) : nullptr, run.size,
             options, grad_scale);
    };
    if (is_wide) {
      step(kernels<T>().sgd_step_wide, std::type_identity<accum<T>>());
    } else {
      step(kernels<T>().sgd_step, std::type_identity<T>());
    }
  });
}

void sgd_step_cpu(TensorLists lists, SGDOptions options, const SGDScalars& scalars) {
  check_sgd(lists, scalars);
  if (scalars.found_inf && scalars.found_inf->item<double>() != 0) return;
  if (scalars.lr) options.lr = scalars.lr->item<double>();
  const double grad_scale = scalars.grad_scale ? scalars.grad_scale->item<double>() : 1;
  lists.writes_grads = grad_scale != 1;
  step_tensors(lists, [&](const SteppedRun& run) { step_run(run, options, grad_scale); });
}

}  // namespace

TORCH_LIBRARY_IMPL(fastnn, CPU, m) {
  m.impl("sgd_step_", as_sgd_step<sgd_step_cpu, double>);
  m.impl("sgd_step_.tensor_lr", as_sgd_step<sgd_step_cpu, const at::Tensor&>);
}

}  // namespace fastnn::cpu
