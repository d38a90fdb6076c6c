// sgd_step_ on the CPU: one parallel region over all tensors, in chunks that fit a cache.
#include <torch/library.h>

#include "cpu/launch.h"
#include "ops/sgd.h"

namespace fastnn::cpu {
namespace {

constexpr int64_t kChunk = 1 << 14;  // elements: 192 KiB of float parameter, gradient and buffer

// One parameter's tensors and their memory: in the parallel region copy-on-write memory, which is
// copied when a pointer to write to it is taken, may not be copied.
struct Item {
  SGDItem tensors;
  void* param;
  void* grad;
  void* buffer;  // null without momentum
  bool has_wide_buffer;
};

Item make_item(SGDItem tensors, bool writes_grad) {
  const at::Tensor& buffer = tensors.buffer;
  Item item{
      .param = data<void>(tensors.param),
      .grad = grad_data<void>(tensors.grad, writes_grad),
      .buffer = buffer.defined() ? data<void>(buffer) : nullptr,
      .has_wide_buffer = buffer.defined() && buffer.scalar_type() != tensors.param.scalar_type()};
  item.tensors = std::move(tensors);
  return item;
}

// A piece of one item: what one call of the kernel takes.
struct Chunk {
  const Item* item;
  int64_t begin;
  int64_t size;
};

std::vector<Chunk> split(const std::vector<Item>& items) {
  std::vector<Chunk> chunks;
  for (const Item& item : items) {
    const int64_t n = item.tensors.param.numel();
    for (int64_t begin = 0; begin < n; begin += kChunk) {
      chunks.push_back({&item, begin, std::min(kChunk, n - begin)});
    }
  }
  return chunks;
}

void step_chunk(const Chunk& chunk, const simd::SGD& options, double grad_scale) {
  const Item& item = *chunk.item;
  dispatch(item.tensors.param.scalar_type(), "sgd_step_", [&]<typename T>() {
    const auto step = [&](auto kernel, auto* buffer) {
      kernel(static_cast<T*>(item.param) + chunk.begin, static_cast<T*>(item.grad) + chunk.begin,
             buffer == nullptr ? nullptr : buffer + chunk.begin, chunk.size, options, grad_scale);
    };
    if (item.has_wide_buffer) {
      step(kernels<T>().sgd_step_wide, static_cast<accum<T>*>(item.buffer));
    } else {
      step(kernels<T>().sgd_step, static_cast<T*>(item.buffer));
    }
  });
}

// The parameters [first, last), in one parallel region. `momentum_buffers` may be empty.
void step_range(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
                size_t first, size_t last, const simd::SGD& options, double grad_scale) {
  const bool writes_grads = grad_scale != 1;
  std::vector<Item> items;
  items.reserve(last - first);
  for (size_t i = first; i < last; ++i) {
    items.push_back(make_item(sgd_item(params, grads, momentum_buffers, i), writes_grads));
  }
  const std::vector<Chunk> chunks = split(items);
  int64_t elements = 0;
  for (const Chunk& chunk : chunks) elements += chunk.size;
  const int64_t chunk_size = chunks.empty() ? 1 : elements / int64_t(chunks.size());
  at::parallel_for(0, chunks.size(), grain(chunk_size), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) step_chunk(chunks[i], options, grad_scale);
  });
  for (size_t i = first; i < last; ++i) {
    copy_back(items[i - first].tensors, params, grads, momentum_buffers, i, writes_grads);
  }
}

void sgd_step_cpu(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
                  double lr, double momentum, double dampening, double weight_decay, bool nesterov,
                  bool maximize, bool is_first_step, const std::optional<at::Tensor>& grad_scale,
                  const std::optional<at::Tensor>& found_inf) {
  if (momentum == 0) momentum_buffers = {};
  check_sgd_lists(params, grads, momentum_buffers, momentum, grad_scale.has_value());
  check_sgd_scalar("grad_scale", grad_scale);
  check_sgd_scalar("found_inf", found_inf);
  if (found_inf && found_inf->item<double>() != 0) return;
  const double scale = grad_scale ? grad_scale->item<double>() : 1;
  const simd::SGD options{lr, momentum, dampening, weight_decay, nesterov, maximize, is_first_step};

  step_in_order(params, momentum_buffers, [&](size_t first, size_t last) {
    step_range(params, grads, momentum_buffers, first, last, options, scale);
  });
}

void sgd_step_tensor_lr_cpu(at::TensorList params, at::TensorList grads,
                            at::TensorList momentum_buffers, const at::Tensor& lr, double momentum,
                            double dampening, double weight_decay, bool nesterov, bool maximize,
                            bool is_first_step, const std::optional<at::Tensor>& grad_scale,
                            const std::optional<at::Tensor>& found_inf) {
  check_sgd_scalar("lr", lr);
  sgd_step_cpu(params, grads, momentum_buffers, lr.item<double>(), momentum, dampening,
               weight_decay, nesterov, maximize, is_first_step, grad_scale, found_inf);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastnn, CPU, m) {
  m.impl("sgd_step_", sgd_step_cpu);
  m.impl("sgd_step_.tensor_lr", sgd_step_tensor_lr_cpu);
}

}  // namespace fastnn::cpu
