// Shared by the tests of log_softmax and cross_entropy: layouts, and how they round.
#pragma once

#include "harness.h"
#include "row_math.h"

namespace fastnn::tests {

// Contiguous rows, fewer and more than a vector's lanes, and rows whose classes aren't contiguous.
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

// Roundings on the way to a sum over classes, and in exp, log and what follows.
inline double roundings_of_row(const Layout& layout) {
  return layout.classes + 8;
}

}  // namespace fastnn::tests
