// Products of many short rows with few columns: a vector's lanes are rows. Tiles, whose lanes are
// columns, would leave most lanes empty.
#pragma once

#include "cpu/simd/gemm_epilogue.h"
#include "cpu/simd/transposed_rows.h"

namespace fastnn::simd::FASTNN_SIMD_TARGET {

template <typename A>
constexpr int64_t kNarrowCols = kLanes<A> / 2;

template <typename T>
inline bool is_narrow(const Gemm<T>& g) {
  using A = accum<T>;
  return g.rows >= kLanes<A> && g.cols <= kNarrowCols<A> && g.depth <= kShortRow<A> &&
         !g.a.transposed && !g.step && !g.add;
}

template <typename T>
inline void narrow_gemm(const Gemm<T>& g, const GemmBlock& block) {
  using A = accum<T>;
  A right[kNarrowCols<A>][kShortRow<A>];
  for (int64_t c = 0; c < g.cols; ++c) {
    for (int64_t p = 0; p < g.depth; ++p) {
      right[c][p] =
          load_scalar(g.b.data + (g.b.transposed ? c * g.b.stride + p : p * g.b.stride + c));
    }
  }
  for (int64_t row = block.rows.begin; row < block.rows.end; row += kLanes<A>) {
    const int64_t count = std::min(kLanes<A>, block.rows.end - row);
    TransposedRows<A> left, mask, out;
    if (g.depth != 0) left.load_rows(g.a.data + row * g.a.stride, g.a.stride, g.depth, count);
    if (g.mask) mask.load_rows(g.mask + row * g.cols, g.cols, g.cols, count);
    for (int64_t c = 0; c < g.cols; ++c) {
      vec<A> sum = {};
      for (int64_t p = 0; p < g.depth; ++p) sum += load(left.at(p)) * right[c][p];
      if (g.bias) sum += load_scalar(g.bias + c);
      if (g.relu) sum = relu<A>(sum);
      store(out.at(c), g.mask ? masked<A>(sum, load(mask.at(c))) : sum);
    }
    out.store_rows(g.out + row * g.cols, g.cols, count);
  }
}

}  // namespace fastnn::simd::FASTNN_SIMD_TARGET
