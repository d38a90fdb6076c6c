// sgd_step_ on the CPU.
#include "ops/sgd.h"

#include <torch/library.h>

#include "cpu/multi_tensor.h"

namespace fastnn::cpu {
namespace {

void step_chunk(const Chunk& chunk, const SGDOptions& options, double grad_scale) {
  const SteppedTensors& of = *chunk.of;
  const at::ScalarType dtype = of.tensors.param.scalar_type();
  void* const buffer = of.states.empty() ? nullptr : of.states[0];
  const bool is_wide = buffer != nullptr && of.tensors.states[0].scalar_type() != dtype;
  dispatch(dtype, "sgd_step_", [&]<typename T>() {
    const auto step = [&](auto kernel, auto* b) {
      kernel(static_cast<T*>(of.param) + chunk.begin, static_cast<T*>(of.grad) + chunk.begin,
             b == nullptr ? nullptr : b + chunk.begin, chunk.size, options, grad_scale);
    };
    if (is_wide) {
      step(kernels<T>().sgd_step_wide, static_cast<accum<T>*>(buffer));
    } else {
      step(kernels<T>().sgd_step, static_cast<T*>(buffer));
    }
  });
}

void sgd_step_cpu(TensorLists lists, SGDOptions options, const SGDScalars& scalars) {
  check_sgd(lists, scalars);
  if (scalars.found_inf && scalars.found_inf->item<double>() != 0) return;
  if (scalars.lr) options.lr = scalars.lr->item<double>();
  const double grad_scale = scalars.grad_scale ? scalars.grad_scale->item<double>() : 1;
  lists.writes_grads = grad_scale != 1;
  step_chunks(lists, [&](const Chunk& chunk) { step_chunk(chunk, options, grad_scale); });
}

}  // namespace

TORCH_LIBRARY_IMPL(fastnn, CPU, m) {
  m.impl("sgd_step_", as_sgd_step<sgd_step_cpu, double>);
  m.impl("sgd_step_.tensor_lr", as_sgd_step<sgd_step_cpu, const at::Tensor&>);
}

}  // namespace fastnn::cpu
