// What every kind of matrix product does with its sums.
#pragma once

#include <algorithm>

#include "cpu/simd/kernels.h"
#include "cpu/simd/linear.h"
#include "cpu/simd/vec.h"

namespace fastnn::simd::FASTNN_SIMD_TARGET {

// Whether sums are as wide as what they are stored to.
template <typename T>
constexpr bool kIsWide = sizeof(T) == sizeof(accum<T>);

inline int64_t size(Range range) {
  return range.end - range.begin;
}

// out = epilogue(sums) for the tile of these rows and columns.
template <typename T>
inline void finish_tile(const Gemm<T>& g, Range rows, Range cols, const accum<T>* sums,
                        int64_t stride) {
  using A = accum<T>;
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    for (int64_t c = cols.begin; c < cols.end; c += kLanes<A>) {
      const int64_t n = std::min(kLanes<A>, cols.end - c);
      vec<A> value = load(sums + (c - cols.begin));
      if (g.bias) value += load_up_to(g.bias + c, n);
      store_up_to(g.out + r * g.cols + c, n, g.relu ? relu<A>(value) : value);
    }
    sums += stride;
  }
}

}  // namespace fastnn::simd::FASTNN_SIMD_TARGET
