// linear_cross_entropy's blocks of logits: cross_entropy's rows over products x in the accumulation
// dtype. The logits y are scale * x, or softcap * tanh(scale * x / softcap), and a z-loss z adds
// z * lse^2 to a row's loss and 2 * z * lse * softmax to its gradient. The gradient is that with
// respect to y times the softcap's slope; the incoming gradient already contains `scale`.
#pragma once

#include "cuda/cross_entropy_kernels.cuh"

namespace fastnn::cuda {

// `Element` is the type of the gradient, an operand of the products: a Widened if that is narrower.
template <typename Storage, typename Element>
struct LogitArgs : CrossEntropyArgs<Storage> {
  using A = accum<Storage>;
  using Out = Element;
  static constexpr bool kStrided = false, kHasSoftcap = true, kHasZLoss = true;

  A scale;
  A softcap;  // 0: none
  A z_loss;

  __device__ A logit(A x) const {
    return softcap == 0 ? scale * x : softcap * std::tanh(scale * x / softcap);
  }
  // Branches once for all N: without a softcap this must cost as little as possible.
  template <int N>
  __device__ void logits_of(const A (&x)[N], A (&y)[N]) const {
#pragma unroll
    for (int j = 0; j < N; ++j) y[j] = scale * x[j];
    if (softcap == 0) return;
#pragma unroll
    for (int j = 0; j < N; ++j) y[j] = softcap * std::tanh(y[j] / softcap);
  }
  __device__ A z_loss_of(A max, A log_sum) const {
    // lse may be infinite: 0 * lse^2 would be NaN.
    return z_loss == 0 ? A(0) : z_loss * (max + log_sum) * (max + log_sum);
  }
  // Added to the sum of q, which multiplies the softmax.
  __device__ A z_loss_slope(A max, A log_sum) const {
    return z_loss == 0 ? A(0) : 2 * z_loss * (max + log_sum);
  }
  // The gradient at products x; p holds the target's probabilities if it has them.
  template <TargetKind Kind, int N>
  __device__ void gradient(const GradientRow<A>& row, Classes c, const A (&x)[N], const A (&p)[N],
                           A (&out)[N]) const {
    A y[N];
    logits_of(x, y);
    CrossEntropyArgs<Storage>::template gradient<Kind>(row, c, y, p, out);
    if (softcap == 0) return;
#pragma unroll
    for (int j = 0; j < N; ++j) out[j] *= A(1) - (y[j] / softcap) * (y[j] / softcap);
  }
};

// Computes each row's loss, but not their sum.
template <typename T, TargetKind Kind>
struct LogitLossRows : CrossEntropyForwardRows<T, Kind, LogitArgs<T, T>> {
  static constexpr bool kSums = false;
};

template <typename T, typename Element, TargetKind Kind>
struct LogitGradientRows : CrossEntropyGradientRows<T, Kind, LogitArgs<T, Element>> {
  static constexpr bool kSums = false;

  const T* grad;  // the factor of every row's gradient

  __device__ void start() {
    this->scale = *grad;
  }
};

template <typename T, typename Element, TargetKind Kind>
using LogitBackwardRows = CrossEntropyBackwardRows<T, Kind, LogitArgs<T, Element>>;

}  // namespace fastnn::cuda
