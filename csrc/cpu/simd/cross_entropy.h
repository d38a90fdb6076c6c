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
    for (int64_t c = 0; c < args.layout.classes; ++c) uniform_sum_ += uniform(c);
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

  // The part of q that stands at the target alone.
  A at_target(int64_t t) const {
    return keep_ * class_weight(t);
  }
  // Likewise for the class of each lane; anything where that is negative.
  vec<A> at_targets(ints<A> t) const {
    if (args_.weight == nullptr) return broadcast(keep_);
    vec<A> q;
    for (int64_t lane = 0; lane < kLanes<A>; ++lane) q[lane] = t[lane] < 0 ? 0 : at_target(t[lane]);
    return q;
  }
  // The spread part at a class, of class indices.
  A uniform(int64_t c) const {
    return uniform_ * class_weight(c);
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

template <typename T, TargetKind Kind>
int64_t cross_entropy_of(const CrossEntropy<T>& args, int64_t begin, int64_t end, accum<T>* max,
                         accum<T>* log_sum, T* losses, LossSums& sums) {
  using A = accum<T>;
  using Distribution = TargetDistribution<T, Kind>;
  const Distribution q(args);
  Targets<T> targets(args);
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
    for (int64_t lane = 0; lane < rows.count; ++lane) {
      const int64_t row = position + lane;
      A loss = spread_loss[lane];
      A weight = 1;
      if constexpr (Kind != TargetKind::Probabilities) {
        if (targets.counts(row)) {
          const int64_t t = targets[row];
          weight = q.class_weight(t);
          const A x_t = load_scalar(args.logits + offset + rows.element(t, lane));
          loss -= q.at_target(t) * ((x_t - lse.max[lane]) - lse.log_sum[lane]);
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
          target = ints_of<A>([&](int64_t lane) -> lane_int<A> {
            const int64_t row = position + (lane < rows.count ? lane : 0);
            return targets.counts(row) ? targets[row] : -1;
          });
          at_target = q.at_targets(target);
          total = at_target + q.uniform_sum();
        } else {
          total = rows.sum([&](auto step) { return q.spread(rows, probabilities, step); });
        }

        const auto gradient = [&](vec<A> x_step, vec<A> q_step) {
          const vec<A> softmax = exp_nonpositive<A>(lse.log_softmax(x_step));
          return target >= 0 ? g * (softmax * total - q_step) : vec<A>{};
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
