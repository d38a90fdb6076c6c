// Merges the states of several threads into one, in a fixed order.
#pragma once

#include "cuda/portability.cuh"

namespace fastnn::cuda {

// Merges 2^k neighbouring lanes of a warp, which all get the first one's result: merging a with b
// or b with a may round differently (in which product the multiply-add fuses), and the lanes
// of a row must agree. The mask names only these lanes, as the warp's other rows may have ended.
template <typename State>
__device__ State reduce_lanes(State state, int lanes) {
  const int first = int(threadIdx.x) % 32 & ~(lanes - 1);
  const unsigned mask = (lanes == 32 ? ~0u : (1u << lanes) - 1) << first;
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    state.merge(state.each([&](auto value) { return __shfl_xor_sync(mask, value, distance); }));
  }
  return state.each([&](auto value) { return __shfl_sync(mask, value, first); });
}

// Merges the whole block, whose threads all get the result: each warp merges the warps' results for
// itself, in the same order.
template <typename State>
__device__ State reduce_block(State state) {
  FASTNN_SHARED(State, of_warp, [32]);
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int warps = int(blockDim.x) / 32;
  state = reduce_lanes(state, 32);
  if (lane == 0) of_warp[warp] = state;
  __syncthreads();
  state = reduce_lanes(lane < warps ? of_warp[lane] : State::none(), 32);
  // Before the next row's results replace these, which a slower warp may not have read.
  __syncthreads();
  return state;
}

}  // namespace fastnn::cuda
