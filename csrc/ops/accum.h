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

}  // namespace fastnn
