#include "cpu/gemm_jobs.h"

#include "harness.h"

namespace fastnn::tests {
namespace {

struct Size {
  int64_t rows;
  int64_t cols;
  int64_t depth;
};

// ---- sizes ----

// The kernel's own sizes (csrc/cpu/simd/gemm.h), to test around. If they change there, these tests
// still hold, but test less.
struct Tile {
  int64_t lanes;
  int64_t rows;
  int64_t cols;

  Tile(int64_t lanes, int64_t vector_bytes)
      : lanes(lanes), rows(vector_bytes == 64 ? 8 : 6), cols((vector_bytes == 64 ? 3 : 2) * lanes) {
  }
};
constexpr int64_t kDepth = 200;
constexpr int64_t kGroup = 8;
// More rows than are multiplied without packing.
constexpr int64_t kManyRows = 17;
// Depths that can't be halved in whole vectors, at most a vector below a limit of two blocks: if a
// block exceeded the limit, its panels would run into the next part of the scratch memory.
constexpr int64_t kUnevenDepths[] = {2 * kDepth - 8, 2 * kDepth, 2 * kDepth + 16};

std::vector<Size> sizes(const Tile& tile) {
  const int64_t rows[] = {0, 1, 2, tile.rows - 1, tile.rows, tile.rows + 1, 2 * tile.rows + 1, 31};
  const int64_t cols[] = {0,
                          1,
                          tile.lanes - 1,
                          tile.lanes,
                          tile.lanes + 1,
                          tile.cols - 1,
                          tile.cols,
                          tile.cols + 1,
                          2 * tile.cols + 1,
                          97};
  const int64_t depths[] = {0, 1, tile.lanes - 1, tile.lanes, tile.lanes + 1, 3, 97};
  std::vector<Size> result;
  for (const int64_t r : rows) {
    for (const int64_t c : cols) result.push_back({r, c, depths[result.size() % 7]});
  }
  for (const int64_t d :
       {kDepth - 1, kDepth, kDepth + 1, 2 * kDepth - 1, 2 * kDepth + 1, 4 * kDepth + 1}) {
    result.push_back({1, 1, d});
    result.push_back({tile.rows, tile.cols, d});
    result.push_back({tile.rows + 1, tile.lanes - 1, d});
    result.push_back({kManyRows, kGroup * tile.cols + 1, d});
  }
  // Fill each part of the scratch memory: the left operand's and both kinds of sums. The right
  // operand's is filled above.
  result.push_back({simd::kGemmRows, 1, kDepth});
  result.push_back({simd::kGemmRows, tile.cols - 1, 2});
  result.push_back({simd::kGemmRows, simd::kGemmCols, 1});
  for (const int64_t d : kUnevenDepths) {
    result.push_back({simd::kGemmRows, 3, d});                 // the left operand's last panel
    result.push_back({kManyRows, 2 * kGroup * tile.cols, d});  // the right one's, next to sums
  }
  // More than one block, on one thread and on several.
  for (const int64_t n : {simd::kGemmRows - 1, simd::kGemmRows + 1, 2 * simd::kGemmRows + 9}) {
    result.push_back({n, 3, 5});
    result.push_back({3, n, 5});
  }
  result.push_back({simd::kGemmRows + 1, 2, 0});
  result.push_back({simd::kGemmRows + 1, simd::kGemmCols + 1, 7});
  // Dot products: around what is summed at once, the least depth, and a block of terms.
  for (const int64_t rows : {1, 5, 6, 7, 16, 17}) {
    for (const int64_t cols : {1, 3, 4, 5, 15, 16}) {
      const int64_t least = 2 * std::min(rows, cols) * tile.lanes;
      for (const int64_t depth : {least - 1, least, least + 1}) {
        result.push_back({rows, cols, depth});
      }
    }
  }
  for (const int64_t more : {-1, 0, 1}) result.push_back({3, 5, 256 * tile.lanes + more});
  // Few columns and short rows: whole vectors of rows and a part, and each power of two that is
  // interleaved.
  for (const int64_t rows : {tile.lanes, 2 * tile.lanes + 1}) {
    for (const int64_t cols : {int64_t{1}, int64_t{2}, int64_t{3}, tile.lanes / 2}) {
      for (const int64_t depth : {int64_t{1}, int64_t{2}, int64_t{3}, int64_t{4}, int64_t{8},
                                  tile.lanes + 1, 4 * tile.lanes, 4 * tile.lanes + 1}) {
        result.push_back({rows, cols, depth});
      }
    }
  }
  result.push_back({61, 89, 131});
  result.push_back({131, 17, 419});
  return result;
}

// ---- operands ----

// Integers, whose sums are exact in any order; numbers of any kind, whose sums are rounded; and
// numbers some of which are infinite or NaN.
enum class Values { Integers, Reals, Special };

template <typename T>
Buffer<T> random_values(int64_t n, Values values) {
  auto result = random_buffer<T>(n, 0);
  if (values == Values::Integers) {
    for (int64_t i = 0; i < n; ++i) result[i] = from_double<T>(random_index(9) - 4);
  } else if (values == Values::Special && n != 0) {
    for (const double value : {double(NAN), double(INFINITY), double(-INFINITY)}) {
      result[random_index(n)] = from_double<T>(value);
    }
  }
  return result;
}

// The operands as lines, and the product's elements with the sums of their terms' magnitudes.
template <typename T>
struct Problem {
  Size size;
  Values values;
  Buffer<T> a;     // the left one's rows
  Buffer<T> b;     // the right one's columns
  Buffer<T> bias;  // for each column
  std::vector<double> sums;
  std::vector<double> magnitudes;

  Problem(const Size& size, Values values)
      : size(size),
        values(values),
        a(random_values<T>(size.rows * size.depth, values)),
        b(random_values<T>(size.cols * size.depth, values)),
        bias(random_values<T>(size.cols, values)) {
    const auto left = as_doubles(a), right = as_doubles(b);
    for (int64_t r = 0; r < size.rows; ++r) {
      for (int64_t c = 0; c < size.cols; ++c) {
        double sum = 0, magnitude = 0;
        for (int64_t p = 0; p < size.depth; ++p) {
          const double term = left[r * size.depth + p] * right[c * size.depth + p];
          sum += term;
          magnitude += std::abs(term);
        }
        sums.push_back(sum);
        magnitudes.push_back(magnitude);
      }
    }
  }

  static std::vector<double> as_doubles(const Buffer<T>& buffer) {
    std::vector<double> result;
    for (int64_t i = 0; i < buffer.size(); ++i) result.push_back(buffer(i));
    return result;
  }
};

struct Options {
  bool a_transposed = false;
  bool b_transposed = false;
  bool has_bias = false;
  bool relu = false;
  int64_t padding = 0;
  int64_t offset = 0;
};

// A copy of an operand's lines, with element p of line l at p * stride + l if `by_depth`, at
// l * stride + p otherwise. The memory between them is NaN.
template <typename T>
struct Stored {
  int64_t stride;
  Buffer<T> memory;

  Stored(const Buffer<T>& from, int64_t lines, int64_t depth, bool by_depth, const Options& options)
      : Stored(by_depth ? depth : lines, by_depth ? lines : depth, options) {
    for (int64_t l = 0; l < lines; ++l) {
      for (int64_t p = 0; p < depth; ++p) {
        memory[by_depth ? p * stride + l : l * stride + p] = from[l * depth + p];
      }
    }
  }

 private:
  // As in torch, the stride doesn't matter if there is one row or no element.
  Stored(int64_t rows, int64_t cols, const Options& options)
      : stride(rows == 1 && options.padding != 0 ? 1 : cols + options.padding),
        memory(rows == 0 || cols == 0 ? 0 : (rows - 1) * stride + cols, options.offset) {
  }
};

// ---- runs ----

// The memory of one call, NaN until it is written.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : memory_(::operator new(bytes, kAlignment)) {
    std::memset(memory_.get(), 0xff, bytes);
  }
  void* data() {
    return memory_.get();
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(void* memory) const {
      ::operator delete(memory, kAlignment);
    }
  };
  std::unique_ptr<void, Free> memory_;
};

// Multiplies the blocks meant for `jobs` threads on `threads` threads.
template <typename T>
Buffer<T> multiply(const Target& target, simd::Gemm<T> arguments, int64_t offset, int jobs,
                   int threads) {
  Buffer<T> out(arguments.rows * arguments.cols, offset);
  arguments.out = out.data();
  const cpu::GemmJobs blocks(arguments.rows, arguments.cols, arguments.depth, jobs);
  parallel_for(threads, blocks.count(), [&](int64_t begin, int64_t end) {
    Scratch scratch(target.kernels<T>().gemm_scratch);
    for (int64_t i = begin; i < end; ++i) {
      target.kernels<T>().gemm(arguments, blocks.block(i), scratch.data());
    }
  });
  return out;
}

// Which of its operands' NaNs an instruction passes on depends on their order, which the compiler
// chooses for each tile: all NaNs count as one.
template <typename T>
void unite_nans(Buffer<T>& buffer) {
  for (int64_t i = 0; i < buffer.size(); ++i) {
    if (std::isnan(buffer(i))) buffer[i] = from_double<T>(NAN);
  }
}

template <typename T>
void check(const Problem<T>& problem, const Options& options, const Buffer<T>& out) {
  const auto& [rows, cols, depth] = problem.size;
  for (int64_t i = 0; i < rows * cols; ++i) {
    const double bias = options.has_bias ? problem.bias(i % cols) : 0;
    const double sum = problem.sums[i] + bias;
    const double expected = options.relu && sum <= 0 ? 0 : sum;
    if (problem.values == Values::Integers) {
      expect_within("out", i, to_double(out[i]), to_double(from_double<T>(expected)), 0);
    } else {
      // Each term rounds in the product, in a sum for each depth, in one for each block, and with
      // the bias, by half an epsilon at most; the reference may be off by as much again.
      expect_close("out", i, out[i], expected, depth + depth / kDepth + 3,
                   problem.magnitudes[i] + std::abs(bias));
    }
  }
}

template <typename T>
void gemm(const Target& target, const Problem<T>& problem, const Options& options) {
  const auto& [rows, cols, depth] = problem.size;
  const Stored<T> a(problem.a, rows, depth, options.a_transposed, options);
  const Stored<T> b(problem.b, cols, depth, !options.b_transposed, options);
  const simd::Gemm<T> arguments{.rows = rows,
                                .cols = cols,
                                .depth = depth,
                                .a = {a.memory.data(), a.stride, options.a_transposed},
                                .b = {b.memory.data(), b.stride, options.b_transposed},
                                .bias = data_if(options.has_bias, problem.bias),
                                .relu = options.relu,
                                .out = nullptr};
  const auto run = [&](int jobs, int threads) {
    auto out = multiply(target, arguments, options.offset, jobs, threads);
    if (problem.values == Values::Special) unite_nans(out);
    return out;
  };
  const int64_t blocks_of_one_thread = cpu::GemmJobs(rows, cols, depth, 1).count();
  if (cpu::GemmJobs(rows, cols, depth, 64).count() == blocks_of_one_thread) {
    return check(problem, options, run(1, 1));  // others would do the same
  }
  const auto [out] =
      same_on_any_threads([&](int threads) { return std::tuple(run(threads, threads)); });
  for (const int jobs : {3, 64}) expect_same_bits("out", run(jobs, 1), out);
  check(problem, options, out);
}

// ---- tests ----

const Test test("gemm", [](const Target& target) {
  for_each_dtype([&]<typename T>() {
    const int64_t lanes = target.lanes<T>();
    int n = 0;
    for (const Size& size : sizes(Tile(lanes, lanes * sizeof(accum<T>)))) {
      const auto values = static_cast<Values>(n % 3);
      const Problem<T> problem(size, values);
      for (int layout = 0; layout < 4; ++layout) {
        const int epilogue = (n + layout) % 4;
        constexpr int64_t kPaddings[] = {0, 1, 37};
        const Options options{.a_transposed = layout % 2 == 1,
                              .b_transposed = layout / 2 == 1,
                              .has_bias = epilogue % 2 == 1,
                              .relu = epilogue / 2 == 1,
                              .padding = kPaddings[(n / 3 + layout) % 3],
                              .offset = n / 2 % 2};
        describe("%s rows=%d cols=%d depth=%d layout=%d epilogue=%d padding=%d offset=%d values=%d",
                 kName<T>, int(size.rows), int(size.cols), int(size.depth), layout, epilogue,
                 int(options.padding), int(options.offset), int(values));
        gemm<T>(target, problem, options);
      }
      ++n;
    }
  });
});

// ---- what a backward does with its products, bit for bit ----

// The product where the mask is positive or NaN, zero elsewhere.
template <typename T>
void masked(const Target& target, simd::Gemm<T> arguments, const Buffer<T>& product, int jobs) {
  auto mask = random_values<T>(product.size(), Values::Integers);  // some of them zero
  if (mask.size() != 0) mask[random_index(mask.size())] = from_double<T>(NAN);
  arguments.mask = mask.data();
  Buffer<T> expected = product;
  for (int64_t i = 0; i < expected.size(); ++i) {
    if (mask(i) <= 0) expected[i] = from_double<T>(0);
  }
  expect_same_bits("masked product", multiply(target, arguments, /*offset=*/1, jobs, 1), expected);
}

template <typename T, typename B>
simd::SteppedParam<T> stepped_param(Buffer<T>& param, B* momentum_buffer,
                                    const SGDOptions& options) {
  if (options.momentum == 0) return {param.data(), nullptr, nullptr, options};
  if constexpr (std::is_same_v<T, B>) {
    return {param.data(), momentum_buffer, nullptr, options};
  } else {
    return {param.data(), nullptr, momentum_buffer, options};
  }
}

// The parameter and its momentum buffer of B as sgd_step leaves them, where the product is the
// gradient.
template <typename T, typename B>
void stepped(const Target& target, simd::Gemm<T> arguments, const Buffer<T>& product,
             const SGDOptions& options, int jobs) {
  const int64_t n = product.size();
  auto param = random_buffer<T>(n, 1), expected_param = param;
  auto momentum_buffer = random_buffer<B>(n, 1), expected_buffer = momentum_buffer;
  const auto step = stepped_param(param, momentum_buffer.data(), options);
  arguments.step = &step;
  multiply(target, arguments, /*offset=*/0, jobs, 1);

  Buffer<T> grad = product;
  const auto expected = stepped_param(expected_param, expected_buffer.data(), options);
  if (expected.wide_momentum_buffer) {
    target.kernels<T>().sgd_step_wide(expected.param, grad.data(), expected.wide_momentum_buffer, n,
                                      options, /*grad_scale=*/1);
  } else {
    target.kernels<T>().sgd_step(expected.param, grad.data(), expected.momentum_buffer, n, options,
                                 /*grad_scale=*/1);
  }
  expect_same_bits("stepped param", param, expected_param);
  expect_same_bits("momentum_buffer", momentum_buffer, expected_buffer);
}

// lr, momentum, dampening, weight_decay, nesterov, maximize, is_first_step
const SGDOptions kSteps[] = {
    {0.1, 0, 0, 0, false, false, false},    {0.1, 0, 0, 0.01, false, true, false},
    {0.1, 0.9, 0, 0, false, false, true},   {0.1, 0.9, 0.3, 0.01, false, false, false},
    {0.1, 0.9, 0, 0.01, true, true, false}, {0.1, 0.9, 0, 0, true, false, true},
};

const Test backward_test("gemm_backward", [](const Target& target) {
  for_each_dtype([&]<typename T>() {
    const int64_t lanes = target.lanes<T>();
    int n = 0;
    for (const Size& size : sizes(Tile(lanes, lanes * sizeof(accum<T>)))) {
      const Problem<T> problem(size, n % 2 ? Values::Integers : Values::Reals);
      // Transposed as for the gradient of an input, and for that of a weight.
      const Options options{.a_transposed = n % 3 == 1, .b_transposed = n % 3 == 2};
      const Stored<T> a(problem.a, size.rows, size.depth, options.a_transposed, options);
      const Stored<T> b(problem.b, size.cols, size.depth, !options.b_transposed, options);
      const simd::Gemm<T> arguments{.rows = size.rows,
                                    .cols = size.cols,
                                    .depth = size.depth,
                                    .a = {a.memory.data(), a.stride, options.a_transposed},
                                    .b = {b.memory.data(), b.stride, options.b_transposed},
                                    .out = nullptr};
      const auto product = multiply(target, arguments, /*offset=*/0, 1, 1);
      const int jobs = n % 4 == 3 ? 64 : 1, step = n % std::size(kSteps);
      describe("%s rows=%d cols=%d depth=%d layout=%d jobs=%d step=%d", kName<T>, int(size.rows),
               int(size.cols), int(size.depth), n % 3, jobs, step);
      masked<T>(target, arguments, product, jobs);
      stepped<T, T>(target, arguments, product, kSteps[step], jobs);
      if constexpr (!std::is_same_v<T, accum<T>>) {
        stepped<T, accum<T>>(target, arguments, product, kSteps[step], jobs);
      }
      ++n;
    }
  });
});

// Adds a product whose right operand is stored as T, and all else in the accumulation type, to the
// output. It is a product of integers, which is exact.
template <typename T>
void wide_gemm(const Target& target, const Size& size, bool a_transposed, bool b_transposed) {
  using A = accum<T>;
  const auto& [rows, cols, depth] = size;
  const auto integers = [](int64_t count) {
    Buffer<A> result(count);
    for (int64_t i = 0; i < count; ++i) result[i] = A(random_index(9) - 4);
    return result;
  };
  const Buffer<A> a = integers(rows * depth), b_wide = integers(cols * depth);
  Buffer<A> out = integers(rows * cols);
  Buffer<T> b(b_wide.size());
  for (int64_t i = 0; i < b.size(); ++i) b[i] = from_double<T>(b_wide(i));
  const Buffer<A> before = out;
  const simd::Gemm<A, T> arguments{.rows = rows,
                                   .cols = cols,
                                   .depth = depth,
                                   .a = {a.data(), a_transposed ? rows : depth, a_transposed},
                                   .b = {b.data(), b_transposed ? depth : cols, b_transposed},
                                   .out = out.data(),
                                   .add = true};
  const cpu::GemmJobs blocks(rows, cols, depth, 3);
  Scratch scratch(target.kernels<A>().gemm_scratch);
  for (int64_t i = 0; i < blocks.count(); ++i) {
    target.kernels<T>().wide_gemm(arguments, blocks.block(i), scratch.data());
  }
  for (int64_t i = 0; i < rows * cols; ++i) {
    const int64_t r = i / cols, c = i % cols;
    double sum = before(i);
    for (int64_t p = 0; p < depth; ++p) {
      sum += a(a_transposed ? p * rows + r : r * depth + p) *
             b_wide(b_transposed ? c * depth + p : p * cols + c);
    }
    expect_within("out", i, out(i), sum, 0);
  }
}

const Test wide_test("wide_gemm", [](const Target& target) {
  for_each_dtype([&]<typename T>() {
    const int64_t lanes = target.lanes<T>();
    for (const Size& size : sizes(Tile(lanes, lanes * sizeof(accum<T>)))) {
      for (int layout = 0; layout < 4; ++layout) {
        describe("%s rows=%d cols=%d depth=%d layout=%d", kName<T>, int(size.rows), int(size.cols),
                 int(size.depth), layout);
        wide_gemm<T>(target, size, layout % 2 == 1, layout / 2 == 1);
      }
    }
  });
});

// Expects the blocks, in their order, to cover the output row by row, and none to be too large.
void blocks_cover(const Size& size, int64_t threads) {
  const cpu::GemmJobs jobs(size.rows, size.cols, size.depth, threads);
  int64_t row = 0, col = 0;  // where the next block starts
  for (int64_t i = 0; i < jobs.count(); ++i) {
    const auto [rows, cols] = jobs.block(i);
    expect(rows.begin == row && cols.begin == col, "a block doesn't start where the last one ends");
    const int64_t height = rows.end - rows.begin, width = cols.end - cols.begin;
    expect(0 < height && height <= simd::kGemmRows, "a block has too many rows or none");
    expect(0 < width && width <= simd::kGemmCols, "a block has too many columns or none");
    const bool ends_row = cols.end == size.cols;
    col = ends_row ? 0 : cols.end;
    row = ends_row ? rows.end : rows.begin;
  }
  const bool empty = size.rows == 0 || size.cols == 0;
  expect(empty ? jobs.count() == 0 : row == size.rows && col == 0, "blocks don't cover the output");
}

const Test jobs_test("gemm_jobs", [](const Target&) {
  for (const int64_t rows : {0, 1, 2, 15, 16, 17, 255, 256, 257, 1000, 4099}) {
    for (const int64_t cols : {0, 1, 15, 16, 17, 255, 256, 257, 272, 513, 3001}) {
      for (const int64_t depth : {0, 1, 784, 100000}) {
        for (const int64_t threads : {1, 2, 3, 5, 8, 16, 96, 1024}) {
          describe("rows=%d cols=%d depth=%d threads=%d", int(rows), int(cols), int(depth),
                   int(threads));
          blocks_cover({rows, cols, depth}, threads);
        }
      }
    }
  }
});

}  // namespace
}  // namespace fastnn::tests
