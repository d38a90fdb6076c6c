// Chooses the instruction set whose kernels run.
#pragma once

#include "cpu/simd/kernels.h"

namespace fastnn::cpu {

// The best instruction set that the library was built for and that the CPU and operating system
// support; FASTNN_CPU_CAPABILITY=default|avx2|avx512 caps it. Read once.
const char* capability();

// Whether the CPU has instructions that multiply bfloat16.
bool multiplies_bfloat16();

// Whether the library multiplies float32 and float64 with vectors as wide as our kernels': MKL uses
// AVX-512 on Intel CPUs only.
bool library_has_our_vectors();

// The chosen set's kernels. T: double, float, simd::bfloat16 or simd::float16.
template <typename T>
const simd::Kernels<T>& kernels();

}  // namespace fastnn::cpu
