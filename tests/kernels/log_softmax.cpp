#include "rows.h"

namespace fastnn::tests {
namespace {

// The output may be as wide as the sums.
template <typename T, typename Out>
void log_softmax(const Target& target, const Layout& layout, int64_t offset) {
  auto input = random_buffer<T>(elements(layout), offset);
  if (input.size() > 1) input[input.size() - 1] = from_double<T>(-INFINITY);
  const auto& kernels = target.kernels<T>();
  const auto kernel = [&] {
    if constexpr (std::is_same_v<T, Out>) {
      return kernels.log_softmax;
    } else {
      return kernels.wide_log_softmax;
    }
  }();
  const auto [output] = same_on_any_threads([&](int threads) {
    Buffer<Out> output(input.size(), offset);
    parallel_for(threads, layout.rows(), [&](int64_t begin, int64_t end) {
      kernel(output.data(), input.data(), layout, begin, end);
    });
    return std::tuple(output);
  });
  for (int64_t row = 0; row < layout.rows(); ++row) {
    const LogSumExp lse = log_sum_exp(input, layout, row);
    for (int64_t c = 0; c < layout.classes; ++c) {
      const int64_t i = element(layout, row, c);
      expect_close("output", i, output[i], lse.log_softmax(input(i)), roundings_of_row(layout),
                   lse.scale(input(i)));
    }
  }
}

template <typename T, typename Out>
void log_softmax_backward(const Target& target, const Layout& layout, int64_t offset) {
  const auto grad = random_buffer<Out>(elements(layout), offset);
  const auto output = random_buffer<Out>(elements(layout), offset, -8, 0);
  const auto& kernels = target.kernels<T>();
  const auto kernel = [&] {
    if constexpr (std::is_same_v<T, Out>) {
      return kernels.log_softmax_backward;
    } else {
      return kernels.wide_log_softmax_backward;
    }
  }();
  const auto [grad_input] = same_on_any_threads([&](int threads) {
    Buffer<T> grad_input(grad.size(), offset);
    parallel_for(threads, layout.rows(), [&](int64_t begin, int64_t end) {
      kernel(grad_input.data(), grad.data(), output.data(), layout, begin, end);
    });
    return std::tuple(grad_input);
  });
  for (int64_t row = 0; row < layout.rows(); ++row) {
    double sum = 0, magnitude = 0;
    for (int64_t c = 0; c < layout.classes; ++c) {
      sum += grad(element(layout, row, c));
      magnitude += std::abs(grad(element(layout, row, c)));
    }
    for (int64_t c = 0; c < layout.classes; ++c) {
      const int64_t i = element(layout, row, c);
      const double softmax = std::exp(output(i));
      expect_close("grad_input", i, grad_input[i], grad(i) - softmax * sum,
                   roundings_of_row(layout), std::abs(grad(i)) + softmax * magnitude);
    }
  }
}

const Test test("log_softmax", [](const Target& target) {
  for_each_dtype([&]<typename T>() {
    for (const Layout& layout : layouts(target.lanes<T>())) {
      for (const int64_t offset : {0, 1}) {
        describe("%s %s offset=%d", kName<T>, to_string(layout).c_str(), int(offset));
        log_softmax<T, T>(target, layout, offset);
        log_softmax_backward<T, T>(target, layout, offset);
        if constexpr (!std::is_same_v<T, accum<T>>) {
          log_softmax<T, accum<T>>(target, layout, offset);
          log_softmax_backward<T, accum<T>>(target, layout, offset);
        }
      }
    }
  });
});

}  // namespace
}  // namespace fastnn::tests
