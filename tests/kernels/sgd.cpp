#include "harness.h"

namespace fastnn::tests {
namespace {

template <typename T, typename B>
struct State {
  Buffer<T> param;
  Buffer<T> grad;
  Buffer<B> momentum_buffer;
};

// The kernel for momentum buffers of B.
template <typename T, typename B>
auto kernel_of(const Target& target) {
  if constexpr (std::is_same_v<T, B>) {
    return target.kernels<T>().sgd_step;
  } else {
    return target.kernels<T>().sgd_step_wide;
  }
}

// In chunks of a fixed size, as the launcher steps them.
template <typename T, typename B>
void step(const Target& target, int threads, const SGDOptions& options, double grad_scale,
          State<T, B>& state) {
  constexpr int64_t kChunk = 41;
  const int64_t n = state.param.size();
  parallel_for(threads, (n + kChunk - 1) / kChunk, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * kChunk; i < std::min(end * kChunk, n); i += kChunk) {
      kernel_of<T, B>(target)(state.param.data() + i, state.grad.data() + i,
                              options.momentum == 0 ? nullptr : state.momentum_buffer.data() + i,
                              std::min(kChunk, n - i), options, grad_scale);
    }
  });
}

template <typename T, typename B>
void sgd_step(const Target& target, int64_t n, int64_t offset, const SGDOptions& options,
              double grad_scale) {
  const State<T, B> before{random_buffer<T>(n, offset), random_buffer<T>(n, offset),
                           random_buffer<B>(n, offset)};
  const auto [param, grad, momentum_buffer] = same_on_any_threads([&](int threads) {
    State<T, B> state = before;
    step(target, threads, options, grad_scale, state);
    return std::tuple(state.param, state.grad, state.momentum_buffer);
  });
  constexpr double kRoundings = 8;  // operations on the way to any of the results
  for (int64_t i = 0; i < n; ++i) {
    const double x = before.param(i), g = before.grad(i) / grad_scale;
    double d = (options.maximize ? -g : g) + options.weight_decay * x;
    double b = before.momentum_buffer(i);
    const double scale = std::abs(x) + std::abs(g) + std::abs(b);
    if (options.momentum != 0) {
      b = options.is_first_step ? d : options.momentum * b + (1 - options.dampening) * d;
      d = options.nesterov ? d + options.momentum * b : b;
    }
    expect_close("param", i, param[i], x - options.lr * d, kRoundings, scale);
    expect_close("grad", i, grad[i], g, 1, scale);
    expect_close("momentum_buffer", i, momentum_buffer[i], b, kRoundings, scale);
  }
}

struct Case {
  SGDOptions options;
  double grad_scale;
};
// lr, momentum, dampening, weight_decay, nesterov, maximize, is_first_step
const Case kCases[] = {
    {{0.1, 0, 0, 0, false, false, false}, 1},  {{0.1, 0, 0, 0.01, false, true, false}, 4},
    {{0.1, 0.9, 0, 0, false, false, true}, 1}, {{0.1, 0.9, 0.3, 0.01, false, false, false}, 3},
    {{0.1, 0.9, 0, 0, true, true, false}, 1},
};

template <typename T, typename B>
void sgd_steps(const Target& target) {
  for (const int64_t n : odd_sizes(target.lanes<T>())) {
    for (const int64_t offset : {0, 1}) {
      for (const Case& c : kCases) {
        describe("%s buffer=%s n=%d offset=%d case=%d", kName<T>, kName<B>, int(n), int(offset),
                 int(&c - kCases));
        sgd_step<T, B>(target, n, offset, c.options, c.grad_scale);
      }
    }
  }
}

const Test test("sgd", [](const Target& target) {
  for_each_dtype([&]<typename T>() {
    sgd_steps<T, T>(target);
    if (!std::is_same_v<T, accum<T>>) sgd_steps<T, accum<T>>(target);
  });
});

}  // namespace
}  // namespace fastnn::tests
