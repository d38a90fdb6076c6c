// Integer arithmetic for the kernels and launchers of all devices. No ATen.
#pragma once

#include "ops/layout.h"

namespace fastnn {

template <typename I>
FASTNN_HOST_DEVICE constexpr I ceil_div(I n, I divisor) {
  return (n + divisor - 1) / divisor;
}

}  // namespace fastnn
