// Storage types, the type each is summed in, and the layout of rows: what the SIMD kernels and
// their launchers share. No ATen here: the kernels take raw pointers and sizes.
#pragma once

#include <cstdint>

#include "ops/layout.h"

namespace fastnn::simd {

struct bfloat16 {
  uint16_t bits;
};

struct float16 {
  uint16_t bits;
};

template <typename T>
struct accum_of {
  using type = float;
};
template <>
struct accum_of<double> {
  using type = double;
};
// float64 sums in float64, everything narrower in float32.
template <typename T>
using accum = typename accum_of<T>::type;

using fastnn::Layout;

}  // namespace fastnn::simd
