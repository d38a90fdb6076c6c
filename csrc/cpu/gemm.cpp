#include "cpu/gemm.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>

#include <memory>
#include <new>

#include "cpu/gemm_jobs.h"
#include "cpu/launch.h"

namespace fastnn::cpu {
namespace {

// Measured, one thread, AVX2: our kernel is 1.0 to 2 times as fast as the library's for all sizes
// from 3 to 256, and 3 to 50 times for narrow types; slower for vectors and for large matrices.
// With AVX-512 on an AMD processor it is twice as fast as MKL for large ones, too.
bool is_for_library(at::ScalarType dtype, int64_t rows, int64_t cols, int64_t depth) {
  // Instructions that multiply bfloat16, which the library uses, outdo our kernel's float32.
  if (dtype == at::kBFloat16) return multiplies_bfloat16();
  if (dtype == at::kHalf) return false;
  const int64_t smallest = std::min({rows, cols, depth});
  return smallest <= 2 || (smallest >= 512 && library_has_our_vectors());
}

bool is_for_library(const at::Tensor& a, const at::Tensor& b) {
  return is_for_library(a.scalar_type(), a.size(0), b.size(1), a.size(1));
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

at::Tensor tiled_gemm(const at::Tensor& left, const at::Tensor& right,
                      const std::optional<at::Tensor>& bias, bool relu) {
  const at::Tensor a = as_matrix(left), b = as_matrix(right);
  const int64_t rows = a.size(0), cols = b.size(1), depth = a.size(1);
  const at::Tensor out = empty_result({rows, cols}, a.scalar_type());
  dispatch(a.scalar_type(), "matmul", [&]<typename T>() {
    const auto& kernel = kernels<T>();
    const auto contiguous_bias = contiguous(bias);
    const simd::Gemm<T> args{.rows = rows,
                             .cols = cols,
                             .depth = depth,
                             .a = operand<T>(a),
                             .b = operand<T>(b),
                             .bias = const_data_or_null<T>(contiguous_bias),
                             .relu = relu,
                             .out = data<T>(out)};
    const GemmJobs jobs(rows, cols, depth, at::get_num_threads());
    at::parallel_for(0, jobs.count(), 1, [&](int64_t begin, int64_t end) {
      void* memory = scratch(kernel.gemm_scratch);
      for (int64_t i = begin; i < end; ++i) kernel.gemm(args, jobs.block(i), memory);
    });
  });
  return out;
}

// The library's product, then bias and ReLU in one pass over it.
at::Tensor library_gemm_bias_relu(const at::Tensor& a, const at::Tensor& b,
                                  const std::optional<at::Tensor>& bias) {
  // Where the output is narrower than the sums, the library adds the bias before it rounds.
  const bool bias_in_gemm = bias && accumulate_dtype(a) != a.scalar_type();
  const at::Tensor out = bias_in_gemm ? at::addmm(*bias, a, b) : at::mm(a, b);
  const auto epilogue_bias = bias_in_gemm ? std::nullopt : contiguous(bias);
  const int64_t cols = out.size(1);
  dispatch(a.scalar_type(), "matmul", [&]<typename T>() {
    const auto& kernel = kernels<T>();
    T* out_data = data<T>(out);
    const T* bias_data = const_data_or_null<T>(epilogue_bias);
    at::parallel_for(0, out.size(0), grain(cols), [&](int64_t begin, int64_t end) {
      kernel.bias_relu(out_data, bias_data, cols, begin, end);
    });
  });
  return out;
}

}  // namespace

at::Tensor matmul_bias_relu(const at::Tensor& a, const at::Tensor& b,
                            const std::optional<at::Tensor>& bias) {
  return is_for_library(a, b) ? library_gemm_bias_relu(a, b, bias)
                              : tiled_gemm(a, b, bias, /*relu=*/true);
}

at::Tensor matmul(const at::Tensor& a, const at::Tensor& b) {
  return is_for_library(a, b) ? at::mm(a, b)
                              : tiled_gemm(a, b, /*bias=*/std::nullopt, /*relu=*/false);
}

}  // namespace fastnn::cpu
