// The CPU kernels as a table of function pointers per storage type, one table for each instruction
// set that kernels.cpp was compiled for; kernels<T>() gives the one in use.
#pragma once

#include "cpu/simd/types.h"
#include "ops/sgd_options.h"

namespace fastnn::simd {

// The operands of cross entropy's kernels. Targets are class indices (`target`) or probabilities
// in the logits' layout (`target_probs`); the other is null, and `weight` may be. Values per row or
// per class are in the accumulation type of T, as the losses and their gradients are.
template <typename T>
struct CrossEntropy {
  Layout layout;
  const T* logits;
  const int64_t* target;
  const T* target_probs;
  const accum<T>* weight;
  int64_t ignore_index;
  double label_smoothing;
};

// What the forward keeps for the backward, all null if no gradient is wanted: the gradient times
// `scale` if T keeps that, else each row's log-sum-exp, as its maximum and the sum of exp(x - max).
template <typename T>
struct KeptRows {
  T* grad;
  double scale;
  accum<T>* max;
  accum<T>* sum;
};

// Sums over rows, in double for every storage type: a loss over many rows stays precise.
struct LossSums {
  double loss = 0;
  double weight = 0;
};

// A block of rows of logits in the accumulation type, and its results: each row's loss, its
// log-sum-exp in the parts of KeptRows, and the gradient, which replaces the logits. A null result
// isn't wanted. `grad` multiplies the gradient: one value, or one per row.
template <typename A>
struct LogitBlock {
  CrossEntropy<A> args;
  double z_loss;
  A* losses;
  A* max;
  A* log_sum;
  A* gradient;
  const A* grad;
  bool grad_per_row;
};

struct Range {
  int64_t begin;
  int64_t end;
};

// A matrix whose element (i, j) is data[i * stride + j], or data[j * stride + i] if transposed.
template <typename T>
struct Matrix {
  const T* data;
  int64_t stride;
  bool transposed;
};

// A parameter as sgd_step takes it, with at most one of the buffers.
template <typename T>
struct SteppedParam {
  T* param;
  T* momentum_buffer;
  accum<T>* wide_momentum_buffer;
  SGDOptions options;
};

// out = a @ b (+ bias) (then ReLU), but zero where `mask` is not positive, with a of (rows, depth)
// and b of (depth, cols); or out + a @ b with `add`, which excludes the others. out and mask are
// contiguous; bias has one value per column. With a `step` the product is that parameter's
// gradient, and out is undefined afterwards. Bias, mask and step may be null. The right operand may
// be narrower if everything else has the accumulation type.
template <typename T, typename Right = T>
struct Gemm {
  int64_t rows;
  int64_t cols;
  int64_t depth;
  Matrix<T> a;
  Matrix<Right> b;
  const T* bias = nullptr;
  bool relu = false;
  const T* mask = nullptr;
  const SteppedParam<T>* step = nullptr;
  T* out;
  bool add = false;
};

// The part of the output that one call computes, at most kGemmRows x kGemmCols: its part of the
// left operand stays in the L2 cache, and packing the right one is little of the work.
struct GemmBlock {
  Range rows;
  Range cols;
};
constexpr int64_t kGemmRows = 256;
constexpr int64_t kGemmCols = 512;

// Few enough columns for their sums to stay in the L1 cache.
constexpr int64_t kColumnSums = 1024;

constexpr int64_t kNoBadTarget = INT64_MAX;

template <typename T>
struct Kernels {
  // out[r, c] = max(out[r, c] + bias[c], 0) for rows [begin, end); bias may be null.
  void (*bias_relu)(T* out, const T* bias, int64_t cols, int64_t begin, int64_t end);

  // Adds the sums over rows to `sums`, for at most kColumnSums columns; rows are `stride` apart.
  void (*column_sums)(double* sums, const T* grad, int64_t rows, int64_t cols, int64_t stride);
  // grad_linear = output > 0 ? grad : 0, and its column_sums (`sums` may be null).
  void (*relu_backward)(T* grad_linear, double* sums, const T* grad, const T* output, int64_t rows,
                        int64_t cols, int64_t stride);

  // `scratch` has gemm_scratch bytes, aligned to a cache line, and is used by this call alone.
  void (*gemm)(const Gemm<T>& args, const GemmBlock& block, void* scratch);
  int64_t gemm_scratch;
  // Whether gemm() packs its operands instead of reading them in place.
  bool (*gemm_packs)(const Gemm<T>& args);
  // The same with all but the right operand in the accumulation type, whose scratch it takes.
  void (*wide_gemm)(const Gemm<accum<T>, T>& args, const GemmBlock& block, void* scratch);

  // For the rows at positions [begin, end).
  void (*log_softmax)(T* output, const T* input, Layout layout, int64_t begin, int64_t end);
  void (*log_softmax_backward)(T* grad_input, const T* grad, const T* output, Layout layout,
                               int64_t begin, int64_t end);
  // The same with an output as wide as the sums.
  void (*wide_log_softmax)(accum<T>* output, const T* input, Layout layout, int64_t begin,
                           int64_t end);
  void (*wide_log_softmax_backward)(T* grad_input, const accum<T>* grad, const accum<T>* output,
                                    Layout layout, int64_t begin, int64_t end);

  // Both return the first position whose target is out of range, or kNoBadTarget. The forward
  // writes each row's loss, unless `losses` is null, and adds to `sums`.
  int64_t (*cross_entropy)(const CrossEntropy<T>& args, int64_t begin, int64_t end,
                           const KeptRows<T>& kept, accum<T>* losses, LossSums& sums);
  // grad_output holds one value, or one per row. If T keeps the gradient, that is passed as the
  // logits and only multiplied by grad_output: max, sum, scale and the targets' range are ignored.
  // Otherwise it is first computed as the forward would have kept it with that scale. `grad_input`
  // may alias the logits.
  int64_t (*cross_entropy_backward)(const CrossEntropy<T>& args, int64_t begin, int64_t end,
                                    const accum<T>* max, const accum<T>* sum,
                                    const accum<T>* grad_output, bool grad_per_row, double scale,
                                    T* grad_input);

  // Computes the block's wanted results for rows [begin, end), whose targets are in range or
  // ignored. The backward reads the log-sum-exps and only writes the gradient.
  void (*logit_block)(const LogitBlock<accum<T>>& block, int64_t begin, int64_t end);
  void (*logit_block_backward)(const LogitBlock<accum<T>>& block, int64_t begin, int64_t end);

  // One step over n elements. `momentum_buffer` is null without momentum. With a `grad_scale`
  // other than 1 the gradient is divided by it and written back.
  void (*sgd_step)(T* param, T* grad, T* momentum_buffer, int64_t n, const SGDOptions& options,
                   double grad_scale);
  // The same with a momentum buffer in the accumulation type.
  void (*sgd_step_wide)(T* param, T* grad, accum<T>* momentum_buffer, int64_t n,
                        const SGDOptions& options, double grad_scale);
};

namespace generic {
template <typename T>
const Kernels<T>& kernels();
}
#if defined(__x86_64__)
namespace avx2 {
template <typename T>
const Kernels<T>& kernels();
}
namespace avx512 {
template <typename T>
const Kernels<T>& kernels();
}
#endif

}  // namespace fastnn::simd
