// How a kernel walks the classes of its rows. Where rows are long and lie in one piece, a vector's
// lanes are consecutive classes of one row; otherwise they are the same class of several rows. The
// kernels are written once, over either.
#pragma once

#include <algorithm>

#include "cpu/simd/vec.h"

namespace fastnn::simd::FASTNN_SIMD_TARGET {

// One step over the classes: a whole vector from class c on, or its first n lanes.
struct Whole {
  int64_t c;
};
struct Part {
  int64_t c;
  int64_t n;
};

// Lanes are classes c, c+1, ... of a single row in one piece.
template <typename A>
struct AlongClasses {
  int64_t classes;
  static constexpr int64_t count = 1;  // rows walked at once

  template <typename F>
  void for_each_step(F f) const {
    int64_t c = 0;
    for (; c + kLanes<A> <= classes; c += kLanes<A>) f(Whole{c});
    if (c < classes) f(Part{c, classes - c});
  }
  // Where a class of the row in this lane lies, from the first row's first element.
  int64_t element(int64_t c, int64_t /*lane*/) const {
    return c;
  }
  template <typename T>
  vec<A> load(const T* row, Whole step, A /*fill*/) const {
    return simd::FASTNN_SIMD_TARGET::load(row + step.c);
  }
  template <typename T>
  vec<A> load(const T* row, Part step, A fill) const {
    return load_first(row + step.c, step.n, fill);
  }
  template <typename T>
  void store(T* row, Whole step, vec<A> value) const {
    simd::FASTNN_SIMD_TARGET::store(row + step.c, value);
  }
  template <typename T>
  void store(T* row, Part step, vec<A> value) const {
    store_first(row + step.c, step.n, value);
  }
  // The value with zeros in the lanes that no class stands behind: what a sum over classes takes.
  vec<A> valid(Whole, vec<A> value) const {
    return value;
  }
  vec<A> valid(Part step, vec<A> value) const {
    return first_lanes<A>(value, step.n, 0);
  }
  // A class's own value (its weight), in the lanes of that class.
  template <typename T, typename Step>
  vec<A> per_class(const T* values, Step step) const {
    return load(values, step, 0);
  }
  // A row's own value, in the lanes of that row.
  vec<A> per_row(const A* values) const {
    return broadcast(values[0]);
  }
  // A row's own value where the step's class is the row's target, elsewhere zero.
  template <typename Step>
  vec<A> at_target(Step step, const lane_int<A>* target, const A* values) const {
    vec<A> result = {};
    const int64_t lane = target[0] - step.c;
    if (lane >= 0 && lane < kLanes<A>) result[lane] = values[0];
    return result;
  }
  // The maximum and the sum over a row's classes, in the lanes of that row.
  vec<A> reduce_max(vec<A> value) const {
    return broadcast(simd::FASTNN_SIMD_TARGET::reduce_max<A>(value));
  }
  vec<A> reduce_sum(vec<A> value) const {
    return broadcast(simd::FASTNN_SIMD_TARGET::reduce_sum<A>(value));
  }
};

// Lanes are the rows (the first `count`), all at one class. A row's classes are `class_stride`
// elements apart, the rows `row_stride`.
template <typename A>
struct AcrossRows {
  int64_t classes;
  int64_t count;
  int64_t class_stride;
  int64_t row_stride;

  template <typename F>
  void for_each_step(F f) const {
    for (int64_t c = 0; c < classes; ++c) f(Whole{c});
  }
  int64_t element(int64_t c, int64_t lane) const {
    return c * class_stride + lane * row_stride;
  }
  template <typename T>
  vec<A> load(const T* rows, Whole step, A fill) const {
    const T* from = rows + step.c * class_stride;
    if (row_stride != 1) return gather(from, row_stride, count);
    return count == kLanes<A> ? simd::FASTNN_SIMD_TARGET::load(from)
                              : load_first(from, count, fill);
  }
  template <typename T>
  void store(T* rows, Whole step, vec<A> value) const {
    T* to = rows + step.c * class_stride;
    if (row_stride != 1) {
      scatter(to, row_stride, count, value);
    } else if (count == kLanes<A>) {
      simd::FASTNN_SIMD_TARGET::store(to, value);
    } else {
      store_first(to, count, value);
    }
  }
  vec<A> valid(Whole, vec<A> value) const {
    return value;
  }
  template <typename T>
  vec<A> per_class(const T* values, Whole step) const {
    return broadcast(load_scalar(values + step.c));
  }
  vec<A> per_row(const A* values) const {
    return simd::FASTNN_SIMD_TARGET::load(values);
  }
  vec<A> at_target(Whole step, const lane_int<A>* target, const A* values) const {
    ints<A> classes_of_lanes;
    std::memcpy(&classes_of_lanes, target, sizeof(classes_of_lanes));
    const ints<A> here = classes_of_lanes == static_cast<lane_int<A>>(step.c);
    return here ? per_row(values) : vec<A>{};
  }
  vec<A> reduce_max(vec<A> value) const {
    return value;
  }
  vec<A> reduce_sum(vec<A> value) const {
    return value;
  }
};

// Rows of fewer classes than this are walked several at a time: alone they would leave most lanes
// of their last vector, if not of their only one, empty.
template <typename A>
constexpr int64_t kShortRow = 4 * kLanes<A>;

// Calls f(rows, offset, position) for the rows at positions [begin, end): `offset` is the first
// element of the row at `position`, of which `rows.count` are walked at once.
template <typename A, typename F>
void for_each_row(const Layout& layout, int64_t begin, int64_t end, F f) {
  const auto [outer, classes, inner] = layout;
  if (inner == 1 && classes >= kShortRow<A>) {
    for (int64_t position = begin; position < end; ++position) {
      f(AlongClasses<A>{classes}, position * classes, position);
    }
    return;
  }
  for (int64_t position = begin; position < end;) {
    const int64_t o = position / inner;
    const int64_t i = position % inner;
    const int64_t in_one_stride = inner == 1 ? end - position : inner - i;
    const int64_t count = std::min({kLanes<A>, in_one_stride, end - position});
    const int64_t row_stride = inner == 1 ? classes : 1;
    f(AcrossRows<A>{classes, count, inner, row_stride}, o * classes * inner + i, position);
    position += count;
  }
}

// The maximum of each row, and the log of the sum of exp(x - max): a row's log-sum-exp in two
// parts. Their sum would lose the small differences of large logits; (x - max) - log_sum keeps
// them.
template <typename A>
struct LogSumExp {
  vec<A> max;
  vec<A> log_sum;

  vec<A> log_softmax(vec<A> x) const {
    return (x - max) - log_sum;
  }
};

template <typename T, typename RowsT, typename A = accum<T>>
LogSumExp<A> log_sum_exp(const RowsT& rows, const T* x) {
  constexpr A lowest = -std::numeric_limits<A>::infinity();
  vec<A> max = broadcast(lowest);
  rows.for_each_step(
      [&](auto step) { max = simd::FASTNN_SIMD_TARGET::max<A>(max, rows.load(x, step, lowest)); });
  max = rows.reduce_max(max);
  vec<A> sum = {};
  rows.for_each_step(
      [&](auto step) { sum += rows.valid(step, exp<A>(rows.load(x, step, lowest) - max)); });
  return {max, log<A>(rows.reduce_sum(sum))};
}

}  // namespace fastnn::simd::FASTNN_SIMD_TARGET
