// linear and linear_relu on CUDA: the library's matrix product and a ReLU, or our own product with
// both. The backward masks the gradient and sums it for the bias in one pass, then calls the
// library for two products.
#include "ops/linear.h"

#include <ATen/Context.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include "cuda/gemm.cuh"
#include "cuda/launch.cuh"
#include "cuda/linear_relu_kernels.cuh"
#include "ops/product.h"

namespace fastnn::cuda {
namespace {

// The dtype is already decided here; autocast would cast ATen's operators again.
using WithoutAutocast = c10::impl::ExcludeDispatchKeyGuard;

// The largest products with a ReLU for which ours is faster: those with short sums. On an H200 it
// takes 2 us and 0.03 us per element of a sum, the library's product and ReLU 5 us or more.
struct Largest {
  int64_t depth;
  double multiplications;
};
constexpr Largest largest_tiled(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return {128, 1 << 28};
    case at::kDouble:
      return {64, 1 << 24};
    default:  // the dtypes that tensor cores multiply without TF32
      return {64, 1 << 26};
  }
}

bool is_for_library(bool relu, at::ScalarType dtype, int64_t rows, int64_t cols, int64_t depth) {
  if (rows == 0 || cols == 0 || depth == 0) return false;
  switch (requested_product("FASTNN_CUDA_GEMM")) {
    case Product::Library:
      return true;
    case Product::Tiled:
      return false;
    case Product::Auto:
      break;
  }
  // Without a ReLU the library takes one launch, as ours does.
  if (!relu) return true;
  // Only the library has TF32: with ours, a layer's rounding would depend on its batch.
  if (dtype == at::kFloat && at::globalContext().allowTF32CuBLAS()) return true;
  const Largest largest = largest_tiled(dtype);
  return depth > largest.depth ||
         double(rows) * double(cols) * double(depth) > largest.multiplications;
}

int multiprocessors() {
  int device = 0, count = 0;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

// Doesn't use the library's fused ReLU, which turns NaN into 0 in some of its kernels.
at::Tensor library_product(const at::Tensor& input, const at::Tensor& weight,
                           const std::optional<at::Tensor>& bias, bool relu) {
  at::Tensor output = bias ? at::addmm(*bias, input, weight.t()) : at::mm(input, weight.t());
  return relu ? at::relu_(output) : output;
}

at::Tensor tiled_product(const at::Tensor& input, const at::Tensor& weight,
                         const std::optional<at::Tensor>& bias, bool relu) {
  const at::Tensor output = at::empty({input.size(0), weight.size(0)}, input.options());
  const auto contiguous_bias = contiguous(bias);
  dispatch(input.scalar_type(), "linear", [&]<typename T>() {
    const auto lines = [](const at::Tensor& matrix) {
      return operand(matrix.const_data_ptr<T>(), matrix.stride(0), matrix.stride(1));
    };
    const GemmArgs<T> args{.rows = input.size(0),
                           .cols = weight.size(0),
                           .depth = weight.size(1),
                           .a = lines(input),
                           .b = lines(weight),
                           .bias = const_data_or_null<T>(contiguous_bias),
                           .relu = relu,
                           .whole_groups = false,
                           .out = output.data_ptr<T>()};
    launch_gemm(args, multiprocessors(), c10::cuda::getCurrentCUDAStream());
  });
  return output;
}

template <bool relu>
at::Tensor linear_cuda(const at::Tensor& input, const at::Tensor& weight,
                       const std::optional<at::Tensor>& bias) {
  if (!can_fuse_linear(input, weight, bias)) return linear_composite<relu>(input, weight, bias);
  check_linear(relu, input, weight);
  const c10::cuda::CUDAGuard guard(input.device());
  const WithoutAutocast without_autocast(c10::autocast_dispatch_keyset);
  const at::Tensor rows = matrix_of_rows(input);
  const at::Tensor output =
      is_for_library(relu, input.scalar_type(), rows.size(0), weight.size(0), weight.size(1))
          ? library_product(rows, weight, bias, relu)
          : tiled_product(rows, weight, bias, relu);
  return input.dim() == 2 ? output : output.view(with_last_size(input, weight.size(0)));
}

// grad_linear = output > 0 ? grad : 0 and its column sums; an unwanted result is undefined.
void relu_backward(const at::Tensor& grad, const at::Tensor& output, const at::Tensor& grad_linear,
                   const at::Tensor& grad_bias) {
  if (grad.numel() == 0) return;
  dispatch(grad.scalar_type(), "linear_relu_backward", [&]<typename T>() {
    const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
    ReluBackwardArgs<T> args{
        .rows = grad.size(0),
        .cols = grad.size(1),
        .grad = grad.const_data_ptr<T>(),
        .output = output.const_data_ptr<T>(),
        .grad_linear = grad_linear.defined() ? grad_linear.data_ptr<T>() : nullptr,
        .partials = nullptr,
        .grad_bias = nullptr};
    if (!grad_bias.defined()) {
      // Columns don't matter then, and one long row has the fewest ends.
      args.cols = grad.numel();
      args.rows = 1;
      launch_relu_backward(args, plan_relu_backward(args), stream);
      return;
    }
    const ReluBackwardPlan plan = plan_relu_backward(args);
    if (plan.grid.y == 1) {
      args.grad_bias = grad_bias.data_ptr<T>();
      launch_relu_backward(args, plan, stream);
      return;
    }
    using A = accum<T>;
    const at::Tensor partials = at::empty({int64_t(plan.grid.y), args.cols},
                                          grad.options().dtype(c10::CppTypeToScalarType<A>::value));
    args.partials = partials.data_ptr<A>();
    launch_relu_backward(args, plan, stream);
    launch_column_sums(grad_bias.data_ptr<T>(), args.partials, partials.size(0), args.cols, stream);
  });
}

at::Tensor library_matmul(const at::Tensor& a, const at::Tensor& b) {
  return at::mm(a, b);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_backward_cuda(
    const at::Tensor& grad_output, const std::optional<at::Tensor>& input,
    const std::optional<at::Tensor>& weight, std::array<bool, 3> output_mask) {
  check_linear_backward(grad_output, input, weight, /*output=*/nullptr, output_mask);
  const c10::cuda::CUDAGuard guard(grad_output.device());
  const WithoutAutocast without_autocast(c10::autocast_dispatch_keyset);
  const at::Tensor grad = matrix_of_rows(grad_output);
  const at::Tensor grad_bias = output_mask[2] ? at::sum(grad, 0) : at::Tensor();
  const auto [grad_input, grad_weight] =
      factor_gradients(grad, grad_output, input, weight, output_mask, library_matmul);
  return {grad_input, grad_weight, grad_bias};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_relu_backward_cuda(
    const at::Tensor& grad_output, const std::optional<at::Tensor>& input,
    const std::optional<at::Tensor>& weight, const at::Tensor& output,
    std::array<bool, 3> output_mask) {
  check_linear_backward(grad_output, input, weight, &output, output_mask);
  const c10::cuda::CUDAGuard guard(output.device());
  const WithoutAutocast without_autocast(c10::autocast_dispatch_keyset);
  const at::Tensor grad = matrix_of_rows(grad_output).contiguous();
  const at::Tensor out = matrix_of_rows(output).contiguous();
  at::Tensor grad_linear, grad_bias;
  if (output_mask[0] || output_mask[1]) grad_linear = at::empty(grad.sizes(), grad.options());
  if (output_mask[2]) {
    // Without rows the sum is zero, and no kernel runs.
    grad_bias = grad.size(0) == 0 ? at::zeros({grad.size(1)}, grad.options())
                                  : at::empty({grad.size(1)}, grad.options());
  }
  if (grad_linear.defined() || grad_bias.defined())
    relu_backward(grad, out, grad_linear, grad_bias);

  const auto [grad_input, grad_weight] =
      factor_gradients(grad_linear, grad_output, input, weight, output_mask, library_matmul);
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastnn, FASTNN_CUDA_KEY, m) {
  m.impl("linear", linear_cuda<false>);
  m.impl("linear_backward", linear_backward_cuda);
  m.impl("linear_relu", linear_cuda<true>);
  m.impl("linear_relu_backward", linear_relu_backward_cuda);
}

}  // namespace fastnn::cuda
