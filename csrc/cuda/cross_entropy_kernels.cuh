// Cross entropy of logits x and a target distribution q: a row's loss is
//   sum_c q_c * (lse - x_c),   its gradient   softmax_c * sum(q) - q_c.
// A class index t gives q = (1 - s) * w_t at t plus the spread part s / C * w_c at every class c;
// probabilities p give the spread part w_c * ((1 - s) * p_c + s / C) alone (s: label smoothing,
// w: class weights).
//
// The forward reads the logits (and probabilities) once; of each row it reads 8 bytes of target and
// writes the maximum and the log of the sum, and with reduction 'none' the loss. The backward reads
// the same and those values, and writes the gradient. An element costs one exponential and three
// operations (class indices, forward) to about ten (probabilities). So with n logits of sizeof(T)
// bytes, at B bytes/s, the bound is n * sizeof(T) / B seconds forward and 2 * n * sizeof(T) / B
// backward, with probabilities 2 and 3 times n * sizeof(T) / B; what there is of each row counts
// where rows are short (forward 8 + 2 * sizeof(accum<T>) bytes). Class weights are read for each
// element where there is smoothing or probabilities, but from a cache. rows.cuh says where the
// bounds hold, rows_plan.h why the launches should reach them.
//
// sum_class_weights runs before a backward with class weights and smoothing: one block reads
// classes * sizeof(T) bytes, 512 classes a turn. That is one turn for most losses; for 32000
// classes it is 63, an estimated 10 to 40 us, less than the pass itself takes over a thousand rows
// or more.
#pragma once

#include "cuda/loss.cuh"

namespace fastnn::cuda {

enum class TargetKind { Index, SmoothedIndex, Probabilities };

// What both directions know. `weight` may be null; so is `target` or `target_probs`, the other one.
template <typename T>
struct CrossEntropy {
  using A = accum<T>;

  const T* logits;
  int64_t classes;
  int64_t inner;
  const int64_t* target;
  const T* target_probs;
  const T* weight;
  int64_t ignore_index;
  A keep;     // 1 - s
  A uniform;  // s / C

  __device__ int64_t element(int64_t row, int64_t c) const {
    if (inner == 1) return row * classes + c;
    return (row / inner * classes + c) * inner + row % inner;
  }
  __device__ int64_t class_of(int64_t row) const {
    return class_of_row(target, row, classes, ignore_index);
  }
  template <int N>
  __device__ void weights(Classes c, A (&w)[N]) const {
#pragma unroll
    for (int j = 0; j < N; ++j) w[j] = class_weight_at(weight, c.at(j));
  }
  // The spread part of q with probabilities.
  template <int N>
  __device__ void spread(Classes c, const A (&p)[N], A (&q)[N]) const {
    weights(c, q);
#pragma unroll
    for (int j = 0; j < N; ++j) q[j] *= uniform + keep * p[j];
  }
};

// Operands: logits, probabilities.
template <typename Storage, TargetKind Kind>
struct CrossEntropyForward {
  using T = Storage;
  using A = accum<T>;
  static constexpr bool kIndices = Kind != TargetKind::Probabilities;
  static constexpr bool kHasSpread = Kind != TargetKind::Index;
  using State = std::conditional_t<kHasSpread, SpreadState<T>, SoftmaxState<T>>;
  struct Row {
    A max;
    A log_sum;
    A spread_loss;
  };
  static constexpr int kReduceInputs = kIndices ? 1 : 2, kMapInputs = 0;
  static constexpr bool kMaps = false, kSums = true;

  CrossEntropy<T> args;
  A* max;
  A* log_sum;
  T* losses;  // may be null

  __device__ Row begin(int64_t) const {
    return {};
  }
  template <int N>
  __device__ void reduce(State& state, const Row&, Classes c,
                         const A (&x)[kReduceInputs][N]) const {
    if constexpr (Kind == TargetKind::Index) {
      state.add(x[0]);
    } else {
      A q[N];
      // Of class indices, q in units of s / C: where it is 1 everywhere its sum is exact.
      if constexpr (kIndices) {
        args.weights(c, q);
      } else {
        args.spread(c, x[1], q);
      }
      state.add(x[0], q);
    }
  }
  __device__ void finish(Row& row, const State& state, int64_t) const {
    if constexpr (kHasSpread) {
      const A unit = kIndices ? args.uniform : A(1);
      row = {state.softmax.max, std::log(state.softmax.sum), A(0)};
      // Of no classes the sum is 0, and the log of theirs -inf.
      if (args.classes != 0) row.spread_loss = unit * (state.q * row.log_sum - state.q_x);
    } else {
      row = {state.max, std::log(state.sum), A(0)};
    }
  }
  __device__ void report(const Row& row, int64_t position, LossSums& sums) const {
    A loss = kHasSpread && overflows(row) ? overflowing_loss(row, position) : row.spread_loss;
    A weight = A(1);
    if constexpr (kIndices) {
      const int64_t t = args.class_of(position);
      if (t >= 0) {
        const A x = to_accum(args.logits[args.element(position, t)]);
        weight = class_weight_at(args.weight, t);
        loss -= args.keep * weight * ((x - row.max) - row.log_sum);
      } else {
        loss = weight = A(0);
      }
    }
    max[position] = row.max;
    log_sum[position] = row.log_sum;
    if (losses) losses[position] = static_cast<T>(loss);
    sums.loss += loss;
    sums.weight += weight;
  }

 private:
  // Whether the difference of two logits may overflow. In a state it might not, where x was taken
  // relative to what was the maximum then; torch's and the CPU's losses are infinite or NaN there.
  __device__ static bool overflows(const Row& row) {
    constexpr A kInfinity = std::numeric_limits<A>::infinity();
    return row.max < kInfinity && row.max + std::numeric_limits<A>::max() == kInfinity;
  }
  // By one thread: such rows are not for speed.
  __device__ A overflowing_loss(const Row& row, int64_t position) const {
    A loss = A(0);
    for (int64_t c = 0; c < args.classes; ++c) {
      const int64_t i = args.element(position, c);
      A q[1] = {args.uniform * class_weight_at(args.weight, c)};
      if constexpr (!kIndices) args.spread(Classes{c, 1}, {to_accum(args.target_probs[i])}, q);
      loss -= q[0] * ((to_accum(args.logits[i]) - row.max) - row.log_sum);
    }
    return loss;
  }
};

// Operands: logits; or probabilities, logits (the former are summed first).
template <typename Storage, TargetKind Kind>
struct CrossEntropyBackward {
  using T = Storage;
  using A = accum<T>;
  static constexpr bool kIndices = Kind != TargetKind::Probabilities;
  using State = std::conditional_t<kIndices, NoState, SumState<A>>;
  struct Row {
    A max;
    A log_sum;
    A grad;
    A grad_times_total;  // times the sum of q
    int64_t target;      // or -1 where the row doesn't count
    A at_target;         // what q has there beside the spread part
  };
  static constexpr int kReduceInputs = kIndices ? 0 : 1, kMapInputs = kIndices ? 1 : 2;
  static constexpr bool kMaps = true, kSums = false;

  CrossEntropy<T> args;
  const A* max;
  const A* log_sum;
  IncomingGrad<T> grad;
  // SmoothedIndex: the sum over classes of the spread part; in memory where weights make it.
  A uniform_sum;
  const A* weighted_uniform_sum;

  __device__ Row begin(int64_t position) const {
    Row row{max[position], log_sum[position], grad.of(position), A(0), 0, A(0)};
    if constexpr (kIndices) {
      row.target = args.class_of(position);
      if (row.target >= 0) row.at_target = args.keep * class_weight_at(args.weight, row.target);
      A total = row.at_target;
      if constexpr (Kind == TargetKind::SmoothedIndex) {
        total += weighted_uniform_sum ? *weighted_uniform_sum : uniform_sum;
      }
      row.grad_times_total = row.grad * total;
    }
    return row;
  }
  __device__ bool skips(const Row& row) const {
    return row.target < 0;
  }
  template <int N>
  __device__ void reduce(State& state, const Row&, Classes c, const A (&p)[1][N]) const {
    if constexpr (!kIndices) {
      A q[N];
      args.spread(c, p[0], q);
      state.add(q);
    }
  }
  __device__ void finish(Row& row, const State& state, int64_t) const {
    if constexpr (!kIndices) row.grad_times_total = row.grad * state.sum;
  }
  __device__ void report(const Row&, int64_t, LossSums&) const {
  }
  template <int N>
  __device__ void map(const Row& row, Classes c, const A (&x)[kMapInputs][N], A (&out)[N]) const {
    A q[N];
    if constexpr (Kind == TargetKind::Probabilities) {
      args.spread(c, x[0], q);
    } else {
      if constexpr (Kind == TargetKind::SmoothedIndex) args.weights(c, q);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        q[j] = Kind == TargetKind::SmoothedIndex ? args.uniform * q[j] : A(0);
        if (c.at(j) == row.target) q[j] += row.at_target;
      }
    }
    // Not grad * (total * softmax - q), which would be rounded twice at the target.
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const A softmax = std::exp((x[kMapInputs - 1][j] - row.max) - row.log_sum);
      out[j] = row.grad_times_total * softmax - row.grad * q[j];
    }
  }
};

// sum * factor, in double: a sum of thousands of equal terms would be off by as many ulps. One
// block.
template <typename T>
__global__ void __launch_bounds__(kMaxRowThreads)
    sum_class_weights(const T* weight, int64_t classes, double factor, accum<T>* result) {
  SumState<double> state = SumState<double>::none();
  for (int64_t c = threadIdx.x; c < classes; c += blockDim.x) {
    state.sum += static_cast<double>(class_weight_at(weight, c));
  }
  state = reduce_block(state);
  if (threadIdx.x == 0) *result = static_cast<accum<T>>(factor * state.sum);
}

}  // namespace fastnn::cuda
