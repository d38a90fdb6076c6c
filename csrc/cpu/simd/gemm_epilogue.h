// The epilogue of every kind of matrix product.
#pragma once

#include <algorithm>

#include "cpu/simd/kernels.h"
#include "cpu/simd/linear.h"
#include "cpu/simd/sgd.h"
#include "cpu/simd/vec.h"

namespace fastnn::simd::FASTNN_SIMD_TARGET {

// Whether sums are as wide as the type that they are stored in.
template <typename T>
constexpr bool kIsWide = sizeof(T) == sizeof(accum<T>);

inline int64_t size(Range range) {
  return range.end - range.begin;
}

// Prefetches the tile that will be stepped while its gradient is computed: the rows of a tile are
// too short and too far apart for the hardware prefetcher.
template <typename T, typename Right>
inline void prefetch_step(const Gemm<T, Right>& g, Range rows, Range cols) {
  constexpr int64_t kLine = 64;
  const auto prefetch = [&](const auto* data) {
    if (data == nullptr) return;
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      const auto* row = data + r * g.cols;
      for (int64_t c = cols.begin; c < cols.end; c += kLine / int64_t(sizeof(*data))) {
        __builtin_prefetch(row + c, /*rw=*/1);
      }
    }
  };
  prefetch(g.step->param);
  prefetch(g.step->momentum_buffer);
  prefetch(g.step->wide_momentum_buffer);
}

// Steps these rows and columns of the parameter whose gradient the product is.
template <typename T, typename Right, typename B>
inline void step_tile(const Gemm<T, Right>& g, B* momentum_buffer, Range rows, Range cols,
                      const accum<T>* sums, int64_t stride) {
  using A = accum<T>;
  const SGDFormula<A> formula(g.step->options);
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    for (int64_t c = cols.begin; c < cols.end; c += kLanes<A>) {
      const int64_t n = std::min(kLanes<A>, cols.end - c), i = r * g.cols + c;
      const auto load_n = [&](const auto* from) { return load_up_to(from, n); };
      const auto store_n = [&](auto* to, vec<A> value) { store_up_to(to, n, value); };
      const vec<A> grad = rounded<T>(load(sums + (c - cols.begin)));
      formula.step(g.step->param + i, grad, momentum_buffer ? momentum_buffer + i : nullptr, load_n,
                   store_n);
    }
    sums += stride;
  }
}

// out = epilogue(sums) for the tile of these rows and columns.
template <typename T, typename Right>
inline void finish_tile(const Gemm<T, Right>& g, Range rows, Range cols, const accum<T>* sums,
                        int64_t stride) {
  using A = accum<T>;
  if (g.step) {
    A* const wide_buffer = g.step->wide_momentum_buffer;
    return wide_buffer ? step_tile(g, wide_buffer, rows, cols, sums, stride)
                       : step_tile(g, g.step->momentum_buffer, rows, cols, sums, stride);
  }
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    for (int64_t c = cols.begin; c < cols.end; c += kLanes<A>) {
      const int64_t n = std::min(kLanes<A>, cols.end - c), i = r * g.cols + c;
      vec<A> value = load(sums + (c - cols.begin));
      if (g.add) value += load_up_to(g.out + i, n);
      if (g.bias) value += load_up_to(g.bias + c, n);
      if (g.relu) value = relu<A>(value);
      if (g.mask) value = masked<A>(value, load_up_to(g.mask + i, n));
      store_up_to(g.out + i, n, value);
    }
    sums += stride;
  }
}

}  // namespace fastnn::simd::FASTNN_SIMD_TARGET
