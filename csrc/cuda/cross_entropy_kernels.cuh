// Cross entropy of logits x and a target distribution q: a row's loss is
//   sum_c q_c * (lse - x_c),   its gradient   softmax_c * sum(q) - q_c.
// A class index t gives q = (1 - s) * w_t at t plus the spread part s / C * w_c at every class c;
// probabilities p give the spread part w_c * ((1 - s) * p_c + s / C) alone (s: label smoothing,
// w: class weights).
// What bounds them: docs/performance.md, "Bounds of the CUDA kernels".
#pragma once

#include <type_traits>

#include "cuda/loss.cuh"
#include "cuda/rows/operator.cuh"
#include "cuda/rows/plan.h"

namespace fastnn::cuda {

enum class TargetKind { Index, SmoothedIndex, Probabilities };

// Vectors that a thread has in flight: more would spill registers beside class weights or a
// softcap.
template <TargetKind Kind, typename Args>
inline constexpr int kVectorsOf =
    (Kind == TargetKind::SmoothedIndex ? 2 : 4) / (Args::kHasSoftcap ? 2 : 1);

// What a row's gradient needs.
template <typename A>
struct GradientRow {
  A max;
  A log_sum;
  A grad;
  A grad_times_total;  // times the sum of q
  int64_t target;      // or -1 if the row doesn't count
  A at_target;         // the part of q there besides the spread part
};

// The arguments of both directions. `weight` may be null; one of `target` and `target_probs` is.
// The operators over rows also take other argument types (linear_cross_entropy_kernels.cuh), which
// may compute the logits from what is read, and have a z-loss.
template <typename T>
struct CrossEntropyArgs {
  using A = accum<T>;
  using Out = T;  // the gradient's element
  static constexpr bool kStrided = true, kHasSoftcap = false, kHasZLoss = false;

  const T* logits;
  int64_t classes;
  int64_t inner;
  const int64_t* target;
  const T* target_probs;
  const Wide<T>* weight;
  int64_t ignore_index;
  A keep;     // 1 - s
  A uniform;  // s / C

  __device__ int64_t element(int64_t row, int64_t c) const {
    if (inner == 1) return row * classes + c;
    return (row / inner * classes + c) * inner + row % inner;
  }
  __device__ A logit(A x) const {
    return x;
  }
  template <int N>
  __device__ void logits_of(const A (&x)[N], A (&y)[N]) const {
#pragma unroll
    for (int j = 0; j < N; ++j) y[j] = x[j];
  }
  __device__ int64_t checked(int64_t t) const {
    return checked_class(t, classes, ignore_index);
  }
  // Sets the row's class from its target, and the part of q there, which it returns.
  __device__ A set_target(GradientRow<A>& row, int64_t t) const {
    row.target = checked(t);
    if (row.target >= 0) row.at_target = keep * class_weight_at(weight, row.target);
    return row.at_target;
  }
  template <int N>
  __device__ void weights(Classes c, A (&w)[N]) const {
#pragma unroll
    for (int j = 0; j < N; ++j) w[j] = A(1);
    if (weight == nullptr) return;
#pragma unroll
    for (int j = 0; j < N; ++j) w[j] = to_accum(weight[c.at(j)]);
  }
  // The spread part of q with probabilities.
  template <int N>
  __device__ void spread(Classes c, const A (&p)[N], A (&q)[N]) const {
    weights(c, q);
#pragma unroll
    for (int j = 0; j < N; ++j) q[j] = rounded_product(q[j], std::fma(keep, p[j], uniform));
  }
  // The gradient at logits x; p holds the target's probabilities where it has them.
  template <TargetKind Kind, int N>
  __device__ void gradient(const GradientRow<A>& row, Classes c, const A (&x)[N], const A (&p)[N],
                           A (&out)[N]) const {
    A q[N] = {};
    if constexpr (Kind == TargetKind::SmoothedIndex) {
      weights(c, q);
#pragma unroll
      for (int j = 0; j < N; ++j) q[j] = rounded_product(q[j], uniform);
    } else if constexpr (Kind == TargetKind::Probabilities) {
      spread(c, p, q);
    }
    // Not grad * (total * softmax - q), which would be rounded twice. Which products are rounded is
    // said here, as the compiler would choose in each kernel anew.
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const A softmax = exp_for<T>(x[j] - row.max, row.log_sum);
      out[j] = Kind == TargetKind::Index
                   ? row.grad_times_total * softmax
                   : std::fma(row.grad_times_total, softmax, -row.grad * q[j]);
    }
    if constexpr (Kind != TargetKind::Probabilities) {
      if (!c.may_hold(row.target, N)) [[likely]]
        return;
      const int distance = int(row.target - c.first);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        if (j * int(c.step) == distance) out[j] -= rounded_product(row.grad, row.at_target);
      }
    }
  }
};

// The sum over classes of the spread part of class indices, in memory where class weights make it.
template <typename A>
struct UniformSum {
  A unweighted;
  const A* weighted;

  __device__ A value() const {
    return weighted ? *weighted : unweighted;
  }
};

// Operands: logits, probabilities.
template <typename Storage, TargetKind Kind, typename Args = CrossEntropyArgs<Storage>>
struct CrossEntropyForwardRows : RowDefaults {
  using T = Storage;
  using A = accum<T>;
  static constexpr bool kIndices = Kind != TargetKind::Probabilities;
  static constexpr bool kHasSpread = Kind != TargetKind::Index;
  using State = std::conditional_t<kHasSpread, SpreadState<T>, SoftmaxState<T>>;
  struct Row {
    int64_t target;  // not checked yet
    A at_target;     // the logit there
    A weight;        // of the row: 0 if it doesn't count
    A max;
    A sum;  // of exp(x - max)
    A spread_loss;
    bool overflows;  // the spread loss must be computed class by class

    __device__ A log_sum() const {
      return std::log(sum);
    }
  };
  static constexpr int kReduceInputs = kIndices ? 1 : 2;
  static constexpr bool kMaps = false, kSums = true, kStrided = Args::kStrided;
  // The same with and without a gradient: sums of other groups of classes would round differently.
  static constexpr int kVectors = kVectorsOf<Kind, Args>;

  Args args;
  Wide<T>* losses;  // may be null
  A* max;           // where a copy of the logits is kept, or null
  A* sum;           // likewise
  LossResult<T> result;

  __device__ void begin(Row& row, int64_t position) const {
    if constexpr (kIndices) row.target = args.target[position];
  }
  template <int N>
  __device__ void reduce(State& state, const Row&, Classes c,
                         const A (&x)[kReduceInputs][N]) const {
    A logits[N];
    args.logits_of(x[0], logits);
    if constexpr (Kind == TargetKind::Index) {
      state.add(logits);
    } else {
      A q[N];
      // With class indices q is in units of s / C: where it is 1 everywhere, its sum is exact.
      if constexpr (kIndices) {
        args.weights(c, q);
      } else {
        args.spread(c, x[1], q);
      }
      state.add(logits, q);
    }
  }
  __device__ void read_ahead(Row& row, int64_t position) const {
    row.weight = A(1);
    if constexpr (kIndices) {
      const int64_t t = args.checked(row.target);
      row.weight = t < 0 ? A(0) : class_weight_at(args.weight, t);
      row.at_target = t < 0 ? A(0) : logit_at(position, t);
    }
  }
  __device__ void finish(Row& row, const State& state, int64_t) const {
    if constexpr (kHasSpread) {
      const A unit = kIndices ? args.uniform : A(1);
      row.max = state.softmax.max;
      row.sum = state.softmax.sum;
      // Without classes the sum is 0 and its log -inf.
      if (args.classes != 0) row.spread_loss = unit * (state.q * row.log_sum() - state.q_x);
      row.overflows = std::isinf(state.q) || differences_overflow(row.max);
    } else {
      row.max = state.max;
      row.sum = state.sum;
    }
  }
  __device__ void report(const Row& row, int64_t position, LossSums& sums) const {
    A loss = row.overflows ? overflowing_loss(row, position) : row.spread_loss;
    if constexpr (kIndices) {
      // A row that counts may weigh 0, and its logit be infinite: their product is NaN, as torch's.
      if (args.checked(row.target) >= 0) {
        loss -= args.keep * row.weight * ((row.at_target - row.max) - row.log_sum());
        if constexpr (Args::kHasZLoss) loss += args.z_loss_of(row.max, row.log_sum());
      } else {
        loss = A(0);
      }
    } else if constexpr (Args::kHasZLoss) {
      loss += args.z_loss_of(row.max, row.log_sum());
    }
    if (max) {
      max[position] = row.max;
      sum[position] = row.sum;
    }
    if (losses) losses[position] = Wide<T>(loss);
    sums.loss += loss;
    sums.weight += row.weight;
  }
  __device__ void conclude(const LossSums& sums) const {
    result.set(sums);
  }

 private:
  // Whether the difference of two logits may overflow. In a state, where x is relative to an
  // earlier maximum, it might not; torch's and the CPU's losses are infinite or NaN there.
  __device__ static bool differences_overflow(A max) {
    constexpr A kInfinity = std::numeric_limits<A>::infinity();
    return max < kInfinity && max + std::numeric_limits<A>::max() == kInfinity;
  }
  __device__ A logit_at(int64_t position, int64_t c) const {
    return args.logit(to_accum(args.logits[args.element(position, c)]));
  }
  // Runs in one thread: such rows needn't be fast.
  __device__ A overflowing_loss(const Row& row, int64_t position) const {
    A loss = A(0);
    for (int64_t c = 0; c < args.classes; ++c) {
      A q[1] = {args.uniform * class_weight_at(args.weight, c)};
      if constexpr (!kIndices) {
        const int64_t i = args.element(position, c);
        args.spread(Classes{c, 1}, {to_accum(args.target_probs[i])}, q);
      }
      loss -= q[0] * ((logit_at(position, c) - row.max) - row.log_sum());
    }
    return loss;
  }
};

// The forward that also writes a copy of the logits.
template <typename Storage, TargetKind Kind>
struct CrossEntropyCopyingRows : CrossEntropyForwardRows<Storage, Kind> {
  static constexpr bool kCopies = true;
  // Widened rows take the threads of float32's forward, which keeps the gradient.
  static constexpr bool kHasThreadsToReread = kIsWidened<Storage>;
};

// The weight of the targets of this block's part of rows [0, rows), one of `blocks` parts. All of
// its threads call this, and get the result.
template <typename T>
__device__ double target_weight_of(const CrossEntropyArgs<T>& args, int64_t block, int64_t blocks,
                                   int64_t rows) {
  SumState<double> state = SumState<double>::none();
#pragma unroll 4
  for (int64_t row = block * blockDim.x + threadIdx.x; row < rows; row += blocks * blockDim.x) {
    const int64_t t = args.checked(args.target[row]);
    state.sum += t < 0 ? accum<T>(0) : class_weight_at(args.weight, t);
  }
  return reduce_block(state).sum;
}

// The forward that also writes the gradient times `scale`, divided by the weight of all targets,
// which is in memory or, with few rows, summed by each block for itself.
template <typename Storage, TargetKind Kind, typename Args = CrossEntropyArgs<Storage>>
struct CrossEntropyGradientRows : CrossEntropyForwardRows<Storage, Kind, Args> {
  using A = accum<Storage>;
  using Out = typename Args::Out;
  using Forward = CrossEntropyForwardRows<Storage, Kind, Args>;
  using State = typename Forward::State;
  struct Row : Forward::Row {
    GradientRow<A> gradient;
  };
  static constexpr int kMapInputs = Forward::kReduceInputs;
  static constexpr bool kMaps = true;

  A scale;
  UniformSum<A> uniform_sum;  // SmoothedIndex
  const A* total_weight = nullptr;
  int64_t weighed_rows = 0;  // rows whose weights each block adds up, or 0

  __device__ void start() {
    if (weighed_rows > 0) {
      scale *= reciprocal(A(target_weight_of(this->args, 0, 1, weighed_rows)));
    } else if (total_weight) {
      scale *= reciprocal(*total_weight);
    }
  }
  __device__ void finish(Row& row, const State& state, int64_t position) const {
    Forward::finish(row, state, position);
    row.gradient = {row.max, row.log_sum(), scale, A(0), 0, A(0)};
    A total = A(0);
    if constexpr (Kind == TargetKind::SmoothedIndex) total = uniform_sum.value();
    if constexpr (Kind == TargetKind::Probabilities) total = state.q;
    if constexpr (Forward::kIndices) total += this->args.set_target(row.gradient, row.target);
    if constexpr (Args::kHasZLoss) total += this->args.z_loss_slope(row.max, row.log_sum());
    row.gradient.grad_times_total = scale * total;
  }
  __device__ bool skips(const Row& row) const {
    return row.gradient.target < 0;
  }
  template <int N>
  __device__ void map(const Row& row, Classes c, const A (&x)[kMapInputs][N], A (&out)[N]) const {
    this->args.template gradient<Kind>(row.gradient, c, x[0], x[kMapInputs - 1], out);
  }
};

// Operands: a copy of the logits; or probabilities, which are summed first, and the copy.
template <typename Storage, TargetKind Kind, typename Args = CrossEntropyArgs<Storage>>
struct CrossEntropyBackwardRows : RowDefaults {
  using T = Storage;
  using A = accum<T>;
  using Out = typename Args::Out;
  static constexpr bool kIndices = Kind != TargetKind::Probabilities;
  using State = std::conditional_t<kIndices, NoState, SumState<A>>;
  struct Row : GradientRow<A> {
    A incoming;  // for Widened: applied last, as to the gradient that float32's forward keeps
  };
  static constexpr int kReduceInputs = kIndices ? 0 : 1, kMapInputs = kIndices ? 1 : 2;
  static constexpr bool kStrided = Args::kStrided;
  static constexpr int kVectors = kVectorsOf<Kind, Args>;

  Args args;
  const A* max;
  const A* sum;
  IncomingGrad<T> grad;
  UniformSum<A> uniform_sum;  // SmoothedIndex

  __device__ void begin(Row& row, int64_t position) const {
    row = {max[position], std::log(sum[position]), A(0), A(0), 0, A(0), A(1)};
    if constexpr (kIsWidened<T>) {
      row.grad = grad.total_weight ? reciprocal(*grad.total_weight) : A(1);
      row.incoming = grad.undivided(position);
    } else {
      row.grad = grad.of(position);
    }
    if constexpr (kIndices) {
      A total = A(0);
      if constexpr (Kind == TargetKind::SmoothedIndex) total = uniform_sum.value();
      total += args.set_target(row, args.target[position]);
      row.grad_times_total = row.grad * with_z_loss(row, total);
    }
  }
  __device__ bool skips(const Row& row) const {
    return row.target < 0;
  }
  template <int N>
  __device__ void reduce(State& state, const Row&, Classes c, const A (&p)[1][N]) const {
    A q[N];
    args.spread(c, p[0], q);
    state.add(q);
  }
  __device__ void finish(Row& row, const State& state, int64_t) const {
    row.grad_times_total = row.grad * with_z_loss(row, state.sum);
  }
  template <int N>
  __device__ void map(const Row& row, Classes c, const A (&x)[kMapInputs][N], A (&out)[N]) const {
    args.template gradient<Kind>(row, c, x[kMapInputs - 1], x[0], out);
    if constexpr (kIsWidened<T>) {
#pragma unroll
      for (int j = 0; j < N; ++j) out[j] *= row.incoming;
    }
  }

 private:
  __device__ A with_z_loss(const Row& row, A total) const {
    if constexpr (Args::kHasZLoss) total += args.z_loss_slope(row.max, row.log_sum);
    return total;
  }
};

// The gradient that the forward kept, times the incoming one. Operands: that gradient.
template <typename Storage>
struct ScaleGradientRows : RowDefaults {
  using T = Storage;
  using A = accum<T>;
  struct Row {
    A grad;
    bool ignored;
  };
  static constexpr int kMapInputs = 1;

  const int64_t* target;  // null with probabilities
  int64_t ignore_index;
  IncomingGrad<T> grad;
  bool in_place;

  __device__ bool is_done() const {
    return in_place && !grad.per_row && grad.of(0) == A(1);
  }
  __device__ void begin(Row& row, int64_t position) const {
    row = {grad.of(position), target && target[position] == ignore_index};
  }
  // An ignored row is zero whatever its factor.
  __device__ bool skips(const Row& row) const {
    return row.ignored;
  }
  template <int N>
  __device__ void map(const Row& row, Classes, const A (&x)[1][N], A (&out)[N]) const {
#pragma unroll
    for (int j = 0; j < N; ++j) out[j] = row.grad * x[0][j];
  }
};

// The divisor of 'mean': each block's part, or the whole from one block.
template <typename T>
__global__ void __launch_bounds__(kMaxRowThreads)
    sum_target_weights_kernel(CrossEntropyArgs<T> args, int64_t rows, LossSums* sums_of_block,
                              LossResult<T> result) {
  const LossSums sums{0, target_weight_of(args, blockIdx.x, gridDim.x, rows)};
  if (threadIdx.x != 0) return;
  if (gridDim.x == 1) {
    result.set(sums);
  } else {
    sums_of_block[blockIdx.x] = sums;
  }
}

// sum * factor, in double: a sum of thousands of equal terms would be off by as many ulps. One
// block.
template <typename T>
__global__ void __launch_bounds__(kMaxRowThreads)
    sum_class_weights_kernel(const Wide<T>* weight, int64_t classes, double factor,
                             accum<T>* result) {
  SumState<double> state = SumState<double>::none();
  for (int64_t c = threadIdx.x; c < classes; c += blockDim.x) {
    state.sum += double(class_weight_at(weight, c));
  }
  state = reduce_block(state);
  if (threadIdx.x == 0) *result = accum<T>(factor * state.sum);
}

}  // namespace fastnn::cuda
