#include "ops/sgd.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/OpMathType.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>

#include "ops/checks.h"

namespace fastnn {

namespace {

template <typename LR>
using SGDStep = void(at::TensorList, at::TensorList, at::TensorList, LR, double, double, double,
                     bool, bool, bool, const std::optional<at::Tensor>&,
                     const std::optional<at::Tensor>&);

template <typename LR>
auto find_sgd_step(const char* overload) {
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow("fastnn::sgd_step_", overload)
      .typed<SGDStep<LR>>();
}

}  // namespace

void sgd_step_(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
               double lr, double momentum, double dampening, double weight_decay, bool nesterov,
               bool maximize, bool is_first_step, const std::optional<at::Tensor>& grad_scale,
               const std::optional<at::Tensor>& found_inf) {
  static const auto op = find_sgd_step<double>("");
  op.call(params, grads, momentum_buffers, lr, momentum, dampening, weight_decay, nesterov,
          maximize, is_first_step, grad_scale, found_inf);
}

void sgd_step_(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
               const at::Tensor& lr, double momentum, double dampening, double weight_decay,
               bool nesterov, bool maximize, bool is_first_step,
               const std::optional<at::Tensor>& grad_scale,
               const std::optional<at::Tensor>& found_inf) {
  static const auto op = find_sgd_step<const at::Tensor&>("tensor_lr");
  op.call(params, grads, momentum_buffers, lr, momentum, dampening, weight_decay, nesterov,
          maximize, is_first_step, grad_scale, found_inf);
}

bool sgd_takes(const at::Tensor& param) {
  // A subclass may keep its data elsewhere, or want to see torch's own operators. What is negated
  // or conjugated lazily, or zero without memory, the dispatcher can't hand over in a list to write
  // to.
  return has_kernels(param) && !param.is_meta() && !param.is_neg() && !param.is_conj() &&
         !param._is_zerotensor() && !param.unsafeGetTensorImpl()->is_python_dispatch();
}

bool sgd_takes_grad(const at::Tensor& param, const at::Tensor& grad) {
  return sgd_takes(grad) && grad.scalar_type() == param.scalar_type() &&
         grad.sym_sizes() == param.sym_sizes();
}

bool sgd_takes_buffer(const at::Tensor& param, const at::Tensor& buffer) {
  return sgd_takes(buffer) && is_buffer_dtype(buffer.scalar_type(), param) &&
         buffer.sym_sizes() == param.sym_sizes();
}

bool is_buffer_dtype(at::ScalarType dtype, const at::Tensor& param) {
  return dtype == param.scalar_type() || dtype == at::toOpMathType(param.scalar_type());
}

namespace {

// Raises unless `tensor`, entry i of the list `name`, can be stepped with its parameter.
void check_entry(const char* name, size_t i, const at::Tensor& tensor, const at::Tensor& param,
                 bool is_buffer) {
  const at::ScalarType dtype = param.scalar_type();
  const at::ScalarType or_dtype = is_buffer ? at::toOpMathType(dtype) : dtype;
  TORCH_CHECK(tensor.device() == param.device(), "sgd_step_: expected ", name, "[", i,
              "] on its parameter's device ", param.device(), ", but it is on ", tensor.device());
  TORCH_CHECK(tensor.scalar_type() == dtype || tensor.scalar_type() == or_dtype,
              "sgd_step_: expected ", name, "[", i, "] to have its parameter's dtype ", dtype,
              or_dtype == dtype ? "" : c10::str(" or ", or_dtype), ", but got ",
              tensor.scalar_type());
  TORCH_CHECK(tensor.layout() == at::kStrided, "sgd_step_: expected ", name, "[", i,
              "] to be dense, but got layout ", tensor.layout());
  TORCH_CHECK(tensor.sizes() == param.sizes(), "sgd_step_: expected ", name, "[", i,
              "] to have its parameter's shape ", param.sizes(), ", but got ", tensor.sizes());
}

void check_list(const char* name, at::TensorList tensors, at::TensorList params,
                bool is_buffers = false) {
  TORCH_CHECK(tensors.size() == params.size(), "sgd_step_: expected as many ", name, " as params (",
              params.size(), "), but got ", tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    check_entry(name, i, tensors[i], params[i], is_buffers);
  }
}

// Raises where a stride of 0 has several elements in one place: all but one of the results would be
// lost.
void check_writable(const char* name, at::TensorList tensors) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    TORCH_CHECK(at::has_internal_overlap(tensors[i]) != at::MemOverlap::Yes,
                "sgd_step_: expected each element of ", name, "[", i, "], which is written to, to ",
                "have its own place, but several refer to a single memory location: shape ",
                tensors[i].sizes(), " with strides ", tensors[i].strides());
  }
}

// A tensor as one run of memory in the parameter's order: itself where it lies so, else a copy.
at::Tensor in_order_of(const at::Tensor& param, const at::Tensor& tensor) {
  if (param.is_non_overlapping_and_dense() && tensor.strides() == param.strides()) return tensor;
  return at::empty_like(param, tensor.options()).copy_(tensor);
}

void copy_back(const at::Tensor& flat, const at::Tensor& tensor) {
  if (!flat.is_same(tensor)) tensor.copy_(flat);
}

// The memory that a tensor's elements lie in.
std::pair<const char*, const char*> extent(const at::Tensor& tensor) {
  int64_t last = 0;
  for (int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
  const char* begin = static_cast<const char*>(tensor.const_data_ptr());
  return {begin, begin + (last + 1) * tensor.element_size()};
}

}  // namespace

void check_sgd_lists(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
                     double momentum, bool writes_grads) {
  check_list("params", params, params);
  for (const auto& param : params) {
    TORCH_CHECK(is_supported_dtype(param.scalar_type()), "sgd_step_: expected params of dtype ",
                "float64, float32, bfloat16 or float16, but got ", param.scalar_type());
  }
  check_list("grads", grads, params);
  if (momentum != 0) check_list("momentum_buffers", momentum_buffers, params, /*is_buffers=*/true);
  check_writable("params", params);
  if (writes_grads) check_writable("grads", grads);
  check_writable("momentum_buffers", momentum_buffers);
}

void check_sgd_scalar(const char* name, const std::optional<at::Tensor>& scalar) {
  TORCH_CHECK(!scalar || scalar->numel() == 1, "sgd_step_: expected ", name,
              " to have one element, but got shape ", scalar->sizes());
}

SGDItem sgd_item(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
                 size_t i) {
  const at::Tensor& param = params[i];
  return {in_order_of(param, param), in_order_of(param, grads[i]),
          momentum_buffers.empty() ? at::Tensor() : in_order_of(param, momentum_buffers[i])};
}

void copy_back(const SGDItem& item, at::TensorList params, at::TensorList grads,
               at::TensorList momentum_buffers, size_t i, bool grads_changed) {
  copy_back(item.param, params[i]);
  if (grads_changed) copy_back(item.grad, grads[i]);
  if (!momentum_buffers.empty()) copy_back(item.buffer, momentum_buffers[i]);
}

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

TORCH_LIBRARY_FRAGMENT(fastnn, m) {
  m.def(
      "sgd_step_(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] momentum_buffers, *, "
      "float lr, float momentum=0, float dampening=0, float weight_decay=0, bool nesterov=False, "
      "bool maximize=False, bool is_first_step=False, Tensor? grad_scale=None, "
      "Tensor? found_inf=None) -> ()");
  m.def(
      "sgd_step_.tensor_lr(Tensor(a!)[] params, Tensor(b!)[] grads, "
      "Tensor(c!)[] momentum_buffers, *, Tensor lr, float momentum=0, float dampening=0, "
      "float weight_decay=0, bool nesterov=False, bool maximize=False, bool is_first_step=False, "
      "Tensor? grad_scale=None, Tensor? found_inf=None) -> ()");
}

}  // namespace fastnn
