// The interface between operators over rows and the kernels that run them: a struct of device
// functions, checked by the concept RowOperator. It states what differs from its base RowDefaults.
#pragma once

#include <concepts>
#include <cstdint>
#include <functional>

#include "cuda/rows/states.cuh"
#include "ops/accum.h"

namespace fastnn::cuda {

// Classes first, first + step, ...
struct Classes {
  int64_t first;
  int64_t step;

  __device__ int64_t at(int j) const {
    return first + j * step;
  }
  // Whether c may be one of n classes: it lies within their range.
  __device__ bool may_hold(int64_t c, int n) const {
    return uint64_t(c - first) <= uint64_t((n - 1) * step);
  }
};

// An operator adds:
// - T, the operands' element, and Out, the output's, if that is another. One of the two is then a
//   Widened and the other float32, so that vectors of both have as many elements;
// - Row, the data that all threads of a row have, such as its target and later its lse;
// - if it reduces operands: State, a thread's reduction of the classes that it has read, and
//   finish(row, state, position), which completes the Row with the state of all classes;
// - if it has an output that isn't a copy: map(row, classes, x, out), which computes its elements.
// `position` is the row's index, and x[k][j] operand k's element of class classes.at(j). All
// threads of a row call begin and finish and get the same bits.
struct RowDefaults {
  using State = NoState;
  static constexpr int kReduceInputs = 0;  // how many operands, the first ones, the state reads
  static constexpr int kMapInputs = 0;     // how many operands, the first ones, the output reads
  static constexpr int kVectors = 4;       // of 16 bytes, that a thread has in flight
  static constexpr bool kMaps = true;      // whether there is an output of the rows' layout
  static constexpr bool kCopies = false;   // whether the output is a copy of the first operand
  static constexpr bool kSums = false;     // whether rows add to a loss and a total weight
  static constexpr bool kStrided = true;   // whether a row's classes may be apart in memory
  // Whether it has the threads that it would have if it read an operand twice.
  static constexpr bool kHasThreadsToReread = false;

  // Whether the output is already right, which only the device may know.
  __device__ bool is_done() const {
    return false;
  }
  // Computes what all rows share; all threads of the block call this before the first row.
  __device__ void start() {
  }
  // Sets in a Row of zeros what is known before the operands are read. Its own loads stay in flight
  // while the operands are reduced, unless it uses their values.
  template <typename Row>
  __device__ void begin(Row&, int64_t) const {
  }
  // Adds some classes' elements to the state.
  template <typename State, typename Row, typename A, int N>
  __device__ void reduce(State& state, const Row&, Classes, const A (&x)[1][N]) const {
    state.add(x[0]);
  }
  // Starts to read what report will need; the reporting thread calls this before the threads'
  // states are merged.
  template <typename Row>
  __device__ void read_ahead(Row&, int64_t) const {
  }
  // Whether the output is zero whatever the operands.
  template <typename Row>
  __device__ bool skips(const Row&) const {
    return false;
  }
  // Writes the row's own results and adds to the sums; one of its threads calls this.
  template <typename Row>
  __device__ void report(const Row&, int64_t, LossSums&) const {
  }
  // Takes the sums of all rows if one block had them all.
  __device__ void conclude(const LossSums&) const {
  }
};

template <typename Op>
struct OutputElement {
  using type = typename Op::T;
};
template <typename Op>
  requires requires { typename Op::Out; }
struct OutputElement<Op> {
  using type = typename Op::Out;
};
template <typename Op>
using OutputOf = typename OutputElement<Op>::type;

template <typename State>
concept RowState = requires(State state, const State other) {
  { State::none() } -> std::same_as<State>;
  state.merge(other);
  { other.each(std::identity()) } -> std::same_as<State>;
};

template <typename Op>
concept ReducesRows =
    requires(const Op op, typename Op::State state, typename Op::Row row, Classes classes,
             int64_t position, const accum<typename Op::T> (&x)[Op::kReduceInputs][1]) {
      op.reduce(state, row, classes, x);
      op.finish(row, state, position);
    };

// Without operands x has one that isn't read.
template <typename Op>
concept MapsRows =
    requires(const Op op, const typename Op::Row row, Classes classes,
             const accum<typename Op::T> (&x)[Op::kMapInputs == 0 ? 1 : Op::kMapInputs][1],
             accum<typename Op::T> (&out)[1]) { op.map(row, classes, x, out); };

template <typename Op>
concept RowOperator =
    RowState<typename Op::State> &&
    requires(const Op op, Op own, typename Op::Row row, int64_t position, LossSums sums) {
      own.start();
      op.begin(row, position);
      op.read_ahead(row, position);
      op.report(row, position, sums);
      op.conclude(sums);
      { op.skips(row) } -> std::same_as<bool>;
      { op.is_done() } -> std::same_as<bool>;
      { Op::kSums } -> std::convertible_to<bool>;
    } && (Op::kReduceInputs == 0 || ReducesRows<Op>) &&
    (Op::kCopies ? !Op::kMaps && Op::kReduceInputs > 0 : !Op::kMaps || MapsRows<Op>);

// Whether a row's first operand is read twice.
template <RowOperator Op>
inline constexpr bool kRereads = Op::kReduceInputs > 0 && Op::kMapInputs > 0;

}  // namespace fastnn::cuda
