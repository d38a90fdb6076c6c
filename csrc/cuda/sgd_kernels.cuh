// SGD with momentum over many tensors in one launch: weight decay, momentum and the step in one
// pass.
// What bounds it: docs/performance.md, "Bounds of the CUDA kernels".
#pragma once

#include "cuda/integers.cuh"
#include "cuda/vec.cuh"

namespace fastnn::cuda {

constexpr int kSGDThreads = 256;
// To a multiprocessor at the least: for more, ptxas would spill registers on 8.6.
constexpr int kSGDBlocks = 4;
constexpr int kSGDTensors = 96;  // to a launch: what a kernel's 4 KiB of arguments hold

// Elements that one block steps.
template <typename T>
constexpr int64_t kSGDChunk = 4 * kSGDThreads * kVecSize<T>;

// A number that lies on the device, so that nobody has to wait for it.
struct DeviceScalar {
  const void* data = nullptr;
  bool is_double = false;  // or else float

  __device__ double value_or(double otherwise) const {
    if (data == nullptr) return otherwise;
    return is_double ? *static_cast<const double*>(data) : *static_cast<const float*>(data);
  }
};

struct SGDOptions {
  double lr;
  double momentum;
  double dampening;
  double weight_decay;
  bool nesterov;
  bool maximize;
  bool is_first_step;            // the momentum buffers hold nothing yet
  DeviceScalar device_lr = {};   // in place of `lr`
  DeviceScalar grad_scale = {};  // gradients are divided by it, and written back
  DeviceScalar found_inf = {};   // where not zero, nothing is done
};

// The tensors of a launch, each of which has blocks for all its elements. The momentum buffers'
// type B is T or wider.
template <typename T, typename B>
struct SGDTensors {
  int count = 0;
  unsigned first_block[kSGDTensors + 1] = {};
  int64_t sizes[kSGDTensors];
  T* params[kSGDTensors];
  T* grads[kSGDTensors];
  B* buffers[kSGDTensors];  // null without momentum
};
static_assert(sizeof(SGDTensors<float, float>) + sizeof(SGDOptions) <= 4096);

// The last tensor whose first block is not past `block`.
template <typename T, typename B>
__device__ int tensor_of_block(const SGDTensors<T, B>& tensors, unsigned block) {
  int low = 0, high = tensors.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (tensors.first_block[middle] <= block) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// The step of one element, in A.
template <typename A, bool kMomentum>
struct SGDStep {
  A lr, momentum, keep, weight_decay, grad_scale;
  bool nesterov, maximize, is_first_step;

  __device__ explicit SGDStep(const SGDOptions& options)
      : lr(A(options.device_lr.value_or(options.lr))),
        momentum(A(options.momentum)),
        keep(A(1 - options.dampening)),
        weight_decay(A(options.weight_decay)),
        grad_scale(A(options.grad_scale.value_or(1))),
        nesterov(options.nesterov),
        maximize(options.maximize),
        is_first_step(options.is_first_step) {
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

// One tensor's pointers.
template <typename T, typename B, bool kMomentum>
struct SGDPointers {
  // The buffer's vectors that have as many elements as one of the parameter's.
  static constexpr int kBufferVecs = kVecSize<T> / kVecSize<B>;

  T* param;
  T* grad;
  B* buffer;

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

  // The vector at element i, a 16-byte boundary in all.
  template <typename A>
  __device__ void step_vector(const SGDStep<A, kMomentum>& step, int64_t i) const {
    Vec<T> x = load_vec(param + i, /*aligned=*/true);
    Vec<T> g = load_vec(grad + i, /*aligned=*/true);
    Vec<B> b[kBufferVecs] = {};
    if (kMomentum && !step.is_first_step) {
#pragma unroll
      for (int v = 0; v < kBufferVecs; ++v) {
        b[v] = load_vec(buffer + i + v * kVecSize<B>, /*aligned=*/true);
      }
    }
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
    sgd_step_kernel(SGDTensors<T, B> tensors, SGDOptions options) {
  if (options.found_inf.value_or(0) != 0) return;
  const SGDStep<accum<T>, kMomentum> step(options);
  const int t = tensor_of_block(tensors, blockIdx.x);
  const SGDPointers<T, B, kMomentum> at{tensors.params[t], tensors.grads[t],
                                        kMomentum ? tensors.buffers[t] : nullptr};
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
  for (int64_t v = int64_t(threadIdx.x) * kVecSize<T>; v < kSGDChunk<T>;
       v += kSGDThreads * kVecSize<T>) {
    const int64_t i = begin - before + v;
    if (i >= 0 && i + kVecSize<T> <= n) {
      at.step_vector(step, i);
    } else {
      for (int64_t j = i; j < i + kVecSize<T>; ++j) {
        if (j >= 0 && j < n) at.step_element(step, j);
      }
    }
  }
}

// ---- the launches, on the host ----

// Collects tensors and launches whenever a launch is full.
template <typename T, typename B, bool kMomentum>
class SGDLauncher {
 public:
  SGDLauncher(const SGDOptions& options, cudaStream_t stream) : options_(options), stream_(stream) {
  }

  void add(T* param, T* grad, B* buffer, int64_t n) {
    if (n == 0) return;
    // As many as where the tensor starts at the worst alignment.
    const int64_t blocks = ceil_div(n + kVecSize<T> - 1, kSGDChunk<T>);
    const int64_t first = tensors_.first_block[tensors_.count];
    if (tensors_.count == kSGDTensors || first + blocks > INT32_MAX) launch();
    const int i = tensors_.count++;
    tensors_.sizes[i] = n;
    tensors_.params[i] = param;
    tensors_.grads[i] = grad;
    tensors_.buffers[i] = buffer;
    tensors_.first_block[i + 1] = tensors_.first_block[i] + unsigned(blocks);
  }

  void launch() {
    const unsigned blocks = tensors_.first_block[tensors_.count];
    if (blocks == 0) return;
    FASTNN_LAUNCH((sgd_step_kernel<T, B, kMomentum>), dim3(blocks), dim3(kSGDThreads), 0, stream_,
                  tensors_, options_);
    tensors_.count = 0;
  }

 private:
  SGDOptions options_;
  cudaStream_t stream_;
  SGDTensors<T, B> tensors_;
};

}  // namespace fastnn::cuda
