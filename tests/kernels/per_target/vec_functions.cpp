// Compiled once for each instruction set, as csrc/cpu/simd/kernels.cpp is. No header of the tests'
// own code is included here: its inline functions would be compiled for that set, and the linker
// might take them for all.
#include "../vec_functions.h"

#include <algorithm>

#include "cpu/simd/vec.h"

namespace fastnn::simd::FASTNN_SIMD_TARGET {
namespace {

// to[i] = f(from[i]), a vector at a time and the rest in part of one.
template <typename To, typename From, typename F>
void map(To* to, const From* from, int64_t n, F f) {
  constexpr int64_t lanes = kLanes<accum<From>>;
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) store(to + i, f(load(from + i)));
  if (i < n) store_up_to(to + i, n - i, f(load_up_to(from + i, n - i)));
}

template <typename To, typename From>
void convert(To* to, const From* from, int64_t n) {
  map(to, from, n, [](auto x) { return x; });
}

template <typename A>
void exp_all(A* to, const A* from, int64_t n) {
  map(to, from, n, [](vec<A> x) { return exp<A>(x); });
}

template <typename A>
void exp_nonpositive_all(A* to, const A* from, int64_t n) {
  map(to, from, n, [](vec<A> x) { return exp_nonpositive<A>(x); });
}

template <typename A>
void log_all(A* to, const A* from, int64_t n) {
  map(to, from, n, [](vec<A> x) { return log<A>(x); });
}

}  // namespace

template <typename T>
VecFunctions<T> vec_functions() {
  using A = accum<T>;
  return {kLanes<A>, convert<A, T>, convert<T, A>, exp_all<A>, exp_nonpositive_all<A>, log_all<A>};
}

template VecFunctions<double> vec_functions<double>();
template VecFunctions<float> vec_functions<float>();
template VecFunctions<bfloat16> vec_functions<bfloat16>();
template VecFunctions<float16> vec_functions<float16>();

}  // namespace fastnn::simd::FASTNN_SIMD_TARGET
