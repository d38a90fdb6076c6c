#include "harness.h"

namespace fastnn::tests {
namespace {

template <typename T>
void bias_relu(const Target& target, int64_t rows, int64_t cols, bool has_bias, int64_t offset) {
  auto linear = random_buffer<T>(rows * cols, offset);
  const auto bias = random_buffer<T>(cols, offset);
  if (linear.size() != 0) linear[linear.size() - 1] = from_double<T>(NAN);
  const auto [out] = same_on_any_threads([&](int threads) {
    auto out = linear;
    parallel_for(threads, rows, [&](int64_t begin, int64_t end) {
      target.kernels<T>().bias_relu(out.data(), data_if(has_bias, bias), cols, begin, end);
    });
    return std::tuple(out);
  });
  for (int64_t i = 0; i < out.size(); ++i) {
    const double sum = linear(i) + (has_bias ? bias(i % cols) : 0);
    expect_close("out", i, out[i], sum <= 0 ? 0 : sum, 1, std::abs(sum));
  }
}

// A block of the columns from `first` on.
template <typename T>
void column_sums(const Target& target, int64_t rows, int64_t stride, int64_t first,
                 int64_t offset) {
  const auto grad = random_buffer<T>(rows * stride, offset);
  const int64_t cols = std::min(stride - first, simd::kColumnSums);
  std::vector<double> sums(cols, 1);
  target.kernels<T>().column_sums(sums.data(), grad.data() + first, rows, cols, stride);
  for (int64_t c = 0; c < cols; ++c) {
    double sum = 1, magnitude = 1;
    for (int64_t i = first + c; i < rows * stride; i += stride) {
      sum += grad(i);
      magnitude += std::abs(grad(i));
    }
    expect_close("sums", c, accum<T>(sums[c]), sum, rows, magnitude);
  }
}

// A block of the columns from `first` on: the others stay as they are.
template <typename T>
void relu_backward(const Target& target, int64_t rows, int64_t stride, int64_t first,
                   bool wants_sums, int64_t offset) {
  const auto grad = random_buffer<T>(rows * stride, offset);
  const auto output = random_buffer<T>(rows * stride, offset);
  const auto before = random_buffer<T>(rows * stride, offset);
  auto grad_linear = before;
  const int64_t cols = std::min(stride - first, simd::kColumnSums);
  std::vector<double> sums(cols, 1);
  target.kernels<T>().relu_backward(grad_linear.data() + first, wants_sums ? sums.data() : nullptr,
                                    grad.data() + first, output.data() + first, rows, cols, stride);
  for (int64_t i = 0; i < rows * stride; ++i) {
    const int64_t c = i % stride - first;
    const double masked = output(i) > 0 ? grad(i) : 0;
    expect_close("grad_linear", i, grad_linear[i], c < 0 || c >= cols ? before(i) : masked, 0, 0);
  }
  for (int64_t c = 0; c < cols; ++c) {
    double sum = 1, magnitude = 1;
    for (int64_t i = first + c; i < rows * stride && wants_sums; i += stride) {
      const double masked = output(i) > 0 ? grad(i) : 0;
      sum += masked;
      magnitude += std::abs(masked);
    }
    expect_close("sums", c, accum<T>(sums[c]), sum, rows, magnitude);
  }
}

const Test test("linear", [](const Target& target) {
  for_each_dtype([&]<typename T>() {
    for (const int64_t cols : odd_sizes(target.lanes<T>())) {
      for (const int64_t rows : {0, 1, 7, 131}) {  // 131: more than a block of the bias gradient
        for (const auto& [has_bias, offset] : {std::pair(true, 0), {false, 1}, {true, 1}}) {
          describe("%s rows=%d cols=%d bias=%d offset=%d", kName<T>, int(rows), int(cols), has_bias,
                   offset);
          bias_relu<T>(target, rows, cols, has_bias, offset);
          for (const int64_t first : {int64_t(0), cols / 2}) {
            column_sums<T>(target, rows, cols, first, offset);
            relu_backward<T>(target, rows, cols, first, has_bias, offset);
          }
        }
      }
    }
    describe("%s, columns that fill a block", kName<T>);
    column_sums<T>(target, 5, simd::kColumnSums + 1, /*first=*/1, 0);
    relu_backward<T>(target, 5, simd::kColumnSums + 1, /*first=*/1, true, 0);
  });
});

}  // namespace
}  // namespace fastnn::tests
