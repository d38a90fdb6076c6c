// The functions of csrc/cpu/simd/vec.h over arrays. vec.h itself is only for files that are
// compiled once for each instruction set, as vec_functions.cpp is.
#pragma once

#include "cpu/simd/kernels.h"

namespace fastnn::simd {

template <typename T>
struct VecFunctions {
  int64_t lanes;
  void (*widen)(accum<T>* to, const T* from, int64_t n);
  void (*narrow)(T* to, const accum<T>* from, int64_t n);
  void (*exp)(accum<T>* to, const accum<T>* from, int64_t n);
  void (*exp_nonpositive)(accum<T>* to, const accum<T>* from, int64_t n);
  void (*log)(accum<T>* to, const accum<T>* from, int64_t n);
};

namespace generic {
template <typename T>
VecFunctions<T> vec_functions();
}
namespace avx2 {
template <typename T>
VecFunctions<T> vec_functions();
}
namespace avx512 {
template <typename T>
VecFunctions<T> vec_functions();
}

// AVX-512's vectors, which the compiler splits into AVX2's (see run.py), only in the tests.
namespace avx512_split {
template <typename T>
VecFunctions<T> vec_functions();
template <typename T>
const Kernels<T>& kernels();
}  // namespace avx512_split

}  // namespace fastnn::simd
