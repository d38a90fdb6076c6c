// Stands in for c10's header of this name: there is one device, and its tensors are the CPU's.
#pragma once

#include <c10/core/Device.h>

#include <optional>

namespace c10::cuda {

class [[maybe_unused]] CUDAGuard {
 public:
  explicit CUDAGuard(Device /*device*/) {
  }
  CUDAGuard(const CUDAGuard&) = delete;
  CUDAGuard& operator=(const CUDAGuard&) = delete;
};

class [[maybe_unused]] OptionalCUDAGuard {
 public:
  explicit OptionalCUDAGuard(std::optional<Device> /*device*/ = std::nullopt) {
  }
  OptionalCUDAGuard(const OptionalCUDAGuard&) = delete;
  OptionalCUDAGuard& operator=(const OptionalCUDAGuard&) = delete;
};

}  // namespace c10::cuda
