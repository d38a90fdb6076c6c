#include "harness.h"

#include "cuda/gemm.cuh"

namespace fastnn::cuda::tests {
namespace {

struct Size {
  int64_t rows;
  int64_t cols;
  int64_t depth;
};

// How an operand's lines lie in memory.
enum class Layout { AlongDepth, AlongLines, Scattered };

struct Options {
  Layout a = Layout::AlongDepth;
  Layout b = Layout::AlongDepth;
  int64_t padding = 0;  // elements between lines
  int64_t offset = 0;   // from a 16-byte boundary
  bool has_bias = true;
  bool relu = true;
};

// An operand in memory of its own; the memory between its elements is NaN.
template <typename T>
struct Stored {
  int64_t line_stride;
  int64_t depth_stride;
  Buffer<T> memory;

  Stored(int64_t lines, int64_t depth, Layout layout, const Options& options)
      : line_stride(strides(lines, depth, layout, options).first),
        depth_stride(strides(lines, depth, layout, options).second),
        memory(lines == 0 || depth == 0
                   ? 0
                   : (lines - 1) * line_stride + (depth - 1) * depth_stride + 1,
               options.offset) {
    for (int64_t l = 0; l < lines; ++l) {
      for (int64_t p = 0; p < depth; ++p) memory[at(l, p)] = static_cast<T>(uniform(-2, 2));
    }
  }
  int64_t at(int64_t line, int64_t p) const {
    return line * line_stride + p * depth_stride;
  }
  GemmOperand<T> operand() const {
    return cuda::operand(memory.data(), line_stride, depth_stride);
  }

 private:
  static std::pair<int64_t, int64_t> strides(int64_t lines, int64_t depth, Layout layout,
                                             const Options& options) {
    switch (layout) {
      case Layout::AlongDepth:
        return {depth + options.padding, 1};
      case Layout::AlongLines:
        return {1, lines + options.padding};
      case Layout::Scattered:
        return {3 * depth + options.padding, 3};
    }
    return {};
  }
};

template <typename T>
struct Problem {
  Size size;
  Options options;
  Stored<T> a;
  Stored<T> b;
  Buffer<T> bias;
  Buffer<T> out;

  Problem(const Size& size, const Options& options)
      : size(size),
        options(options),
        a(size.rows, size.depth, options.a, options),
        b(size.cols, size.depth, options.b, options),
        bias(random_buffer<T>(size.cols, options.offset)),
        out(size.rows * size.cols, options.offset) {
    // NaN and infinity must come through where they belong, and nowhere else.
    if (a.memory.size() != 0) a.memory[a.at(size.rows - 1, size.depth / 2)] = static_cast<T>(NAN);
    if (a.memory.size() != 0 && size.rows > 2) a.memory[a.at(1, 0)] = static_cast<T>(INFINITY);
    describe("%s rows=%d cols=%d depth=%d a=%d b=%d padding=%d offset=%d bias=%d relu=%d", kName<T>,
             int(size.rows), int(size.cols), int(size.depth), int(options.a), int(options.b),
             int(options.padding), int(options.offset), options.has_bias, options.relu);
  }

  GemmArgs<T> arguments() {
    return {.rows = size.rows,
            .cols = size.cols,
            .depth = size.depth,
            .a = a.operand(),
            .b = b.operand(),
            .bias = options.has_bias ? bias.data() : nullptr,
            .relu = options.relu,
            .whole_groups = size.cols % kGroup == 0 && is_aligned(out.data()),
            .out = out.data()};
  }

  void check() {
    for (int64_t r = 0; r < size.rows; ++r) {
      for (int64_t c = 0; c < size.cols; ++c) {
        double sum = options.has_bias ? bias(c) : 0, magnitude = std::abs(sum);
        for (int64_t p = 0; p < size.depth; ++p) {
          const double term = a.memory(a.at(r, p)) * b.memory(b.at(c, p));
          sum += term;
          magnitude += std::abs(term);
        }
        const double expected = options.relu && sum <= 0 ? 0 : sum;
        // Each block of the depth is summed separately; the bound of one sum would be the depth.
        const double roundings = std::min<double>(size.depth, kStep * kStepsPerSum) +
                                 size.depth / (kStep * kStepsPerSum) + 3;
        expect_close("out", r * size.cols + c, out[r * size.cols + c], expected, roundings,
                     magnitude);
      }
    }
  }
};

// Runs this kernel, not the one that launch_gemm would choose.
template <typename T, typename Shape>
void run_shape(const Size& size, const Options& options) {
  Problem<T> problem(size, options);
  launch_gemm_shape<T, Shape>(problem.arguments(), nullptr);
  problem.check();
}

template <typename T>
void run_chosen(const Size& size, const Options& options, int multiprocessors) {
  Problem<T> problem(size, options);
  launch_gemm(problem.arguments(), multiprocessors, nullptr);
  problem.check();
}

template <typename T, typename Shape>
void test_shape() {
  const int64_t rows[] = {
      1, 3, Shape::kRows - 1, Shape::kRows, Shape::kRows + 1, 2 * Shape::kRows + 5};
  const int64_t cols[] = {1, 4, Shape::kCols - 1, Shape::kCols, Shape::kCols + 1, Shape::kCols + 8};
  const int64_t depths[] = {1, kStep - 1, kStep, kStep + 1, 2 * kStep, 40};
  constexpr Layout kLayouts[] = {Layout::AlongDepth, Layout::AlongLines, Layout::Scattered};
  int n = 0;
  for (const int64_t r : rows) {
    for (const int64_t c : cols) {
      for (int k = 0; k < 3; ++k, ++n) {
        const Options options{.a = kLayouts[n % 3],
                              .b = kLayouts[n / 3 % 3],
                              .padding = (n % 4 == 3) * 3 + (n % 4 == 1) * 16,
                              .offset = n % 5 == 4,
                              .has_bias = n % 7 != 6,
                              .relu = n % 6 != 5};
        run_shape<T, Shape>({r, c, depths[(n + n / 6) % 6]}, options);
      }
    }
  }
  // All vectors: several blocks, several sums over the depth, with and without a half-filled tile.
  for (const Layout a : {Layout::AlongDepth, Layout::AlongLines}) {
    for (const Layout b : {Layout::AlongDepth, Layout::AlongLines}) {
      run_shape<T, Shape>({Shape::kRows + 8, 2 * Shape::kCols + 16, 64}, {.a = a, .b = b});
      run_shape<T, Shape>({16, 24, 72}, {.a = a, .b = b, .padding = 8});
    }
  }
  run_shape<T, Shape>({5, 7, 3 * kStep * kStepsPerSum + 5}, {});
  run_shape<T, Shape>({5, 7, kStep * kStepsPerSum}, {});
  run_shape<T, Shape>({9, 10, 0}, {});
}

const Test test("gemm", [] {
  for_each_dtype([]<typename T>() {
    using Large = std::conditional_t<std::is_same_v<T, double>, LargeDoubleShape, LargeShape>;
    test_shape<T, Large>();
    test_shape<T, SmallShape>();
    for (const int multiprocessors : {1, 4, 1000}) {
      for (const Size& size : {Size{0, 5, 3}, {5, 0, 3}, {5, 3, 0}, {130, 70, 20}, {64, 128, 16}}) {
        run_chosen<T>(size, {}, multiprocessors);
        run_chosen<T>(size, {.offset = 1}, multiprocessors);
      }
    }
  });
});

// Equal terms: a sum of all of them, one after the other, would drift away from the true one, by a
// thousandth here.
const Test accuracy_test("gemm_accuracy", [] {
  constexpr int64_t kDepth = 1 << 16;
  Buffer<float> a(kDepth), b(kDepth), out(1);
  for (int64_t p = 0; p < kDepth; ++p) {
    a[p] = 0.1f;
    b[p] = 1.0f;
  }
  launch_gemm<float>({.rows = 1,
                      .cols = 1,
                      .depth = kDepth,
                      .a = operand(a.data(), kDepth, 1),
                      .b = operand(b.data(), kDepth, 1),
                      .bias = nullptr,
                      .relu = false,
                      .whole_groups = false,
                      .out = out.data()},
                     1, nullptr);
  const double expected = kDepth * double(0.1f);
  expect(std::abs(out(0) - expected) <= 1e-5 * expected, "sums over the depth drift");
});

// Vectors must be chosen wherever there are any, and not where one would be misaligned.
const Test vectors_test("gemm_vectors", [] {
  for_each_dtype([]<typename T>() {
    describe("%s", kName<T>);
    constexpr int64_t w = kVecSize<T>;
    const Buffer<T> memory(1000), shifted(1000, 1);
    const auto vectors = [&](const Buffer<T>& from, int64_t line_stride, int64_t depth_stride,
                             int64_t lines, int64_t depth) {
      return has_vectors(operand(from.data(), line_stride, depth_stride), lines, depth);
    };
    expect(vectors(memory, 4 * w, 1, 3, 4 * w), "contiguous");
    expect(vectors(memory, 4 * w, 1, 3, 2 * w), "padded");
    expect(vectors(memory, 1, 4 * w, 2 * w, 3), "transposed");
    expect(vectors(memory, 4 * w + 1, 1, 1, 2 * w), "one line");
    expect(!vectors(shifted, 4 * w, 1, 3, 4 * w), "misaligned");
    expect(!vectors(memory, 4 * w + 1, 1, 3, 4 * w), "misaligned from the second line on");
    expect(!vectors(memory, 4 * w, 1, 3, 4 * w - 1), "a vector would stick out");
    expect(!vectors(memory, 1, 4 * w, 2 * w - 1, 3), "a vector would stick out of the lines");
    expect(!vectors(memory, 8 * w, 2, 3, 4 * w), "scattered");
    expect(!vectors(memory, 0, 0, w, w), "expanded");
  });
});

}  // namespace
}  // namespace fastnn::cuda::tests
