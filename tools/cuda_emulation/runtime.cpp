#include "cuda_emulation/runtime.h"

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>
#include <numeric>
#include <random>
#include <vector>

#include "block.h"
#include "cuda_runtime.h"

namespace fastnn::cuda_emulation {
namespace {

constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kMaxBlockZ = 64;
constexpr unsigned kMaxGridX = 0x7fffffff;
constexpr unsigned kMaxGridYZ = 65535;
constexpr size_t kMaxShared = 48 << 10;
constexpr size_t kMaxSharedOptIn = 64 << 10;  // of compute capability 7.5, the lowest we support

// One launch at a time over all threads: a kernel's threadIdx etc. are global variables.
std::mutex mutex;
std::map<const void*, size_t> opted_in;
int64_t launches = 0;
int64_t blocks_run = 0;

Settings settings_from_environment() {
  Settings settings;
  const char* order = std::getenv("FASTNN_EMULATION_ORDER");
  if (order != nullptr && *order != '\0') settings.order = parse_thread_order(order);
  return settings;
}

Settings& current_settings() {
  static Settings settings = settings_from_environment();
  return settings;
}

// The limits of dynamic memory, and of all memory with what the kernel declares.
std::pair<size_t, size_t> max_shared_bytes_of(const void* kernel) {
  const auto found = opted_in.find(kernel);
  if (found == opted_in.end()) return {kMaxShared, kMaxShared};
  return {std::max(kMaxShared, found->second), kMaxSharedOptIn};
}

// What cudaGetLastError() would report after the launch.
void check_config(const Kernel& kernel) {
  const auto& [grid, block, dynamic_shared_bytes] = kernel.config;
  const auto check = [&](bool valid, const std::string& what) {
    if (!valid) throw Fault(std::string("invalid launch of ") + kernel.name + ": " + what);
  };
  check(grid.x != 0 && grid.y != 0 && grid.z != 0, "the grid is empty");
  check(block.x != 0 && block.y != 0 && block.z != 0, "the block is empty");
  check(grid.x <= kMaxGridX && grid.y <= kMaxGridYZ && grid.z <= kMaxGridYZ,
        text("grid", {grid.x, grid.y, grid.z}) + " is too large");
  check(block.x <= kMaxThreads && block.y <= kMaxThreads && block.z <= kMaxBlockZ &&
            uint64_t(block.x) * block.y * block.z <= kMaxThreads,
        text("block", {block.x, block.y, block.z}) + " is too large");
  check(dynamic_shared_bytes <= kernel.max_dynamic_bytes,
        std::to_string(dynamic_shared_bytes) + " bytes of shared memory are more than " +
            std::to_string(kernel.max_dynamic_bytes));
}

// In which order the blocks of a grid run, and the threads of a block.
class Turns {
 public:
  Turns(const Settings& settings, uint64_t blocks, size_t threads)
      : settings_(settings), blocks_(blocks), threads_(threads), random_(settings.seed) {
    std::iota(threads_.begin(), threads_.end(), 0);
    if (settings.order == ThreadOrder::Reverse) std::reverse(threads_.begin(), threads_.end());
    // Each block is visited once if the step and the number of blocks have no common divisor.
    step_ = blocks / 3 + settings.seed;
    while (std::gcd(step_, blocks) != 1) ++step_;
  }

  uint64_t block(uint64_t turn) const {
    switch (settings_.order) {
      case ThreadOrder::Reverse:
        return blocks_ - 1 - turn;
      case ThreadOrder::Shuffled:
        return (settings_.seed + turn * step_) % blocks_;
      default:
        return turn;
    }
  }
  // Another order for each block if they are shuffled.
  const std::vector<int>& threads() {
    if (settings_.order == ThreadOrder::Shuffled) {
      std::shuffle(threads_.begin(), threads_.end(), random_);
    }
    return threads_;
  }

 private:
  const Settings settings_;
  const uint64_t blocks_;
  uint64_t step_;
  std::vector<int> threads_;
  std::mt19937 random_;
};

void run_blocks(const Kernel& kernel) {
  const auto& [grid, block, bytes] = kernel.config;
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  Turns turns(current_settings(), blocks, size_t(block.x) * block.y * block.z);
  for (uint64_t turn = 0; turn < blocks; ++turn) {
    const uint64_t i = turns.block(turn);
    const uint3 index = {static_cast<unsigned>(i % grid.x),
                         static_cast<unsigned>(i / grid.x % grid.y),
                         static_cast<unsigned>(i / grid.x / grid.y)};
    ++blocks_run;
    Block running(kernel, index, turns.threads());
    running.run();
    if (!running.fault().empty()) throw Fault(running.fault());
  }
}

}  // namespace

ThreadOrder parse_thread_order(const std::string& name) {
  if (name == "forward") return ThreadOrder::Forward;
  if (name == "reverse") return ThreadOrder::Reverse;
  if (name == "shuffled") return ThreadOrder::Shuffled;
  throw std::invalid_argument("the thread order must be forward, reverse or shuffled, not " + name);
}

void set_settings(const Settings& settings) {
  const std::lock_guard lock(mutex);
  current_settings() = settings;
}

Statistics statistics() {
  const std::lock_guard lock(mutex);
  return {launches, blocks_run, fiber_switches()};
}

void allow_dynamic_shared_memory(const void* kernel, size_t bytes) {
  if (bytes > kMaxSharedOptIn) {
    throw Fault(std::to_string(bytes) + " bytes of shared memory are more than any block may have");
  }
  const std::lock_guard lock(mutex);
  opted_in[kernel] = bytes;
}

void run_grid(const char* kernel_name, const void* kernel_address, const LaunchConfig& config,
              const std::function<void()>& thread_body) {
  const std::lock_guard lock(mutex);
  const auto [max_dynamic_bytes, max_shared_bytes] = max_shared_bytes_of(kernel_address);
  const Kernel kernel{kernel_name, config, max_dynamic_bytes, max_shared_bytes, thread_body};
  check_config(kernel);
  ++launches;
  blockDim = config.block;
  gridDim = config.grid;
  begin_launch();
  run_blocks(kernel);
}

BarrierResult meet_block(const char* function, bool predicate, const Site& site) {
  return running_block->meet_block(function, predicate, site);
}
uint64_t exchange(const char* function, unsigned mask, uint64_t bits, int source,
                  const Site& site) {
  return running_block->exchange(function, mask, bits, source, site);
}
unsigned vote(const char* function, unsigned mask, bool predicate, const Site& site) {
  return running_block->vote(function, mask, predicate, site);
}
int lane_id() {
  return running_block->lane_id();
}
void* dynamic_shared_memory() {
  return running_block->dynamic_shared_memory();
}
size_t dynamic_shared_bytes() {
  return running_block->dynamic_shared_bytes();
}
void* shared_memory(const void* variable, size_t bytes) {
  return running_block->shared_memory(variable, bytes);
}
void fail(const std::string& what, const Site& site) {
  running_block->fail(what, site);
}

}  // namespace fastnn::cuda_emulation
