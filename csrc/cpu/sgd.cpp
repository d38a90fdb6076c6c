// sgd_step_ on the CPU: one parallel region over all tensors, in chunks that fit a cache.
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "cpu/launch.h"
#include "ops/checks.h"

namespace fastnn::cpu {
namespace {

constexpr int64_t kChunk = 1 << 14;  // elements: 192 KiB of float parameter, gradient and buffer

// Raises unless `tensor`, entry i of the list `name`, can be stepped with its parameter.
void check_entry(const char* name, size_t i, const at::Tensor& tensor, const at::Tensor& param) {
  TORCH_CHECK(tensor.device() == param.device(), "sgd_step_: expected ", name, "[", i,
              "] on its parameter's device ", param.device(), ", but it is on ", tensor.device());
  TORCH_CHECK(tensor.scalar_type() == param.scalar_type(), "sgd_step_: expected ", name, "[", i,
              "] to have its parameter's dtype ", param.scalar_type(), ", but got ",
              tensor.scalar_type());
  TORCH_CHECK(tensor.layout() == at::kStrided, "sgd_step_: expected ", name, "[", i,
              "] to be dense, but got layout ", tensor.layout());
  TORCH_CHECK(tensor.sizes() == param.sizes(), "sgd_step_: expected ", name, "[", i,
              "] to have its parameter's shape ", param.sizes(), ", but got ", tensor.sizes());
}

void check_list(const char* name, at::TensorList tensors, at::TensorList params) {
  TORCH_CHECK(tensors.size() == params.size(), "sgd_step_: expected as many ", name, " as params (",
              params.size(), "), but got ", tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) check_entry(name, i, tensors[i], params[i]);
}

// A tensor as one run of memory in the parameter's order: itself where it lies so, else a copy.
at::Tensor in_order_of(const at::Tensor& param, const at::Tensor& tensor) {
  if (param.is_non_overlapping_and_dense() && tensor.strides() == param.strides()) return tensor;
  return at::empty_like(param).copy_(tensor);
}

void copy_back(const at::Tensor& flat, const at::Tensor& tensor) {
  if (!flat.is_same(tensor)) tensor.copy_(flat);
}

// One parameter's tensors, each as one run of memory.
struct Item {
  at::Tensor param;
  at::Tensor grad;
  at::Tensor buffer;  // undefined without momentum
};

// A piece of one item: what one call of the kernel takes.
struct Chunk {
  const Item* item;
  int64_t begin;
  int64_t size;
};

std::vector<Chunk> split(const std::vector<Item>& items) {
  std::vector<Chunk> chunks;
  for (const Item& item : items) {
    const int64_t n = item.param.numel();
    for (int64_t begin = 0; begin < n; begin += kChunk) {
      chunks.push_back({&item, begin, std::min(kChunk, n - begin)});
    }
  }
  return chunks;
}

void step_chunk(const Chunk& chunk, const simd::SGD& options, double grad_scale) {
  dispatch(chunk.item->param.scalar_type(), "sgd_step_", [&]<typename T>() {
    const auto at_begin = [&](const at::Tensor& tensor) { return data<T>(tensor) + chunk.begin; };
    kernels<T>().sgd_step(at_begin(chunk.item->param), at_begin(chunk.item->grad),
                          chunk.item->buffer.defined() ? at_begin(chunk.item->buffer) : nullptr,
                          chunk.size, options, grad_scale);
  });
}

// The memory that a tensor's elements lie in.
std::pair<const char*, const char*> extent(const at::Tensor& tensor) {
  int64_t last = 0;
  for (int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
  const char* begin = static_cast<const char*>(tensor.const_data_ptr());
  return {begin, begin + (last + 1) * tensor.element_size()};
}

// Whether two tensors share memory: a parameter listed twice, or two views of one tensor.
bool any_share_memory(at::TensorList params, at::TensorList momentum_buffers) {
  std::vector<std::pair<const char*, const char*>> extents;
  for (const at::TensorList list : {params, momentum_buffers}) {
    for (const at::Tensor& tensor : list) {
      if (tensor.numel() != 0) extents.push_back(extent(tensor));
    }
  }
  std::sort(extents.begin(), extents.end());
  for (size_t i = 1; i < extents.size(); ++i) {
    if (extents[i].first < extents[i - 1].second) return true;
  }
  return false;
}

// The parameters [first, last), in one parallel region. `momentum_buffers` may be empty.
void step_range(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
                size_t first, size_t last, const simd::SGD& options, double grad_scale) {
  const bool has_momentum = !momentum_buffers.empty();
  std::vector<Item> items;
  items.reserve(last - first);
  for (size_t i = first; i < last; ++i) {
    items.push_back({in_order_of(params[i], params[i]), in_order_of(params[i], grads[i]),
                     has_momentum ? in_order_of(params[i], momentum_buffers[i]) : at::Tensor()});
  }
  const std::vector<Chunk> chunks = split(items);
  int64_t elements = 0;
  for (const Chunk& chunk : chunks) elements += chunk.size;
  const int64_t chunk_size = chunks.empty() ? 1 : elements / int64_t(chunks.size());
  at::parallel_for(0, chunks.size(), grain(chunk_size), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) step_chunk(chunks[i], options, grad_scale);
  });
  for (size_t i = first; i < last; ++i) {
    const Item& item = items[i - first];
    copy_back(item.param, params[i]);
    if (grad_scale != 1) copy_back(item.grad, grads[i]);
    if (has_momentum) copy_back(item.buffer, momentum_buffers[i]);
  }
}

void sgd_step_cpu(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
                  double lr, double momentum, double dampening, double weight_decay, bool nesterov,
                  bool maximize, bool is_first_step, const std::optional<at::Tensor>& grad_scale,
                  const std::optional<at::Tensor>& found_inf) {
  if (momentum == 0) momentum_buffers = {};
  check_list("params", params, params);
  check_list("grads", grads, params);
  if (momentum != 0) check_list("momentum_buffers", momentum_buffers, params);
  for (const auto& param : params) {
    TORCH_CHECK(is_supported_dtype(param.scalar_type()), "sgd_step_: expected params of dtype ",
                "float64, float32, bfloat16 or float16, but got ", param.scalar_type());
  }
  if (found_inf && found_inf->item<double>() != 0) return;
  const double scale = grad_scale ? grad_scale->item<double>() : 1;
  const simd::SGD options{lr, momentum, dampening, weight_decay, nesterov, maximize, is_first_step};

  if (!any_share_memory(params, momentum_buffers)) {
    step_range(params, grads, momentum_buffers, 0, params.size(), options, scale);
    return;
  }
  // One after the other, as torch steps them: each sees what the one before has written.
  for (size_t i = 0; i < params.size(); ++i) {
    step_range(params, grads, momentum_buffers, i, i + 1, options, scale);
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(fastnn, CPU, m) {
  m.impl("sgd_step_", sgd_step_cpu);
}

}  // namespace fastnn::cpu
