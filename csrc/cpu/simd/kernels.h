// The CPU kernels as a table of function pointers per storage type, one table for each instruction
// set that kernels.cpp was compiled for; kernels<T>() gives the one in use.
#pragma once

#include "cpu/simd/types.h"
#include "ops/sgd_options.h"

namespace fastnn::simd {

// The operands of cross entropy's kernels. Targets are class indices (`target`) or probabilities
// in the logits' layout (`target_probs`); the other is null, and `weight` may be.
template <typename T>
struct CrossEntropy {
  Layout layout;
  const T* logits;
  const int64_t* target;
  const T* target_probs;
  const T* weight;
  int64_t ignore_index;
  double label_smoothing;
};

// What the forward leaves for the backward, all of it null where no gradient is wanted: the
// gradient times `scale` where T keeps that; else each row's log-sum-exp, its maximum and the log
// of the sum past it.
template <typename T>
struct KeptRows {
  T* grad;
  double scale;
  accum<T>* max;
  accum<T>* log_sum;
};

// Sums over rows, in double whatever the storage: a loss over many rows keeps its digits.
struct LossSums {
  double loss = 0;
  double weight = 0;
};

// A block of rows of logits, in what the sums are carried in, and what is made of them: each row's
// loss, log-sum-exp (its maximum and the log of the sum past it), and the gradient in the logits'
// place. What is null is not wanted, `gradient` among them, and its factor `grad`: one value, or
// one for each row.
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

// A parameter that a step of SGD changes, as sgd_step takes it: one of the buffers may be given.
template <typename T>
struct SteppedParam {
  T* param;
  T* momentum_buffer;
  accum<T>* wide_momentum_buffer;
  SGDOptions options;
};

// out = a @ b (+ bias) (then ReLU), or zero where `mask` is not positive, with a of (rows, depth)
// and b of (depth, cols); or out + a @ b with `add`, which goes with nothing else. out is
// contiguous, and so is mask; bias is one value for each column. Where there is a parameter to
// step, the product is its gradient, and what out then holds is undefined. Bias, mask and step may
// be null. The right operand may be stored narrower than all else, which then is as wide as the
// sums.
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

// The part of the output that one call computes, of at most kGemmRows x kGemmCols: its share of the
// left operand stays in the second-level cache, and packing the right one is a small part of the
// work.
struct GemmBlock {
  Range rows;
  Range cols;
};
constexpr int64_t kGemmRows = 256;
constexpr int64_t kGemmCols = 512;

// Few enough columns for their sums to stay in the nearest cache.
constexpr int64_t kColumnSums = 1024;

constexpr int64_t kNoBadTarget = INT64_MAX;

template <typename T>
struct Kernels {
  // out[r, c] = max(out[r, c] + bias[c], 0) for rows [begin, end); bias may be null.
  void (*bias_relu)(T* out, const T* bias, int64_t cols, int64_t begin, int64_t end);

  // The sum over rows added to sums, for a block of at most kColumnSums columns of rows that are
  // `stride` apart.
  void (*column_sums)(double* sums, const T* grad, int64_t rows, int64_t cols, int64_t stride);
  // grad_linear = output > 0 ? grad : 0, and its column_sums (`sums` may be null).
  void (*relu_backward)(T* grad_linear, double* sums, const T* grad, const T* output, int64_t rows,
                        int64_t cols, int64_t stride);

  // `scratch` is of gemm_scratch bytes, aligned to a cache line, and no other call's meanwhile.
  void (*gemm)(const Gemm<T>& args, const GemmBlock& block, void* scratch);
  int64_t gemm_scratch;
  // Whether gemm() packs its operands, rather than read them where they are.
  bool (*gemm_packs)(const Gemm<T>& args);
  // The same with everything but the right operand as wide as the sums; its scratch is theirs.
  void (*wide_gemm)(const Gemm<accum<T>, T>& args, const GemmBlock& block, void* scratch);

  // For the rows at positions [begin, end).
  void (*log_softmax)(T* output, const T* input, Layout layout, int64_t begin, int64_t end);
  void (*log_softmax_backward)(T* grad_input, const T* grad, const T* output, Layout layout,
                               int64_t begin, int64_t end);

  // Both return the first position whose target is out of range, or kNoBadTarget. The forward
  // writes each row's loss, unless `losses` is null, and adds to `sums`.
  int64_t (*cross_entropy)(const CrossEntropy<T>& args, int64_t begin, int64_t end,
                           const KeptRows<T>& kept, T* losses, LossSums& sums);
  // grad_output holds one value, or one per row; `scale` multiplies it. Where T keeps the gradient,
  // that takes the place of the logits, and is multiplied by grad_output alone: max, log_sum and
  // scale, which are not looked at, nor targets' range. `grad_input` may be where the logits are.
  int64_t (*cross_entropy_backward)(const CrossEntropy<T>& args, int64_t begin, int64_t end,
                                    const accum<T>* max, const accum<T>* log_sum,
                                    const T* grad_output, bool grad_per_row, double scale,
                                    T* grad_input);

  // For the rows [begin, end) of the block, whose targets are in range or none: what isn't null.
  // The backward reads the log-sum-exps instead, and writes the gradient alone.
  void (*logit_block)(const LogitBlock<accum<T>>& block, int64_t begin, int64_t end);
  void (*logit_block_backward)(const LogitBlock<accum<T>>& block, int64_t begin, int64_t end);

  // One step over n elements. `momentum_buffer` is null without momentum. With a `grad_scale`
  // other than 1 the gradient is divided by it and written back.
  void (*sgd_step)(T* param, T* grad, T* momentum_buffer, int64_t n, const SGDOptions& options,
                   double grad_scale);
  // The same with a momentum buffer of what T is computed in.
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
