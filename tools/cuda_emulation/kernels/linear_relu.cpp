#include "harness.h"

#include "cuda/linear_relu_kernels.cuh"

namespace fastnn::cuda::tests {
namespace {

struct Options {
  int64_t grad_offset = 0;  // of each from a 16-byte boundary
  int64_t output_offset = 0;
  int64_t grad_linear_offset = 0;
  bool wants_grad_linear = true;
  bool wants_grad_bias = true;
};

template <typename T>
struct Problem {
  int64_t rows;
  int64_t cols;
  Options options;
  Buffer<T> grad;
  Buffer<T> output;
  Buffer<T> grad_linear;
  Buffer<T> grad_bias;

  Problem(int64_t rows, int64_t cols, const Options& options)
      : rows(rows),
        cols(cols),
        options(options),
        grad(random_buffer<T>(rows * cols, options.grad_offset)),
        output(random_buffer<T>(rows * cols, options.output_offset)),
        grad_linear(rows * cols, options.grad_linear_offset),
        grad_bias(cols, options.grad_linear_offset) {
    // Some of ReLU's outputs are zero, and one is NaN, whose gradient passes.
    for (int64_t i = 0; i < output.size(); i += 3) output[i] = static_cast<T>(0.0);
    output[output.size() - 1] = static_cast<T>(NAN);
    describe("%s rows=%d cols=%d offsets=%d,%d,%d wants=%d,%d", kName<T>, int(rows), int(cols),
             int(options.grad_offset), int(options.output_offset), int(options.grad_linear_offset),
             options.wants_grad_linear, options.wants_grad_bias);
  }

  void run() {
    ReluBackwardArgs<T> args{
        .rows = rows,
        .cols = cols,
        .grad = grad.data(),
        .output = output.data(),
        .grad_linear = options.wants_grad_linear ? grad_linear.data() : nullptr,
        .partials = nullptr,
        .grad_bias = nullptr};
    const ReluBackwardPlan plan = plan_relu_backward(args);
    if (!options.wants_grad_bias) return launch_relu_backward(args, plan, nullptr);
    if (plan.grid.y == 1) {
      args.grad_bias = grad_bias.data();
      return launch_relu_backward(args, plan, nullptr);
    }
    Buffer<accum<T>> partials(plan.grid.y * cols);
    args.partials = partials.data();
    launch_relu_backward(args, plan, nullptr);
    launch_column_sums(grad_bias.data(), partials.data(), plan.grid.y, cols, nullptr);
  }

  void check() const {
    for (int64_t c = 0; c < cols; ++c) {
      double sum = 0, magnitude = 0;
      for (int64_t i = c; i < rows * cols; i += cols) {
        const double masked = output(i) <= 0 ? 0 : grad(i);
        const double written = options.wants_grad_linear ? masked : NAN;
        expect_close("grad_linear", i, grad_linear[i], written, 0, 0);
        sum += masked;
        magnitude += std::abs(masked);
      }
      if (!options.wants_grad_bias) sum = NAN;
      expect_close("grad_bias", c, grad_bias[c], sum, std::sqrt(double(rows)) + 8, magnitude);
    }
  }
};

template <typename T>
void relu_backward(int64_t rows, int64_t cols, const Options& options) {
  Problem<T> problem(rows, cols, options);
  problem.run();
  problem.check();
}

const Test test("relu_backward", [] {
  for_each_dtype([]<typename T>() {
    constexpr int64_t w = kVecSize<T>;
    const int64_t cols[] = {1,     2,         w - 1,         w,         w + 1, 3 * w + 2,
                            4 * w, 4 * w + 1, 6 * w - w / 2, 32 * w + 3};
    for (const int64_t c : cols) {
      for (const int64_t rows : {1, 2, 7, 33, 400}) {
        relu_backward<T>(rows, c, {});
        // Equally misaligned: vectors; differently: none.
        relu_backward<T>(rows, c, {.grad_offset = 1, .output_offset = 1, .grad_linear_offset = 1});
        relu_backward<T>(rows, c, {.output_offset = 1});
      }
      relu_backward<T>(19, c, {.grad_linear_offset = 1});
      relu_backward<T>(19, c, {.wants_grad_linear = false});
      relu_backward<T>(19, c, {.wants_grad_bias = false});
      relu_backward<T>(1, 300 * c, {.wants_grad_bias = false});
    }
    relu_backward<T>(3000, 5, {});         // a dozen partial sums
    relu_backward<T>(2, 70 * 32 * w, {});  // many blocks across
  });
});

// The second stage by itself: more partial sums than threads per column, and columns that don't
// fill a block.
template <typename T>
void column_sums(int64_t rows, int64_t cols) {
  describe("%s rows=%d cols=%d", kName<T>, int(rows), int(cols));
  const auto partials = random_buffer<accum<T>>(rows * cols);
  Buffer<T> sums(cols);
  launch_column_sums(sums.data(), partials.data(), rows, cols, nullptr);
  for (int64_t c = 0; c < cols; ++c) {
    double sum = 0, magnitude = 0;
    for (int64_t i = c; i < rows * cols; i += cols) {
      sum += partials(i);
      magnitude += std::abs(partials(i));
    }
    expect_close("sums", c, sums[c], sum, std::sqrt(double(rows)) + 8, magnitude);
  }
}

const Test sums_test("column_sums", [] {
  for_each_dtype([]<typename T>() {
    for (const int64_t rows : {1, 2, kSumRows - 1, kSumRows, kSumRows + 1, 4 * kSumRows + 3}) {
      for (const int64_t cols : {1, kSumColumns - 1, kSumColumns, 2 * kSumColumns + 1}) {
        column_sums<T>(rows, cols);
      }
    }
  });
});

// Where vectors are expected, and that only sizes and alignment decide the order of the sums.
const Test plan_test("relu_backward_plan", [] {
  for_each_dtype([]<typename T>() {
    describe("%s", kName<T>);
    constexpr int64_t w = kVecSize<T>;
    const Buffer<T> memory(1), shifted(1, 1);
    const auto plan = [&](int64_t rows, int64_t cols, const Buffer<T>& grad,
                          const Buffer<T>& output) {
      return plan_relu_backward<T>({.rows = rows,
                                    .cols = cols,
                                    .grad = grad.data(),
                                    .output = output.data(),
                                    .grad_linear = nullptr,
                                    .partials = nullptr,
                                    .grad_bias = nullptr});
    };
    expect(plan(100, 10 * w, memory, memory).vectors, "whole vectors");
    expect(plan(100, 10 * w, memory, memory).phases == 1, "rows alike");
    expect(plan(100, w, memory, memory).vectors, "a vector to a row");
    expect(plan(100, 10 * w + 1, memory, memory).vectors, "odd rows");
    expect(plan(100, 10 * w + 1, memory, memory).phases == w, "as many kinds of odd rows");
    expect(plan(100, 10 * w + w / 2, memory, memory).phases == 2, "two kinds of rows");
    expect(plan(100, 10 * w, shifted, shifted).vectors, "equally misaligned");
    expect(!plan(100, 10 * w, memory, shifted).vectors, "differently misaligned");
    expect(!plan(100, w + 1, memory, memory).vectors, "short odd rows");
    for (const int64_t rows : {1, 8, 1000, 1000000}) {
      for (const int64_t cols : {1, 10, 1000, 100000}) {
        const auto [vectors, phases, block, grid] = plan(rows, cols, memory, memory);
        expect(block.x * block.y == kReluThreads, "a block of another size");
        expect(grid.y % unsigned(phases) == 0, "phases differ in blocks");
        expect(grid.y >= 1 && grid.y <= 512 + w, "too many partial sums");
        expect(int64_t(grid.x) * block.x * (vectors ? w : 1) >= cols, "columns are missed");
      }
    }
  });
});

}  // namespace
}  // namespace fastnn::cuda::tests
