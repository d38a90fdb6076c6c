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
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/simd/types.h"

namespace fastnn::simd::FASTNN_SIMD_TARGET {

// Everything a kernel calls is inlined into it: a call in its loop would spill all vectors to
// memory and reload every constant.
#define FASTNN_KERNEL __attribute__((flatten))

// The compiler splits vectors that are wider than the target's, which lets the tests run AVX-512's
// width on machines without it.
#if !defined(FASTNN_VECTOR_BYTES)
#if defined(__AVX512F__)
#define FASTNN_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define FASTNN_VECTOR_BYTES 32
#else
#define FASTNN_VECTOR_BYTES 16
#endif
#endif
constexpr int64_t kVectorBytes = FASTNN_VECTOR_BYTES;

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

// Vectors of the accumulation type A, and of integers of its width: the type of a comparison.
template <typename A>
using vec = typename vec_of<A>::type;
template <typename A>
using ints = typename vec_of<A>::ints;

// An integer lane: int32_t for float, int64_t for double.
template <typename A>
using lane_int = std::remove_reference_t<decltype(ints<A>{}[0])>;

template <typename A>
constexpr int64_t kLanes = kVectorBytes / sizeof(A);

// Lane i is f(i).
template <typename A, typename F, size_t... I>
inline ints<A> ints_of(F f, std::index_sequence<I...>) {
  return ints<A>{f(I)...};
}
template <typename A, typename F>
inline ints<A> ints_of(F f) {
  return ints_of<A>(f, std::make_index_sequence<kLanes<A>>());
}

template <typename A, typename F, size_t... I>
inline vec<A> lanes_of(F f, std::index_sequence<I...>) {
  return vec<A>{f(I)...};
}
template <typename A, typename F>
inline vec<A> lanes_of(F f) {
  return lanes_of<A>(f, std::make_index_sequence<kLanes<A>>());
}

template <typename A>
inline vec<A> broadcast(A value) {
  return value - vec<A>{};  // not value + 0, which would turn -0.0 into 0.0
}

// ---- bfloat16 and float16 from and to float32, in integer arithmetic that any target has ----

typedef uint32_t bits32 __attribute__((vector_size(kVectorBytes)));
typedef uint16_t bits16 __attribute__((vector_size(kVectorBytes / 2)));

inline bits32 select(bits32 condition, bits32 yes, bits32 no) {
  return condition ? yes : no;
}

// Zero-extends each element. On x86 that takes one instruction, where GCC 12 emits four.
inline bits32 zero_extend(bits16 bits) {
#if FASTNN_VECTOR_BYTES == 64 && defined(__AVX512F__)
  return (bits32)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)bits);  // a mask as in vec_max
#elif FASTNN_VECTOR_BYTES == 32 && defined(__AVX2__)
  return (bits32)_mm256_cvtepu16_epi32((__m128i)bits);
#else
  return __builtin_convertvector(bits, bits32);
#endif
}

#if FASTNN_VECTOR_BYTES == 64 && defined(__AVX512F__)
typedef uint16_t halves __attribute__((vector_size(kVectorBytes)));
// Half i of a vector is f(i).
template <typename F, size_t... I>
inline halves halves_of(F f, std::index_sequence<I...>) {
  return halves{uint16_t(f(I))...};
}
template <typename F>
inline halves halves_of(F f) {
  return halves_of(f, std::make_index_sequence<kVectorBytes / 2>());
}
#endif

// The upper 16 bits of each lane, in one instruction where there is one.
inline bits16 upper_halves(bits32 bits) {
#if FASTNN_VECTOR_BYTES == 64 && defined(__AVX512F__)
  const __m512i places = (__m512i)halves_of([](int i) { return (2 * i + 1) % 32; });
  const __m512i upper = _mm512_maskz_permutexvar_epi16(0xffffffff, places, (__m512i)bits);
  bits16 first;  // not by a cast, for which GCC warns of an operand that it leaves undefined
  std::memcpy(&first, &upper, sizeof(first));
  return first;
#else
  return __builtin_convertvector(bits >> 16, bits16);
#endif
}

inline vec<float> widen(bits16 bits, bfloat16) {
#if FASTNN_VECTOR_BYTES == 64 && defined(__AVX512F__)
  // Each to the upper half of a lane, in one instruction.
  const __m512i places = (__m512i)halves_of([](int i) { return i / 2; });
  return (vec<float>)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, places,
                                                    _mm512_castsi256_si512((__m256i)bits));
#else
  return (vec<float>)(zero_extend(bits) << 16);
#endif
}

// `bits`, or the bits of a quiet NaN where `value` is NaN.
inline bits32 quiet_where_nan(bits32 bits, vec<float> value) {
#if FASTNN_VECTOR_BYTES == 64 && defined(__AVX512F__)
  // The table's two digits, of quiet and signalling NaN: the value itself, quiet. All else: `bits`.
  return (bits32)_mm512_fixupimm_ps((vec<float>)bits, value, _mm512_set1_epi32(0x22), 0);
#else
  return select((bits32)(value != value), (bits32)value | 0x400000, bits);
#endif
}

inline bits16 narrow(vec<float> value, bfloat16) {
  const bits32 bits = (bits32)value;
  const bits32 rounded = bits + 0x7fff + ((bits >> 16) & 1);  // to nearest, ties to even
  return upper_halves(quiet_where_nan(rounded, value));
}

inline vec<float> widen(bits16 half, float16) {
  const bits32 bits = zero_extend(half);
  const bits32 sign = (bits & 0x8000) << 16;
  const bits32 magnitude = (bits & 0x7fff) << 13;
  const bits32 normal = magnitude + ((127 - 15) << 23);
  const bits32 special = magnitude + ((255 - 31) << 23);  // infinity and NaN
  // A subnormal is its mantissa times 2^-24: make it the mantissa of 2^-14, then subtract that.
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

// The value that is loaded again after a store as T.
template <typename T>
inline vec<accum<T>> rounded(vec<accum<T>> value) {
  if constexpr (sizeof(T) == sizeof(accum<T>)) {
    return value;
  } else {
    return widen(narrow(value, T{}), T{});
  }
}

// All bits set in the first n lanes, none in the others.
template <typename A>
inline ints<A> first_lanes(int64_t n) {
  const ints<A> lane = ints_of<A>([](size_t i) { return static_cast<lane_int<A>>(i); });
  return lane < ints<A>{} + static_cast<lane_int<A>>(n);
}

// The first n lanes of `value`, `fill` in the others.
template <typename A>
inline vec<A> first_lanes(vec<A> value, int64_t n, A fill) {
  return first_lanes<A>(n) ? value : broadcast(fill);
}

// Copies n < 2 * Lanes elements in pieces of constant size: a call to memcpy costs more than a
// row's tail.
template <int64_t Lanes, typename T>
inline void copy_few(T* to, const T* from, int64_t n) {
  const bool has_piece = n & Lanes;
  if (has_piece) std::memcpy(to, from, Lanes * sizeof(T));
  if constexpr (Lanes > 1) {
    const int64_t done = has_piece ? Lanes : 0;
    copy_few<Lanes / 2>(to + done, from + done, n);
  }
}

// Load and store the first n <= kLanes elements; a load zeroes the other lanes. Masked instructions
// touch no memory past the elements. AVX2's masked store isn't used: it takes tens of cycles on AMD
// CPUs.
#if FASTNN_VECTOR_BYTES == 64 && defined(__AVX512F__)
inline __mmask16 first_lanes_mask(int64_t n) {
  return static_cast<__mmask16>((1u << n) - 1);
}
inline vec<float> load_up_to(const float* from, int64_t n) {
  return _mm512_maskz_loadu_ps(first_lanes_mask(n), from);
}
inline vec<double> load_up_to(const double* from, int64_t n) {
  return _mm512_maskz_loadu_pd(static_cast<__mmask8>(first_lanes_mask(n)), from);
}
template <typename T>
inline vec<float> load_up_to(const T* from, int64_t n) {
  return widen((bits16)_mm256_maskz_loadu_epi16(first_lanes_mask(n), from), T{});
}
inline void store_up_to(float* to, int64_t n, vec<float> value) {
  _mm512_mask_storeu_ps(to, first_lanes_mask(n), value);
}
inline void store_up_to(double* to, int64_t n, vec<double> value) {
  _mm512_mask_storeu_pd(to, static_cast<__mmask8>(first_lanes_mask(n)), value);
}
template <typename T>
inline void store_up_to(T* to, int64_t n, vec<float> value) {
  _mm256_mask_storeu_epi16(to, first_lanes_mask(n), (__m256i)narrow(value, T{}));
}
#else
template <typename T>
inline vec<accum<T>> load_up_to(const T* from, int64_t n) {
  if (n == kLanes<accum<T>>) return load(from);
#if FASTNN_VECTOR_BYTES == 32 && defined(__AVX2__)
  const auto mask = (__m256i)first_lanes<accum<T>>(n);
  if constexpr (std::is_same_v<T, float>) return _mm256_maskload_ps(from, mask);
  if constexpr (std::is_same_v<T, double>) return _mm256_maskload_pd(from, mask);
#endif
  T buffer[kLanes<accum<T>>] = {};
  copy_few<kLanes<accum<T>> / 2>(buffer, from, n);
  return load(buffer);
}

template <typename T>
inline void store_up_to(T* to, int64_t n, vec<accum<T>> value) {
  if (n == kLanes<accum<T>>) return store(to, value);
  T buffer[kLanes<accum<T>>];
  store(buffer, value);
  copy_few<kLanes<accum<T>> / 2>(to, buffer, n);
}
#endif

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

// a > b ? a : b and a < b ? a : b, so b if either is NaN. On x86 each is one instruction, which
// the compiler doesn't find by itself.
#if FASTNN_VECTOR_BYTES == 64 && defined(__AVX512F__)
#define FASTNN_VECTOR_OP(op, a, b)                                                   \
  /* A full mask, as GCC warns of an undefined operand in its unmasked intrinsic. */ \
  if constexpr (sizeof(A) == 4) return _mm512_maskz_##op##_ps(0xffff, a, b);         \
  if constexpr (sizeof(A) == 8) return _mm512_maskz_##op##_pd(0xff, a, b);
#elif FASTNN_VECTOR_BYTES == 32 && defined(__AVX2__)
#define FASTNN_VECTOR_OP(op, a, b)                             \
  if constexpr (sizeof(A) == 4) return _mm256_##op##_ps(a, b); \
  if constexpr (sizeof(A) == 8) return _mm256_##op##_pd(a, b);
#elif FASTNN_VECTOR_BYTES == 16 && defined(__SSE2__)
#define FASTNN_VECTOR_OP(op, a, b)                          \
  if constexpr (sizeof(A) == 4) return _mm_##op##_ps(a, b); \
  if constexpr (sizeof(A) == 8) return _mm_##op##_pd(a, b);
#endif
template <typename A>
inline vec<A> vec_max(vec<A> a, vec<A> b) {
#ifdef FASTNN_VECTOR_OP
  FASTNN_VECTOR_OP(max, a, b)
#else
  return a > b ? a : b;
#endif
}
template <typename A>
inline vec<A> vec_min(vec<A> a, vec<A> b) {
#ifdef FASTNN_VECTOR_OP
  FASTNN_VECTOR_OP(min, a, b)
#else
  return a < b ? a : b;
#endif
}
#undef FASTNN_VECTOR_OP

template <typename A>
inline vec<A> vec_add(vec<A> a, vec<A> b) {
  return a + b;
}

// ---- across lanes ----

// Lane i of the result is lane index(i) of a or, from kLanes on, of b.
template <typename A, typename Index, size_t... I>
inline vec<A> shuffle(vec<A> a, vec<A> b, Index index, std::index_sequence<I...>) {
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, index(I)...);
#else
  return __builtin_shuffle(a, b, ints<A>{index(I)...});
#endif
}

template <typename A, typename Index>
inline vec<A> shuffle(vec<A> a, vec<A> b, Index index) {
  return shuffle<A>(a, b, index, std::make_index_sequence<kLanes<A>>());
}

// Two vectors in blocks of Distance lanes: the first block of each pair, and the second.
template <typename A, int Distance>
constexpr auto kFirstBlocks =
    [](int i) { return i & Distance ? int(kLanes<A>) + i - Distance : i; };
template <typename A, int Distance>
constexpr auto kSecondBlocks = [](int i) { return kFirstBlocks<A, Distance>(i) + Distance; };

// Swaps the off-diagonal blocks of Distance x Distance elements, then those of half the size.
template <typename A, int Distance = kLanes<A> / 2>
inline void transpose(vec<A> (&rows)[kLanes<A>]) {
  constexpr int lanes = kLanes<A>;
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) {
    if (i & Distance) continue;
    const vec<A> a = rows[i];
    const vec<A> b = rows[i + Distance];
    rows[i] = shuffle<A>(a, b, kFirstBlocks<A, Distance>);
    rows[i + Distance] = shuffle<A>(a, b, kSecondBlocks<A, Distance>);
  }
  if constexpr (Distance > 1) transpose<A, Distance / 2>(rows);
}

// Combines all lanes by halves; every lane holds the result.
template <typename A, int Distance = kLanes<A> / 2, typename Combine>
inline vec<A> reduce(vec<A> value, Combine combine) {
  value = combine(value, shuffle<A>(value, value, [](int i) { return i ^ Distance; }));
  if constexpr (Distance > 1) {
    return reduce<A, Distance / 2>(value, combine);
  } else {
    return value;
  }
}

// The same of a vector's worth of vectors: that of vectors[i] in lane i, in fewer steps than one by
// one.
template <typename A, int Distance = kLanes<A> / 2, typename Combine>
inline vec<A> reduce_each(vec<A> (&vectors)[kLanes<A>], Combine combine) {
#pragma GCC unroll 8
  for (int i = 0; i < Distance; ++i) {
    vectors[i] = combine(shuffle<A>(vectors[i], vectors[i + Distance], kFirstBlocks<A, Distance>),
                         shuffle<A>(vectors[i], vectors[i + Distance], kSecondBlocks<A, Distance>));
  }
  if constexpr (Distance > 1) {
    return reduce_each<A, Distance / 2>(vectors, combine);
  } else {
    return vectors[0];
  }
}

template <typename A>
inline vec<A> reduce_max(vec<A> value) {
  return reduce<A>(value, vec_max<A>);
}

template <typename A>
inline vec<A> reduce_sum(vec<A> value) {
  return reduce<A>(value, vec_add<A>);
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

// The sum of r^(k - First) / k! for k from First to Last, in pairs of terms: they don't wait for
// one another, as the steps of a single chain do.
template <typename A, int First, int Last>
inline vec<A> taylor_from(vec<A> r, vec<A> r2) {
  static_assert((Last - First) % 2 == 1);
  const vec<A> pair = inverse_factorial<A>(First) + r * inverse_factorial<A>(First + 1);
  if constexpr (Last == First + 1) {
    return pair;
  } else {
    return pair + r2 * taylor_from<A, First + 2, Last>(r, r2);
  }
}

// exp(x) = 2^n * polynomial.
template <typename A>
struct ExpParts {
  vec<A> polynomial;
  vec<A> n;
  ints<A> exponent;  // n as an integer
};

// Takes n = round(x / ln 2), so that |r| <= ln(2) / 2, where the Taylor polynomial of this degree
// is accurate to less than a tenth of a unit in the last place.
template <typename A>
inline ExpParts<A> exp_parts(vec<A> x) {
  using K = ExpConstants<A>;
  const vec<A> rounded = x * K::log2_e + K::rounder;
  const vec<A> n = rounded - K::rounder;
  const vec<A> r = (x - n * K::ln2_high) - n * K::ln2_low;
  const vec<A> r2 = r * r;
  const vec<A> polynomial = 1 + r * (1 + r * taylor_from<A, 2, K::degree>(r, r2));
  // The bits of `rounded` minus those of the rounder are the integer n.
  return {polynomial, n, (ints<A>)rounded - (ints<A>)broadcast(K::rounder)};
}

// 2^exponent, which must be a normal number.
template <typename A>
inline vec<A> power_of_two(ints<A> exponent) {
  using K = ExpConstants<A>;
  return (vec<A>)((exponent + K::exponent_bias) << K::mantissa_bits);
}

// a * b, rounded. In a sum of two products the compiler fuses one with the addition, but not the
// same one in every kernel: results that must be equal would differ in their last bits.
template <typename A, typename B>
inline auto rounded_product(A a, B b) {
  auto product = a * b;
  // The compiler can't see through it. __builtin_assoc_barrier would take vectors apart.
#if defined(__x86_64__)
  asm("" : "+v"(product));
#elif defined(__aarch64__)
  asm("" : "+w"(product));
#endif
  return product;
}

// 2^n * polynomial, or 0 where x is at most the lowest: letting such a product underflow would cost
// a hundred cycles. AVX-512 has an instruction for it; elsewhere it takes two factors, 2^first and
// the rest, since no single normal power of two reaches subnormal results or 2^128.
template <typename A>
inline vec<A> combine(const ExpParts<A>& exp, vec<A> x, [[maybe_unused]] ints<A> first) {
  const vec<A> lowest = broadcast(ExpConstants<A>::lowest), zero = {};
#if FASTNN_VECTOR_BYTES == 64 && defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) {
    const __mmask16 is_not_zero = _mm512_cmp_ps_mask(x, lowest, _CMP_NLE_UQ);
    return _mm512_mask_scalef_ps(zero, is_not_zero, exp.polynomial, exp.n);
  } else {
    const __mmask8 is_not_zero = _mm512_cmp_pd_mask(x, lowest, _CMP_NLE_UQ);
    return _mm512_mask_scalef_pd(zero, is_not_zero, exp.polynomial, exp.n);
  }
#else
  const vec<A> large = exp.polynomial * power_of_two<A>(first);
  return (x <= lowest ? zero : large) * power_of_two<A>(exp.exponent - first);
#endif
}

// exp(x) for x <= 0, all that a softmax needs; NaN stays NaN.
template <typename A>
inline vec<A> exp_nonpositive(vec<A> x) {
  using K = ExpConstants<A>;
  x = vec_max<A>(broadcast(K::lowest), x);  // so that the exponent fits an integer
  const ExpParts<A> parts = exp_parts<A>(x);
  return combine<A>(parts, x, parts.exponent + K::exponent_bias / 2);
}

// exp(x); NaN stays NaN.
template <typename A>
inline vec<A> exp(vec<A> x) {
  using K = ExpConstants<A>;
  x = vec_min<A>(broadcast(K::highest), vec_max<A>(broadcast(K::lowest), x));
  const ExpParts<A> parts = exp_parts<A>(x);
  return combine<A>(parts, x, parts.exponent >> 1);
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
  // Adding an integer to the rounder's bits, then subtracting the rounder, converts it to float.
  const vec<A> e = (vec<A>)((ints<A>)broadcast(K::rounder) + exponent) - K::rounder;
  const vec<A> tail = e * K::ln2_low + (x - x);  // x - x: NaN stays NaN
  return e * K::ln2_high + (2 * s * series + tail);
}

}  // namespace fastnn::simd::FASTNN_SIMD_TARGET
