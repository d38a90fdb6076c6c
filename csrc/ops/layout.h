// The layout of rows in a tensor, for the kernels and launchers of all devices. No ATen: kernels
// take raw pointers and sizes.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FASTNN_HOST_DEVICE __host__ __device__
#else
#define FASTNN_HOST_DEVICE
#endif

namespace fastnn {

// An (outer, classes, inner) view of a contiguous tensor: class c of row (o, i) is element
// (o * classes + c) * inner + i. A row's index, its position, is o * inner + i.
struct Layout {
  int64_t outer;
  int64_t classes;
  int64_t inner;

  FASTNN_HOST_DEVICE int64_t rows() const {
    return outer * inner;
  }
};

// Element offsets in an (outer, classes, inner) tensor with arbitrary strides.
struct RowStrides {
  int64_t inner_size;
  int64_t outer;
  int64_t classes;
  int64_t inner;

  FASTNN_HOST_DEVICE int64_t element(int64_t row, int64_t c) const {
    // A division costs more than the rest of a loss's work on a row.
    if (inner_size == 1) return row * outer + c * classes;
    return row / inner_size * outer + c * classes + row % inner_size * inner;
  }
};

}  // namespace fastnn
