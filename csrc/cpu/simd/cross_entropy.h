// Cross entropy of logits x and a target distribution q: a row's loss is
//   sum_c q_c * (lse - x_c),   its gradient   softmax_c * sum(q) - q_c.
// A class index t gives q = (1 - s) * w_t at t plus the spread part s / C * w_c at every class c;
// probabilities p give the spread part w_c * ((1 - s) * p_c + s / C) alone (s: label smoothing,
// w: class weights).
#pragma once

#include "cpu/simd/kernels.h"
#include "cpu/simd/rows.h"

namespace fastnn::simd::FASTNN_SIMD_TARGET {

enum class TargetKind { Index, SmoothedIndex, Probabilities };

template <typename T, TargetKind Kind>
class TargetDistribution {
 public:
  using A = accum<T>;
  // Whether every class has a share, not only the target.
  static constexpr bool kHasSpread = Kind != TargetKind::Index;

  explicit TargetDistribution(const CrossEntropy<T>& args)
      : args_(args),
        keep_(A(1 - args.label_smoothing)),
        uniform_(A(args.label_smoothing / args.layout.classes)) {
    if (Kind != TargetKind::SmoothedIndex) return;
    double weights =
        0;  // in double: a sum of thousands of equal terms would be off by as many ulps
    for (int64_t c = 0; c < args.layout.classes; ++c) {
      weights += args.weight ? load_scalar(args.weight + c) : A(1);
    }
    uniform_sum_ = A(args.label_smoothing / args.layout.classes * weights);
  }

  // The reader that spread() takes for the row(s) at `offset`.
  template <typename RowsT>
  auto reader(const RowsT& rows, int64_t offset) const {
    if constexpr (Kind == TargetKind::Probabilities) {
      return rows.reader(args_.target_probs + offset);
    } else {
      return nullptr;
    }
  }
  // The spread part of q at a step over the classes.
  template <typename RowsT, typename Reader, typename Step>
  vec<A> spread(const RowsT& rows, Reader& probabilities, Step step) const {
    vec<A> q = broadcast(uniform_);
    if constexpr (Kind == TargetKind::Probabilities) q += keep_ * probabilities(step, 0);
    if (args_.weight) q = rounded_product(q, rows.per_class(args_.weight, step));
    return rows.valid(step, q);
  }

  // The part of q at the target only, for the class in each lane.
  template <typename Rows>
  vec<A> at_target(const Rows& rows, ints<A> target) const {
    return rounded_product(broadcast(keep_), class_weight(rows, target));
  }
  // The spread part at a class, for class indices.
  A uniform(int64_t c) const {
    return args_.weight ? rounded_product(uniform_, load_scalar(args_.weight + c)) : uniform_;
  }
  // The sum over classes of a class index's spread part.
  A uniform_sum() const {
    return uniform_sum_;
  }
  // The weight of the class in each lane; any value if that is negative.
  template <typename Rows>
  vec<A> class_weight(const Rows& rows, ints<A> target) const {
    if (args_.weight == nullptr) return broadcast(A(1));
    return rows.row_values(
        [&](int64_t i) { return load_scalar(args_.weight + std::max<int64_t>(target[i], 0)); });
  }

 private:
  const CrossEntropy<T>& args_;
  A keep_;
  A uniform_;
  A uniform_sum_ = 0;
};

// The rows' classes, and the first that is out of range.
template <typename T>
class Targets {
 public:
  using A = accum<T>;

  explicit Targets(const CrossEntropy<T>& args) : args_(args) {
  }

  // The class of each lane's row, or -1 if that doesn't count (ignored, out of range, no row).
  template <typename Rows>
  ints<A> of(const Rows& rows, int64_t position) {
    return rows.row_indices([&](int64_t i) {
      const int64_t row = position + i;
      return counts(row) ? args_.target[row] : -1;
    });
  }
  int64_t first_bad() const {
    return first_bad_;
  }

 private:
  bool counts(int64_t position) {
    const int64_t t = args_.target[position];
    if (t == args_.ignore_index) return false;
    if (t >= 0 && t < args_.layout.classes) return true;
    first_bad_ = std::min(first_bad_, position);
    return false;
  }

  const CrossEntropy<T>& args_;
  int64_t first_bad_ = kNoBadTarget;
};

// The targets of the rows that are processed at once, in the lanes of each: the class, or -1 if the
// row doesn't count; q's part at the class; the sum of q.
template <typename A>
struct RowTargets {
  ints<A> target = {};
  vec<A> at_target = {};
  vec<A> total = {};
};

template <typename T, TargetKind Kind, typename Rows, typename Reader>
RowTargets<accum<T>> row_targets(const TargetDistribution<T, Kind>& q, ints<accum<T>> target,
                                 const Rows& rows, Reader& probabilities) {
  if constexpr (Kind == TargetKind::Probabilities) {
    return {.total = rows.sum([&](auto step) { return q.spread(rows, probabilities, step); })};
  } else {
    const vec<accum<T>> at_target = q.at_target(rows, target);
    return {target, at_target, at_target + q.uniform_sum()};
  }
}

// Gives write(step, gradient) g * sum(q) * softmax - g * q of the rows, zeros where a row doesn't
// count. (Not g times the difference, which would be rounded twice at the target.) g_softmax(step)
// is the first term. For one class of a long row, g_softmax_at(class) is the first term, and the
// gradient goes to write_at(class, gradient).
template <typename T, TargetKind Kind, typename Rows, typename Reader, typename Write,
          typename WriteAt, typename Steps, typename Elements>
void write_gradient(const TargetDistribution<T, Kind>& q, const RowTargets<accum<T>>& known,
                    vec<accum<T>> g, const Rows& rows, Reader& probabilities, Write& write,
                    WriteAt write_at, Steps g_softmax, Elements g_softmax_at) {
  using A = accum<T>;
  constexpr bool kIndices = Kind != TargetKind::Probabilities;
  // The target is one of a long row's many classes: it is written again, not tested at each step.
  constexpr bool kTargetApart = kIndices && !Rows::kLanesAreRows;
  const int64_t t = known.target[0];
  const vec<A> g_at_target = rounded_product(g, known.at_target);
  A gradient_at_target = 0;
  if constexpr (kTargetApart) {
    if (t < 0) return rows.for_each_step([&](auto step) { write(step, vec<A>{}); });
    gradient_at_target =
        g_softmax_at(t) - rounded_product(A(g[0]), known.at_target[0] + q.uniform(t));
  }
  rows.for_each_step([&](auto step) {
    vec<A> gradient = g_softmax(step);
    if constexpr (Kind != TargetKind::Index) {
      gradient -= rounded_product(g, q.spread(rows, probabilities, step));
    }
    if constexpr (kIndices && !kTargetApart) {
      gradient -= known.target == static_cast<lane_int<A>>(step.c) ? g_at_target : vec<A>{};
      gradient = known.target >= 0 ? gradient : vec<A>{};
    }
    write(step, gradient);
  });
  if constexpr (kTargetApart) write_at(t, gradient_at_target);
}

template <typename A>
struct RowLosses {
  vec<A> loss;
  vec<A> weight;
};

template <typename T, TargetKind Kind, typename Rows, typename Logits, typename Probabilities>
RowLosses<accum<T>> row_losses(const TargetDistribution<T, Kind>& q, ints<accum<T>> target,
                               const Rows& rows, const T* logits, Logits& x,
                               Probabilities& probabilities, const LogSumExp<accum<T>>& lse) {
  using A = accum<T>;
  vec<A> loss = {};
  if constexpr (Kind != TargetKind::Index) {
    loss = -rows.sum([&](auto step) {
      const vec<A> log_p = lse.log_softmax(x(step, 0));
      return rows.valid(step, q.spread(rows, probabilities, step) * log_p);
    });
  }
  if constexpr (Kind == TargetKind::Probabilities) return {loss, broadcast(A(1))};
  const vec<A> x_target = rows.row_values([&](int64_t i) {
    const int64_t t = target[i];
    return t < 0 ? A(0) : load_scalar(logits + rows.element(t, i));
  });
  loss -= q.at_target(rows, target) * lse.log_softmax(x_target);
  const vec<A> none = {};
  return {target >= 0 ? loss : none, target >= 0 ? q.class_weight(rows, target) : none};
}

// Replaces the terms of the sum of exp(x - max), which `terms` holds, by the gradient.
template <typename T, TargetKind Kind, typename Rows, typename Terms, typename Probabilities>
void keep_gradient(const TargetDistribution<T, Kind>& q, ints<T> target, const Rows& rows, T* grad,
                   Terms& terms, Probabilities& probabilities, T scale, vec<T> sum) {
  const RowTargets<T> known = row_targets<T>(q, target, rows, probabilities);
  const vec<T> g = broadcast(scale);
  const vec<T> g_total_over_sum = g * known.total / sum;
  write_gradient<T>(
      q, known, g, rows, probabilities, terms, [&](int64_t c, T value) { grad[c] = value; },
      [&](auto step) { return rounded_product(terms(step), g_total_over_sum); },
      [&](int64_t c) { return rounded_product(grad[c], g_total_over_sum[0]); });
}

template <typename T, TargetKind Kind, bool kGradient>
int64_t cross_entropy_of(const CrossEntropy<T>& args, int64_t begin, int64_t end,
                         const KeptRows<T>& kept, accum<T>* losses, LossSums& sums) {
  using A = accum<T>;
  const TargetDistribution<T, Kind> q(args);
  Targets<T> targets(args);
  LossSums total;  // not `sums` itself, which would be written to memory at each row
  const auto run = [&](const auto& rows, int64_t offset, int64_t position, auto& x, auto& terms,
                       const LogSumExp<A>& lse) {
    auto probabilities = q.reader(rows, offset);
    ints<A> target = {};
    if constexpr (Kind != TargetKind::Probabilities) target = targets.of(rows, position);
    if constexpr (kGradient) {
      keep_gradient(q, target, rows, kept.grad + offset, terms, probabilities, T(kept.scale),
                    lse.sum);
    }
    if (kept.max) {
      rows.store_per_row(kept.max + position, lse.max);
      rows.store_per_row(kept.sum + position, lse.sum);
    }
    const auto [loss, weight] =
        row_losses(q, target, rows, args.logits + offset, x, probabilities, lse);
    if (losses) rows.store_per_row(losses + position, loss);
    total.loss += rows.sum_over_rows(loss);
    total.weight += rows.sum_over_rows(weight);
  };
  if constexpr (kGradient) {
    const auto in_grad = [&](const auto& rows, int64_t offset) {
      return rows.writer(kept.grad + offset);
    };
    for_each_log_sum_exp(args.layout, begin, end, args.logits, in_grad, run);
  } else {
    for_each_log_sum_exp(args.layout, begin, end, args.logits, KeepNothing(), run);
  }
  sums.loss += total.loss;
  sums.weight += total.weight;
  return targets.first_bad();
}

// Reads a copy of the logits, and each row's log-sum-exp. The gradient as it would be kept in what
// T is summed in, bit for bit, times grad_output.
template <typename T, TargetKind Kind>
int64_t gradient_from_logits(const CrossEntropy<T>& args, int64_t begin, int64_t end,
                             const accum<T>* max, const accum<T>* sum, const accum<T>* grad_output,
                             bool grad_per_row, double scale, T* grad_input) {
  using A = accum<T>;
  const TargetDistribution<T, Kind> q(args);
  Targets<T> targets(args);
  const vec<A> one_grad = broadcast(begin < end ? *grad_output : A(0));
  const vec<A> g = broadcast(A(scale));
  for_each_row<A>(args.layout, begin, end, [&](auto rows, int64_t offset, int64_t position) {
    const T* const logits = args.logits + offset;
    auto x = rows.reader(logits);
    auto probabilities = q.reader(rows, offset);
    auto writer = rows.writer(grad_input + offset);
    ints<A> target = {};
    if constexpr (Kind != TargetKind::Probabilities) target = targets.of(rows, position);
    const RowTargets<A> known = row_targets<T>(q, target, rows, probabilities);
    const vec<A> row_max = rows.per_row(max + position);
    const vec<A> g_total_over_sum = g * known.total / rows.per_row(sum + position);
    const auto g_softmax = [&](vec<A> x_step) {
      return rounded_product(exp_nonpositive<A>(x_step - row_max), g_total_over_sum);
    };
    vec<A> incoming = grad_per_row ? rows.per_row(grad_output + position) : one_grad;
    // Zeros stay zeros in rows that don't count, whatever their factor.
    if constexpr (Kind != TargetKind::Probabilities) incoming = target >= 0 ? incoming : vec<A>{};
    const auto write = [&](auto step, vec<A> gradient) { writer(step, incoming * gradient); };
    write_gradient<T>(
        q, known, g, rows, probabilities, write,
        [&](int64_t c, A gradient) {
          store_scalar(grad_input + offset + c, incoming[0] * gradient);
        },
        [&](auto step) { return g_softmax(x(step, 0)); },
        [&](int64_t c) { return g_softmax(broadcast(load_scalar(logits + c)))[0]; });
  });
  return targets.first_bad();
}

// Scales the gradient that the forward kept. Ignored rows stay zero whatever their factor.
template <typename T>
void scale_gradient(const CrossEntropy<T>& args, int64_t begin, int64_t end, const T* grad_output,
                    bool grad_per_row, T* grad_input) {
  const auto scale = [&](const auto& rows, int64_t offset, vec<T> g) {
    auto kept = rows.reader(args.logits + offset);
    auto write = rows.writer(grad_input + offset);
    rows.for_each_step([&](auto step) { write(step, g * kept(step, 0)); });
  };
  const int64_t classes = args.layout.classes;
  if (args.layout.inner == 1 && !grad_per_row && begin < end && std::isfinite(*grad_output)) {
    // Zeros stay zeros, and where a row ends does not matter.
    scale(AlongClasses<T>{(end - begin) * classes}, begin * classes, broadcast(*grad_output));
    return;
  }
  const auto scale_rows = [&](const auto& rows, int64_t offset, int64_t position) {
    scale(rows, offset, rows.row_values([&](int64_t i) {
      const int64_t row = position + i;
      const bool ignored = args.target && args.target[row] == args.ignore_index;
      return ignored ? T(0) : grad_output[grad_per_row ? row : 0];
    }));
  };
  if (args.layout.inner == 1) {
    for_each_row_alone<T>(classes, begin, end, scale_rows);
  } else {
    for_each_row<T>(args.layout, begin, end, scale_rows);
  }
}

// Calls f.template operator()<Kind>() with the kind of the operands' targets.
template <typename T, typename F>
int64_t dispatch_target_kind(const CrossEntropy<T>& args, F f) {
  // This doesn't test target_probs, which is null if there are no classes.
  if (args.target == nullptr) return f.template operator()<TargetKind::Probabilities>();
  if (args.label_smoothing != 0) return f.template operator()<TargetKind::SmoothedIndex>();
  return f.template operator()<TargetKind::Index>();
}

template <typename T>
FASTNN_KERNEL int64_t cross_entropy(const CrossEntropy<T>& args, int64_t begin, int64_t end,
                                    const KeptRows<T>& kept, accum<T>* losses, LossSums& sums) {
  return dispatch_target_kind(args, [&]<TargetKind Kind>() {
    if constexpr (kKeepsGradient<T>) {
      if (kept.grad) return cross_entropy_of<T, Kind, true>(args, begin, end, kept, losses, sums);
    }
    return cross_entropy_of<T, Kind, false>(args, begin, end, kept, losses, sums);
  });
}

template <typename T>
FASTNN_KERNEL int64_t cross_entropy_backward(const CrossEntropy<T>& args, int64_t begin,
                                             int64_t end, const accum<T>* max, const accum<T>* sum,
                                             const accum<T>* grad_output, bool grad_per_row,
                                             double scale, T* grad_input) {
  if constexpr (kKeepsGradient<T>) {
    scale_gradient(args, begin, end, grad_output, grad_per_row, grad_input);
    return kNoBadTarget;
  } else {
    return dispatch_target_kind(args, [&]<TargetKind Kind>() {
      return gradient_from_logits<T, Kind>(args, begin, end, max, sum, grad_output, grad_per_row,
                                           scale, grad_input);
    });
  }
}

}  // namespace fastnn::simd::FASTNN_SIMD_TARGET
