// The type that each storage type is summed in, on every device. No ATen: kernels take raw
// pointers.
#pragma once

namespace fastnn {

template <typename T>
struct accum_of {
  using type = float;
};
template <>
struct accum_of<double> {
  using type = double;
};
// float64 sums in float64, everything narrower in float32.
template <typename T>
using accum = typename accum_of<T>::type;

// What cross_entropy's forward keeps for the backward: the gradient itself, which is then scaled;
// or a copy of the logits, where that would round it twice, and in float16 lose a gradient divided
// by many rows that a scaled loss brings back.
template <typename T>
inline constexpr bool kKeepsGradient = sizeof(T) == sizeof(accum<T>);

}  // namespace fastnn
