// Shared by the tests of the kernels over rows: layouts, the ways to map rows to threads, and how
// they round.
#pragma once

#include "cuda/rows/launch.cuh"
#include "harness.h"
#include "kernels/row_math.h"

namespace fastnn::cuda::tests {

// No rows; rows of no, few and many classes around the ends of vectors, lanes and blocks; and rows
// whose classes aren't contiguous, for one thread each and for several.
inline std::vector<Layout> layouts() {
  std::vector<Layout> result = {{0, 5, 1}, {2, 5, 0}};
  for (const int64_t classes : {0, 1, 2, 3, 7, 17, 33, 65, 129, 257, 1000}) {
    result.push_back({classes < 10 ? 67 : 5, classes, 1});
  }
  result.push_back({1, 5000, 1});
  for (const int64_t classes : {0, 1, 5, 65}) {
    result.push_back({1, classes, 3});
    result.push_back({3, classes, 21});
  }
  result.push_back({1, 9, 600});
  return result;
}

// How the kernels are made to run, besides the layout.
struct Way {
  const char* name;
  std::optional<Path> path = std::nullopt;
  int64_t max_blocks = INT64_MAX;  // if the plan has more, each does several rows
  bool may_cache = true;
  int64_t slice_size = 0;  // of a split row; 0: the plan's own
};

inline std::vector<Way> ways(const Layout& layout) {
  if (layout.inner != 1) return {{"strided"}, {.name = "strided, one block", .max_blocks = 1}};
  std::vector<Way> result = {
      {"warp", Path::Warp},
      {.name = "warp, one block, no cache",
       .path = Path::Warp,
       .max_blocks = 1,
       .may_cache = false},
      {"block", Path::Block},
      {.name = "block, two blocks, no cache",
       .path = Path::Block,
       .max_blocks = 2,
       .may_cache = false},
      {"split", Path::Split},
      {.name = "split, two blocks", .path = Path::Split, .max_blocks = 2},
  };
  if (layout.classes < 1000) {
    result.push_back({"subwarp", Path::Subwarp});
    result.push_back({.name = "subwarp, one block", .path = Path::Subwarp, .max_blocks = 1});
  } else {
    // More slices than a warp has lanes.
    result.push_back({.name = "split, short slices", .path = Path::Split, .slice_size = 16});
  }
  return result;
}

template <typename Op>
Plan plan_of(const Layout& layout, const Way& way) {
  RowTraits traits = row_traits<Op>();
  traits.device_shared_bytes = 64 * 1024;  // the emulated GPU's
  Plan plan = plan_rows(layout, traits, way.path);
  if (auto* split = std::get_if<SplitPlan>(&plan); split && way.slice_size != 0) {
    split->slice_size = way.slice_size;
    split->slices = ceil_div(layout.classes, way.slice_size);
    split->reduce_blocks = layout.rows() * split->slices;
    split->blocks = layout.rows() * (row_traits<Op>().maps ? split->slices : 1);
  }
  const auto limit = [&](auto& of_path) {
    of_path.blocks = std::min(of_path.blocks, way.max_blocks);
    if constexpr (requires { of_path.reduce_blocks; }) {
      of_path.reduce_blocks = std::min(of_path.reduce_blocks, way.max_blocks);
    }
    if constexpr (requires { of_path.cache_bytes; }) {
      if (!way.may_cache) of_path.cache_bytes = 0;
    }
  };
  std::visit(limit, plan);
  return plan;
}

template <typename Op>
void run_rows(const Op& op, const Plan& plan, const Layout& layout, const TensorsOf<Op>& tensors,
              LossSums* sums = nullptr) {
  Buffer<char> states(states_bytes<Op>(plan, layout.rows()));
  launch_rows(op, plan, layout, tensors, states.data(), sums, nullptr);
}

// Elements past a 16-byte boundary at which operands and outputs start.
struct Offsets {
  int64_t first;
  int64_t second;
  int64_t output;
};

// At boundaries, all equally far from one, and each at a different distance.
template <typename T>
std::vector<Offsets> offsets() {
  const int64_t last = 16 / int64_t(sizeof(T)) - 1;
  return {{0, 0, 0}, {last, last, last}, {1, 0, last == 1 ? 0 : last - 1}, {0, 1, 1}};
}

// All combinations would be too many; a random one per shape covers them over all shapes.
template <typename C>
auto one_of(const C& choices) {
  return choices[random_index(std::size(choices))];
}

// Roundings on the way to a sum over classes, and in exp, log and what follows.
inline double roundings_of_row(const Layout& layout) {
  return static_cast<double>(layout.classes) / 4 + 16;
}

// Sets some logits to -infinity, also at a row's start, before any finite one. Each row keeps a
// finite class.
template <typename T>
void mask_some(Buffer<T>& logits, const Layout& layout) {
  for (int64_t row = 0; row < layout.rows() && layout.classes > 1; ++row) {
    const int64_t kept = random_index(layout.classes);
    for (int64_t c = 0; c < layout.classes; ++c) {
      if (c != kept && (c < 2 || random_index(4) == 0)) {
        logits[element(layout, row, c)] = static_cast<T>(-INFINITY);
      }
    }
  }
}

}  // namespace fastnn::cuda::tests
