// SIMD vectors from the compiler's vector extensions (GCC, Clang): one source for every
// instruction set. Included only by kernels.cpp, once per FASTNN_SIMD_TARGET; everything lives in
// that target's namespace, so that no code of one target can be linked into another.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "cpu/simd/types.h"

namespace fastnn::simd::FASTNN_SIMD_TARGET {

// Everything a kernel calls is inlined into it: a call in its loop would spill all vectors to
// memory and load every constant again.
#define FASTNN_KERNEL __attribute__((flatten))

#if defined(__AVX512F__)
constexpr int64_t kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int64_t kVectorBytes = 32;
#else
constexpr int64_t kVectorBytes = 16;
#endif

template <typename A>
struct vec_of;
template <>
struct vec_of<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef int32_t ints __attribute__((vector_size(kVectorBytes)));
};
template <>
struct vec_of<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef int64_t ints __attribute__((vector_size(kVectorBytes)));
};

// Vectors of the accumulation type A, and of integers as wide: the type of a comparison.
template <typename A>
using vec = typename vec_of<A>::type;
template <typename A>
using ints = typename vec_of<A>::ints;

// An integer lane: int32_t for float, int64_t for double.
template <typename A>
using lane_int = std::remove_reference_t<decltype(ints<A>{}[0])>;

template <typename A>
constexpr int64_t kLanes = kVectorBytes / sizeof(A);

template <typename A>
inline vec<A> broadcast(A value) {
  return value - vec<A>{};  // not value + 0, which would turn -0.0 into 0.0
}

// ---- bfloat16 and float16 from and to float32: integer arithmetic that any target has ----

typedef uint32_t bits32 __attribute__((vector_size(kVectorBytes)));
typedef uint16_t bits16 __attribute__((vector_size(kVectorBytes / 2)));

inline bits32 select(bits32 condition, bits32 yes, bits32 no) {
  return condition ? yes : no;
}

inline vec<float> widen(bits16 bits, bfloat16) {
  return (vec<float>)(__builtin_convertvector(bits, bits32) << 16);
}

inline bits16 narrow(vec<float> value, bfloat16) {
  const bits32 bits = (bits32)value;
  const bits32 rounded = bits + 0x7fff + ((bits >> 16) & 1);  // to nearest, ties to even
  const bits32 is_nan = (bits32)(value != value);
  return __builtin_convertvector(select(is_nan, bits | 0x400000, rounded) >> 16, bits16);
}

inline vec<float> widen(bits16 half, float16) {
  const bits32 bits = __builtin_convertvector(half, bits32);
  const bits32 sign = (bits & 0x8000) << 16;
  const bits32 magnitude = (bits & 0x7fff) << 13;
  const bits32 normal = magnitude + ((127 - 15) << 23);
  const bits32 special = magnitude + ((255 - 31) << 23);  // infinity and NaN
  // A subnormal is its mantissa times 2^-24: set as the mantissa of 2^-14, which is then taken off.
  const bits32 smallest_normal = bits32{} + (113u << 23);
  const bits32 subnormal =
      (bits32)((vec<float>)(magnitude + smallest_normal) - (vec<float>)smallest_normal);
  const bits32 result = select((bits32)(magnitude >= (0x7c00u << 13)), special,
                               select((bits32)(magnitude < (0x0400u << 13)), subnormal, normal));
  return (vec<float>)(result | sign);
}

inline bits16 narrow(vec<float> value, float16) {
  const bits32 bits = (bits32)value;
  const bits32 sign = bits & 0x80000000u;
  const bits32 magnitude = bits ^ sign;
  // To nearest, ties to even; a carry out of the mantissa lands in the exponent, as it should.
  const bits32 normal = (magnitude - ((127u - 15u) << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Adding 0.5 leaves a subnormal's rounded mantissa in the lowest bits.
  const bits32 half = bits32{} + (126u << 23);
  const bits32 subnormal = (bits32)((vec<float>)magnitude + (vec<float>)half) - half;
  const bits32 infinite = bits32{} + 0x7c00;
  const bits32 nan = bits32{} + 0x7e00;
  bits32 result = select((bits32)(magnitude < (113u << 23)), subnormal, normal);
  result = select((bits32)(magnitude >= (143u << 23)), infinite, result);
  result = select((bits32)(magnitude > (255u << 23)), nan, result);
  return __builtin_convertvector(result | (sign >> 16), bits16);
}

// ---- loads and stores, converting between storage and accumulation type ----

template <typename T>
inline vec<accum<T>> load(const T* from) {
  if constexpr (sizeof(T) == sizeof(accum<T>)) {
    vec<accum<T>> value;
    std::memcpy(&value, from, sizeof(value));
    return value;
  } else {
    bits16 bits;
    std::memcpy(&bits, from, sizeof(bits));
    return widen(bits, T{});
  }
}

template <typename T>
inline void store(T* to, vec<accum<T>> value) {
  if constexpr (sizeof(T) == sizeof(accum<T>)) {
    std::memcpy(to, &value, sizeof(value));
  } else {
    const bits16 bits = narrow(value, T{});
    std::memcpy(to, &bits, sizeof(bits));
  }
}

// The first n lanes of `value`, `fill` in the others.
template <typename A>
inline vec<A> first_lanes(vec<A> value, int64_t n, A fill) {
  ints<A> lane;
  for (int64_t i = 0; i < kLanes<A>; ++i) lane[i] = i;
  return lane < ints<A>{} + static_cast<lane_int<A>>(n) ? value : broadcast(fill);
}

// Copies n < Lanes elements in pieces of constant size: a call of memcpy costs more than a row's
// tail.
template <int64_t Lanes, typename T>
inline void copy_few(T* to, const T* from, int64_t n) {
  if constexpr (Lanes > 1) {
    constexpr int64_t kPiece = Lanes / 2;
    const bool has_piece = n & kPiece;
    if (has_piece) std::memcpy(to, from, kPiece * sizeof(T));
    const int64_t done = has_piece ? kPiece : 0;
    copy_few<kPiece>(to + done, from + done, n);
  }
}

template <typename T>
inline vec<accum<T>> load_first(const T* from, int64_t n, accum<T> fill) {
  T buffer[kLanes<accum<T>>] = {};
  copy_few<kLanes<accum<T>>>(buffer, from, n);
  return first_lanes<accum<T>>(load(buffer), n, fill);
}

template <typename T>
inline void store_first(T* to, int64_t n, vec<accum<T>> value) {
  T buffer[kLanes<accum<T>>];
  store(buffer, value);
  copy_few<kLanes<accum<T>>>(to, buffer, n);
}

// The first n lanes from and to elements `stride` apart. The other lanes repeat the first: memory
// that may be read. Built lane by lane, not through a buffer, whose narrow stores the wide load
// would have to wait for.
template <typename T, size_t... I>
inline vec<accum<T>> gather(const T* from, int64_t stride, int64_t n, std::index_sequence<I...>) {
  const auto lane = [&](int64_t i) { return from[i < n ? i * stride : 0]; };
  if constexpr (sizeof(T) == sizeof(accum<T>)) {
    return vec<accum<T>>{lane(I)...};
  } else {
    return widen(bits16{lane(I).bits...}, T{});
  }
}

template <typename T>
inline vec<accum<T>> gather(const T* from, int64_t stride, int64_t n) {
  constexpr int64_t lanes = kLanes<accum<T>>;
  constexpr auto all = std::make_index_sequence<lanes>();
  return n == lanes ? gather(from, stride, lanes, all) : gather(from, stride, n, all);
}

template <typename T>
inline void scatter(T* to, int64_t stride, int64_t n, vec<accum<T>> value) {
  T buffer[kLanes<accum<T>>];
  store(buffer, value);
  for (int64_t i = 0; i < n; ++i) to[i * stride] = buffer[i];
}

template <typename T>
inline accum<T> load_scalar(const T* from) {
  if constexpr (sizeof(T) == sizeof(accum<T>)) {
    return *from;
  } else {
    return widen(bits16{} + from->bits, T{})[0];
  }
}

template <typename T>
inline void store_scalar(T* to, accum<T> value) {
  if constexpr (sizeof(T) == sizeof(accum<T>)) {
    *to = value;
  } else {
    to->bits = narrow(broadcast(value), T{})[0];
  }
}

// ---- arithmetic ----

template <typename A>
inline vec<A> max(vec<A> a, vec<A> b) {
  return a > b ? a : b;
}

template <typename A>
inline A reduce_max(vec<A> value) {
  A result = value[0];
  for (int64_t i = 1; i < kLanes<A>; ++i) result = value[i] > result ? value[i] : result;
  return result;
}

template <typename A>
inline A reduce_sum(vec<A> value) {
  A result = value[0];
  for (int64_t i = 1; i < kLanes<A>; ++i) result += value[i];
  return result;
}

// Constants of exp(): the range outside which the result is 0 or infinity; ln 2 in two parts, the
// first short enough for n * ln2_high to be exact; 1.5 * 2^mantissa_bits, which rounds to integers.
template <typename A>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr float lowest = -104.0f, highest = 89.0f;
  static constexpr float log2_e = 1.442695041f;
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr float rounder = 12582912.0f;
  static constexpr int mantissa_bits = 23, exponent_bias = 127;
  static constexpr int degree = 7;
};
template <>
struct ExpConstants<double> {
  static constexpr double lowest = -746.0, highest = 710.0;
  static constexpr double log2_e = 1.4426950408889634;
  static constexpr double ln2_high = 0.6931471803691238, ln2_low = 1.9082149292705877e-10;
  static constexpr double rounder = 6755399441055744.0;
  static constexpr int mantissa_bits = 52, exponent_bias = 1023;
  static constexpr int degree = 13;
};

template <typename A>
constexpr A inverse_factorial(int k) {
  A factorial = 1;
  for (int i = 2; i <= k; ++i) factorial *= i;
  return A(1) / factorial;
}

// exp(x) = 2^n * exp(r) with n = round(x / ln 2) and |r| <= ln(2) / 2, where the Taylor polynomial
// of the given degree is exact to less than a tenth of a unit in the last place. NaN stays NaN.
template <typename A>
inline vec<A> exp(vec<A> x) {
  using K = ExpConstants<A>;
  x = x < K::lowest ? broadcast(K::lowest) : x;
  x = x > K::highest ? broadcast(K::highest) : x;
  const vec<A> rounded = x * K::log2_e + K::rounder;
  const vec<A> n = rounded - K::rounder;
  const vec<A> r = (x - n * K::ln2_high) - n * K::ln2_low;

  vec<A> polynomial = broadcast(inverse_factorial<A>(K::degree));
#pragma GCC unroll 16
  for (int k = K::degree - 1; k >= 0; --k) polynomial = polynomial * r + inverse_factorial<A>(k);

  // The rounder's own bits taken off, what is left of `rounded` is the integer n. 2^n in two
  // factors: one alone can't reach subnormal results, nor 2^128.
  const ints<A> exponent = (ints<A>)rounded - (ints<A>)broadcast(K::rounder);
  const ints<A> half = exponent >> 1;
  const vec<A> scale1 = (vec<A>)((half + K::exponent_bias) << K::mantissa_bits);
  const vec<A> scale2 = (vec<A>)((exponent - half + K::exponent_bias) << K::mantissa_bits);
  return polynomial * scale1 * scale2;
}

template <typename A>
constexpr int kLogTerms = sizeof(A) == 4 ? 5 : 12;

// log(x) = e * ln 2 + 2 * atanh((m - 1) / (m + 1)) with x = 2^e * m and sqrt(1/2) <= m < sqrt(2),
// for positive normal x and for NaN. The series of atanh is taken to a tenth of a unit in the last
// place.
template <typename A>
inline vec<A> log(vec<A> x) {
  using K = ExpConstants<A>;
  const ints<A> half_root = (ints<A>)broadcast(A(0.70710678118654752440));
  // How many powers of two x is away from [sqrt(1/2), sqrt(2)).
  const ints<A> exponent = ((ints<A>)x - half_root) >> K::mantissa_bits;
  const vec<A> m = (vec<A>)((ints<A>)x - (exponent << K::mantissa_bits));
  const vec<A> s = (m - 1) / (m + 1);
  const vec<A> s2 = s * s;
  vec<A> series = broadcast(A(1) / (2 * kLogTerms<A> - 1));
#pragma GCC unroll 16
  for (int k = kLogTerms<A> - 1; k > 0; --k) series = series * s2 + A(1) / (2 * k - 1);
  // An integer in the rounder's lowest bits is that integer's float, less the rounder.
  const vec<A> e = (vec<A>)((ints<A>)broadcast(K::rounder) + exponent) - K::rounder;
  const vec<A> tail = e * K::ln2_low + (x - x);  // x - x: NaN stays NaN
  return e * K::ln2_high + (2 * s * series + tail);
}

}  // namespace fastnn::simd::FASTNN_SIMD_TARGET
