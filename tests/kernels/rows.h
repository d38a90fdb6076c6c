// What the tests of log_softmax and cross_entropy share: layouts, and a row's log-sum-exp.
#pragma once

#include "harness.h"

namespace fastnn::tests {

// Rows in one piece, fewer and more than a vector's lanes, and rows whose classes lie apart.
inline std::vector<Layout> layouts(int64_t lanes) {
  std::vector<Layout> result;
  for (const int64_t classes : odd_sizes(lanes)) {
    result.push_back({0, classes, 1});
    result.push_back({1, classes, 1});
    result.push_back({2 * lanes + 3, classes, 1});
    result.push_back({1, classes, 3});
    result.push_back({2, classes, lanes + 1});
  }
  return result;
}

inline std::string to_string(const Layout& layout) {
  return format("outer=%d classes=%d inner=%d", int(layout.outer), int(layout.classes),
                int(layout.inner));
}

inline int64_t elements(const Layout& layout) {
  return layout.rows() * layout.classes;
}

// Where class c of a row lies.
inline int64_t element(const Layout& layout, int64_t row, int64_t c) {
  return (row / layout.inner * layout.classes + c) * layout.inner + row % layout.inner;
}

struct LogSumExp {
  double max = -INFINITY;
  double log_sum = 0;

  double log_softmax(double x) const {
    return (x - max) - log_sum;
  }
  // The magnitudes that a log-softmax is the difference of.
  double scale(double x) const {
    return std::isinf(x) ? 0 : 1 + std::abs(x - max) + log_sum;
  }
};

template <typename T>
LogSumExp log_sum_exp(const Buffer<T>& x, const Layout& layout, int64_t row) {
  LogSumExp result;
  double sum = 0;
  for (int64_t c = 0; c < layout.classes; ++c) {
    result.max = std::max(result.max, x(element(layout, row, c)));
  }
  for (int64_t c = 0; c < layout.classes; ++c) {
    sum += std::exp(x(element(layout, row, c)) - result.max);
  }
  result.log_sum = std::log(sum);
  return result;
}

// Roundings on the way to a sum over classes, and in exp, log and what follows.
inline double roundings_of_row(const Layout& layout) {
  return layout.classes + 8;
}

}  // namespace fastnn::tests
