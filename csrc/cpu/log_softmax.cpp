// log_softmax on the CPU: each row is read from memory once.
#include "ops/log_softmax.h"

#include <ATen/WrapDimUtils.h>
#include <torch/library.h>

#include "cpu/launch.h"

namespace fastnn::cpu {
namespace {

at::Tensor log_softmax_cpu(const at::Tensor& input, int64_t dim,
                           std::optional<at::ScalarType> dtype) {
  if (!can_fuse_log_softmax(input, dtype)) return log_softmax_composite(input, dim, dtype);
  dim = at::maybe_wrap_dim(dim, input.dim());
  const at::Tensor x = input.contiguous();
  const at::Tensor output = empty_result(input.sizes(), dtype.value_or(input.scalar_type()));
  if (output.numel() == 0) return output;

  const Layout layout = log_softmax_layout(x, dim);
  dispatch(x.scalar_type(), "log_softmax", [&]<typename T>() {
    const T* in = const_data<T>(x);
    const auto run = [&]<typename Out>(auto* kernel, Out* out) {
      at::parallel_for(0, layout.rows(), grain(layout.classes),
                       [&](int64_t begin, int64_t end) { kernel(out, in, layout, begin, end); });
    };
    if (output.scalar_type() == x.scalar_type()) {
      run(kernels<T>().log_softmax, data<T>(output));
    } else {
      run(kernels<T>().wide_log_softmax, data<simd::accum<T>>(output));
    }
  });
  return output;
}

at::Tensor log_softmax_backward_cpu(const at::Tensor& grad_output, const at::Tensor& output,
                                    int64_t dim, std::optional<at::ScalarType> dtype) {
  check_log_softmax_backward(grad_output, output, dtype);
  dim = at::maybe_wrap_dim(dim, output.dim());
  const at::Tensor grad = grad_output.contiguous();
  const at::Tensor out = output.contiguous();
  const at::Tensor grad_input = empty_result(output.sizes(), dtype.value_or(output.scalar_type()));
  if (grad_input.numel() == 0) return grad_input;

  const Layout layout = log_softmax_layout(out, dim);
  dispatch(grad_input.scalar_type(), "log_softmax_backward", [&]<typename T>() {
    T* grad_in = data<T>(grad_input);
    const auto run = [&]<typename Out>(auto* kernel, const Out* grad_data, const Out* out_data) {
      at::parallel_for(0, layout.rows(), grain(layout.classes), [&](int64_t begin, int64_t end) {
        kernel(grad_in, grad_data, out_data, layout, begin, end);
      });
    };
    if (out.scalar_type() == grad_input.scalar_type()) {
      run(kernels<T>().log_softmax_backward, const_data<T>(grad), const_data<T>(out));
    } else {
      using A = simd::accum<T>;
      run(kernels<T>().wide_log_softmax_backward, const_data<A>(grad), const_data<A>(out));
    }
  });
  return grad_input;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastnn, CPU, m) {
  m.impl("log_softmax", log_softmax_cpu);
  m.impl("log_softmax_backward", log_softmax_backward_cpu);
}

}  // namespace fastnn::cpu
