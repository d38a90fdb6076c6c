// linear and linear_relu on the CPU: a matrix product with bias and ReLU as its epilogue; the
// backward makes mask and bias gradient in one pass, then the two products.
#include "ops/linear.h"

#include <torch/library.h>

#include "cpu/gemm.h"
#include "cpu/launch.h"

namespace fastnn::cpu {
namespace {

template <bool relu>
at::Tensor linear_cpu(const at::Tensor& input, const at::Tensor& weight,
                      const std::optional<at::Tensor>& bias) {
  if (!can_fuse_linear(input, weight, bias)) return linear_composite<relu>(input, weight, bias);
  check_linear(relu, input, weight);
  const at::Tensor output = cpu::matmul(matrix_of_rows(input), weight.t(), bias, relu);
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
    dispatch_scalars(dtype, "linear_backward", [&]<typename T>() {
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

// Calls block(first, sums, rows, cols) for the blocks of a contiguous matrix, whose first element
// has that index; gives the matrix's sums over rows, which a block adds its own to, if wanted.
template <typename F>
at::Tensor sum_blocks(const at::Tensor& matrix, bool wants_sums, F block) {
  constexpr int64_t kLeastRows = 64, kMostChunks = 16;
  const int64_t rows = matrix.size(0), cols = matrix.size(1);
  const int64_t strip = std::min(cols, simd::kColumnSums);
  const int64_t strips = cols == 0 ? 0 : ceil_div(cols, strip);
  const int64_t chunk = std::max({kLeastRows, grain(strip), ceil_div(rows, kMostChunks)});
  const int64_t chunks = ceil_div(rows, chunk);
  ColumnSums sums(wants_sums ? chunks : 0, cols);
  at::parallel_for(0, chunks * strips, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / strips * chunk, col = i % strips * strip;
      block(row * cols + col, wants_sums ? sums.at(i / strips, col) : nullptr,
            std::min(chunk, rows - row), std::min(strip, cols - col));
    }
  });
  return wants_sums ? sums.total(matrix.scalar_type()) : at::Tensor();
}

// The gradient of the bias.
at::Tensor column_sums(const at::Tensor& grad) {
  at::Tensor result;
  dispatch(grad.scalar_type(), "linear_backward", [&]<typename T>() {
    const T* from = const_data<T>(grad);
    const auto sum = [&](int64_t first, double* sums, int64_t rows, int64_t cols) {
      kernels<T>().column_sums(sums, from + first, rows, cols, grad.size(1));
    };
    result = sum_blocks(grad, /*wants_sums=*/true, sum);
  });
  return result;
}

struct MaskedGradient {
  at::Tensor grad_linear;
  at::Tensor grad_bias;
};

// grad_output where the output is positive, and its sum over rows if that is wanted.
MaskedGradient relu_backward(const at::Tensor& grad, const at::Tensor& output, bool wants_bias) {
  MaskedGradient result{empty_result(grad.sizes(), grad.scalar_type()), {}};
  dispatch(grad.scalar_type(), "linear_relu_backward", [&]<typename T>() {
    T* to = data<T>(result.grad_linear);
    const T* from = const_data<T>(grad);
    const T* out = const_data<T>(output);
    const auto mask = [&](int64_t first, double* sums, int64_t rows, int64_t cols) {
      kernels<T>().relu_backward(to + first, sums, from + first, out + first, rows, cols,
                                 grad.size(1));
    };
    result.grad_bias = sum_blocks(grad, wants_bias, mask);
  });
  return result;
}

at::Tensor product(const at::Tensor& a, const at::Tensor& b) {
  return cpu::matmul(a, b);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_backward_cpu(
    const at::Tensor& grad_output, const std::optional<at::Tensor>& input,
    const std::optional<at::Tensor>& weight, std::array<bool, 3> output_mask) {
  check_linear_backward(grad_output, input, weight, /*output=*/nullptr, output_mask);
  const at::Tensor grad = matrix_of_rows(grad_output).contiguous();
  const at::Tensor grad_bias = output_mask[2] ? column_sums(grad) : at::Tensor();
  const auto [grad_input, grad_weight] =
      factor_gradients(grad, grad_output, input, weight, output_mask, product);
  return {grad_input, grad_weight, grad_bias};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_relu_backward_cpu(
    const at::Tensor& grad_output, const std::optional<at::Tensor>& input,
    const std::optional<at::Tensor>& weight, const at::Tensor& output,
    std::array<bool, 3> output_mask) {
  check_linear_backward(grad_output, input, weight, &output, output_mask);
  const auto [grad_linear, grad_bias] =
      relu_backward(matrix_of_rows(grad_output).contiguous(), matrix_of_rows(output).contiguous(),
                    output_mask[2]);
  const auto [grad_input, grad_weight] =
      factor_gradients(grad_linear, grad_output, input, weight, output_mask, product);
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastnn, CPU, m) {
  m.impl("linear", linear_cpu<false>);
  m.impl("linear_backward", linear_backward_cpu);
  m.impl("linear_relu", linear_cpu<true>);
  m.impl("linear_relu_backward", linear_relu_backward_cpu);
}

}  // namespace fastnn::cpu
