// sgd_step_ on the CPU: one parallel region over all tensors, in chunks that fit a cache.
#include <torch/library.h>

#include "cpu/launch.h"
#include "ops/sgd.h"

namespace fastnn::cpu {
namespace {

constexpr int64_t kChunk = 1 << 14;  // elements: 192 KiB of float parameter, gradient and buffer

// A piece of one item: what one call of the kernel takes.
struct Chunk {
  const SGDItem* item;
  int64_t begin;
  int64_t size;
};

std::vector<Chunk> split(const std::vector<SGDItem>& items) {
  std::vector<Chunk> chunks;
  for (const SGDItem& item : items) {
    const int64_t n = item.param.numel();
    for (int64_t begin = 0; begin < n; begin += kChunk) {
      chunks.push_back({&item, begin, std::min(kChunk, n - begin)});
    }
  }
  return chunks;
}

void step_chunk(const Chunk& chunk, const simd::SGD& options, double grad_scale) {
  const SGDItem& item = *chunk.item;
  dispatch(item.param.scalar_type(), "sgd_step_", [&]<typename T>() {
    const auto step = [&](auto kernel, auto* buffer) {
      kernel(data<T>(item.param) + chunk.begin, data<T>(item.grad) + chunk.begin, buffer,
             chunk.size, options, grad_scale);
    };
    if (!item.buffer.defined()) {
      step(kernels<T>().sgd_step, static_cast<T*>(nullptr));
    } else if (item.buffer.scalar_type() == item.param.scalar_type()) {
      step(kernels<T>().sgd_step, data<T>(item.buffer) + chunk.begin);
    } else {
      step(kernels<T>().sgd_step_wide, data<accum<T>>(item.buffer) + chunk.begin);
    }
  });
}

// The parameters [first, last), in one parallel region. `momentum_buffers` may be empty.
void step_range(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
                size_t first, size_t last, const simd::SGD& options, double grad_scale) {
  std::vector<SGDItem> items;
  items.reserve(last - first);
  for (size_t i = first; i < last; ++i) {
    items.push_back(sgd_item(params, grads, momentum_buffers, i));
  }
  const std::vector<Chunk> chunks = split(items);
  int64_t elements = 0;
  for (const Chunk& chunk : chunks) elements += chunk.size;
  const int64_t chunk_size = chunks.empty() ? 1 : elements / int64_t(chunks.size());
  at::parallel_for(0, chunks.size(), grain(chunk_size), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) step_chunk(chunks[i], options, grad_scale);
  });
  for (size_t i = first; i < last; ++i) {
    copy_back(items[i - first], params, grads, momentum_buffers, i, grad_scale != 1);
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
