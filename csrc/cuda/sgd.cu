// sgd_step_ on CUDA: one launch per 900 tensors that share a device and the dtypes of parameter and
// momentum buffer.
#include "ops/sgd.h"

#include <torch/library.h>

#include "cuda/run_multi_tensor.cuh"
#include "cuda/sgd_kernels.cuh"

namespace fastnn::cuda {
namespace {

template <typename T, typename B, bool kMomentum>
void launch_steps(const std::vector<FlatTensors>& all, const SGDArgs& args, bool writes_grads) {
  using Pointers = SGDPointers<T, B, kMomentum>;
  with_argument_bytes<Pointers>(all.size(), [&]<int kBytes>() {
    auto launcher = sgd_launcher<T, B, kMomentum, kBytes>(args, c10::cuda::getCurrentCUDAStream());
    for (const FlatTensors& of : all) {
      launcher.add({data<T>(of.param), grad_data<T>(of.grad, writes_grads),
                    kMomentum ? data<B>(of.states[0]) : nullptr},
                   of.param.numel());
    }
    launcher.launch();
  });
}

// Steps lists of one device and dtype. Only the device knows whether the gradients' scale is 1; if
// it is, they count as written but don't change.
void step_on_device(const TensorLists& lists, const SGDOptions& options,
                    const SGDScalars& scalars) {
  const c10::cuda::CUDAGuard guard(lists.params[0].device());
  const SGDArgs args{options, device_scalar(scalars.lr), device_scalar(scalars.grad_scale),
                     device_scalar(scalars.found_inf)};
  const at::ScalarType dtype = lists.params[0].scalar_type();
  step_flat(lists, [&](const std::vector<FlatTensors>& all) {
    dispatch(dtype, "sgd_step_", [&]<typename T>() {
      if (lists.states.empty()) {
        launch_steps<T, T, false>(all, args, lists.writes_grads);
      } else if (all[0].states[0].scalar_type() == dtype) {
        launch_steps<T, T, true>(all, args, lists.writes_grads);
      } else {
        launch_steps<T, accum<T>, true>(all, args, lists.writes_grads);
      }
    });
  });
}

void sgd_step_cuda(const TensorLists& all_lists, const SGDOptions& options,
                   const SGDScalars& scalars) {
  check_sgd(all_lists, scalars);
  step_groups(all_lists, [&](const TensorLists& lists) {
    const at::Device device = lists.params[0].device();
    const SGDScalars here{on_device(scalars.lr, device), on_device(scalars.grad_scale, device),
                          on_device(scalars.found_inf, device)};
    if (is_our_device(device)) {
      step_on_device(lists, options, here);
    } else {
      // Lists with several types of devices are dispatched to only one of them.
      sgd_step_(lists, options, here);
    }
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(fastnn, FASTNN_CUDA_KEY, m) {
  m.impl("sgd_step_", as_sgd_step<sgd_step_cuda, double>);
  m.impl("sgd_step_.tensor_lr", as_sgd_step<sgd_step_cuda, const at::Tensor&>);
}

}  // namespace fastnn::cuda
