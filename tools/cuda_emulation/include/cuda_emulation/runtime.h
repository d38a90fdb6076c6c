// Runs CUDA kernels on the CPU: block after block, each CUDA thread on a fiber of its own.
// Undefined behaviour that can be detected here (a barrier that not all threads reach, a shuffle
// with a lane that has exited, ...) ends the launch with a Fault that says where.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "cuda_emulation/vector_types.h"

#if defined(FASTNN_EMULATION_PTX)
#include "ptx/kernels.h"
#endif

namespace fastnn::cuda_emulation {

// A place in a kernel's source. As a default argument: the caller's.
using Site = std::source_location;

constexpr int kWarpSize = 32;

// Thrown by a launch whose kernel did something undefined or failed an assertion.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The order in which the threads of a block, and the blocks, get their turns. CUDA promises none:
// results must be the same in each.
enum class ThreadOrder { Forward, Reverse, Shuffled };

struct Settings {
  ThreadOrder order = ThreadOrder::Forward;
  unsigned seed = 1;  // of the shuffled order
};

// Applies to later launches. Initially the order is the one that FASTNN_EMULATION_ORDER names
// (forward, reverse or shuffled).
void set_settings(const Settings& settings);
ThreadOrder parse_thread_order(const std::string& name);

struct Statistics {
  int64_t launches = 0;
  int64_t blocks = 0;
  int64_t switches = 0;  // between fibers
};
Statistics statistics();

struct LaunchConfig {
  dim3 grid;
  dim3 block;
  size_t dynamic_shared_bytes = 0;
};

// Calls `thread_body` once as each thread of the grid. `kernel` identifies the kernel.
void run_grid(const char* kernel_name, const void* kernel, const LaunchConfig& config,
              const std::function<void()>& thread_body);

// Lets the kernel's launches have more than 48 KiB of shared memory.
void allow_dynamic_shared_memory(const void* kernel, size_t bytes);

// The code of one thread: the kernel as the host's compiler compiled it, or as nvcc did.
template <typename... Parameters>
std::function<void()> thread_body(void (*kernel)(Parameters...),
                                  const std::tuple<std::decay_t<Parameters>...>& parameters,
                                  [[maybe_unused]] const dim3& block) {
#if defined(FASTNN_EMULATION_PTX)
  const auto described = std::apply(
      [](const auto&... values) {
        return std::vector<ptx::Parameter>{{&values, sizeof(values)}...};
      },
      parameters);
  const auto& translated = ptx::find(reinterpret_cast<const void*>(kernel), described,
                                     size_t(block.x) * block.y * block.z);
  return [&translated, described] { translated.body(described); };
#else
  return [kernel, &parameters] { std::apply(kernel, parameters); };
#endif
}

// As `kernel<<<grid, block, bytes>>>(arguments...)`: each thread gets copies of the arguments.
template <typename... Parameters, typename... Arguments>
void launch(const char* kernel_name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
            size_t dynamic_shared_bytes, Arguments&&... arguments) {
  const std::tuple<std::decay_t<Parameters>...> parameters(std::forward<Arguments>(arguments)...);
  run_grid(kernel_name, reinterpret_cast<const void*>(kernel), {grid, block, dynamic_shared_bytes},
           thread_body(kernel, parameters, block));
}

// The remaining functions are called by kernels.

struct BarrierResult {
  int count;    // of threads whose predicate was true
  int threads;  // that met
};
BarrierResult meet_block(const char* function, bool predicate, const Site& site);

// Wait for the lanes in `mask`. exchange() returns the bits of lane `source`, vote() the lanes
// whose predicate was true.
uint64_t exchange(const char* function, unsigned mask, uint64_t bits, int source, const Site& site);
unsigned vote(const char* function, unsigned mask, bool predicate, const Site& site);
int lane_id();

// Memory of the block, uninitialized (NaN if read as floating point) when it starts.
void* dynamic_shared_memory();
size_t dynamic_shared_bytes();
void* shared_memory(const void* variable, size_t bytes);

[[noreturn]] void fail(const std::string& what, const Site& site);

// The block's variable that the type of `tag`, a lambda's, identifies.
template <typename T, typename Tag>
T& shared_variable(Tag) {
  static const char variable = 0;
  return *static_cast<T*>(shared_memory(&variable, sizeof(T)));
}

template <typename T>
uint64_t to_bits(T value) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8),
                "CUDA exchanges 32-bit and 64-bit numbers between lanes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <typename T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// The value of lane `source`. `in_segment`: whether that lane belongs to the segment of `width`
// lanes; if it doesn't, CUDA returns the caller's own value.
template <typename T>
T shuffle(const char* function, unsigned mask, T value, int source, bool in_segment, int width,
          const Site& site) {
  if (width < 1 || width > kWarpSize || (width & (width - 1)) != 0) {
    fail(std::string(function) + " with a width that is not a power of 2", site);
  }
  return from_bits<T>(
      exchange(function, mask, to_bits(value), in_segment ? source : lane_id(), site));
}

}  // namespace fastnn::cuda_emulation
