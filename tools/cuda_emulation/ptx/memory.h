// The addresses that kernels see. Tensors have the CPU's; each variable in shared memory and each
// parameter has a window of its own, so that one is never reached from another.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastnn::cuda_emulation::ptx {

constexpr int kWindowBits = 20;

// The first parameter or variable has number 1, so that address 0 is never valid.
constexpr uint64_t window_address(uint64_t number) {
  return number << kWindowBits;
}

void add_tensor(const void* start, size_t bytes);
void remove_tensor(const void* start);

// Whether all the bytes belong to one tensor's memory.
bool is_of_tensor(uint64_t address, size_t bytes);

}  // namespace fastnn::cuda_emulation::ptx
