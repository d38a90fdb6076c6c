// Included by every CUDA launcher: guard, stream, launch check, and the kernels' storage types.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <string_view>

#include "cuda/portability.cuh"
#include "cuda/vec.cuh"
#include "ops/operands.h"

// The dispatch key that the launchers register under; the tests' emulation defines it as CPU.
#ifndef FASTNN_CUDA_KEY
#define FASTNN_CUDA_KEY CUDA
#endif

namespace fastnn::cuda {

// Calls f.template operator()<T>() with the kernels' storage type T of the dtype.
template <typename F>
void dispatch(at::ScalarType dtype, std::string_view op, F f) {
  dispatch_storage<c10::BFloat16, c10::Half>(dtype, op, f);
}

// The same for elements that other tensors of an operator hold in `wide`: a Widened where that is
// another dtype.
template <typename F>
void dispatch_widened(at::ScalarType dtype, at::ScalarType wide, std::string_view op, F f) {
  if (dtype == wide) return dispatch(dtype, op, f);
  if (dtype == at::kBFloat16) return f.template operator()<Widened<c10::BFloat16>>();
  f.template operator()<Widened<c10::Half>>();
}

}  // namespace fastnn::cuda
