// log_softmax on the CPU: each row is read from memory once.
#include "ops/log_softmax.h"

#include <ATen/WrapDimUtils.h>
#include <torch/library.h>

#include "cpu/launch.h"

namespace fastnn::cpu {
namespace {

at::Tensor log_softmax_cpu(const at::Tensor& input, int64_t dim) {
  if (!can_fuse_log_softmax(input)) return log_softmax_composite(input, dim);
  dim = at::maybe_wrap_dim(dim, input.dim());
  const at::Tensor x = input.contiguous();
  const at::Tensor output = empty_result(input.sizes(), input.scalar_type());
  if (output.numel() == 0) return output;

  const Layout layout = log_softmax_layout(x, dim);
  dispatch(x.scalar_type(), "log_softmax", [&]<typename T>() {
    const auto& kernel = kernels<T>();
    T* out = data<T>(output);
    const T* in = const_data<T>(x);
    at::parallel_for(0, layout.rows(), grain(layout.classes), [&](int64_t begin, int64_t end) {
      kernel.log_softmax(out, in, layout, begin, end);
    });
  });
  return output;
}

at::Tensor log_softmax_backward_cpu(const at::Tensor& grad_output, const at::Tensor& output,
                                    int64_t dim) {
  check_log_softmax_backward(grad_output, output);
  dim = at::maybe_wrap_dim(dim, output.dim());
  const at::Tensor grad = grad_output.contiguous();
  const at::Tensor out = output.contiguous();
  const at::Tensor grad_input = empty_result(output.sizes(), output.scalar_type());
  if (grad_input.numel() == 0) return grad_input;

  const Layout layout = log_softmax_layout(out, dim);
  dispatch(out.scalar_type(), "log_softmax_backward", [&]<typename T>() {
    const auto& kernel = kernels<T>();
    T* grad_in = data<T>(grad_input);
    const T* grad_data = const_data<T>(grad);
    const T* out_data = const_data<T>(out);
    at::parallel_for(0, layout.rows(), grain(layout.classes), [&](int64_t begin, int64_t end) {
      kernel.log_softmax_backward(grad_in, grad_data, out_data, layout, begin, end);
    });
  });
  return grad_input;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastnn, CPU, m) {
  m.impl("log_softmax", log_softmax_cpu);
  m.impl("log_softmax_backward", log_softmax_backward_cpu);
}

}  // namespace fastnn::cpu
