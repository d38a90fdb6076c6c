// Stands in for CUDA's <cuda_runtime.h> when kernels are compiled as plain C++: the part of CUDA
// that fastnn's kernels use, on tools/cuda_emulation's runtime.
#pragma once

// First, so that its CUDA_KERNEL_ASSERT, which would end the process, is replaced below for good.
#if __has_include(<c10/macros/Macros.h>)
#include <c10/macros/Macros.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cuda_emulation/runtime.h"
#include "cuda_emulation/vector_types.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __restrict__ __restrict

// Launchers register in place of the CPU's.
#define FASTNN_CUDA_KEY CPU

#define FASTNN_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)          \
  do {                                                                         \
    static_cast<void>(static_cast<cudaStream_t>(stream));                      \
    ::fastnn::cuda_emulation::launch(#kernel, kernel, grid, block,             \
                                     shared_bytes __VA_OPT__(, ) __VA_ARGS__); \
  } while (false)

#define FASTNN_SHARED(T, name, ...) \
  auto& name = ::fastnn::cuda_emulation::shared_variable<T __VA_ARGS__>([] {})

#define FASTNN_DYNAMIC_SHARED(T, name) \
  T* const name = static_cast<T*>(::fastnn::cuda_emulation::dynamic_shared_memory())

#define FASTNN_EXP2(x) std::exp2(x)

#undef CUDA_KERNEL_ASSERT
#define CUDA_KERNEL_ASSERT(condition)                                             \
  do {                                                                            \
    if (!(condition)) {                                                           \
      ::fastnn::cuda_emulation::fail("device-side assert triggered: " #condition, \
                                     ::fastnn::cuda_emulation::Site::current());  \
    }                                                                             \
  } while (false)

[[noreturn]] inline void __trap(
    const fastnn::cuda_emulation::Site& site = fastnn::cuda_emulation::Site::current()) {
  fastnn::cuda_emulation::fail("trap", site);
}

inline uint3 threadIdx{};
inline uint3 blockIdx{};
inline dim3 blockDim{};
inline dim3 gridDim{};
constexpr int warpSize = fastnn::cuda_emulation::kWarpSize;

// Nothing is fused here (-ffp-contract=off).
inline float __fmul_rn(float a, float b) {
  return a * b;
}
inline double __dmul_rn(double a, double b) {
  return a * b;
}

// --- host functions

#define CUDART_VERSION 13000

using cudaStream_t = struct CUstream_st*;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};

// Errors of a launch are thrown by the launch itself.
inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid argument";
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

// A small GPU, so that small products have enough tiles for large ones to be chosen.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int /*device*/) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = 4;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 8;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = 64 << 10;
      return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaErrorInvalidValue;
  fastnn::cuda_emulation::allow_dynamic_shared_memory(reinterpret_cast<const void*>(kernel), value);
  return cudaSuccess;
}

// --- the block

inline void __syncthreads(
    fastnn::cuda_emulation::Site site = fastnn::cuda_emulation::Site::current()) {
  fastnn::cuda_emulation::meet_block("__syncthreads", false, site);
}
inline int __syncthreads_count(
    int predicate, fastnn::cuda_emulation::Site site = fastnn::cuda_emulation::Site::current()) {
  return fastnn::cuda_emulation::meet_block("__syncthreads_count", predicate != 0, site).count;
}
inline int __syncthreads_or(
    int predicate, fastnn::cuda_emulation::Site site = fastnn::cuda_emulation::Site::current()) {
  return fastnn::cuda_emulation::meet_block("__syncthreads_or", predicate != 0, site).count != 0;
}
inline int __syncthreads_and(
    int predicate, fastnn::cuda_emulation::Site site = fastnn::cuda_emulation::Site::current()) {
  const auto result = fastnn::cuda_emulation::meet_block("__syncthreads_and", predicate != 0, site);
  return result.count == result.threads;
}

// --- the warp

inline void __syncwarp(unsigned mask = 0xffffffffu, fastnn::cuda_emulation::Site site =
                                                        fastnn::cuda_emulation::Site::current()) {
  fastnn::cuda_emulation::vote("__syncwarp", mask, false, site);
}
inline unsigned __ballot_sync(
    unsigned mask, int predicate,
    fastnn::cuda_emulation::Site site = fastnn::cuda_emulation::Site::current()) {
  return fastnn::cuda_emulation::vote("__ballot_sync", mask, predicate != 0, site);
}
inline int __any_sync(unsigned mask, int predicate,
                      fastnn::cuda_emulation::Site site = fastnn::cuda_emulation::Site::current()) {
  return fastnn::cuda_emulation::vote("__any_sync", mask, predicate != 0, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate,
                      fastnn::cuda_emulation::Site site = fastnn::cuda_emulation::Site::current()) {
  return fastnn::cuda_emulation::vote("__all_sync", mask, predicate != 0, site) == mask;
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize,
              fastnn::cuda_emulation::Site site = fastnn::cuda_emulation::Site::current()) {
  const int first = fastnn::cuda_emulation::lane_id() & ~(width - 1);
  return fastnn::cuda_emulation::shuffle("__shfl_sync", mask, value, first | (source & (width - 1)),
                                         true, width, site);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize,
                  fastnn::cuda_emulation::Site site = fastnn::cuda_emulation::Site::current()) {
  const int lane = fastnn::cuda_emulation::lane_id();
  const int source = (lane ^ lane_mask) & (warpSize - 1);
  // A lane of an earlier segment may be read, one of a later may not.
  const bool in_segment = (source & ~(width - 1)) <= (lane & ~(width - 1));
  return fastnn::cuda_emulation::shuffle("__shfl_xor_sync", mask, value, source, in_segment, width,
                                         site);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                   fastnn::cuda_emulation::Site site = fastnn::cuda_emulation::Site::current()) {
  const int lane = fastnn::cuda_emulation::lane_id();
  const bool in_segment = (lane & (width - 1)) + delta < unsigned(width);
  const int source = (lane + delta) & (warpSize - 1);
  return fastnn::cuda_emulation::shuffle("__shfl_down_sync", mask, value, source, in_segment, width,
                                         site);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                 fastnn::cuda_emulation::Site site = fastnn::cuda_emulation::Site::current()) {
  const int lane = fastnn::cuda_emulation::lane_id();
  const bool in_segment = unsigned(lane & (width - 1)) >= delta;
  const int source = (lane - delta) & (warpSize - 1);
  return fastnn::cuda_emulation::shuffle("__shfl_up_sync", mask, value, source, in_segment, width,
                                         site);
}

// --- memory

// Integers only: a floating-point sum would depend on the order.
template <typename T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  static_assert(std::is_integral_v<T>);
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}

template <typename T>
T __ldg(const T* address) {
  return *address;
}

// Stores a vector as one, by its bytes: they are part of an array of another type.
#define FASTNN_STORE_WHOLE(p, words) ::fastnn::cuda_emulation::store_whole(p, words)

namespace fastnn::cuda_emulation {
template <typename T>
void store_whole(T* address, T value, Site site = Site::current()) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T) != 0) {
    fail("misaligned address of a vector store", site);
  }
  std::memcpy(static_cast<void*>(address), &value, sizeof(T));
}
}  // namespace fastnn::cuda_emulation

// --- arithmetic

using std::max;
using std::min;

inline int __popc(unsigned bits) {
  return __builtin_popcount(bits);
}
inline int __ffs(int bits) {
  return __builtin_ffs(bits);
}
inline int __clz(int bits) {
  return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits));
}
inline float __int_as_float(int bits) {
  return fastnn::cuda_emulation::from_bits<float>(static_cast<unsigned>(bits));
}
inline int __float_as_int(float value) {
  return static_cast<int>(fastnn::cuda_emulation::to_bits(value));
}
inline float rsqrtf(float x) {
  return 1 / std::sqrt(x);
}
