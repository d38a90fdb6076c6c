#include "cpu/gemm.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>

#include <memory>
#include <new>

#include "cpu/gemm_jobs.h"
#include "cpu/launch.h"
#include "ops/product.h"

namespace fastnn::cpu {
namespace {

// Whether the library's product is faster than ours, as `python -m benchmarks.crossovers` measures
// it; `packs` says whether ours packs its operands.
//
// The library's instructions that multiply bfloat16 outdo our float32, but a call of them costs
// more than a small product.
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

// A tensor as it is where one of its strides is 1, else a copy.
at::Tensor as_matrix(const at::Tensor& tensor) {
  const auto lies_well = [](int64_t outer_size, int64_t outer, int64_t inner_size, int64_t inner) {
    return inner == 1 && (outer >= inner_size || outer_size <= 1);
  };
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  return lies_well(sizes[0], strides[0], sizes[1], strides[1]) ||
                 lies_well(sizes[1], strides[1], sizes[0], strides[0])
             ? tensor
             : tensor.contiguous();
}

template <typename T>
simd::Matrix<T> operand(const at::Tensor& matrix) {
  const bool transposed = matrix.stride(1) != 1;
  return {const_data<T>(matrix), matrix.stride(transposed ? 1 : 0), transposed};
}

// A right operand of one column counts as transposed: its elements lie along the depth.
template <typename T>
simd::Matrix<T> right_operand(const at::Tensor& matrix) {
  const bool is_vector = matrix.size(1) == 1 && matrix.stride(0) == 1;
  if (is_vector) return {const_data<T>(matrix), matrix.size(0), /*transposed=*/true};
  return operand<T>(matrix);
}

// This thread's memory for packed operands, kept: to map it anew would cost more than small
// products.
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

// Our kernels, in blocks that the threads take.
template <typename T>
void run(const simd::Gemm<T>& args) {
  const auto& kernel = kernels<T>();
  const GemmJobs jobs(args.rows, args.cols, args.depth, at::get_num_threads());
  at::parallel_for(0, jobs.count(), 1, [&](int64_t begin, int64_t end) {
    void* memory = scratch(kernel.gemm_scratch);
    for (int64_t i = begin; i < end; ++i) kernel.gemm(args, jobs.block(i), memory);
  });
}

// The library's product, and a ReLU in one pass over it with the bias.
template <typename T>
void run_library(const at::Tensor& a, const at::Tensor& b, const std::optional<at::Tensor>& bias,
                 bool relu, at::Tensor& out) {
  // Where the output is narrower than the sums, the library adds the bias before it rounds.
  const bool bias_in_gemm = bias && (!relu || accumulate_dtype(a) != a.scalar_type());
  bias_in_gemm ? at::addmm_out(out, *bias, a, b) : at::mm_out(out, a, b);
  if (!relu) return;
  const auto epilogue_bias = bias_in_gemm ? std::nullopt : contiguous(bias);
  const int64_t cols = out.size(1);
  T* out_data = data<T>(out);
  const T* bias_data = const_data_or_null<T>(epilogue_bias);
  at::parallel_for(0, out.size(0), grain(cols), [&](int64_t begin, int64_t end) {
    kernels<T>().bias_relu(out_data, bias_data, cols, begin, end);
  });
}

}  // namespace

at::Tensor matmul(const at::Tensor& left, const at::Tensor& right,
                  const std::optional<at::Tensor>& bias, bool relu) {
  static const Product requested = requested_product("FASTNN_CPU_GEMM");
  const at::Tensor a = as_matrix(left), b = as_matrix(right);
  const int64_t rows = a.size(0), cols = b.size(1), depth = a.size(1);
  at::Tensor out = empty_result({rows, cols}, a.scalar_type());
  dispatch(a.scalar_type(), "matmul", [&]<typename T>() {
    const auto contiguous_bias = contiguous(bias);
    const simd::Gemm<T> args{.rows = rows,
                             .cols = cols,
                             .depth = depth,
                             .a = operand<T>(a),
                             .b = right_operand<T>(b),
                             .bias = const_data_or_null<T>(contiguous_bias),
                             .relu = relu,
                             .out = data<T>(out)};
    const bool by_library =
        requested == Product::Auto
            ? library_is_faster(a.scalar_type(), rows, cols, depth, kernels<T>().gemm_packs(args))
            : requested == Product::Library;
    by_library ? run_library<T>(a, b, bias, relu, out) : run(args);
  });
  return out;
}

}  // namespace fastnn::cpu
