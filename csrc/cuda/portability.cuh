// Macros for CUDA syntax that C++ lacks, so that a kernel compiles with nvcc and, in the tests, as
// plain C++ (tools/cuda_emulation has its own <cuda_runtime.h>, which defines them).
#pragma once

#include <cuda_runtime.h>

// Launches and checks: FASTNN_LAUNCH((kernel<T, 4>), grid, block, shared_bytes, stream, args...).
// A kernel with template arguments needs the parentheses.
#ifndef FASTNN_LAUNCH
#include <c10/cuda/CUDAException.h>
#define FASTNN_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)     \
  do {                                                                    \
    (kernel)<<<(grid), (block), (shared_bytes), (stream)>>>(__VA_ARGS__); \
    C10_CUDA_KERNEL_LAUNCH_CHECK();                                       \
  } while (false)
#endif

// A variable in shared memory, aligned to 16 bytes: FASTNN_SHARED(float, tile, [16][17])
// declares `float tile[16][17]`, FASTNN_SHARED(float, total) a single value.
#ifndef FASTNN_SHARED
#define FASTNN_SHARED(T, name, ...) __shared__ __align__(16) T name __VA_ARGS__
#endif

// The block's dynamic shared memory as `T* name`, aligned to 16 bytes.
#ifndef FASTNN_DYNAMIC_SHARED
#define FASTNN_DYNAMIC_SHARED(T, name)                             \
  extern __shared__ __align__(16) unsigned char name##_as_bytes[]; \
  T* const name = reinterpret_cast<T*>(name##_as_bytes)
#endif

// One store of 16 or 8 bytes to global memory. The compiler splits an assignment into stores of
// single elements if those are selected one by one, as by a mask. Unlike __stwb, this lets loads
// pass: the stored value must depend on what was loaded from the same address.
#ifndef FASTNN_STORE_WHOLE
__device__ inline void store_in_one_instruction(uint4* p, uint4 words) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)),
               "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w));
}
__device__ inline void store_in_one_instruction(uint2* p, uint2 words) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(p)), "r"(words.x),
               "r"(words.y));
}
#define FASTNN_STORE_WHOLE(p, words) store_in_one_instruction(p, words)
#endif

// 2^x in one instruction: off by two units in the last place; a subnormal result becomes 0.
#ifndef FASTNN_EXP2
__device__ inline float exp2_in_one_instruction(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
#define FASTNN_EXP2(x) exp2_in_one_instruction(x)
#endif
