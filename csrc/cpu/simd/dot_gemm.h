// Products computed as dot products: few rows by columns that are contiguous along the depth, like
// a linear layer's weight, or few such columns. The larger operand is read once, in order. Packing
// it, as the tiles do, would cost more than multiplying it.
#pragma once

#include "cpu/simd/gemm_epilogue.h"

namespace fastnn::simd::FASTNN_SIMD_TARGET {

// The numbers of rows and columns that are summed at once, in registers.
constexpr int64_t kDotRows = kVectorBytes == 64 ? 6 : 2;
constexpr int64_t kDotCols = 4;
// The epilogue reads a row of sums in whole vectors.
template <typename A>
constexpr int64_t kSumsStride = std::max(kDotCols, kLanes<A>);
// At most this many terms are added to a lane in sequence: rounding errors grow with their number.
constexpr int64_t kDotTerms = 256;

// With more rows or columns packing pays; and the more there are, the longer the sums must be to
// repay the reductions across lanes.
template <typename T>
inline bool is_of_dot_products(const Gemm<T>& g) {
  constexpr int64_t kFew = 16;
  const bool lie_along_depth = !g.a.transposed && g.b.transposed;
  const bool has_few = g.rows <= kFew || g.cols < kFew;
  if (!lie_along_depth || !has_few) return false;
  // A single column of many rows takes as long as kDotCols of them.
  const int64_t few = g.cols == 1 && g.rows > kFew ? 2 * kDotCols : std::min(g.rows, g.cols);
  return g.depth >= 2 * few * kLanes<accum<T>>;
}

// Pointers to N lines of a matrix from `first` on; past the end, to the last line.
template <int64_t N, typename T>
struct Lines {
  const T* of[N];

  Lines(const Matrix<T>& matrix, int64_t first, int64_t end) {
    for (int64_t i = 0; i < N; ++i) {
      of[i] = matrix.data + std::min(first + i, end - 1) * matrix.stride;
    }
  }
};
template <typename T>
using DotRows = Lines<kDotRows, T>;
template <typename T>
using DotCols = Lines<kDotCols, T>;

// sums[r * kSumsStride + c] = the dot product of row r, of the first Rows, and column c.
template <int64_t Rows, typename T, typename A = accum<T>>
inline void dot_products(const DotRows<T>& a, const DotCols<T>& b, int64_t depth, A* sums) {
  A total[Rows][kDotCols] = {};
  for (int64_t first = 0; first < depth; first += kDotTerms * kLanes<A>) {
    const int64_t last = std::min(first + kDotTerms * kLanes<A>, depth);
    vec<A> lanes[Rows][kDotCols] = {};
    const auto multiply = [&](auto load_vector) {
      vec<A> cols[kDotCols];
#pragma GCC unroll 8
      for (int64_t c = 0; c < kDotCols; ++c) cols[c] = load_vector(b.of[c]);
#pragma GCC unroll 8
      for (int64_t r = 0; r < Rows; ++r) {
        const vec<A> row = load_vector(a.of[r]);
#pragma GCC unroll 8
        for (int64_t c = 0; c < kDotCols; ++c) lanes[r][c] += row * cols[c];
      }
    };
    int64_t p = first;
    for (; p + kLanes<A> <= last; p += kLanes<A>) {
      multiply([&](const T* line) { return load(line + p); });
    }
    if (p < last) multiply([&](const T* line) { return load_up_to(line + p, last - p); });
#pragma GCC unroll 8
    for (int64_t r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
      for (int64_t c = 0; c < kDotCols; ++c) total[r][c] += reduce_sum<A>(lanes[r][c])[0];
    }
  }
  for (int64_t r = 0; r < Rows; ++r) {
    for (int64_t c = 0; c < kDotCols; ++c) sums[r * kSumsStride<A> + c] = total[r][c];
  }
}

// The same for a number of rows that is only known at run time.
template <int64_t Rows = kDotRows, typename T, typename A = accum<T>>
inline void dot_products_of(int64_t rows, const DotRows<T>& a, const DotCols<T>& b, int64_t depth,
                            A* sums) {
  if constexpr (Rows > 1) {
    if (rows < Rows) return dot_products_of<Rows - 1>(rows, a, b, depth, sums);
  }
  dot_products<Rows>(a, b, depth, sums);
}

template <typename T, typename A = accum<T>>
inline void dot_gemm(const Gemm<T>& g, const GemmBlock& block) {
  A sums[kDotRows * kSumsStride<A>] = {};
  for (int64_t col = block.cols.begin; col < block.cols.end; col += kDotCols) {
    const Range cols = {col, std::min(col + kDotCols, block.cols.end)};
    const DotCols<T> b(g.b, cols.begin, cols.end);
    for (int64_t row = block.rows.begin; row < block.rows.end; row += kDotRows) {
      const Range rows = {row, std::min(row + kDotRows, block.rows.end)};
      const DotRows<T> a(g.a, rows.begin, rows.end);
      dot_products_of(size(rows), a, b, g.depth, sums);
      finish_tile(g, rows, cols, sums, kSumsStride<A>);
    }
  }
}

}  // namespace fastnn::simd::FASTNN_SIMD_TARGET
