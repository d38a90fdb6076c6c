// Conversions of storage types, and 128-bit access to memory of any alignment.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cuda/portability.cuh"
#include "ops/accum.h"

namespace fastnn::cuda {

// Two bytes in memory, but float32 otherwise: kernels plan, group and compute as for float32, so
// that results have the same bits as those of a copy in float32.
template <typename Narrow>
struct Widened {
  Narrow value;

  Widened() = default;
  __device__ explicit Widened(float x) : value(x) {
  }
  __device__ operator float() const {
    return value;
  }
};

// The storage type of the losses, log-probabilities, incoming gradients and class weights of such
// elements. A class, not a condition: compilers mangle a condition in a kernel's name differently.
template <typename T>
struct WideOf {
  using type = T;
};
template <typename Narrow>
struct WideOf<Widened<Narrow>> {
  using type = float;
};
template <typename T>
using Wide = typename WideOf<T>::type;
template <typename T>
inline constexpr bool kIsWidened = !std::is_same_v<T, Wide<T>>;

// The bytes that a thread loads or stores in one instruction, at an address that is a multiple.
inline constexpr int kVecBytes = 16;
template <typename T>
inline constexpr int kVecSize = kVecBytes / int(sizeof(Wide<T>));

template <typename T>
struct alignas(kVecSize<T> * sizeof(T)) Vec {
  T values[kVecSize<T>];
};

// How many elements past a vector's boundary a pointer is.
template <typename T>
__device__ inline int elements_past_boundary(const T* p) {
  return int(reinterpret_cast<uintptr_t>(p) % sizeof(Vec<T>) / sizeof(T));
}

// Elements [0, n) from `start` on, split for vector access: `head` single ones up to the first
// 16-byte boundary, `vecs` vectors, and the rest single again.
struct Peel {
  int64_t head;
  int64_t vecs;
  int64_t n;
  int vec_size;

  template <typename T>
  __device__ static Peel of(const T* start, int64_t n) {
    const int past = elements_past_boundary(start);
    int64_t head = past == 0 ? 0 : kVecSize<T> - past;
    if (head > n) head = n;
    return {head, (n - head) / kVecSize<T>, n, kVecSize<T>};
  }
  // The number of single elements, and the index of each.
  __device__ int64_t singles() const {
    return n - vecs * vec_size;
  }
  __device__ int64_t single(int64_t i) const {
    return i < head ? i : i + vecs * vec_size;
  }
  __device__ int64_t vec(int64_t v) const {
    return head + v * vec_size;
  }
};

// Whether b is at a vector's boundary wherever a is, so that a's peel is b's. The answer is the
// same for all rows that are equally far apart.
template <typename T, typename U>
__device__ inline bool co_aligned(const T* a, const U* b) {
  static_assert(kVecSize<U> <= kVecSize<T>, "then a's vector is one or several of b's");
  return elements_past_boundary(a) % kVecSize<U> == elements_past_boundary(b);
}

// kVecSize neighbouring elements; `aligned` says whether p is at a 16-byte boundary. If it isn't,
// a warp's single loads still touch the same cache lines as its vector loads would.
template <typename T>
__device__ inline Vec<T> load_vec(const T* p, bool aligned) {
  if (aligned) return *reinterpret_cast<const Vec<T>*>(p);
  Vec<T> result;
#pragma unroll
  for (int i = 0; i < kVecSize<T>; ++i) result.values[i] = p[i];
  return result;
}

// One store of 16 or 8 bytes.
template <typename V>
__device__ inline void store_whole(void* p, const V& value) {
  using Bits = std::conditional_t<sizeof(V) == sizeof(uint4), uint4, uint2>;
  static_assert(sizeof(V) == sizeof(Bits));
  Bits bits;
  memcpy(&bits, &value, sizeof(bits));
  FASTNN_STORE_WHOLE(static_cast<Bits*>(p), bits);
}

template <typename T>
__device__ inline void store_vec(T* p, bool aligned, const Vec<T>& vec) {
  if (aligned) {
    store_whole(p, vec);
    return;
  }
#pragma unroll
  for (int i = 0; i < kVecSize<T>; ++i) p[i] = vec.values[i];
}

template <typename T>
__device__ inline accum<T> to_accum(T value) {
  return accum<T>(value);
}

template <typename T>
__device__ inline void to_accum(const Vec<T>& vec, accum<T> (&values)[kVecSize<T>]) {
#pragma unroll
  for (int i = 0; i < kVecSize<T>; ++i) values[i] = to_accum(vec.values[i]);
}

// Converts two at a time, with one instruction each; the compiler takes two for every other one.
__device__ inline void to_accum(const Vec<c10::BFloat16>& vec,
                                float (&values)[kVecSize<c10::BFloat16>]) {
#pragma unroll
  for (int i = 0; i < kVecSize<c10::BFloat16>; i += 2) {
    uint32_t pair;
    memcpy(&pair, &vec.values[i], sizeof(pair));
    const uint32_t bits[2] = {pair << 16, pair & 0xFFFF0000};
    memcpy(&values[i], bits, sizeof(bits));
  }
}

template <typename T>
__device__ inline Vec<T> from_accum(const accum<T> (&values)[kVecSize<T>]) {
  Vec<T> vec;
#pragma unroll
  for (int i = 0; i < kVecSize<T>; ++i) vec.values[i] = T(values[i]);
  return vec;
}

template <typename To, typename T>
__device__ inline Vec<To> converted(const Vec<T>& vec) {
  if constexpr (std::is_same_v<To, T>) {
    return vec;
  } else {
    accum<T> values[kVecSize<T>];
    to_accum(vec, values);
    return from_accum<To>(values);
  }
}

}  // namespace fastnn::cuda
