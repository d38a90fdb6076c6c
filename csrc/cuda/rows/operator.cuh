// What an operator over rows is to the kernels that walk them.
//
// clang-format off: a table.
// An operator is a struct of device functions:
//   T, State, Row               element; what a thread knows of the classes it has read; what all
//                               of a row's threads know (its target, say, and later its lse)
//   kReduceInputs               operands read for the state (the first ones), 0: there is none
//   kMaps, kMapInputs           whether an output of the input's layout is written, and operands
//                               read for it
//   kSums                       whether rows add to a loss and a total weight
//   begin(row)                  the Row, from what is known before reading
//   skips(Row)                  whether the output is zero whatever the operands
//   reduce(state, Row, classes, x)  takes x[operand][j], of class classes.at(j), into the state
//   finish(Row, state, row)     completes the Row with the state of all its classes
//   report(Row, row, sums)      writes and adds what there is one of per row
//   map(Row, classes, x, out)   writes the output's elements
//   is_done()                   optional: whether the output is right as it is
// clang-format on
// Threads that share a row all call begin and finish and get the same bits; one of them reports.
#pragma once

#include <cstdint>

#include "cuda/rows/states.cuh"

namespace fastnn::cuda {

// Whether the operator finds nothing to do, which the device alone may know.
template <typename Op>
__device__ bool is_done(const Op& op) {
  if constexpr (requires { op.is_done(); }) {
    return op.is_done();
  } else {
    return false;
  }
}

// Whether a row's first operand is read twice.
template <typename Op>
inline constexpr bool kRereads = Op::kReduceInputs > 0 && Op::kMapInputs > 0;

// Classes first, first + step, ...
struct Classes {
  int64_t first;
  int64_t step;

  __device__ int64_t at(int j) const {
    return first + j * step;
  }
};

}  // namespace fastnn::cuda
