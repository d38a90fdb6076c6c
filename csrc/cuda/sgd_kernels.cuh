// SGD with momentum over many tensors in one launch: weight decay, momentum and the step in one
// pass.
// What bounds it: docs/performance.md, "Bounds of the CUDA kernels".
#pragma once

#include "cuda/multi_tensor.cuh"
#include "ops/sgd_options.h"

namespace fastnn::cuda {

constexpr int kSGDThreads = 256;
// To a multiprocessor at the least: for more, ptxas would spill registers on 8.6.
constexpr int kSGDBlocks = 4;

// Vectors that a thread steps, and those that it has in flight at once: of each of the tensors.
constexpr int kSGDVectors = 4;
template <typename T>
constexpr int kSGDVectorsAtOnce = sizeof(T) == 2 ? 1 : 2;  // more would spill registers

// Elements that one block steps.
template <typename T>
constexpr int64_t kSGDChunk = kSGDVectors * kSGDThreads * kVecSize<T>;

// What a launch takes beside its tensors.
struct SGDArgs {
  SGDOptions options;
  DeviceScalar device_lr = {};   // in place of `options.lr`
  DeviceScalar grad_scale = {};  // gradients are divided by it, and written back
  DeviceScalar found_inf = {};   // where not zero, nothing is done
};

// The step of one element, in A.
template <typename A, bool kMomentum>
struct SGDStep {
  A lr, momentum, keep, weight_decay, grad_scale;
  bool nesterov, maximize, is_first_step;

  __device__ explicit SGDStep(const SGDArgs& args)
      : lr(A(args.device_lr.value_or(args.options.lr))),
        momentum(A(args.options.momentum)),
        keep(A(1 - args.options.dampening)),
        weight_decay(A(args.options.weight_decay)),
        grad_scale(A(args.grad_scale.value_or(1))),
        nesterov(args.options.nesterov),
        maximize(args.options.maximize),
        is_first_step(args.options.is_first_step) {
  }

  __device__ bool unscales() const {
    return grad_scale != A(1);
  }

  __device__ void operator()(A& param, A& grad, A& buffer) const {
    if (unscales()) grad /= grad_scale;
    A direction = maximize ? -grad : grad;
    // Without decay the parameter stays out of it: 0 * inf would be NaN.
    if (weight_decay != 0) direction += weight_decay * param;
    if (kMomentum) {
      buffer = is_first_step ? direction : momentum * buffer + keep * direction;
      direction = nesterov ? direction + momentum * buffer : buffer;
    }
    param -= lr * direction;
  }
};

// One parameter's pointers. The momentum buffer's type B is T or wider.
template <typename T, typename B, bool kMomentum>
struct SGDPointers {
  // The buffer's vectors that have as many elements as one of the parameter's.
  static constexpr int kBufferVecs = kVecSize<T> / kVecSize<B>;

  T* param;
  T* grad;
  B* buffer;  // null without momentum

  // Whether the others are at a 16-byte boundary wherever the parameter is.
  __device__ bool are_co_aligned() const {
    return co_aligned(param, grad) && (!kMomentum || co_aligned(param, buffer));
  }

  template <typename A>
  __device__ void step_element(const SGDStep<A, kMomentum>& step, int64_t i) const {
    A x = A(param[i]), g = A(grad[i]);
    // What a first buffer holds is nobody's, and may be NaN.
    A b = kMomentum && !step.is_first_step ? A(buffer[i]) : A(0);
    step(x, g, b);
    param[i] = T(x);
    if (step.unscales()) grad[i] = T(g);
    if (kMomentum) buffer[i] = B(b);
  }

  struct Vectors {
    Vec<T> x, g;
    Vec<B> b[kBufferVecs];
  };
  // Those at element i, a 16-byte boundary in all.
  template <typename A>
  __device__ Vectors load(const SGDStep<A, kMomentum>& step, int64_t i) const {
    Vectors at{load_vec(param + i, /*aligned=*/true), load_vec(grad + i, /*aligned=*/true), {}};
    if (kMomentum && !step.is_first_step) {
#pragma unroll
      for (int v = 0; v < kBufferVecs; ++v) {
        at.b[v] = load_vec(buffer + i + v * kVecSize<B>, /*aligned=*/true);
      }
    }
    return at;
  }
  template <typename A>
  __device__ void step_and_store(const SGDStep<A, kMomentum>& step, int64_t i, Vectors at) const {
    auto& [x, g, b] = at;
#pragma unroll
    for (int j = 0; j < kVecSize<T>; ++j) {
      B& stored = b[j / kVecSize<B>].values[j % kVecSize<B>];
      A xj = A(x.values[j]), gj = A(g.values[j]), bj = A(stored);
      step(xj, gj, bj);
      x.values[j] = T(xj);
      g.values[j] = T(gj);
      stored = B(bj);
    }
    store_vec(param + i, /*aligned=*/true, x);
    if (step.unscales()) store_vec(grad + i, /*aligned=*/true, g);
    if (kMomentum) {
#pragma unroll
      for (int v = 0; v < kBufferVecs; ++v) {
        store_vec(buffer + i + v * kVecSize<B>, /*aligned=*/true, b[v]);
      }
    }
  }
};

template <typename T, typename B, bool kMomentum>
__global__ void __launch_bounds__(kSGDThreads, kSGDBlocks)
    sgd_step_kernel(TensorBatch<SGDPointers<T, B, kMomentum>> tensors, SGDArgs args) {
  static_assert(sizeof(tensors) + sizeof(args) <= 4096);
  if (args.found_inf.value_or(0) != 0) return;
  const SGDStep<accum<T>, kMomentum> step(args);
  const int t = tensor_of_block(tensors, blockIdx.x);
  const SGDPointers<T, B, kMomentum> at = tensors.pointers[t];
  const int64_t n = tensors.sizes[t];
  const int64_t begin = int64_t(blockIdx.x - tensors.first_block[t]) * kSGDChunk<T>;

  if (!at.are_co_aligned()) {
    const int64_t end = begin + kSGDChunk<T> < n ? begin + kSGDChunk<T> : n;
    for (int64_t i = begin + threadIdx.x; i < end; i += kSGDThreads) at.step_element(step, i);
    return;
  }
  // Vectors are counted from the boundary at or before the first element, so that all are aligned
  // and only the first and the last may stick out.
  const int before = elements_past_boundary(at.param);
  const int64_t first = begin - before + int64_t(threadIdx.x) * kVecSize<T>;
  const auto is_whole = [&](int64_t i) { return i >= 0 && i + kVecSize<T> <= n; };
#pragma unroll 1
  for (int round = 0; round < kSGDVectors; round += kSGDVectorsAtOnce<T>) {
    // All that are loaded at once before any is stored: the compiler doesn't know that tensors
    // don't overlap.
    const auto element = [&](int u) {
      return first + int64_t(round + u) * (kSGDThreads * kVecSize<T>);
    };
    typename SGDPointers<T, B, kMomentum>::Vectors loaded[kSGDVectorsAtOnce<T>];
#pragma unroll
    for (int u = 0; u < kSGDVectorsAtOnce<T>; ++u) {
      if (is_whole(element(u))) loaded[u] = at.load(step, element(u));
    }
#pragma unroll
    for (int u = 0; u < kSGDVectorsAtOnce<T>; ++u) {
      const int64_t i = element(u);
      if (is_whole(i)) {
        at.step_and_store(step, i, loaded[u]);
      } else {
        for (int64_t j = i; j < i + kVecSize<T>; ++j) {
          if (j >= 0 && j < n) at.step_element(step, j);
        }
      }
    }
  }
}

// ---- the launches, on the host ----

template <typename T, typename B, bool kMomentum>
auto sgd_launcher(const SGDArgs& args, cudaStream_t stream) {
  using Pointers = SGDPointers<T, B, kMomentum>;
  const auto launch = [=](unsigned blocks, const TensorBatch<Pointers>& tensors) {
    FASTNN_LAUNCH((sgd_step_kernel<T, B, kMomentum>), dim3(blocks), dim3(kSGDThreads), 0, stream,
                  tensors, args);
  };
  return BatchLauncher<Pointers, decltype(launch)>(kSGDChunk<T>, kVecSize<T>, launch);
}

}  // namespace fastnn::cuda
