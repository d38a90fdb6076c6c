// How a kernel iterates over the classes of its rows. If rows are long and contiguous, a vector's
// lanes are consecutive classes of one row; otherwise they are the same class of several rows.
// Kernels are written once for both.
#pragma once

#include <algorithm>

#include "cpu/simd/transposed_rows.h"
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

// Combines f(step) of all whole steps, `size` classes apart, in four chains: in one, each step
// would wait for the last, and a sum would lose more digits.
template <typename A, typename Combine, typename F>
inline vec<A> fold_whole_steps(int64_t classes, int64_t size, vec<A> init, Combine combine, F f) {
  constexpr int64_t kChains = 4;
  vec<A> chain[kChains] = {init, init, init, init};
  int64_t c = 0;
  for (; c + kChains * size <= classes; c += kChains * size) {
#pragma GCC unroll 4
    for (int64_t k = 0; k < kChains; ++k) chain[k] = combine(chain[k], f(Whole{c + k * size}));
  }
  for (; c + size <= classes; c += size) chain[0] = combine(chain[0], f(Whole{c}));
  return combine(combine(chain[0], chain[1]), combine(chain[2], chain[3]));
}

// Lanes are classes c, c+1, ... of a single contiguous row.
template <typename A>
struct AlongClasses {
  int64_t classes;
  static constexpr bool kLanesAreRows = false;
  static constexpr int64_t count = 1;  // rows at once

  template <typename F>
  void for_each_step(F f) const {
    int64_t c = 0;
    for (; c + kLanes<A> <= classes; c += kLanes<A>) f(Whole{c});
    if (c < classes) f(Part{c, classes - c});
  }
  // Reads the rows' elements at each step.
  template <typename T>
  auto reader(const T* row) const {
    return [row](auto step, A fill) { return load(row, step, fill); };
  }
  // Writes them, and reads what was written.
  template <typename T>
  struct Writer {
    T* row;

    template <typename Step>
    void operator()(Step step, vec<A> value) const {
      store(row, step, value);
    }
    template <typename Step>
    vec<A> operator()(Step step) const {
      return load(row, step, 0);
    }
  };
  template <typename T>
  Writer<T> writer(T* row) const {
    return {row};
  }
  // The offset of a class of this lane's row from the first row's first element.
  int64_t element(int64_t c, int64_t /*lane*/) const {
    return c;
  }

  // The value with zeros in the lanes without a class, for sums over classes.
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
  // A row's own value, in the lanes of that row: f(i) for the i-th of these rows.
  template <typename F>
  vec<A> row_values(F f) const {
    return broadcast(A(f(0)));
  }
  template <typename F>
  ints<A> row_indices(F f) const {
    return ints<A>{} + static_cast<lane_int<A>>(f(0));
  }
  template <typename T>
  vec<A> per_row(const T* values) const {
    return broadcast(load_scalar(values));
  }
  template <typename T>
  void store_per_row(T* values, vec<A> value) const {
    store_scalar(values, value[0]);
  }
  double sum_over_rows(vec<A> value) const {
    return value[0];
  }
  // The maximum and the sum of f(step) over a row's classes, in the lanes of that row.
  template <typename F>
  vec<A> max(F f) const {
    return reduce_max<A>(fold(broadcast(-std::numeric_limits<A>::infinity()), vec_max<A>, f));
  }
  template <typename F>
  vec<A> sum(F f) const {
    return reduce_sum<A>(sum_in_lanes(f));
  }
  // Each lane has the sum over some of the classes.
  template <typename F>
  vec<A> sum_in_lanes(F f) const {
    return fold(vec<A>{}, vec_add<A>, f);
  }

 private:
  template <typename Combine, typename F>
  vec<A> fold(vec<A> init, Combine combine, F f) const {
    const vec<A> whole = fold_whole_steps<A>(classes, kLanes<A>, init, combine, f);
    const int64_t rest = classes % kLanes<A>;
    return rest == 0 ? whole : combine(whole, f(Part{classes - rest, rest}));
  }

  template <typename T>
  static vec<A> load(const T* row, Whole step, A /*fill*/) {
    return simd::FASTNN_SIMD_TARGET::load(row + step.c);
  }
  template <typename T>
  static vec<A> load(const T* row, Part step, A fill) {
    const vec<A> value = load_up_to(row + step.c, step.n);
    return fill == 0 ? value : first_lanes<A>(value, step.n, fill);
  }
  template <typename T>
  static void store(T* row, Whole step, vec<A> value) {
    simd::FASTNN_SIMD_TARGET::store(row + step.c, value);
  }
  template <typename T>
  static void store(T* row, Part step, vec<A> value) {
    store_up_to(row + step.c, step.n, value);
  }
};

// Lanes are the rows (the first `count`), all at one class.
template <typename A>
struct LanesAreRows {
  static constexpr bool kLanesAreRows = true;
  int64_t classes;
  int64_t count;

  template <typename F>
  void for_each_step(F f) const {
    for (int64_t c = 0; c < classes; ++c) f(Whole{c});
  }
  vec<A> valid(Whole, vec<A> value) const {
    return value;
  }
  template <typename T>
  vec<A> per_class(const T* values, Whole step) const {
    return broadcast(load_scalar(values + step.c));
  }
  // Lanes past the rows hold 0, or the index -1.
  template <typename F>
  vec<A> row_values(F f) const {
    return lanes_of<A>([&](int64_t lane) { return lane < count ? A(f(lane)) : A(0); });
  }
  template <typename F>
  ints<A> row_indices(F f) const {
    return ints_of<A>(
        [&](int64_t lane) -> lane_int<A> { return lane < count ? f(lane) : int64_t{-1}; });
  }
  template <typename T>
  vec<A> per_row(const T* values) const {
    return load_up_to(values, count);
  }
  template <typename T>
  void store_per_row(T* values, vec<A> value) const {
    store_up_to(values, count, value);
  }
  double sum_over_rows(vec<A> value) const {
    value = first_lanes<A>(value, count, 0);
    double sums[kLanes<A>];
#pragma GCC unroll 16
    for (int64_t i = 0; i < kLanes<A>; ++i) sums[i] = value[i];
#pragma GCC unroll 4
    for (int64_t n = kLanes<A> / 2; n > 0; n /= 2) {
#pragma GCC unroll 8
      for (int64_t i = 0; i < n; ++i) sums[i] += sums[i + n];
    }
    return sums[0];
  }
  template <typename F>
  vec<A> max(F f) const {
    const vec<A> lowest = broadcast(-std::numeric_limits<A>::infinity());
    return fold_whole_steps<A>(classes, 1, lowest, vec_max<A>, f);
  }
  template <typename F>
  vec<A> sum(F f) const {
    return fold_whole_steps<A>(classes, 1, vec<A>{}, vec_add<A>, f);
  }
};

// Rows whose elements of one class are neighbours; their classes are `class_stride` apart.
template <typename A>
struct NeighbouringRows : LanesAreRows<A> {
  int64_t class_stride;

  template <typename T>
  auto reader(const T* rows) const {
    return [this, rows](Whole step, A /*fill*/) {
      return load_up_to(rows + step.c * class_stride, this->count);
    };
  }
  template <typename T>
  struct Writer {
    T* rows;
    int64_t class_stride;
    int64_t count;

    void operator()(Whole step, vec<A> value) const {
      store_up_to(rows + step.c * class_stride, count, value);
    }
    vec<A> operator()(Whole step) const {
      return load_up_to(rows + step.c * class_stride, count);
    }
  };
  template <typename T>
  Writer<T> writer(T* rows) const {
    return {rows, class_stride, this->count};
  }
  int64_t element(int64_t c, int64_t lane) const {
    return c * class_stride + lane;
  }
};

// Short rows, one after the other in memory: read and written transposed.
template <typename A>
struct ShortRows : LanesAreRows<A> {
  template <typename T>
  struct Reader {
    TransposedRows<A> values;

    Reader(const T* rows, int64_t classes, int64_t count) {
      values.load_rows(rows, classes, classes, count);
    }
    vec<A> operator()(Whole step, A /*fill*/) {
      return load(values.at(step.c));
    }
  };
  template <typename T>
  struct Writer {
    TransposedRows<A> values;
    T* rows;
    int64_t classes;
    int64_t count;

    Writer(T* rows, int64_t classes, int64_t count) : rows(rows), classes(classes), count(count) {
    }
    ~Writer() {
      values.store_rows(rows, classes, count);
    }
    void operator()(Whole step, vec<A> value) {
      store(values.at(step.c), value);
    }
    vec<A> operator()(Whole step) {
      return load(values.at(step.c));
    }
  };

  template <typename T>
  Reader<T> reader(const T* rows) const {
    return Reader<T>(rows, this->classes, this->count);
  }
  template <typename T>
  Writer<T> writer(T* rows) const {
    return Writer<T>(rows, this->classes, this->count);
  }
  int64_t element(int64_t c, int64_t lane) const {
    return lane * this->classes + c;
  }
};

// Calls f(rows, offset, position) for contiguous rows, one by one.
template <typename A, typename F>
void for_each_row_alone(int64_t classes, int64_t begin, int64_t end, F f) {
  for (int64_t position = begin; position < end; ++position) {
    f(AlongClasses<A>{classes}, position * classes, position);
  }
}

// Calls f(rows, offset, position) for the rows at positions [begin, end), several at once: `offset`
// is the first element of the row at `position`, the first of `rows.count`.
template <typename A, typename F>
void for_each_group(const Layout& layout, int64_t begin, int64_t end, F f) {
  const auto [outer, classes, inner] = layout;
  if (inner == 1) {
    for (int64_t position = begin; position < end; position += kLanes<A>) {
      const int64_t count = std::min(kLanes<A>, end - position);
      f(ShortRows<A>{{classes, count}}, position * classes, position);
    }
    return;
  }
  for (int64_t position = begin; position < end;) {
    const int64_t o = position / inner;
    const int64_t i = position % inner;
    const int64_t count = std::min({kLanes<A>, inner - i, end - position});
    f(NeighbouringRows<A>{{classes, count}, inner}, o * classes * inner + i, position);
    position += count;
  }
}

// The same for rows of any kind; contiguous ones of `short_row` classes or more come one by one.
template <typename A, typename F>
void for_each_row(const Layout& layout, int64_t begin, int64_t end, F f,
                  int64_t short_row = kShortRow<A>) {
  if (layout.inner == 1 && layout.classes >= short_row) {
    for_each_row_alone<A>(layout.classes, begin, end, f);
  } else {
    for_each_group<A>(layout, begin, end, f);
  }
}

// The maximum of each row, and the sum of exp(x - max) with its log: a row's log-sum-exp in two
// parts. Their sum would lose small differences of large logits; (x - max) - log_sum keeps them.
template <typename A>
struct LogSumExp {
  vec<A> max;
  vec<A> sum;
  vec<A> log_sum;

  vec<A> log_softmax(vec<A> x) const {
    return (x - max) - log_sum;
  }
};

// The values whose maximum a row takes, by step.
template <typename A, typename Reader>
auto logits(Reader& x) {
  return [&x](auto step) { return x(step, -std::numeric_limits<A>::infinity()); };
}

// The terms exp(x - max) of its sum, by step; each is passed to keep(step, term).
template <typename A, typename RowsT, typename Reader, typename Keep>
auto exp_terms(const RowsT& rows, Reader& x, vec<A> max, Keep& keep) {
  return [&rows, &x, max, &keep](auto step) {
    const vec<A> from_max = rows.valid(step, x(step, 0) - max);
    const vec<A> term = rows.valid(step, exp_nonpositive<A>(from_max));
    keep(step, term);
    return term;
  };
}

// Keeps no terms.
struct KeepNothing {
  template <typename Rows>
  auto operator()(const Rows&, int64_t) const {
    return [](auto...) {};
  }
};

// Calls f(rows, offset, position, x, terms, lse) as for_each_row does, with a reader of `input` and
// the log-sum-exps. terms = keep(rows, offset) has received the terms of the sums.
template <typename T, typename Keep, typename F>
void for_each_log_sum_exp(const Layout& layout, int64_t begin, int64_t end, const T* input,
                          Keep keep, F f) {
  using A = accum<T>;
  const int64_t classes = layout.classes;
  if (layout.inner != 1 || classes < kShortRow<A>) {
    for_each_group<A>(layout, begin, end, [&](auto rows, int64_t offset, int64_t position) {
      auto x = rows.reader(input + offset);
      auto terms = keep(rows, offset);
      const vec<A> max = rows.max(logits<A>(x));
      const vec<A> sum = rows.sum(exp_terms<A>(rows, x, max, terms));
      f(rows, offset, position, x, terms, LogSumExp<A>{max, sum, log<A>(sum)});
    });
    return;
  }
  // All sums of a few rows, then all their results: they share one logarithm, and few instructions
  // reduce all sums across lanes. A row's maximum is taken before the last row's sum, which doesn't
  // wait for its reduction. The rows are few enough to stay in the L1 cache.
  constexpr int64_t kElements = 4096;
  const int64_t block = std::clamp<int64_t>(kElements / classes, 1, kLanes<A>);
  const AlongClasses<A> row{classes};
  for (int64_t first = begin; first < end; first += block) {
    const int64_t last = std::min(first + block, end);
    vec<A> lanes[kLanes<A>] = {};
    A max[kLanes<A>], sum[kLanes<A>], log_sum[kLanes<A>];
    const auto max_of = [&](int64_t position) {
      auto x = row.reader(input + position * classes);
      return row.max(logits<A>(x));
    };
    vec<A> next_max = max_of(first);
    for_each_row_alone<A>(classes, first, last, [&](auto, int64_t offset, int64_t position) {
      auto x = row.reader(input + offset);
      auto terms = keep(row, offset);
      const int64_t i = position - first;
      const vec<A> row_max = next_max;
      if (position + 1 < last) next_max = max_of(position + 1);
      max[i] = row_max[0];
      lanes[i] = row.sum_in_lanes(exp_terms<A>(row, x, row_max, terms));
    });
    const vec<A> sums = reduce_each<A>(lanes, vec_add<A>);
    store(sum, sums);
    store(log_sum, log<A>(sums));
    for_each_row_alone<A>(classes, first, last, [&](auto, int64_t offset, int64_t position) {
      auto x = row.reader(input + offset);
      auto terms = keep(row, offset);
      const int64_t i = position - first;
      f(row, offset, position, x, terms,
        LogSumExp<A>{broadcast(max[i]), broadcast(sum[i]), broadcast(log_sum[i])});
    });
  }
}

}  // namespace fastnn::simd::FASTNN_SIMD_TARGET
