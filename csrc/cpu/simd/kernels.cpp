// Compiled once for each instruction set, with FASTNN_SIMD_TARGET naming it (see setup.py).
#include "cpu/simd/kernels.h"

#include "cpu/simd/cross_entropy.h"
#include "cpu/simd/gemm.h"
#include "cpu/simd/linear.h"
#include "cpu/simd/linear_cross_entropy.h"
#include "cpu/simd/log_softmax.h"
#include "cpu/simd/sgd.h"

namespace fastnn::simd::FASTNN_SIMD_TARGET {

template <typename T>
const Kernels<T>& kernels() {
  static constexpr Kernels<T> table = {
      .bias_relu = bias_relu<T>,
      .column_sums = column_sums<T>,
      .relu_backward = relu_backward<T>,
      .gemm = gemm<T>,
      .gemm_scratch = kGemmScratchBytes<T>,
      .gemm_packs = gemm_packs<T>,
      .wide_gemm = gemm<accum<T>, T>,
      .log_softmax = log_softmax<T>,
      .log_softmax_backward = log_softmax_backward<T>,
      .wide_log_softmax = log_softmax<T, accum<T>>,
      .wide_log_softmax_backward = log_softmax_backward<T, accum<T>>,
      .cross_entropy = cross_entropy<T>,
      .cross_entropy_backward = cross_entropy_backward<T>,
      .logit_block = logit_block<accum<T>>,
      .logit_block_backward = logit_block_backward<accum<T>>,
      .sgd_step = sgd_step<T, T>,
      .sgd_step_wide = sgd_step<T, accum<T>>,
  };
  return table;
}

template const Kernels<double>& kernels<double>();
template const Kernels<float>& kernels<float>();
template const Kernels<bfloat16>& kernels<bfloat16>();
template const Kernels<float16>& kernels<float16>();

}  // namespace fastnn::simd::FASTNN_SIMD_TARGET
