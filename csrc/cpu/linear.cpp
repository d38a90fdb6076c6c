// linear_relu on the CPU: a matrix product with bias and ReLU as its epilogue; the backward makes
// mask and bias gradient in one pass, then the two products.
#include "ops/linear.h"

#include <torch/library.h>

#include "cpu/gemm.h"
#include "cpu/launch.h"

namespace fastnn::cpu {
namespace {

at::Tensor linear_relu_cpu(const at::Tensor& input, const at::Tensor& weight,
                           const std::optional<at::Tensor>& bias) {
  if (!can_fuse_linear_relu(input, weight, bias)) {
    return linear_relu_composite(input, weight, bias);
  }
  check_linear_relu(input, weight);
  const at::Tensor output = matmul_bias_relu(matrix_of_rows(input), weight.t(), bias);
  return input.dim() == 2 ? output : output.view(with_last_size(input, weight.size(0)));
}

// The sums over a matrix's rows, taken over chunks of rows that depend on its sizes alone: the
// result has the same bits on any number of threads.
class ColumnSums {
 public:
  ColumnSums(int64_t chunks, int64_t cols) : chunks_(chunks), cols_(cols), sums_(chunks * cols) {
  }
  double* at(int64_t chunk, int64_t col) {
    return sums_.data() + chunk * cols_ + col;
  }
  at::Tensor total(at::ScalarType dtype) {
    for (int64_t chunk = 1; chunk < chunks_; ++chunk) {
      for (int64_t c = 0; c < cols_; ++c) sums_[c] += *at(chunk, c);
    }
    const at::Tensor result = empty_result({cols_}, dtype);
    dispatch_scalars(dtype, "linear_relu_backward", [&]<typename T>() {
      T* to = data<T>(result);
      for (int64_t c = 0; c < cols_; ++c) to[c] = T(chunks_ == 0 ? 0 : sums_[c]);
    });
    return result;
  }

 private:
  int64_t chunks_;
  int64_t cols_;
  std::vector<double> sums_;
};

struct MaskedGradient {
  at::Tensor grad_linear;
  at::Tensor grad_bias;
};

// grad_output where the output is positive, and its sum over rows if that is wanted.
MaskedGradient relu_backward(const at::Tensor& grad, const at::Tensor& output, bool wants_bias) {
  constexpr int64_t kLeastRows = 64, kMostChunks = 16;
  const int64_t rows = grad.size(0), cols = grad.size(1);
  const int64_t strip = std::min(cols, simd::kReluBackwardCols);
  const int64_t strips = cols == 0 ? 0 : ceil_div(cols, strip);
  const int64_t chunk = std::max({kLeastRows, grain(strip), ceil_div(rows, kMostChunks)});
  const int64_t chunks = ceil_div(rows, chunk);
  ColumnSums sums(wants_bias ? chunks : 0, cols);
  const at::Tensor grad_linear = empty_result(grad.sizes(), grad.scalar_type());
  dispatch(grad.scalar_type(), "linear_relu_backward", [&]<typename T>() {
    const auto& kernel = kernels<T>();
    T* to = data<T>(grad_linear);
    const T* from = const_data<T>(grad);
    const T* out = const_data<T>(output);
    at::parallel_for(0, chunks * strips, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = i / strips * chunk, col = i % strips * strip;
        const int64_t first = row * cols + col;
        kernel.relu_backward(to + first, wants_bias ? sums.at(i / strips, col) : nullptr,
                             from + first, out + first, std::min(chunk, rows - row),
                             std::min(strip, cols - col), cols);
      }
    });
  });
  return {grad_linear, wants_bias ? sums.total(grad.scalar_type()) : at::Tensor()};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_relu_backward_cpu(
    const at::Tensor& grad_output, const std::optional<at::Tensor>& input,
    const std::optional<at::Tensor>& weight, const at::Tensor& output,
    std::array<bool, 3> output_mask) {
  check_linear_relu_backward(grad_output, input, weight, output, output_mask);
  const auto [grad_linear, grad_bias] =
      relu_backward(matrix_of_rows(grad_output).contiguous(), matrix_of_rows(output).contiguous(),
                    output_mask[2]);
  at::Tensor grad_input, grad_weight;
  if (output_mask[0]) {
    grad_input = cpu::matmul(grad_linear, *weight);
    if (output.dim() != 2) grad_input = grad_input.view(with_last_size(output, weight->size(1)));
  }
  if (output_mask[1]) grad_weight = cpu::matmul(grad_linear.t(), matrix_of_rows(*input));
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastnn, CPU, m) {
  m.impl("linear_relu", linear_relu_cpu);
  m.impl("linear_relu_backward", linear_relu_backward_cpu);
}

}  // namespace fastnn::cpu
