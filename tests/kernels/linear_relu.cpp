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

template <typename T>
void relu_backward(const Target& target, int64_t rows, int64_t cols, bool wants_grad_bias,
                   int64_t offset) {
  const auto grad = random_buffer<T>(rows * cols, offset);
  const auto output = random_buffer<T>(rows * cols, offset);
  const auto [grad_linear, grad_bias] = same_on_any_threads([&](int threads) {
    Buffer<T> grad_linear(rows * cols, offset);
    Buffer<T> grad_bias(cols, offset);
    parallel_for(threads, cols, [&](int64_t begin, int64_t end) {
      target.kernels<T>().relu_backward(grad_linear.data(), data_if(wants_grad_bias, grad_bias),
                                        grad.data(), output.data(), rows, cols, begin, end);
    });
    return std::tuple(grad_linear, grad_bias);
  });
  for (int64_t c = 0; c < cols; ++c) {
    double sum = 0, magnitude = 0;
    for (int64_t i = c; i < rows * cols; i += cols) {
      const double masked = output(i) > 0 ? grad(i) : 0;
      expect_close("grad_linear", i, grad_linear[i], masked, 0, 0);
      sum += masked;
      magnitude += std::abs(masked);
    }
    if (wants_grad_bias) expect_close("grad_bias", c, grad_bias[c], sum, rows, magnitude);
  }
}

const Test test("linear_relu", [](const Target& target) {
  for_each_dtype([&]<typename T>() {
    for (const int64_t cols : odd_sizes(target.lanes<T>())) {
      for (const int64_t rows : {0, 1, 7, 131}) {  // 131: more than a block of the bias gradient
        for (const auto& [has_bias, offset] : {std::pair(true, 0), {false, 1}, {true, 1}}) {
          describe("%s rows=%d cols=%d bias=%d offset=%d", kName<T>, int(rows), int(cols), has_bias,
                   offset);
          bias_relu<T>(target, rows, cols, has_bias, offset);
          relu_backward<T>(target, rows, cols, has_bias, offset);
        }
      }
    }
  });
});

}  // namespace
}  // namespace fastnn::tests
