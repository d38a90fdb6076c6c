// linear_cross_entropy's blocks of logits: each row's loss, which is cross_entropy's, and its
// gradient, which replaces the logits. A z-loss z adds z * lse^2 to the loss and
// 2 * z * lse * softmax to the gradient.
#pragma once

#include "cpu/simd/cross_entropy.h"

namespace fastnn::simd::FASTNN_SIMD_TARGET {

// Processes rows of a block, one or several at once.
template <typename A, TargetKind Kind>
struct BlockRows {
  static constexpr bool kIndices = Kind != TargetKind::Probabilities;

  const LogitBlock<A>& block;
  TargetDistribution<A, Kind> q{block.args};
  Targets<A> targets{block.args};

  template <typename Rows>
  ints<A> target(const Rows& rows, int64_t position) {
    ints<A> target = {};
    if constexpr (kIndices) target = targets.of(rows, position);
    return target;
  }

  template <typename Rows>
  void report(const Rows& rows, int64_t position, ints<A> target, vec<A> loss,
              const LogSumExp<A>& lse) const {
    if (block.z_loss != 0) {
      const vec<A> total = lse.max + lse.log_sum;
      const vec<A> z = A(block.z_loss) * total * total;
      loss += kIndices ? (target >= 0 ? z : vec<A>{}) : z;
    }
    rows.store_per_row(block.losses + position, loss);
    if (block.max == nullptr) return;
    rows.store_per_row(block.max + position, lse.max);
    rows.store_per_row(block.log_sum + position, lse.log_sum);
  }

  // `term` times `over_sum` is the softmax.
  template <typename Rows, typename Probabilities, typename Writer, typename Steps,
            typename Elements>
  void write(const Rows& rows, int64_t offset, int64_t position, ints<A> target,
             Probabilities& probabilities, Writer& writer, const LogSumExp<A>& lse, vec<A> over_sum,
             Steps term, Elements term_at) const {
    const RowTargets<A> known = row_targets<A>(q, target, rows, probabilities);
    const vec<A> g =
        block.grad_per_row ? rows.per_row(block.grad + position) : broadcast(*block.grad);
    const vec<A> of_z = A(2 * block.z_loss) * (lse.max + lse.log_sum);
    const vec<A> factor = g * (known.total + of_z) * over_sum;
    write_gradient<A>(
        q, known, g, rows, probabilities, writer,
        [&](int64_t c, A gradient) { block.gradient[offset + c] = gradient; },
        [&](auto step) { return factor * term(step); },
        [&](int64_t c) { return factor[0] * term_at(block.gradient[offset + c]); });
  }
};

// Computes the losses alone, or also a gradient, which reads all logits once more.
template <typename A, TargetKind Kind>
void block_of_losses(const LogitBlock<A>& block, int64_t begin, int64_t end) {
  const A* const logits = block.args.logits;
  BlockRows<A, Kind> of{block};
  const auto run = [&](const auto& rows, int64_t offset, int64_t position, auto& x, auto&,
                       const LogSumExp<A>& lse) {
    auto probabilities = of.q.reader(rows, offset);
    const ints<A> target = of.target(rows, position);
    const auto losses = row_losses<A>(of.q, target, rows, logits + offset, x, probabilities, lse);
    of.report(rows, position, target, losses.loss, lse);
    if (block.gradient == nullptr) return;
    auto writer = rows.writer(block.gradient + offset);
    const auto softmax = [&](vec<A> x_step) { return exp_nonpositive<A>(lse.log_softmax(x_step)); };
    of.write(
        rows, offset, position, target, probabilities, writer, lse, broadcast(A(1)),
        [&](auto step) { return softmax(x(step, 0)); },
        [&](A x_target) { return softmax(broadcast(x_target))[0]; });
  };
  for_each_log_sum_exp(block.args.layout, begin, end, logits, KeepNothing(), run);
}

// The gradient reads the terms of the sum of exp(x - max), which have replaced the logits by then,
// so the targets' logits are read first.
template <typename A>
void block_of_gradients(const LogitBlock<A>& block, int64_t begin, int64_t end) {
  const int64_t classes = block.args.layout.classes;
  BlockRows<A, TargetKind::Index> of{block};
  for (int64_t i = begin; i < end; ++i) {
    const int64_t t = block.args.target[i];
    if (t >= 0 && t < classes) block.losses[i] = block.gradient[i * classes + t];
  }
  const auto in_gradient = [&](const auto& rows, int64_t offset) {
    return rows.writer(block.gradient + offset);
  };
  const auto run = [&](const auto& rows, int64_t offset, int64_t position, auto&, auto& terms,
                       const LogSumExp<A>& lse) {
    std::nullptr_t no_probabilities = nullptr;
    const ints<A> target = of.target(rows, position);
    of.write(
        rows, offset, position, target, no_probabilities, terms, lse, A(1) / lse.sum,
        [&](auto step) { return terms(step); }, [](A term) { return term; });
    const vec<A> x_target = rows.per_row(block.losses + position);
    const vec<A> loss = -of.q.at_target(rows, target) * lse.log_softmax(x_target);
    of.report(rows, position, target, target >= 0 ? loss : vec<A>{}, lse);
  };
  for_each_log_sum_exp(block.args.layout, begin, end, block.args.logits, in_gradient, run);
}

template <typename A>
FASTNN_KERNEL void logit_block(const LogitBlock<A>& block, int64_t begin, int64_t end) {
  dispatch_target_kind(block.args, [&]<TargetKind Kind>() {
    if (Kind == TargetKind::Index && block.gradient) {
      block_of_gradients(block, begin, end);
    } else {
      block_of_losses<A, Kind>(block, begin, end);
    }
    return kNoBadTarget;
  });
}

template <typename A>
FASTNN_KERNEL void logit_block_backward(const LogitBlock<A>& block, int64_t begin, int64_t end) {
  const A* const logits = block.args.logits;
  const auto write = [&]<TargetKind Kind>() {
    BlockRows<A, Kind> of{block};
    for_each_row<A>(block.args.layout, begin, end,
                    [&](auto rows, int64_t offset, int64_t position) {
                      auto x = rows.reader(logits + offset);
                      auto probabilities = of.q.reader(rows, offset);
                      auto writer = rows.writer(block.gradient + offset);
                      const LogSumExp<A> lse{.max = rows.per_row(block.max + position),
                                             .sum = {},
                                             .log_sum = rows.per_row(block.log_sum + position)};
                      const auto softmax = [&](vec<A> x_step) {
                        return exp_nonpositive<A>(lse.log_softmax(x_step));
                      };
                      of.write(
                          rows, offset, position, of.target(rows, position), probabilities, writer,
                          lse, broadcast(A(1)), [&](auto step) { return softmax(x(step, 0)); },
                          [&](A x_target) { return softmax(broadcast(x_target))[0]; });
                    });
    return kNoBadTarget;
  };
  dispatch_target_kind(block.args, write);
}

}  // namespace fastnn::simd::FASTNN_SIMD_TARGET
