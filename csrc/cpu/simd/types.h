// Storage types, their accumulation types and the layout of rows, for the SIMD kernels and their
// launchers. No ATen here: the kernels take raw pointers and sizes.
#pragma once

#include <cstdint>

#include "ops/accum.h"
#include "ops/integers.h"
#include "ops/layout.h"

namespace fastnn::simd {

struct bfloat16 {
  uint16_t bits;
};

struct float16 {
  uint16_t bits;
};

using fastnn::accum;
using fastnn::kKeepsGradient;
using fastnn::Layout;

}  // namespace fastnn::simd
