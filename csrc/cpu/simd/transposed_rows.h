// Short rows with a vector's lanes across them: each vector holds one column of kLanes rows.
#pragma once

#include <algorithm>

#include "cpu/simd/vec.h"

namespace fastnn::simd::FASTNN_SIMD_TARGET {

// Rows of fewer elements than this are worth transposing: alone they would leave most lanes of
// their last or only vector empty.
template <typename A>
constexpr int64_t kShortRow = 4 * kLanes<A>;

// Calls f(first, n) for blocks of n columns that cover them all: kLanes columns each, or all if
// there are fewer. The last block overlaps the one before, so that it doesn't end past the row.
template <typename A, typename F>
inline void for_each_block(int64_t cols, F f) {
  const int64_t n = std::min(kLanes<A>, cols);
  for (int64_t c = 0; c < cols; c += n) f(std::min(c, cols - n), n);
}

// Convert vectors of consecutive rows of Cols elements to the rows' columns, and back. Cols is a
// power of two: the even and the odd elements form rows of half the length.
template <typename A, int64_t Cols>
inline void deinterleave(vec<A> (&v)[Cols]) {
  if constexpr (Cols > 1) {
    vec<A> even[Cols / 2], odd[Cols / 2];
#pragma GCC unroll 8
    for (int64_t i = 0; i < Cols / 2; ++i) {
      even[i] = shuffle<A>(v[2 * i], v[2 * i + 1], [](int lane) { return 2 * lane; });
      odd[i] = shuffle<A>(v[2 * i], v[2 * i + 1], [](int lane) { return 2 * lane + 1; });
    }
    deinterleave<A>(even);
    deinterleave<A>(odd);
#pragma GCC unroll 8
    for (int64_t i = 0; i < Cols / 2; ++i) {
      v[2 * i] = even[i];
      v[2 * i + 1] = odd[i];
    }
  }
}
template <typename A, int64_t Cols>
inline void interleave(vec<A> (&v)[Cols]) {
  if constexpr (Cols > 1) {
    constexpr auto zip = [](int lane) { return lane / 2 + lane % 2 * int(kLanes<A>); };
    vec<A> even[Cols / 2], odd[Cols / 2];
#pragma GCC unroll 8
    for (int64_t i = 0; i < Cols / 2; ++i) {
      even[i] = v[2 * i];
      odd[i] = v[2 * i + 1];
    }
    interleave<A>(even);
    interleave<A>(odd);
#pragma GCC unroll 8
    for (int64_t i = 0; i < Cols / 2; ++i) {
      v[2 * i] = shuffle<A>(even[i], odd[i], zip);
      v[2 * i + 1] =
          shuffle<A>(even[i], odd[i], [=](int lane) { return zip(lane) + int(kLanes<A>) / 2; });
    }
  }
}

// Calls f with `cols` as a constant if vectors of such rows can be interleaved; returns whether.
template <typename F>
inline bool with_interleaved(int64_t cols, F f) {
  if (cols == 1) return f(std::integral_constant<int64_t, 1>()), true;
  if (cols == 2) return f(std::integral_constant<int64_t, 2>()), true;
  if (cols == 4) return f(std::integral_constant<int64_t, 4>()), true;
  if (cols == 8) return f(std::integral_constant<int64_t, 8>()), true;
  return false;
}

// kLanes rows of at most kShortRow elements, [column][row], in the accumulation type.
template <typename A>
struct TransposedRows {
  alignas(kVectorBytes) A values[kShortRow<A> * kLanes<A>];

  A* at(int64_t col) {
    return values + col * kLanes<A>;
  }

  // Lanes past `count` repeat the first row, which may be read.
  template <typename T>
  void load_rows(const T* rows, int64_t stride, int64_t cols, int64_t count) {
    const auto load_interleaved = [&]<int64_t Cols>(std::integral_constant<int64_t, Cols>) {
      vec<A> v[Cols];
#pragma GCC unroll 8
      for (int64_t i = 0; i < Cols; ++i) v[i] = load(rows + i * kLanes<A>);
      deinterleave<A>(v);
#pragma GCC unroll 8
      for (int64_t i = 0; i < Cols; ++i) store(at(i), v[i]);
    };
    const bool in_one_piece = stride == cols && count == kLanes<A>;
    if (in_one_piece && with_interleaved(cols, load_interleaved)) return;
    for_each_block<A>(cols, [&](int64_t first, int64_t n) {
      vec<A> block[kLanes<A>];
#pragma GCC unroll 16
      for (int64_t lane = 0; lane < kLanes<A>; ++lane) {
        block[lane] = load_up_to(rows + (lane < count ? lane : 0) * stride + first, n);
      }
      transpose<A>(block);
#pragma GCC unroll 16
      for (int64_t i = 0; i < kLanes<A>; ++i) store(at(first + i), block[i]);
    });
  }
  // Stores into contiguous rows.
  template <typename T>
  void store_rows(T* rows, int64_t cols, int64_t count) {
    const auto store_interleaved = [&]<int64_t Cols>(std::integral_constant<int64_t, Cols>) {
      vec<A> v[Cols];
#pragma GCC unroll 8
      for (int64_t i = 0; i < Cols; ++i) v[i] = load(at(i));
      interleave<A>(v);
#pragma GCC unroll 8
      for (int64_t i = 0; i < Cols; ++i) store(rows + i * kLanes<A>, v[i]);
    };
    if (count == kLanes<A> && with_interleaved(cols, store_interleaved)) return;
    for_each_block<A>(cols, [&](int64_t first, int64_t n) {
      vec<A> block[kLanes<A>];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kLanes<A>; ++i) {
        block[i] = i < n ? load(at(first + i)) : vec<A>{};
      }
      transpose<A>(block);
#pragma GCC unroll 16
      for (int64_t lane = 0; lane < kLanes<A>; ++lane) {
        if (lane < count) store_up_to(rows + lane * cols + first, n, block[lane]);
      }
    });
  }
};

}  // namespace fastnn::simd::FASTNN_SIMD_TARGET
