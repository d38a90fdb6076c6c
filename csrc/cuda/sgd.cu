// sgd_step_ on CUDA: a launch for each hundred tensors or so, of one device and one dtype each of
// parameters and momentum buffers.
#include "ops/sgd.h"

#include <c10/core/TensorOptions.h>
#include <torch/library.h>

#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/sgd_kernels.cuh"

namespace fastnn::cuda {
namespace {

struct Lists {
  std::vector<at::Tensor> params;
  std::vector<at::Tensor> grads;
  std::vector<at::Tensor> momentum_buffers;  // empty without momentum
};

// What the step reads beside its tensors and plain numbers; each may be missing.
struct Scalars {
  std::optional<at::Tensor> lr;
  std::optional<at::Tensor> grad_scale;
  std::optional<at::Tensor> found_inf;
};

// As a number that a kernel on `device` can read: a copy where it has to be, which nobody waits for
// but a CPU, whose kernels would read it too early.
std::optional<at::Tensor> on_device(const std::optional<at::Tensor>& scalar, at::Device device) {
  if (!scalar) return std::nullopt;
  const bool is_readable =
      scalar->scalar_type() == at::kFloat || scalar->scalar_type() == at::kDouble;
  return scalar->to(device, is_readable ? scalar->scalar_type() : at::kDouble,
                    /*non_blocking=*/!device.is_cpu());
}

DeviceScalar device_scalar(const std::optional<at::Tensor>& scalar) {
  if (!scalar) return {};
  return {scalar->const_data_ptr(), scalar->scalar_type() == at::kDouble};
}

template <typename T, typename B, bool kMomentum>
void launch_steps(const std::vector<SGDItem>& items, const SGDOptions& options) {
  const bool writes_grads = options.grad_scale.data != nullptr;
  SGDLauncher<T, B, kMomentum> launcher(options, c10::cuda::getCurrentCUDAStream());
  for (const SGDItem& item : items) {
    launcher.add(data<T>(item.param), grad_data<T>(item.grad, writes_grads),
                 kMomentum ? data<B>(item.buffer) : nullptr, item.param.numel());
  }
  launcher.launch();
}

// Of one device, and of one dtype each.
void step_lists(const Lists& lists, const SGDOptions& options) {
  const size_t count = lists.params.size();
  std::vector<SGDItem> items;
  items.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    items.push_back(sgd_item(lists.params, lists.grads, lists.momentum_buffers, i));
  }
  dispatch(lists.params[0].scalar_type(), "sgd_step_", [&]<typename T>() {
    const at::Tensor& buffer = items[0].buffer;
    if (!buffer.defined()) {
      launch_steps<T, T, false>(items, options);
    } else if (buffer.scalar_type() == items[0].param.scalar_type()) {
      launch_steps<T, T, true>(items, options);
    } else {
      launch_steps<T, accum<T>, true>(items, options);
    }
  });
  // Whether the scale is 1 is known to the device only; where it is, this changes nothing.
  const bool grads_changed = options.grad_scale.data != nullptr;
  for (size_t i = 0; i < count; ++i) {
    copy_back(items[i], lists.params, lists.grads, lists.momentum_buffers, i, grads_changed);
  }
}

void step_on_device(const Lists& lists, SGDOptions options, const Scalars& scalars) {
  const c10::cuda::CUDAGuard guard(lists.params[0].device());
  options.device_lr = device_scalar(scalars.lr);
  options.grad_scale = device_scalar(scalars.grad_scale);
  options.found_inf = device_scalar(scalars.found_inf);
  step_lists(lists, options);
}

// Calls f with the lists of each device and dtypes, in the order of their first parameters.
template <typename F>
void for_each_device_and_dtype(at::TensorList params, at::TensorList grads,
                               at::TensorList momentum_buffers, F f) {
  std::vector<Lists> groups;
  const auto are_alike = [](const at::Tensor& a, const at::Tensor& b) {
    return a.device() == b.device() && a.scalar_type() == b.scalar_type();
  };
  for (size_t i = 0; i < params.size(); ++i) {
    const auto has_room = [&](const Lists& group) {
      return are_alike(group.params[0], params[i]) &&
             (momentum_buffers.empty() ||
              are_alike(group.momentum_buffers[0], momentum_buffers[i]));
    };
    auto group = std::find_if(groups.begin(), groups.end(), has_room);
    if (group == groups.end()) group = groups.emplace(groups.end());
    group->params.push_back(params[i]);
    group->grads.push_back(grads[i]);
    if (!momentum_buffers.empty()) group->momentum_buffers.push_back(momentum_buffers[i]);
  }
  for (const Lists& group : groups) f(group);
}

// Tensors that share no memory.
void step_any_order(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
                    const SGDOptions& options, const Scalars& scalars) {
  const at::DeviceType our_type = c10::dispatchKeyToDeviceType(c10::DispatchKey::FASTNN_CUDA_KEY);
  for_each_device_and_dtype(params, grads, momentum_buffers, [&](const Lists& lists) {
    const at::Device device = lists.params[0].device();
    const Scalars here{on_device(scalars.lr, device), on_device(scalars.grad_scale, device),
                       on_device(scalars.found_inf, device)};
    if (device.type() == our_type) {
      step_on_device(lists, options, here);
    } else if (here.lr) {
      sgd_step_(lists.params, lists.grads, lists.momentum_buffers, *here.lr, options.momentum,
                options.dampening, options.weight_decay, options.nesterov, options.maximize,
                options.is_first_step, here.grad_scale, here.found_inf);
    } else {
      // A list of several kinds of devices comes to one of them only.
      sgd_step_(lists.params, lists.grads, lists.momentum_buffers, options.lr, options.momentum,
                options.dampening, options.weight_decay, options.nesterov, options.maximize,
                options.is_first_step, here.grad_scale, here.found_inf);
    }
  });
}

void step(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
          const SGDOptions& options, const Scalars& scalars) {
  if (options.momentum == 0) momentum_buffers = {};
  check_sgd_lists(params, grads, momentum_buffers, options.momentum,
                  scalars.grad_scale.has_value());
  check_sgd_scalar("grad_scale", scalars.grad_scale);
  check_sgd_scalar("found_inf", scalars.found_inf);
  // Before they are taken apart: what shares memory may be of two dtypes.
  step_in_order(params, momentum_buffers, [&](size_t first, size_t last) {
    const auto part = [&](at::TensorList list) {
      return list.empty() ? list : list.slice(first, last - first);
    };
    step_any_order(part(params), part(grads), part(momentum_buffers), options, scalars);
  });
}

void sgd_step_cuda(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
                   double lr, double momentum, double dampening, double weight_decay, bool nesterov,
                   bool maximize, bool is_first_step, const std::optional<at::Tensor>& grad_scale,
                   const std::optional<at::Tensor>& found_inf) {
  const SGDOptions options{lr,       momentum, dampening,    weight_decay,
                           nesterov, maximize, is_first_step};
  step(params, grads, momentum_buffers, options, {std::nullopt, grad_scale, found_inf});
}

void sgd_step_tensor_lr_cuda(at::TensorList params, at::TensorList grads,
                             at::TensorList momentum_buffers, const at::Tensor& lr, double momentum,
                             double dampening, double weight_decay, bool nesterov, bool maximize,
                             bool is_first_step, const std::optional<at::Tensor>& grad_scale,
                             const std::optional<at::Tensor>& found_inf) {
  check_sgd_scalar("lr", lr);
  const SGDOptions options{0, momentum, dampening, weight_decay, nesterov, maximize, is_first_step};
  step(params, grads, momentum_buffers, options, {lr, grad_scale, found_inf});
}

}  // namespace

TORCH_LIBRARY_IMPL(fastnn, FASTNN_CUDA_KEY, m) {
  m.impl("sgd_step_", sgd_step_cuda);
  m.impl("sgd_step_.tensor_lr", sgd_step_tensor_lr_cuda);
}

}  // namespace fastnn::cuda
