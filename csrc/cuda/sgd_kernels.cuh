// SGD with momentum over many tensors in one launch: weight decay, momentum and the step in one
// pass.
// What bounds it: docs/performance.md, "Bounds of the CUDA kernels".
#pragma once

#include "cuda/multi_tensor.cuh"
#include "ops/sgd_options.h"

namespace fastnn::cuda {

constexpr int kSGDThreads = 256;
// The least number per multiprocessor: for more, ptxas would spill registers.
template <typename T>
constexpr int kSGDBlocks = sizeof(T) == 4 ? 4 : 3;

// Vectors that a thread steps, and those that it has in flight at once: of each of the tensors.
constexpr int kSGDVectors = 4;
constexpr int kSGDVectorsAtOnce = 2;

// Elements from one of a thread's vectors to its next, and those that one block steps.
template <typename T>
constexpr int kSGDStride = kSGDThreads * kVecSize<T>;
template <typename T>
constexpr int64_t kSGDChunk = kSGDVectors * kSGDStride<T>;

// The arguments of a launch besides its tensors.
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

  __device__ void advance(int64_t elements) {
    param += elements;
    grad += elements;
    if (kMomentum) buffer += elements;
  }

  template <typename A>
  __device__ void step_element(const SGDStep<A, kMomentum>& step, int i) const {
    A x = A(param[i]), g = A(grad[i]);
    // On a first step the buffer is uninitialized, and may be NaN.
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
  // Loads the vectors at element i, a 16-byte boundary in all tensors.
  template <typename A>
  __device__ Vectors load(const SGDStep<A, kMomentum>& step, int i) const {
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
  __device__ void step_and_store(const SGDStep<A, kMomentum>& step, int i, Vectors at) const {
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
  // All are loaded before one is stored: the compiler doesn't know that tensors don't overlap.
  template <int kCount, typename A>
  __device__ void step_vectors(const SGDStep<A, kMomentum>& step, int i) const {
    Vectors loaded[kCount];
#pragma unroll
    for (int v = 0; v < kCount; ++v) loaded[v] = load(step, i + v * kSGDStride<T>);
#pragma unroll
    for (int v = 0; v < kCount; ++v) step_and_store(step, i + v * kSGDStride<T>, loaded[v]);
  }
};

template <typename T, typename B, bool kMomentum, int kBytes>
__global__ void __launch_bounds__(kSGDThreads, kSGDBlocks<T>) sgd_step_kernel(
    const __grid_constant__ TensorBatch<SGDPointers<T, B, kMomentum>, kBytes> tensors,
    SGDArgs args) {
  static_assert(sizeof(tensors) + sizeof(args) <= kBytes);
  if (args.found_inf.value_or(0) != 0) return;
  const SGDStep<accum<T>, kMomentum> step(args);
  const int t = tensor_of_block(tensors, blockIdx.x);
  SGDPointers<T, B, kMomentum> at = tensors.pointers[t];
  // Elements are counted from the boundary at or before the block's first one, so that all vectors
  // are aligned and only the first and the last may stick out.
  const int64_t begin = int64_t(blockIdx.x - tensors.first_block[t]) * kSGDChunk<T> -
                        elements_past_boundary(at.param);
  const int first = begin < 0 ? int(-begin) : 0;
  const int end = int(min_of(tensors.sizes[t] - begin, kSGDChunk<T>));
  at.advance(begin);

  if (!at.are_co_aligned()) {
#pragma unroll 1
    for (int i = first + int(threadIdx.x); i < end; i += kSGDThreads) at.step_element(step, i);
    return;
  }
  const auto are_whole = [&](int i, int count) {
    return i >= first && i + (count - 1) * kSGDStride<T> + kVecSize<T> <= end;
  };
#pragma unroll 1
  for (int v = 0; v < kSGDVectors; v += kSGDVectorsAtOnce) {
    const int i = v * kSGDStride<T> + int(threadIdx.x) * kVecSize<T>;
    if (are_whole(i, kSGDVectorsAtOnce)) {
      at.template step_vectors<kSGDVectorsAtOnce>(step, i);
      continue;
    }
#pragma unroll 1
    for (int k = i; k < i + kSGDVectorsAtOnce * kSGDStride<T>; k += kSGDStride<T>) {
      if (are_whole(k, 1)) {
        at.template step_vectors<1>(step, k);
      } else {
#pragma unroll 1
        for (int j = k; j < k + kVecSize<T>; ++j) {
          if (j >= first && j < end) at.step_element(step, j);
        }
      }
    }
  }
}

// ---- the launches, on the host ----

template <typename T, typename B, bool kMomentum, int kBytes>
auto sgd_launcher(const SGDArgs& args, cudaStream_t stream) {
  using Pointers = SGDPointers<T, B, kMomentum>;
  const auto launch = [=](unsigned blocks, const TensorBatch<Pointers, kBytes>& tensors) {
    FASTNN_LAUNCH((sgd_step_kernel<T, B, kMomentum, kBytes>), dim3(blocks), dim3(kSGDThreads), 0,
                  stream, tensors, args);
  };
  return BatchLauncher<Pointers, kBytes, decltype(launch)>(kSGDChunk<T>, kVecSize<T>, launch);
}

}  // namespace fastnn::cuda
