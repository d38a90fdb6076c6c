// Splits a matrix product into blocks for the threads. No ATen here.
#pragma once

#include <algorithm>

#include "cpu/simd/kernels.h"

namespace fastnn::cpu {

// The blocks of a (rows, cols) output. However it is split, each element is summed in the same
// order: results don't depend on the number of threads.
class GemmJobs {
 public:
  GemmJobs(int64_t rows, int64_t cols, int64_t depth, int64_t threads) : rows_(rows), cols_(cols) {
    if (rows == 0 || cols == 0) return;
    threads = std::clamp<int64_t>(rows * cols * depth / kLeastWork, 1, threads);
    const int64_t least_rows = ceil_div(rows, simd::kGemmRows);
    const int64_t least_cols = ceil_div(cols, simd::kGemmCols);
    // Cut columns, rows or both until every thread has a block, whichever takes the least time.
    for (int64_t by_cols = least_cols; by_cols < least_cols + threads; ++by_cols) {
      if (by_cols > ceil_div(cols, kColumns)) break;
      const int64_t by_rows = std::min(rows, std::max(least_rows, ceil_div(threads, by_cols)));
      const double time = cost(by_rows, by_cols, threads);
      if (count() == 0 || time < cost(row_parts_, col_parts_, threads)) {
        row_parts_ = by_rows;
        col_parts_ = by_cols;
      }
    }
  }

  int64_t count() const {
    return row_parts_ * col_parts_;
  }

  simd::GemmBlock block(int64_t i) const {
    const int64_t row = i / col_parts_, col = i % col_parts_;
    return {{row_start(row), row_start(row + 1)}, {col_start(col), col_start(col + 1)}};
  }

 private:
  // The number of multiplications that makes waking a thread worthwhile.
  static constexpr int64_t kLeastWork = 1 << 17;
  // Columns are cut at multiples of this, for whole vectors and cache lines that one thread writes.
  static constexpr int64_t kColumns = 16;
  // The cost of packing an element, in multiplications.
  static constexpr double kPackCost = 8;

  // The relative time of the thread with the most and largest blocks.
  double cost(int64_t by_rows, int64_t by_cols, int64_t threads) const {
    const double rows = ceil_div(rows_, by_rows);
    const double cols = ceil_div(ceil_div(cols_, kColumns), by_cols) * kColumns;
    return ceil_div(by_rows * by_cols, threads) * (rows * cols + kPackCost * (rows + cols));
  }

  int64_t row_start(int64_t i) const {
    return rows_ * i / row_parts_;
  }
  int64_t col_start(int64_t i) const {
    return std::min(cols_, ceil_div(cols_, kColumns) * i / col_parts_ * kColumns);
  }

  int64_t rows_;
  int64_t cols_;
  int64_t row_parts_ = 0;
  int64_t col_parts_ = 0;
};

}  // namespace fastnn::cpu
