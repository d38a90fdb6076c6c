// Registers torch's memory with the checks of memory.h.
#pragma once

namespace fastnn::cuda_emulation::ptx {

// From now on, kernels may access the memory of tensors that torch allocates on the CPU.
void watch_tensors();

}  // namespace fastnn::cuda_emulation::ptx
