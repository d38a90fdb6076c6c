// bfloat16 and float16 by the book, one number at a time: what the kernels' conversions must agree
// with.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "cpu/simd/types.h"

namespace fastnn::tests {

// Bits of the fraction, and the exponent of the smallest normal number; the largest exponent
// mirrors it.
template <typename T>
struct Format {
  static constexpr int fraction_bits = std::numeric_limits<T>::digits - 1;
  static constexpr int lowest_exponent = std::numeric_limits<T>::min_exponent - 1;
};
template <>
struct Format<simd::bfloat16> {
  static constexpr int fraction_bits = 7, lowest_exponent = -126;
};
template <>
struct Format<simd::float16> {
  static constexpr int fraction_bits = 10, lowest_exponent = -14;
};

// The distance from 1 to the next number: twice the largest relative error of a rounding.
template <typename T>
const double kEpsilon = std::ldexp(1.0, -Format<T>::fraction_bits);
// The smallest positive number.
template <typename T>
const double kSmallest = std::ldexp(1.0, Format<T>::lowest_exponent - Format<T>::fraction_bits);

template <typename T>
double to_double(T value) {
  if constexpr (std::is_floating_point_v<T>) {
    return value;
  } else {
    using F = Format<T>;
    const int magnitude = value.bits & 0x7fff;
    const int exponent = magnitude >> F::fraction_bits;
    const int fraction = magnitude & ((1 << F::fraction_bits) - 1);
    constexpr int special = 0x7fff >> F::fraction_bits;
    double result;
    if (exponent == special) {
      result = fraction == 0 ? INFINITY : NAN;
    } else if (exponent == 0) {
      result = std::ldexp(fraction, F::lowest_exponent - F::fraction_bits);
    } else {
      result = std::ldexp(fraction + (1 << F::fraction_bits),
                          exponent - 1 + F::lowest_exponent - F::fraction_bits);
    }
    return value.bits & 0x8000 ? -result : result;
  }
}

// The bits of a narrow format's number without the sign, for a value that isn't negative.
template <typename T>
int magnitude_bits(double value) {
  using F = Format<T>;
  constexpr int infinity = 0x7fff >> F::fraction_bits << F::fraction_bits;
  if (std::isnan(value)) return 0x7fff;
  if (value >= std::ldexp(1.0, 2 - F::lowest_exponent)) return infinity;
  // The bits count the numbers from 0 on: 2^fraction_bits for each exponent. A normal number's
  // leading one, and a fraction that rounds up to 2, both carry into the exponent as they should.
  const int exponent = std::max(std::ilogb(value), F::lowest_exponent);
  const double steps = std::nearbyint(std::ldexp(value, F::fraction_bits - exponent));
  return ((exponent - F::lowest_exponent) << F::fraction_bits) + static_cast<int>(steps);
}

// To the nearest, ties to even.
template <typename T>
T from_double(double value) {
  if constexpr (std::is_floating_point_v<T>) {
    return static_cast<T>(value);
  } else {
    const int sign = std::signbit(value) ? 0x8000 : 0;
    return T{static_cast<uint16_t>(sign | magnitude_bits<T>(std::abs(value)))};
  }
}

}  // namespace fastnn::tests
