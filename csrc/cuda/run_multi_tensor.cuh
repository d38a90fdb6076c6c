// Splits any optimizer's lists of tensors into launches, each with one device and one dtype per
// list.
#pragma once

#include <vector>

#include "cuda/launch.cuh"
#include "cuda/multi_tensor.cuh"
#include "ops/tensor_lists.h"

namespace fastnn::cuda {

inline bool is_our_device(at::Device device) {
  return device.type() == c10::dispatchKeyToDeviceType(c10::DispatchKey::FASTNN_CUDA_KEY);
}

// The scalar as a number that a kernel on `device` can read, copied if it has to be. Only a CPU
// waits for the copy, as its kernels would read it too early. Pinned memory is copied first: its
// owner may write to it before the device has read it, whereas other memory is read at once.
inline std::optional<at::Tensor> on_device(const std::optional<at::Tensor>& scalar,
                                           at::Device device) {
  if (!scalar) return std::nullopt;
  const bool is_readable =
      scalar->scalar_type() == at::kFloat || scalar->scalar_type() == at::kDouble;
  const at::Tensor number =
      !device.is_cpu() && scalar->is_cpu() && scalar->is_pinned() ? scalar->clone() : *scalar;
  return number.to(device, is_readable ? number.scalar_type() : at::kDouble,
                   /*non_blocking=*/!device.is_cpu());
}

inline DeviceScalar device_scalar(const std::optional<at::Tensor>& scalar) {
  if (!scalar) return {};
  return {scalar->const_data_ptr(), scalar->scalar_type() == at::kDouble};
}

// Calls launch.template operator()<kBytes>() with the argument size for this many tensors: the few
// arguments of a small batch reach the device sooner.
template <typename Pointers, typename F>
void with_argument_bytes(size_t tensors, F launch) {
  static const bool takes_many = [] {
    int driver = 0;
    C10_CUDA_CHECK(cudaDriverGetVersion(&driver));
    return driver >= 12010;
  }();
  if (takes_many && tensors > TensorBatch<Pointers, kArgumentBytes>::kCapacity) {
    launch.template operator()<kManyArgumentBytes>();
  } else {
    launch.template operator()<kArgumentBytes>();
  }
}

// Calls launch(flat_tensors) with all tensors of lists of one device and dtype, and copies the
// results back where it stepped copies.
template <typename F>
void step_flat(const TensorLists& lists, F launch) {
  std::vector<FlatTensors> all;
  all.reserve(lists.params.size());
  for (size_t i = 0; i < lists.params.size(); ++i) all.emplace_back(lists, i);
  launch(all);
  for (size_t i = 0; i < all.size(); ++i) all[i].copy_back(lists, i);
}

// Calls step(lists) for the lists of each device and dtypes. If some share memory, parameters are
// stepped one by one, before they are grouped: they may have two dtypes.
template <typename F>
void step_groups(const TensorLists& all_lists, F step) {
  step_in_order(all_lists, [&](const TensorLists& lists) {
    for (const TensorGroup& group : group_by_device_and_dtype(lists)) {
      step(group.lists_like(lists));
    }
  });
}

}  // namespace fastnn::cuda
