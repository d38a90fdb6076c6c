// The mathematics of rows over classes, in float64, for the tests of the kernels of every device. A
// buffer's element as a double is buffer(i).
#pragma once

#include <algorithm>
#include <cmath>

#include "expectations.h"
#include "ops/layout.h"

namespace fastnn::tests {

inline std::string to_string(const Layout& layout) {
  return format("outer=%d classes=%d inner=%d", int(layout.outer), int(layout.classes),
                int(layout.inner));
}

inline int64_t elements(const Layout& layout) {
  return layout.rows() * layout.classes;
}

// The index of class c of a row.
inline int64_t element(const Layout& layout, int64_t row, int64_t c) {
  return (row / layout.inner * layout.classes + c) * layout.inner + row % layout.inner;
}

struct LogSumExp {
  double max = -INFINITY;
  double log_sum = 0;

  double log_softmax(double x) const {
    return (x - max) - log_sum;
  }
  // The magnitude of the terms of a log-softmax.
  double scale(double x) const {
    return std::isinf(x) ? 0 : 1 + std::abs(x - max) + log_sum;
  }
};

template <typename Buffer>
LogSumExp log_sum_exp(const Buffer& x, const Layout& layout, int64_t row) {
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

// The target distribution of a cross entropy's problem: its layout, options (probabilities,
// weighted, label_smoothing), target, target_probs and weight, and whether a row counts(row).
template <typename Problem>
struct TargetDistribution {
  double class_weight(int64_t c) const {
    return problem().options.weighted ? problem().weight(c) : 1;
  }
  // At class c of a row.
  double q(int64_t row, int64_t c) const {
    if (!problem().counts(row)) return 0;
    const double p = problem().options.probabilities
                         ? problem().target_probs(element(problem().layout, row, c))
                         : double(problem().target[row] == c);
    const double s = problem().options.label_smoothing;
    return class_weight(c) * ((1 - s) * p + s / problem().layout.classes);
  }
  // What a row adds to the sum of weights.
  double row_weight(int64_t row) const {
    if (!problem().counts(row)) return 0;
    return problem().options.probabilities ? 1 : class_weight(problem().target[row]);
  }

 private:
  const Problem& problem() const {
    return static_cast<const Problem&>(*this);
  }
};

}  // namespace fastnn::tests
