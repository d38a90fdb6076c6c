// Which instruction set's kernels run.
#pragma once

#include "cpu/simd/kernels.h"

namespace fastnn::cpu {

// The best of the sets the library was built for that this CPU and operating system offer;
// FASTNN_CPU_CAPABILITY=default|avx2|avx512 goes down from it. Read once.
const char* capability();

// Whether the processor has instructions for products of bfloat16.
bool multiplies_bfloat16();

// Whether the library multiplies float32 and float64 with vectors as wide as our kernels': MKL uses
// AVX-512 on Intel's processors alone.
bool library_has_our_vectors();

// The kernels of that set. T: double, float, simd::bfloat16 or simd::float16.
template <typename T>
const simd::Kernels<T>& kernels();

}  // namespace fastnn::cpu
