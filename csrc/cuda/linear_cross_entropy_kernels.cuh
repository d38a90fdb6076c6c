// linear_cross_entropy's blocks of logits: cross_entropy's rows, with losses in what the sums are
// carried in, and a z-loss z, which adds z * lse^2 to a loss and 2 * z * lse * softmax to its
// gradient.
#pragma once

#include "cuda/cross_entropy_kernels.cuh"

namespace fastnn::cuda {

// Each row's own results; `max` and `log_sum` are CrossEntropyForwardRows'.
template <typename A>
struct LogitResults {
  A* losses;
  A z_loss;

  __device__ static A lse(A max, A log_sum) {
    return max + log_sum;
  }
  // What a z-loss adds to the sum of q where softmax is multiplied by it.
  __device__ A weight_of_softmax(A max, A log_sum) const {
    return 2 * z_loss * lse(max, log_sum);
  }
  __device__ void report(int64_t position, const LossSums& row, A max, A log_sum,
                         bool counts) const {
    const A total = lse(max, log_sum);
    losses[position] = A(row.loss) + (z_loss != 0 && counts ? z_loss * total * total : A(0));
  }
};

// `Rows` is CrossEntropyForwardRows, or the one that also writes the gradient.
template <typename Rows, TargetKind Kind>
struct LogitRowsOf : Rows {
  using A = accum<typename Rows::T>;
  using Row = typename Rows::Row;

  LogitResults<A> results;

  __device__ void report(const Row& row, int64_t position, LossSums& sums) const {
    LossSums of_row = LossSums::none();
    Rows::report(row, position, of_row);
    bool counts = true;
    if constexpr (Kind != TargetKind::Probabilities) counts = this->args.checked(row.target) >= 0;
    results.report(position, of_row, row.max, row.log_sum, counts);
    sums.merge(of_row);
  }
  // Each row's results are all that is wanted.
  __device__ void conclude(const LossSums&) const {
  }
};

template <typename T, TargetKind Kind>
using LogitLossRows = LogitRowsOf<CrossEntropyForwardRows<T, Kind>, Kind>;

template <typename T, TargetKind Kind>
struct LogitGradientRows : LogitRowsOf<CrossEntropyGradientRows<T, Kind>, Kind> {
  using Base = LogitRowsOf<CrossEntropyGradientRows<T, Kind>, Kind>;
  using A = accum<T>;
  using State = typename Base::State;
  using Row = typename Base::Row;

  const A* grad;  // what multiplies every row's gradient

  __device__ void finish(Row& row, const State& state, int64_t position) const {
    Base::finish(row, state, position);
    GradientRow<A>& gradient = row.gradient;
    const A total = gradient.grad_times_total;  // times 1
    gradient.grad = *grad;
    gradient.grad_times_total =
        *grad * (total + this->results.weight_of_softmax(row.max, row.log_sum));
  }
};

// Reads the log-sum-exps.
template <typename Storage, TargetKind Kind>
struct LogitBackwardRows : CrossEntropyBackwardRows<Storage, Kind> {
  using Base = CrossEntropyBackwardRows<Storage, Kind>;
  using A = accum<Storage>;
  using State = typename Base::State;
  using Row = typename Base::Row;

  const A* grad_of_row;
  A z_loss;

  __device__ void begin(Row& row, int64_t position) const {
    const A grad = grad_of_row[position];
    row = {this->max[position], this->log_sum[position], grad, A(0), 0, A(0)};
    if constexpr (Base::kIndices) {
      A total = this->args.set_target(row, this->args.target[position]);
      if constexpr (Kind == TargetKind::SmoothedIndex) total += *this->weighted_uniform_sum;
      row.grad_times_total = grad * (total + of_z_loss(row));
    }
  }
  __device__ void finish(Row& row, const State& state, int64_t) const {
    row.grad_times_total = row.grad * (state.sum + of_z_loss(row));
  }

 private:
  __device__ A of_z_loss(const Row& row) const {
    return 2 * z_loss * (row.max + row.log_sum);
  }
};

}  // namespace fastnn::cuda
