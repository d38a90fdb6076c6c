// The backward of the ReLU and the bias in one pass: masks the gradient and sums its columns.
// What bounds them: docs/performance.md, "Bounds of the CUDA kernels".
#pragma once

#include "cuda/integers.cuh"
#include "cuda/vec.cuh"

namespace fastnn::cuda {

constexpr int kReluThreads = 256;

template <typename T>
struct ReluBackwardArgs {
  int64_t rows;
  int64_t cols;
  const T* grad;
  const T* output;
  T* grad_linear;      // the masked gradient; or null
  accum<T>* partials;  // each block row's sums of every column; or null
  T* grad_bias;        // the sums themselves, if there is one row of blocks; or null
  // Rows r and r + phases reach 16-byte boundaries at the same columns. 1 if that doesn't matter.
  int phases = 1;
};

// In a block, threadIdx.x runs over columns, kWidth per thread, and threadIdx.y over rows. A row of
// blocks has the rows of one phase, so that a thread keeps its columns throughout, whatever their
// alignment. If kWidth is a vector's, grad, output and grad_linear are equally far from a 16-byte
// boundary.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kReluThreads) relu_backward_kernel(ReluBackwardArgs<T> args) {
  using A = accum<T>;
  static_assert(kWidth == 1 || kWidth == kVecSize<T>);
  const T* __restrict__ grad = args.grad;
  const T* __restrict__ output = args.output;
  T* __restrict__ grad_linear = args.grad_linear;

  const int64_t phase = blockIdx.y % args.phases;
  const int64_t first = blockIdx.y / args.phases * blockDim.y + threadIdx.y;
  const int64_t step = int64_t(gridDim.y / args.phases) * blockDim.y;
  // The row's vectors start at the boundary before it, so the first and the last may be partial.
  const int before = kWidth == 1 ? 0 : elements_past_boundary(grad + phase * args.cols);
  const int64_t col = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * kWidth - before;
  // Its columns are those of the vector's elements [begin, end).
  const int begin = col < 0 ? int(-col) : 0;
  const int end = int(min_of<int64_t>(args.cols - col, kWidth));
  const bool whole = begin == 0 && end == kWidth;
  const auto inside = [&](int j) { return j >= begin && j < end; };

  A sums[kWidth] = {};
  const auto mask = [&](T grad_value, T output_value, int j) {
    // Not `output > 0`: the gradient passes where the output is NaN, as in torch.
    const T masked = A(output_value) <= 0 ? T(0) : grad_value;
    sums[j] += A(masked);
    return masked;
  };
  // Only with several rows are enough loads of single 2-byte elements in flight.
#pragma unroll kWidth == 1 ? 4 : 1
  for (int64_t n = first; phase + n * args.phases < args.rows; n += step) {
    const int64_t i = (phase + n * args.phases) * args.cols + col;
    if (kWidth > 1 && whole) {
      const Vec<T> grads = load_vec(grad + i, /*aligned=*/true);
      const Vec<T> outputs = load_vec(output + i, /*aligned=*/true);
      Vec<T> masked;
#pragma unroll
      for (int j = 0; j < kWidth; ++j)
        masked.values[j] = mask(grads.values[j], outputs.values[j], j);
      if (grad_linear != nullptr) store_vec(grad_linear + i, /*aligned=*/true, masked);
    } else {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        if (!inside(j)) continue;
        const T masked = mask(grad[i + j], output[i + j], j);
        if (grad_linear != nullptr) grad_linear[i + j] = masked;
      }
    }
  }
  if (args.partials == nullptr && args.grad_bias == nullptr) return;

  // Adds the sums of the threads in a column, in an order that depends only on their number.
  FASTNN_SHARED(A, block_sums, [kReluThreads][kWidth]);
  A* mine = block_sums[threadIdx.y * blockDim.x + threadIdx.x];
#pragma unroll
  for (int j = 0; j < kWidth; ++j) mine[j] = sums[j];
  for (int half = int(blockDim.y) / 2; half > 0; half /= 2) {
    // Before the upper half's sums are read: they were written at the start or one step ago.
    __syncthreads();
    if (int(threadIdx.y) < half) {
      const A* theirs = block_sums[(threadIdx.y + half) * blockDim.x + threadIdx.x];
#pragma unroll
      for (int j = 0; j < kWidth; ++j) mine[j] += theirs[j];
    }
  }
  if (threadIdx.y != 0) return;
#pragma unroll
  for (int j = 0; j < kWidth; ++j) {
    if (!inside(j)) continue;
    if (args.partials != nullptr) {
      args.partials[blockIdx.y * args.cols + col + j] = mine[j];
    } else {
      args.grad_bias[col + j] = T(mine[j]);
    }
  }
}

constexpr int kSumColumns = 32;
constexpr int kSumRows = 32;

// The second stage: sums[c] = the sum over rows of partials[r * cols + c]. A thread adds every
// kSumRows-th row, then the sums of the threads in a column are added, both in a fixed order.
template <typename T>
__global__ void __launch_bounds__(kSumColumns* kSumRows)
    column_sums_kernel(T* sums, const accum<T>* partials, int64_t rows, int64_t cols) {
  using A = accum<T>;
  const int64_t col = int64_t(blockIdx.x) * kSumColumns + threadIdx.x;
  A sum = 0;
  if (col < cols) {
    for (int64_t r = threadIdx.y; r < rows; r += kSumRows) sum += partials[r * cols + col];
  }
  FASTNN_SHARED(A, block_sums, [kSumRows][kSumColumns]);
  A* column = &block_sums[0][threadIdx.x];
  column[threadIdx.y * kSumColumns] = sum;
  for (int half = kSumRows / 2; half > 0; half /= 2) {
    // Before the upper half's sums are read: they were written at the start or one step ago.
    __syncthreads();
    if (int(threadIdx.y) < half) {
      column[threadIdx.y * kSumColumns] += column[(threadIdx.y + half) * kSumColumns];
    }
  }
  if (threadIdx.y == 0 && col < cols) sums[col] = T(column[0]);
}

// ---- the launches, on the host ----

// How a pass over (rows, cols) is split: partial sums depend only on the sizes and the alignment.
struct ReluBackwardPlan {
  bool vectors;
  int phases;
  dim3 block;
  dim3 grid;  // y is the number of partial sums per column
};

template <typename T>
ReluBackwardPlan plan_relu_backward(const ReluBackwardArgs<T>& args) {
  constexpr int64_t kWidth = kVecSize<T>;
  // One wave of an H100 or H200: six per multiprocessor, at 39 registers per thread. A few more
  // would take a second wave.
  constexpr int64_t kBlocks = 768;
  // Fewer rows would not be worth a block's reduction, nor more partial sums the time to add them.
  constexpr int64_t kMinRowsToThread = 8;
  constexpr int64_t kMaxPartials = 512;
  const auto past = [](const T* p) {
    return reinterpret_cast<uintptr_t>(p) % kVecBytes / sizeof(T);
  };

  // Rows of very few vectors would be mostly ends, unless they are whole vectors.
  const bool ends_matter = args.cols % kWidth != 0 || past(args.grad) != 0;
  const bool vectors = past(args.grad) == past(args.output) &&
                       (args.grad_linear == nullptr || past(args.grad) == past(args.grad_linear)) &&
                       (!ends_matter || args.cols >= 4 * kWidth);
  int64_t phases = 1;
  while (vectors && args.rows > 1 && phases * args.cols % kWidth != 0) phases *= 2;
  const int64_t rows = ceil_div(args.rows, phases);  // of a phase
  const int64_t pieces =
      vectors ? ceil_div(args.cols + (ends_matter ? kWidth - 1 : 0), kWidth) : args.cols;

  // As wide as a warp if there are enough columns, wider if there are few rows.
  int64_t across = 32, down = kReluThreads / 32;
  for (; across / 2 >= pieces; across /= 2) down *= 2;
  for (; down / 2 >= rows; down /= 2) across *= 2;

  const int64_t blocks_across = ceil_div(pieces, across);
  const int64_t wanted = min_of(kMaxPartials, ceil_div(kBlocks, blocks_across));
  const int64_t useful = ceil_div(args.rows, down * kMinRowsToThread);
  const int64_t blocks_down = ceil_div(min_of(wanted, useful), phases) * phases;
  return {vectors, int(phases), dim3(unsigned(across), unsigned(down)),
          dim3(unsigned(blocks_across), unsigned(blocks_down))};
}

template <typename T>
void launch_relu_backward(ReluBackwardArgs<T> args, const ReluBackwardPlan& plan,
                          cudaStream_t stream) {
  args.phases = plan.phases;
  if (plan.vectors) {
    FASTNN_LAUNCH((relu_backward_kernel<T, kVecSize<T>>), plan.grid, plan.block, 0, stream, args);
  } else {
    FASTNN_LAUNCH((relu_backward_kernel<T, 1>), plan.grid, plan.block, 0, stream, args);
  }
}

template <typename T>
void launch_column_sums(T* sums, const accum<T>* partials, int64_t rows, int64_t cols,
                        cudaStream_t stream) {
  const dim3 grid(unsigned(ceil_div<int64_t>(cols, kSumColumns)));
  FASTNN_LAUNCH((column_sums_kernel<T>), grid, dim3(kSumColumns, kSumRows), 0, stream, sums,
                partials, rows, cols);
}

}  // namespace fastnn::cuda
