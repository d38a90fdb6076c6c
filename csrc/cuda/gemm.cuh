// A tiled matrix product with bias and ReLU as its epilogue: out = a @ b (+ bias) (then ReLU), for
// any dtype, size, stride and alignment.
//
// A block computes a tile of the output in steps along the depth: it loads both operands' next
// tiles from global memory into registers while it multiplies the current ones, which are in shared
// memory and already in the accumulation type. Shared memory is double-buffered, so that one
// barrier per step suffices.
// What bounds it: docs/performance.md, "Bounds of the CUDA kernels".
#pragma once

#include <type_traits>

#include "cuda/integers.cuh"
#include "cuda/portability.cuh"
#include "cuda/vec.cuh"

namespace fastnn::cuda {

// An operand as its lines (the rows of `a`, the columns of `b`): element p of line l is
// data[l * line_stride + p * depth_stride].
template <typename T>
struct GemmOperand {
  const T* data;
  int64_t line_stride;
  int64_t depth_stride;
  bool along_depth;  // whether neighbours in memory are neighbours along the depth, or lines
};

template <typename T>
struct GemmArgs {
  int64_t rows;
  int64_t cols;
  int64_t depth;
  GemmOperand<T> a;
  GemmOperand<T> b;
  const T* bias;  // one value per column, or null
  bool relu;
  bool whole_groups;  // whether all groups of columns are whole and aligned in `out`
  T* out;             // contiguous
};

// A block's tile of the output, and the part of it that each thread computes.
template <int kRows_, int kCols_, int kThreadRows_, int kThreadCols_>
struct GemmShape {
  static constexpr int kRows = kRows_;
  static constexpr int kCols = kCols_;
  static constexpr int kThreadRows = kThreadRows_;
  static constexpr int kThreadCols = kThreadCols_;
  static constexpr int kThreadsAcross = kCols / kThreadCols;
  static constexpr int kThreads = kThreadsAcross * (kRows / kThreadRows);
  // Blocks that a multiprocessor's 65536 registers must hold: while one waits at its barrier,
  // another multiplies. Numbers of 8 bytes take two registers.
  static constexpr int min_blocks(int number_bytes) {
    return (number_bytes == 8 ? 256 : 512) / kThreads;
  }
};
using LargeShape = GemmShape<128, 64, 8, 4>;
// In float64 the two buffers of a large tile would take 49 KiB, but a block may declare only 48.
// This shape does 8 flop per byte, about the F / B of GPUs that are fast in float64 (6 to 10).
using LargeDoubleShape = GemmShape<64, 64, 4, 4>;
// For fewer large tiles than multiprocessors: eight times as many blocks. It does 8 flop per byte
// of float32, mostly from the L2 cache, which holds such small operands; and shared memory takes
// half as many of a warp's cycles as the multiply-adds here, too.
using SmallShape = GemmShape<32, 32, 4, 4>;

// The depth of one step.
constexpr int kStep = 16;
// Steps whose products are summed separately before they are added to the total: the rounding error
// then grows with the depth of such a block and the number of blocks, not with their product.
constexpr int kStepsPerSum = 16;
// A thread's values form groups of this many neighbours, which are spread over the tile so that
// neighbouring threads read neighbouring groups: there are no bank conflicts in shared memory.
constexpr int kGroup = 4;

// kCount neighbours in memory, aligned so that one instruction moves 16 bytes of them, or them all.
template <typename T, int kCount>
struct alignas(min_of<int>(kCount * sizeof(T), 16)) Neighbours {
  T values[kCount];
};

template <int kCount, typename T>
__device__ Neighbours<T, kCount> read(const T* from) {
  return *reinterpret_cast<const Neighbours<T, kCount>*>(from);
}

template <typename T, int kCount>
__device__ void write_to(T* to, const Neighbours<T, kCount>& value) {
  if constexpr (sizeof(value) <= kVecBytes) {
    store_whole(to, value);
  } else {
    *reinterpret_cast<Neighbours<T, kCount>*>(to) = value;
  }
}

// One step of one operand in shared memory: for each depth its lines side by side.
template <typename A, int kLines>
class Tile {
 public:
  // Padded by 16 bytes: threads that store side by side along the depth have fewer bank conflicts,
  // and every depth still starts at a multiple of 16 bytes.
  static constexpr int kPitch = kLines + 16 / int(sizeof(A));

  __device__ A* at(int depth, int line) {
    return values_ + depth * kPitch + line;
  }
  __device__ const A* at(int depth, int line) const {
    return values_ + depth * kPitch + line;
  }

 private:
  A values_[kStep * kPitch];
};

// Moves one operand's tile from global to shared memory, in pieces of kWidth neighbours.
template <typename T, int kWidth, int kLines, int kThreads>
class TileLoader {
 public:
  using A = accum<T>;

  __device__ TileLoader(const GemmOperand<T>& from, int64_t lines, int64_t first_line)
      : along_depth_(from.along_depth), lines_(int(min_of<int64_t>(lines - first_line, kLines))) {
    constexpr int kPiecesToLine = kStep / kWidth, kPiecesToDepth = kLines / kWidth;
    static_assert(kThreads % kPiecesToLine == 0 && kThreads % kPiecesToDepth == 0);
    const int thread = int(threadIdx.x);
    line_ = along_depth_ ? thread / kPiecesToLine : thread % kPiecesToDepth * kWidth;
    depth_ = along_depth_ ? thread % kPiecesToLine * kWidth : thread / kPiecesToDepth;
    from_ = from.data + (first_line + line_) * from.line_stride + depth_ * from.depth_stride;
    next_piece_ = next_line() * from.line_stride + next_depth() * from.depth_stride;
    next_step_ = kStep * from.depth_stride;
  }

  // Loads the next step's tile into registers, with `depths` left; beyond the operand's end it is
  // zeros, which add nothing to a sum.
  __device__ void load(int64_t depths) {
    const int end = int(min_of<int64_t>(depths, kStep));
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const bool inside = line_ + i * next_line() < lines_ && depth_ + i * next_depth() < end;
      staged_[i] = inside ? read<kWidth>(from_ + i * next_piece_) : Piece{};
    }
    from_ += next_step_;
  }

  // Stores the tile from registers to shared memory.
  __device__ void store(Tile<A, kLines>& tile) const {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int line = line_ + i * next_line(), depth = depth_ + i * next_depth();
      // Some threads have one piece less than others.
      const bool in_tile =
          kPieces * kWidth * kThreads == kLines * kStep || (line < kLines && depth < kStep);
      if (!in_tile) return;
      A* to = tile.at(depth, line);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) to[j * pitch_in_piece()] = A(staged_[i].values[j]);
    }
  }

 private:
  static_assert(kStep % kWidth == 0 && kLines % kWidth == 0, "a piece would cross lines");
  static constexpr int kPieces = ceil_div(kLines * kStep, kWidth* kThreads);
  using Piece = Neighbours<T, kWidth>;

  // The lines between this thread's pieces. Recomputed, as storing it would spill registers.
  __device__ int next_line() const {
    return along_depth_ ? kThreads * kWidth / kStep : 0;
  }
  __device__ int next_depth() const {
    return along_depth_ ? 0 : kThreads * kWidth / kLines;
  }
  // Between neighbours in a piece, in shared memory.
  __device__ int pitch_in_piece() const {
    return along_depth_ ? Tile<A, kLines>::kPitch : 1;
  }

  const T* from_;       // this thread's first piece of the next tile
  int64_t next_piece_;  // from one of this thread's pieces to the next, in memory
  int64_t next_step_;
  bool along_depth_;
  int lines_;         // the tile's number of lines
  int line_, depth_;  // where this thread's first piece starts in the tile
  Piece staged_[kPieces];
};

// The sums of one thread.
template <typename T, typename Shape>
class ThreadSums {
 public:
  using A = accum<T>;

  // This thread's row i and column j in the block's tile.
  static __device__ int row(int i) {
    return i / kGroup * (kGroup * kThreadsDown) + thread_row() * kGroup + i % kGroup;
  }
  static __device__ int col(int j) {
    return j / kGroup * (kGroup * Shape::kThreadsAcross) + thread_col() * kGroup + j % kGroup;
  }

  __device__ void multiply(const Tile<A, Shape::kRows>& a, const Tile<A, Shape::kCols>& b) {
#pragma unroll
    for (int p = 0; p < kStep; ++p) {
      A left[Shape::kThreadRows], right[Shape::kThreadCols];
#pragma unroll
      for (int i = 0; i < Shape::kThreadRows; i += kGroup) read_group(left + i, a.at(p, row(i)));
#pragma unroll
      for (int j = 0; j < Shape::kThreadCols; j += kGroup) read_group(right + j, b.at(p, col(j)));
#pragma unroll
      for (int i = 0; i < Shape::kThreadRows; ++i) {
#pragma unroll
        for (int j = 0; j < Shape::kThreadCols; ++j) sums_[i][j] += left[i] * right[j];
      }
    }
  }

  // Ends a block of steps.
  __device__ void add_to_totals() {
#pragma unroll
    for (int i = 0; i < Shape::kThreadRows; ++i) {
#pragma unroll
      for (int j = 0; j < Shape::kThreadCols; ++j) {
        totals_[i][j] += sums_[i][j];
        sums_[i][j] = A(0);
      }
    }
  }

  // Adds the bias, applies the ReLU and rounds to T, for the tile that starts at this element.
  __device__ void write(const GemmArgs<T>& args, int64_t first_row, int64_t first_col) const {
#pragma unroll
    for (int j = 0; j < Shape::kThreadCols; j += kGroup) {
      const int64_t c = first_col + col(j);
      A bias[kGroup] = {};
#pragma unroll
      for (int k = 0; k < kGroup; ++k) {
        if (args.bias != nullptr && c + k < args.cols) bias[k] = A(args.bias[c + k]);
      }
#pragma unroll
      for (int i = 0; i < Shape::kThreadRows; ++i) {
        const int64_t r = first_row + row(i);
        if (r >= args.rows) continue;
        Neighbours<T, kGroup> values;
#pragma unroll
        for (int k = 0; k < kGroup; ++k)
          values.values[k] = epilogue(totals_[i][j + k] + bias[k], args.relu);
        write_group(args, r, c, values);
      }
    }
  }

 private:
  static constexpr int kThreadsDown = Shape::kRows / Shape::kThreadRows;
  static_assert(Shape::kThreadRows % kGroup == 0 && Shape::kThreadCols % kGroup == 0);

  static __device__ int thread_row() {
    return int(threadIdx.x) / Shape::kThreadsAcross;
  }
  static __device__ int thread_col() {
    return int(threadIdx.x) % Shape::kThreadsAcross;
  }

  static __device__ void read_group(A* to, const A* from) {
    const auto group = read<kGroup>(from);
#pragma unroll
    for (int k = 0; k < kGroup; ++k) to[k] = group.values[k];
  }

  // Zero where x <= 0, so that NaN passes through as in torch.relu.
  static __device__ T epilogue(A x, bool relu) {
    return T(relu && x <= 0 ? A(0) : x);
  }

  static __device__ void write_group(const GemmArgs<T>& args, int64_t r, int64_t c,
                                     const Neighbours<T, kGroup>& values) {
    T* to = args.out + r * args.cols + c;
    if (args.whole_groups) {
      if (c < args.cols) write_to(to, values);
      return;
    }
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      if (c + k < args.cols) to[k] = values.values[k];
    }
  }

  A sums_[Shape::kThreadRows][Shape::kThreadCols] = {};
  A totals_[Shape::kThreadRows][Shape::kThreadCols] = {};
};

// One block per tile of the output, one row of tiles after the other. With a kWidth above 1 (a
// vector's) the pieces of both operands are aligned and whole.
template <typename T, int kWidth, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::min_blocks(sizeof(accum<T>)))
    gemm_kernel(GemmArgs<T> args) {
  using ATile = Tile<accum<T>, Shape::kRows>;
  using BTile = Tile<accum<T>, Shape::kCols>;
  FASTNN_SHARED(ATile, a_tiles, [2]);
  FASTNN_SHARED(BTile, b_tiles, [2]);

  const int64_t tiles_across = ceil_div<int64_t>(args.cols, Shape::kCols);
  const int64_t first_row = blockIdx.x / tiles_across * Shape::kRows;
  const int64_t first_col = blockIdx.x % tiles_across * Shape::kCols;

  TileLoader<T, kWidth, Shape::kRows, Shape::kThreads> a(args.a, args.rows, first_row);
  TileLoader<T, kWidth, Shape::kCols, Shape::kThreads> b(args.b, args.cols, first_col);
  const auto load = [&](int64_t depths) {
    a.load(depths);
    b.load(depths);
  };
  const auto store = [&](int buffer) {
    a.store(a_tiles[buffer]);
    b.store(b_tiles[buffer]);
  };

  ThreadSums<T, Shape> sums;
  if (args.depth > 0) {
    load(args.depth);
    store(0);
    // Before threads read what others have stored.
    __syncthreads();
  }
  int steps_summed = 0;
  int buffer = 0;
  for (int64_t depths = args.depth; depths > 0; depths -= kStep) {
    const bool has_next = depths > kStep;
    // In flight while the current tiles are multiplied.
    if (has_next) load(depths - kStep);
    sums.multiply(a_tiles[buffer], b_tiles[buffer]);
    if (++steps_summed == kStepsPerSum || !has_next) {
      sums.add_to_totals();
      steps_summed = 0;
    }
    if (has_next) {
      // No thread reads the other buffer any more: all were past it at the last barrier. This
      // barrier separates these stores from the next step's reads, and this step's reads from the
      // next step's stores.
      buffer = 1 - buffer;
      store(buffer);
      __syncthreads();
    }
  }
  sums.write(args, first_row, first_col);
}

// ---- the choice of a kernel, on the host ----

template <typename T>
bool is_aligned(const T* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % kVecBytes == 0;
}

template <typename T>
GemmOperand<T> operand(const T* data, int64_t line_stride, int64_t depth_stride) {
  return {data, line_stride, depth_stride, depth_stride <= line_stride};
}

// Whether an operand consists of aligned vectors. A dimension of size 1 may have any stride.
template <typename T>
bool has_vectors(const GemmOperand<T>& from, int64_t lines, int64_t depth) {
  constexpr int64_t kWidth = kVecSize<T>;
  const bool along = from.along_depth;
  const int64_t inner = along ? depth : lines,
                inner_stride = along ? from.depth_stride : from.line_stride;
  const int64_t outer = along ? lines : depth,
                outer_stride = along ? from.line_stride : from.depth_stride;
  return is_aligned(from.data) && inner_stride == 1 && inner % kWidth == 0 &&
         (outer == 1 || outer_stride % kWidth == 0);
}

template <typename T, int kWidth, typename Shape>
void launch_gemm_shape(const GemmArgs<T>& args, cudaStream_t stream) {
  const int64_t tiles =
      ceil_div<int64_t>(args.rows, Shape::kRows) * ceil_div<int64_t>(args.cols, Shape::kCols);
  FASTNN_LAUNCH((gemm_kernel<T, kWidth, Shape>), dim3(unsigned(tiles)), dim3(Shape::kThreads), 0,
                stream, args);
}

template <typename T, typename Shape>
void launch_gemm_shape(const GemmArgs<T>& args, cudaStream_t stream) {
  if (has_vectors(args.a, args.rows, args.depth) && has_vectors(args.b, args.cols, args.depth)) {
    launch_gemm_shape<T, kVecSize<T>, Shape>(args, stream);
  } else {
    launch_gemm_shape<T, 1, Shape>(args, stream);
  }
}

// Large tiles move the fewest bytes; they are used if they are enough for every multiprocessor.
template <typename T>
void launch_gemm(GemmArgs<T> args, int multiprocessors, cudaStream_t stream) {
  if (args.rows == 0 || args.cols == 0) return;
  using Large = std::conditional_t<std::is_same_v<T, double>, LargeDoubleShape, LargeShape>;
  args.whole_groups = args.cols % kGroup == 0 && is_aligned(args.out);
  const int64_t large_tiles =
      ceil_div<int64_t>(args.rows, Large::kRows) * ceil_div<int64_t>(args.cols, Large::kCols);
  if (large_tiles >= multiprocessors) {
    launch_gemm_shape<T, Large>(args, stream);
  } else {
    launch_gemm_shape<T, SmallShape>(args, stream);
  }
}

}  // namespace fastnn::cuda
