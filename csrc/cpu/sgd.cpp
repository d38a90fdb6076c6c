// sgd_step_ on the CPU.
#include "ops/sgd.h"

#include <torch/library.h>

#include "cpu/multi_tensor.h"
#include "cpu/stepped_param.h"

namespace fastnn::cpu {
namespace {

void step_run(const SteppedRun& run, const SGDOptions& options, double grad_scale) {
  const SteppedTensors& of = run.of;
  const bool has_buffer = !of.state_dtypes.empty();
  const bool is_wide = has_buffer && of.state_dtypes[0] != of.dtype;
  dispatch(of.dtype, "sgd_step_", [&]<typename T>() {
    const simd::SteppedParam<T> stepped{
        .param = run.param<T>(),
        .momentum_buffer = has_buffer && !is_wide ? run.state<T>(0) : nullptr,
        .wide_momentum_buffer = is_wide ? run.state<simd::accum<T>>(0) : nullptr,
        .options = options};
    step_range(stepped, run.grad<T>(), 0, run.size, grad_scale);
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
