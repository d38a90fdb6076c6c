// The accumulation type of each storage type, on every device. No ATen: kernels take raw pointers.
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

// Whether cross_entropy's forward keeps the gradient itself, which the backward only scales.
// Narrower types keep a copy of the logits: a stored gradient would be rounded twice, and in
// float16 one divided by many rows could underflow before loss scaling restores it.
template <typename T>
inline constexpr bool kKeepsGradient = sizeof(T) == sizeof(accum<T>);

}  // namespace fastnn
