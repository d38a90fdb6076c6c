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
  // Whether every class has a share, not the target alone.
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

  // What spread() takes for the row(s) at `offset`.
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
    if (args_.weight) q *= rows.per_class(args_.weight, step);
    return rows.valid(step, q);
  }

  // The part of q that stands at the target alone, of the class in each lane.
  vec<A> at_target(ints<A> target) const {
    return keep_ * class_weight(target);
  }
  // The spread part at a class, of class indices.
  A uniform(int64_t c) const {
    return args_.weight ? uniform_ * load_scalar(args_.weight + c) : uniform_;
  }
  // The sum over classes of a class index's spread part.
  A uniform_sum() const {
    return uniform_sum_;
  }
  // The weight of the class in each lane; anything where that is negative.
  vec<A> class_weight(ints<A> target) const {
    if (args_.weight == nullptr) return broadcast(A(1));
    return lanes_of<A>(
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

  // Per lane its row's class, or -1 where that doesn't count (ignored, out of range, no row).
  template <typename Rows>
  ints<A> of(const Rows& rows, int64_t position) {
    return ints_of<A>([&](int64_t lane) -> lane_int<A> {
      if (Rows::kLanesAreRows && lane >= rows.count) return -1;
      const int64_t row = position + (Rows::kLanesAreRows ? lane : 0);
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

template <typename T, TargetKind Kind>
int64_t cross_entropy_of(const CrossEntropy<T>& args, int64_t begin, int64_t end, accum<T>* max,
                         accum<T>* log_sum, T* losses, LossSums& sums) {
  using A = accum<T>;
  using Distribution = TargetDistribution<T, Kind>;
  const Distribution q(args);
  Targets<T> targets(args);
  LossSums total;  // not `sums` itself, which would be written to memory at each row
  for_each_row<A>(args.layout, begin, end, [&](auto rows, int64_t offset, int64_t position) {
    auto x = rows.reader(args.logits + offset);
    const LogSumExp<A> lse = log_sum_exp<A>(rows, x);
    rows.store_per_row(max + position, lse.max);
    rows.store_per_row(log_sum + position, lse.log_sum);
    vec<A> spread_loss = {};
    if constexpr (Distribution::kHasSpread) {
      auto probabilities = q.reader(rows, offset);
      spread_loss = -rows.sum([&](auto step) {
        const vec<A> log_p = lse.log_softmax(x(step, 0));
        return rows.valid(step, q.spread(rows, probabilities, step) * log_p);
      });
    }
    vec<A> loss = spread_loss;
    vec<A> weight = broadcast(A(1));
    if constexpr (Kind != TargetKind::Probabilities) {
      const ints<A> target = targets.of(rows, position);
      const vec<A> x_target = lanes_of<A>([&](int64_t lane) {
        const int64_t t = target[lane];
        return t < 0 ? A(0) : load_scalar(args.logits + offset + rows.element(t, lane));
      });
      loss -= q.at_target(target) * lse.log_softmax(x_target);
      loss = target >= 0 ? loss : vec<A>{};
      weight = target >= 0 ? q.class_weight(target) : vec<A>{};
    }
    if (losses) rows.store_per_row(losses + position, loss);
    total.loss += rows.sum_over_rows(loss);
    total.weight += rows.sum_over_rows(weight);
  });
  sums.loss += total.loss;
  sums.weight += total.weight;
  return targets.first_bad();
}

template <typename T, TargetKind Kind>
int64_t cross_entropy_backward_of(const CrossEntropy<T>& args, int64_t begin, int64_t end,
                                  const accum<T>* max, const accum<T>* log_sum,
                                  const T* grad_output, bool grad_per_row, double scale,
                                  T* grad_input) {
  using A = accum<T>;
  constexpr bool kIndices = Kind != TargetKind::Probabilities;
  using Distribution = TargetDistribution<T, Kind>;
  const Distribution q(args);
  Targets<T> targets(args);
  const vec<A> one_grad = broadcast(begin < end ? load_scalar(grad_output) : A(0));
  for_each_row<A>(
      args.layout, begin, end,
      [&]<typename Rows>(const Rows& rows, int64_t offset, int64_t position) {
        auto x = rows.reader(args.logits + offset);
        auto probabilities = q.reader(rows, offset);
        auto grad_x = rows.writer(grad_input + offset);
        const LogSumExp<A> lse{rows.per_row(max + position), rows.per_row(log_sum + position)};
        const vec<A> g =
            (grad_per_row ? rows.per_row(grad_output + position) : one_grad) * A(scale);

        // Per lane: the row's class, or -1 where it doesn't count; what q has there; sum(q).
        ints<A> target = {};
        vec<A> at_target = {};
        vec<A> total = {};
        if constexpr (kIndices) {
          target = targets.of(rows, position);
          at_target = q.at_target(target);
          total = at_target + q.uniform_sum();
        } else {
          total = rows.sum([&](auto step) { return q.spread(rows, probabilities, step); });
        }

        // Not g * (total * softmax - q), which would be rounded twice at the target.
        const vec<A> g_total = g * total;
        const auto gradient = [&](vec<A> x_step, vec<A> q_step) {
          const vec<A> softmax = exp_nonpositive<A>(lse.log_softmax(x_step));
          return target >= 0 ? g_total * softmax - g * q_step : vec<A>{};
        };
        rows.for_each_step([&](auto step) {
          vec<A> q_step = {};
          if constexpr (Distribution::kHasSpread) q_step = q.spread(rows, probabilities, step);
          if constexpr (kIndices && Rows::kLanesAreRows) {
            q_step += target == static_cast<lane_int<A>>(step.c) ? at_target : vec<A>{};
          }
          grad_x(step, gradient(x(step, 0), q_step));
        });
        if constexpr (kIndices && !Rows::kLanesAreRows) {
          // The target is one of a long row's many classes: written again, not looked for at each
          // step.
          if (target[0] < 0) return;
          const int64_t t = offset + target[0];
          const vec<A> q_target = at_target + q.uniform(target[0]);
          store_scalar(grad_input + t,
                       gradient(broadcast(load_scalar(args.logits + t)), q_target)[0]);
        }
      });
  return targets.first_bad();
}

// Calls f.template operator()<Kind>() with the kind of the operands' targets.
template <typename T, typename F>
int64_t dispatch_target_kind(const CrossEntropy<T>& args, F f) {
  // Not by target_probs, which is null over no classes.
  if (args.target == nullptr) return f.template operator()<TargetKind::Probabilities>();
  if (args.label_smoothing != 0) return f.template operator()<TargetKind::SmoothedIndex>();
  return f.template operator()<TargetKind::Index>();
}

template <typename T>
FASTNN_KERNEL int64_t cross_entropy(const CrossEntropy<T>& args, int64_t begin, int64_t end,
                                    accum<T>* max, accum<T>* log_sum, T* losses, LossSums& sums) {
  return dispatch_target_kind(args, [&]<TargetKind Kind>() {
    return cross_entropy_of<T, Kind>(args, begin, end, max, log_sum, losses, sums);
  });
}

template <typename T>
FASTNN_KERNEL int64_t cross_entropy_backward(const CrossEntropy<T>& args, int64_t begin,
                                             int64_t end, const accum<T>* max,
                                             const accum<T>* log_sum, const T* grad_output,
                                             bool grad_per_row, double scale, T* grad_input) {
  return dispatch_target_kind(args, [&]<TargetKind Kind>() {
    return cross_entropy_backward_of<T, Kind>(args, begin, end, max, log_sum, grad_output,
                                              grad_per_row, scale, grad_input);
  });
}

}  // namespace fastnn::simd::FASTNN_SIMD_TARGET
