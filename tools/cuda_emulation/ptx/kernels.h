// The translated kernels, by the names under which both compilers know them.
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <vector>

namespace fastnn::cuda_emulation::ptx {

struct Parameter {
  const void* data;
  size_t bytes;
};

// A variable in shared memory; 0 bytes stand for the launch's dynamic memory.
struct SharedVariable {
  const char* name;
  size_t bytes;
};

using Body = void (*)(std::span<const Parameter> parameters);

struct TranslatedKernel {
  Body body;
  std::vector<size_t> parameter_bytes;
  size_t max_threads;  // of a block
  bool launched = false;
};

struct Registration {
  Registration(const char* name, Body body, std::vector<size_t> parameter_bytes,
               size_t max_threads);
};

// The translation of the kernel that the host's compiler has at the address. Throws a Fault if
// there is none, or if it could not be launched so.
const TranslatedKernel& find(const void* kernel, std::span<const Parameter> parameters,
                             size_t threads);

// The kernels that have not been launched.
std::vector<std::string> never_launched();
size_t kernel_count();

}  // namespace fastnn::cuda_emulation::ptx
