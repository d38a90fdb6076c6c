// Cross entropy of logits x and a target distribution q: a row's loss is
//   sum_c q_c * (lse - x_c),   its gradient   softmax_c * sum(q) - q_c.
// A class index t gives q = (1 - s) * w_t at t plus the spread part s / C * w_c at every class c;
// probabilities p give the spread part w_c * ((1 - s) * p_c + s / C) alone (s: label smoothing,
// w: class weights).
#pragma once

#include "cpu/simd/kernels.h"
#include "cpu/simd/rows.h"

namespace fastnn::simd::FASTNN_SIMD_TARGET {

template <typename T>
class TargetDistribution {
 public:
  using A = accum<T>;

  explicit TargetDistribution(const CrossEntropy<T>& args)
      : args_(args),
        keep_(A(1 - args.label_smoothing)),
        uniform_(A(args.label_smoothing / args.layout.classes)) {
    if (args.label_smoothing == 0 || args.target == nullptr) return;
    for (int64_t c = 0; c < args.layout.classes; ++c) uniform_sum_ += uniform_ * class_weight(c);
  }

  // Whether every class has a share, not the target alone.
  bool has_spread() const {
    return args_.target == nullptr || args_.label_smoothing != 0;
  }

  // The spread part of q at a step over the classes of the row(s) at `offset`.
  template <typename RowsT, typename Step>
  vec<A> spread(const RowsT& rows, int64_t offset, Step step) const {
    vec<A> q = broadcast(uniform_);
    if (args_.target_probs) q += keep_ * rows.load(args_.target_probs + offset, step, 0);
    if (args_.weight) q *= rows.per_class(args_.weight, step);
    return rows.valid(step, q);
  }

  // The part of q that stands at the target alone.
  A at_target(int64_t t) const {
    return keep_ * class_weight(t);
  }
  A class_weight(int64_t c) const {
    return args_.weight ? load_scalar(args_.weight + c) : A(1);
  }
  // The sum over classes of a class index's spread part.
  A uniform_sum() const {
    return uniform_sum_;
  }

 private:
  const CrossEntropy<T>& args_;
  A keep_;
  A uniform_;
  A uniform_sum_ = 0;
};

// A row's target: whether it counts (not ignored, in range), and its class.
template <typename T>
class Targets {
 public:
  explicit Targets(const CrossEntropy<T>& args) : args_(args) {
  }

  bool counts(int64_t position) {
    const int64_t t = args_.target[position];
    if (t == args_.ignore_index) return false;
    if (t >= 0 && t < args_.layout.classes) return true;
    first_bad_ = std::min(first_bad_, position);
    return false;
  }
  int64_t operator[](int64_t position) const {
    return args_.target[position];
  }
  int64_t first_bad() const {
    return first_bad_;
  }

 private:
  const CrossEntropy<T>& args_;
  int64_t first_bad_ = kNoBadTarget;
};

template <typename T>
FASTNN_KERNEL int64_t cross_entropy(const CrossEntropy<T>& args, int64_t begin, int64_t end,
                                    accum<T>* max, accum<T>* log_sum, T* losses, LossSums& sums) {
  using A = accum<T>;
  const TargetDistribution<T> q(args);
  Targets<T> targets(args);
  for_each_row<A>(args.layout, begin, end, [&](auto rows, int64_t offset, int64_t position) {
    const T* x = args.logits + offset;
    const LogSumExp<A> lse = log_sum_exp(rows, x);
    vec<A> spread_loss = {};
    if (q.has_spread()) {
      rows.for_each_step([&](auto step) {
        const vec<A> log_p = lse.log_softmax(rows.load(x, step, 0));
        spread_loss -= rows.valid(step, q.spread(rows, offset, step) * log_p);
      });
      spread_loss = rows.reduce_sum(spread_loss);
    }
    for (int64_t lane = 0; lane < rows.count; ++lane) {
      const int64_t row = position + lane;
      max[row] = lse.max[lane];
      log_sum[row] = lse.log_sum[lane];
      A loss = spread_loss[lane];
      A weight = 1;
      if (args.target) {
        if (targets.counts(row)) {
          const int64_t t = targets[row];
          weight = q.class_weight(t);
          const A x_t = load_scalar(x + rows.element(t, lane));
          loss -= q.at_target(t) * ((x_t - max[row]) - log_sum[row]);
        } else {
          loss = weight = 0;
        }
      }
      if (losses) store_scalar(losses + row, loss);
      sums.loss += loss;
      sums.weight += weight;
    }
  });
  return targets.first_bad();
}

template <typename T>
FASTNN_KERNEL int64_t cross_entropy_backward(const CrossEntropy<T>& args, int64_t begin,
                                             int64_t end, const accum<T>* max,
                                             const accum<T>* log_sum, const T* grad_output,
                                             bool grad_per_row, double scale, T* grad_input) {
  using A = accum<T>;
  const TargetDistribution<T> q(args);
  Targets<T> targets(args);
  for_each_row<A>(args.layout, begin, end, [&](auto rows, int64_t offset, int64_t position) {
    const T* x = args.logits + offset;
    T* grad_x = grad_input + offset;

    // Per lane: the row's gradient, whether it counts, its class, q there, and sum(q).
    A grad[kLanes<A>] = {};
    A counts[kLanes<A>] = {};
    A row_max[kLanes<A>] = {};
    A row_log_sum[kLanes<A>] = {};
    lane_int<A> target[kLanes<A>] = {};
    A q_target[kLanes<A>] = {};
    A q_sum[kLanes<A>] = {};
    for (int64_t lane = 0; lane < rows.count; ++lane) {
      const int64_t row = position + lane;
      grad[lane] = load_scalar(grad_output + (grad_per_row ? row : 0)) * A(scale);
      row_max[lane] = max[row];
      row_log_sum[lane] = log_sum[row];
      counts[lane] = !args.target || targets.counts(row);
      if (args.target && counts[lane]) {
        target[lane] = static_cast<lane_int<A>>(targets[row]);
        q_target[lane] = q.at_target(targets[row]);
        q_sum[lane] = q_target[lane] + q.uniform_sum();
      }
    }
    const LogSumExp<A> lse{rows.per_row(row_max), rows.per_row(row_log_sum)};
    const vec<A> g = rows.per_row(grad);
    const auto row_counts = rows.per_row(counts) != 0;
    vec<A> total = rows.per_row(q_sum);
    if (!args.target) {
      rows.for_each_step([&](auto step) { total += q.spread(rows, offset, step); });
      total = rows.reduce_sum(total);
    }

    rows.for_each_step([&](auto step) {
      const vec<A> softmax = exp<A>(lse.log_softmax(rows.load(x, step, 0)));
      vec<A> q_step = rows.at_target(step, target, q_target);
      if (q.has_spread()) q_step += q.spread(rows, offset, step);
      rows.store(grad_x, step, row_counts ? g * (softmax * total - q_step) : vec<A>{});
    });
  });
  return targets.first_bad();
}

}  // namespace fastnn::simd::FASTNN_SIMD_TARGET
