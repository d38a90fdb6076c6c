// How a kernel walks the classes of its rows: a vector's lanes are consecutive classes of one row
// where classes are neighbours in memory, and the same class of consecutive rows where rows are.
// The kernels are written once, over either.
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

template <typename A>
struct Rows {
  int64_t classes;
  int64_t stride;  // between a row's classes, in elements
  int64_t count;   // of rows walked at once

  template <typename T>
  vec<A> load(const T* row, Whole step, A /*fill*/) const {
    return simd::FASTNN_SIMD_TARGET::load(row + step.c * stride);
  }
  template <typename T>
  vec<A> load(const T* row, Part step, A fill) const {
    return load_first(row + step.c * stride, step.n, fill);
  }
  template <typename T>
  void store(T* row, Whole step, vec<A> value) const {
    simd::FASTNN_SIMD_TARGET::store(row + step.c * stride, value);
  }
  template <typename T>
  void store(T* row, Part step, vec<A> value) const {
    store_first(row + step.c * stride, step.n, value);
  }
  // The value with lanes that no class or row stands behind set to zero.
  vec<A> valid(Whole, vec<A> value) const {
    return value;
  }
  vec<A> valid(Part step, vec<A> value) const {
    return first_lanes<A>(value, step.n, 0);
  }
};

// Lanes are classes c, c+1, … of a single row.
template <typename A>
struct AlongClasses : Rows<A> {
  template <typename F>
  void for_each_step(F f) const {
    int64_t c = 0;
    for (; c + kLanes<A> <= this->classes; c += kLanes<A>) f(Whole{c});
    if (c < this->classes) f(Part{c, this->classes - c});
  }
  // A class's own value (its weight), in the lanes of that class.
  template <typename T, typename Step>
  vec<A> per_class(const T* values, Step step) const {
    return this->load(values, step, 0);
  }
  // A row's own value, in the lanes of that row.
  vec<A> per_row(const A* values) const {
    return broadcast(values[0]);
  }
  // The maximum and the sum over a row's classes, in the lanes of that row.
  vec<A> reduce_max(vec<A> value) const {
    return broadcast(simd::FASTNN_SIMD_TARGET::reduce_max<A>(value));
  }
  vec<A> reduce_sum(vec<A> value) const {
    return broadcast(simd::FASTNN_SIMD_TARGET::reduce_sum<A>(value));
  }
  vec<A> log(vec<A> value) const {
    return broadcast(std::log(value[0]));
  }
};

// Lanes are rows i, i+1, … (the first `count`), all at one class.
template <typename A>
struct AcrossRows : Rows<A> {
  template <typename F>
  void for_each_step(F f) const {
    if (this->count == kLanes<A>) {
      for (int64_t c = 0; c < this->classes; ++c) f(Whole{c});
    } else {
      for (int64_t c = 0; c < this->classes; ++c) f(Part{c, this->count});
    }
  }
  template <typename T, typename Step>
  vec<A> per_class(const T* values, Step step) const {
    return broadcast(load_scalar(values + step.c));
  }
  vec<A> per_row(const A* values) const {
    return simd::FASTNN_SIMD_TARGET::load(values);
  }
  vec<A> reduce_max(vec<A> value) const {
    return value;
  }
  vec<A> reduce_sum(vec<A> value) const {
    return value;
  }
  vec<A> log(vec<A> value) const {
    for (int64_t i = 0; i < kLanes<A>; ++i) value[i] = std::log(value[i]);
    return value;
  }
};

// Calls f(rows, offset, position) for the rows at positions [begin, end): `offset` is the first
// element of the row at `position`, of which `rows.count` are walked at once.
template <typename A, typename F>
void for_each_row(const Layout& layout, int64_t begin, int64_t end, F f) {
  const auto [outer, classes, inner] = layout;
  if (inner == 1) {
    for (int64_t position = begin; position < end; ++position) {
      f(AlongClasses<A>{{classes, 1, 1}}, position * classes, position);
    }
    return;
  }
  for (int64_t position = begin; position < end;) {
    const int64_t o = position / inner;
    const int64_t i = position % inner;
    const int64_t count = std::min({kLanes<A>, inner - i, end - position});
    f(AcrossRows<A>{{classes, inner, count}}, o * classes * inner + i, position);
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
  return {max, rows.log(rows.reduce_sum(sum))};
}

}  // namespace fastnn::simd::FASTNN_SIMD_TARGET
