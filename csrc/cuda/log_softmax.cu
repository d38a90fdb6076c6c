// log_softmax on CUDA devices.
#include "ops/log_softmax.h"

#include <ATen/WrapDimUtils.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cuda/log_softmax_kernels.cuh"
#include "cuda/rows/run.cuh"

namespace fastnn::cuda {
namespace {

at::Tensor log_softmax_cuda(const at::Tensor& input, int64_t dim,
                            std::optional<at::ScalarType> dtype) {
  if (!can_fuse_log_softmax(input, dtype)) return log_softmax_composite(input, dim, dtype);
  dim = at::maybe_wrap_dim(dim, input.dim());
  const c10::cuda::CUDAGuard guard(input.device());
  at::Tensor x = input.contiguous();
  const at::Tensor output =
      at::empty(input.sizes(), input.options().dtype(dtype.value_or(input.scalar_type())));
  if (output.scalar_type() != x.scalar_type()) x = from_vector_boundary(x);
  if (output.numel() == 0) return output;

  const Layout layout = log_softmax_layout(x, dim);
  dispatch_widened(x.scalar_type(), output.scalar_type(), "log_softmax", [&]<typename T>() {
    using Op = LogSoftmaxRows<T>;
    const TensorsOf<Op> tensors{{const_data<T>(x), nullptr}, data<Wide<T>>(output)};
    run_rows(Op{}, plan_of<Op>(layout), layout, tensors, x.options());
  });
  return output;
}

at::Tensor log_softmax_backward_cuda(const at::Tensor& grad_output, const at::Tensor& output,
                                     int64_t dim, std::optional<at::ScalarType> dtype) {
  check_log_softmax_backward(grad_output, output, dtype);
  dim = at::maybe_wrap_dim(dim, output.dim());
  const c10::cuda::CUDAGuard guard(output.device());
  const at::Tensor grad = grad_output.contiguous();
  const at::Tensor out = output.contiguous();
  const at::Tensor grad_input =
      at::empty(output.sizes(), output.options().dtype(dtype.value_or(output.scalar_type())));
  if (grad_input.numel() == 0) return grad_input;

  const Layout layout = log_softmax_layout(out, dim);
  const auto op = "log_softmax_backward";
  dispatch_widened(grad_input.scalar_type(), out.scalar_type(), op, [&]<typename T>() {
    using Op = LogSoftmaxBackwardRows<T>;
    const TensorsOf<Op> tensors{{const_data<Wide<T>>(grad), const_data<Wide<T>>(out)},
                                data<T>(grad_input)};
    run_rows(Op{}, plan_of<Op>(layout), layout, tensors, out.options());
  });
  return grad_input;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastnn, FASTNN_CUDA_KEY, m) {
  m.impl("log_softmax", log_softmax_cuda);
  m.impl("log_softmax_backward", log_softmax_backward_cuda);
}

}  // namespace fastnn::cuda
