#include "cpu/gemm.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>

#include <memory>
#include <new>
#include <utility>

#include "cpu/gemm_jobs.h"
#include "cpu/launch.h"
#include "cpu/matrix.h"
#include "cpu/stepped_param.h"
#include "ops/product.h"

namespace fastnn::cpu {
namespace {

// Whether the library's product is faster than ours, as benchmarks/results/crossovers.txt has it
// for each instruction set; `packs` says whether ours packs its operands.
//
// The library's instructions that multiply bfloat16 beat our float32, but a call costs more than a
// small product.
bool multiplies_bfloat16_faster(int64_t rows, int64_t cols, int64_t depth, bool packs) {
  constexpr int64_t kSmall = 1 << 21, kFewRows = 4;
  const bool reads_a_matrix_once = !packs && rows <= kFewRows;
  return multiplies_bfloat16() && rows * cols * depth > kSmall && !reads_a_matrix_once;
}

// Products with a vector; and, if the library's vectors are as wide as ours, large ones and those
// of few rows by a large matrix. With AVX-512 on an AMD processor ours are twice as fast as MKL's.
bool multiplies_floats_faster(int64_t rows, int64_t cols, int64_t depth, bool packs) {
  if (!packs) return false;
  if (rows <= 2 || cols == 1 || depth == 1) return true;
  constexpr int64_t kFewRows = 16, kLargeMatrix = 1 << 22, kLargeSide = 512;
  const bool packs_for_few = rows <= kFewRows && cols * depth >= kLargeMatrix;
  const bool is_large = std::min({rows, cols, depth}) >= kLargeSide;
  return (packs_for_few || is_large) && library_has_our_vectors();
}

bool library_is_faster(at::ScalarType dtype, int64_t rows, int64_t cols, int64_t depth,
                       bool packs) {
  if (dtype == at::kHalf) return false;
  return dtype == at::kBFloat16 ? multiplies_bfloat16_faster(rows, cols, depth, packs)
                                : multiplies_floats_faster(rows, cols, depth, packs);
}

// Makes an operand of one row or column contiguous along the depth.
template <typename T>
simd::Gemm<T> with_vectors_along_depth(simd::Gemm<T> args) {
  const auto is_vector = [](int64_t lines, const simd::Matrix<T>& matrix, bool transposed) {
    return lines == 1 && matrix.transposed == transposed && matrix.stride == 1;
  };
  if (is_vector(args.rows, args.a, true)) args.a = {args.a.data, args.depth, false};
  if (is_vector(args.cols, args.b, false)) args.b = {args.b.data, args.depth, true};
  return args;
}

// This thread's memory for packed operands. It is kept, as mapping it anew would cost more than
// small products.
void* scratch(size_t bytes) {
  constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(void* memory) const {
      ::operator delete(memory, kAlignment);
    }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local size_t size = 0;
  if (size < bytes) {
    memory.reset(::operator new(bytes, kAlignment));
    size = bytes;
  }
  return memory.get();
}

// Runs our kernels, in blocks that the threads share.
template <typename T, typename Right>
void run(const simd::Gemm<T, Right>& args) {
  const GemmJobs jobs(args.rows, args.cols, args.depth, at::get_num_threads());
  at::parallel_for(0, jobs.count(), 1, [&](int64_t begin, int64_t end) {
    void* memory = scratch(kernels<T>().gemm_scratch);
    for (int64_t i = begin; i < end; ++i) {
      if constexpr (std::is_same_v<T, Right>) {
        kernels<T>().gemm(args, jobs.block(i), memory);
      } else {
        kernels<Right>().wide_gemm(args, jobs.block(i), memory);
      }
    }
  });
}

// A product as the library takes it.
struct LibraryProduct {
  at::Tensor a;
  at::Tensor b;
  std::optional<at::Tensor> bias;
  at::Tensor out;
};

// The passes that apply our epilogues to the library's product.
template <typename T>
void mask_product(const simd::Gemm<T>& args) {
  at::parallel_for(0, args.rows, grain(args.cols), [&](int64_t begin, int64_t end) {
    const int64_t first = begin * args.cols;
    kernels<T>().relu_backward(args.out + first, /*sums=*/nullptr, args.out + first,
                               args.mask + first, end - begin, args.cols, args.cols);
  });
}

template <typename T>
void step_by_product(const simd::Gemm<T>& args) {
  at::parallel_for(0, args.rows * args.cols, kGrain, [&](int64_t begin, int64_t end) {
    step_range(*args.step, args.out, begin, end);
  });
}

template <typename T>
void run_library(const simd::Gemm<T>& args, LibraryProduct product) {
  auto& [a, b, bias, out] = product;
  if (args.add) {
    at::addmm_out(out, out, a, b);
    return;
  }
  // If the output is narrower than the sums, the library adds the bias before it rounds.
  const bool bias_in_gemm = bias && (!args.relu || accumulate_dtype(a) != a.scalar_type());
  if (bias_in_gemm) {
    at::addmm_out(out, *bias, a, b);
  } else if (args.depth == 1) {
    at::mul_out(out, a, b);  // as fast as memory takes the output, which mm is not
  } else {
    at::mm_out(out, a, b);
  }
  if (args.relu) {
    const T* bias_data = bias_in_gemm ? nullptr : args.bias;
    at::parallel_for(0, args.rows, grain(args.cols), [&](int64_t begin, int64_t end) {
      kernels<T>().bias_relu(args.out, bias_data, args.cols, begin, end);
    });
  }
  if (args.mask) mask_product(args);
  if (args.step) step_by_product(args);
}

template <typename T>
bool is_for_library(const simd::Gemm<T>& args) {
  static const Product requested = requested_product("FASTNN_CPU_GEMM");
  if (requested != Product::Auto) return requested == Product::Library;
  return library_is_faster(kDtype<T>, args.rows, args.cols, args.depth,
                           kernels<T>().gemm_packs(args));
}

// Raw memory as the library takes it.
template <typename T>
at::Tensor as_tensor(const T* memory, at::IntArrayRef sizes, at::IntArrayRef strides) {
  return at::from_blob(const_cast<T*>(memory), sizes, strides, at::TensorOptions(kDtype<T>));
}
template <typename T>
at::Tensor as_tensor(const simd::Matrix<T>& matrix, int64_t rows, int64_t cols) {
  const int64_t row_stride = matrix.transposed ? 1 : matrix.stride;
  const int64_t col_stride = matrix.transposed ? matrix.stride : 1;
  return as_tensor(matrix.data, {rows, cols}, {row_stride, col_stride});
}

}  // namespace

// Our product with a step. Tile by tile, a parameter and its buffer are read in short pieces, which
// pays while both are in the L2 cache; larger ones are stepped in a separate pass.
template <typename T>
void run_and_step(simd::Gemm<T> args) {
  constexpr int64_t kNear = 1 << 19;
  if (args.rows * args.cols * int64_t(sizeof(T)) <= kNear) return run(args);
  const auto* step = std::exchange(args.step, nullptr);
  run(args);
  args.step = step;
  step_by_product(args);
}

template <typename T>
void multiply(const simd::Gemm<T>& of) {
  const simd::Gemm<T> args = with_vectors_along_depth(of);
  if (!is_for_library(args)) return args.step ? run_and_step(args) : run(args);
  LibraryProduct product{.a = as_tensor(args.a, args.rows, args.depth),
                         .b = as_tensor(args.b, args.depth, args.cols),
                         .bias = std::nullopt,
                         .out = as_tensor(args.out, {args.rows, args.cols}, {args.cols, 1})};
  if (args.bias) product.bias = as_tensor(args.bias, {args.cols}, {1});
  run_library(args, product);
}
template void multiply(const simd::Gemm<double>&);
template void multiply(const simd::Gemm<float>&);
template void multiply(const simd::Gemm<simd::bfloat16>&);
template void multiply(const simd::Gemm<simd::float16>&);

at::Tensor matmul(const at::Tensor& left, const at::Tensor& right,
                  const std::optional<at::Tensor>& bias, bool relu) {
  const at::Tensor a = as_matrix(left), b = as_matrix(right);
  const int64_t rows = a.size(0), cols = b.size(1), depth = a.size(1);
  at::Tensor out = empty_result({rows, cols}, a.scalar_type());
  dispatch(a.scalar_type(), "matmul", [&]<typename T>() {
    const auto contiguous_bias = contiguous(bias);
    const simd::Gemm<T> of{.rows = rows,
                           .cols = cols,
                           .depth = depth,
                           .a = operand<T>(a),
                           .b = operand<T>(b),
                           .bias = const_data_or_null<T>(contiguous_bias),
                           .relu = relu,
                           .out = data<T>(out)};
    const simd::Gemm<T> args = with_vectors_along_depth(of);
    is_for_library(args) ? run_library(args, {a, b, contiguous_bias, out}) : run(args);
  });
  return out;
}

void matmul_into(const at::Tensor& out, const at::Tensor& left, const at::Tensor& right,
                 const std::optional<at::Tensor>& bias, bool add) {
  const at::Tensor a = as_matrix(left), b = as_matrix(right);
  dispatch(b.scalar_type(), "matmul", [&]<typename Right>() {
    using T = simd::accum<Right>;
    const simd::Gemm<T, Right> args{.rows = a.size(0),
                                    .cols = b.size(1),
                                    .depth = a.size(1),
                                    .a = operand<T>(a),
                                    .b = operand<Right>(b),
                                    .bias = const_data_or_null<T>(bias),
                                    .out = data<T>(out),
                                    .add = add};
    if constexpr (std::is_same_v<T, Right>) {
      multiply(args);
    } else {
      run(args);
    }
  });
}

}  // namespace fastnn::cpu
