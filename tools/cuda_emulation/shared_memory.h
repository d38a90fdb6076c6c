// The shared memory of a block.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "sanitizers.h"

namespace fastnn::cuda_emulation {

class SharedMemory {
 public:
  explicit SharedMemory(size_t dynamic_bytes) {
    if (dynamic_bytes != 0) dynamic_ = allocate(nullptr, dynamic_bytes);
  }

  // The same memory for each thread.
  void* dynamic() const {
    return seen_by_thread(dynamic_);
  }
  void* variable(const void* key, size_t bytes) {
    for (const Memory& known : variables_) {
      if (known.key == key) return seen_by_thread(known);
    }
    add(key, bytes);
    return seen_by_thread(variables_.back());
  }

  size_t bytes() const {
    size_t sum = dynamic_.bytes;
    for (const Memory& variable : variables_) sum += variable.bytes;
    return sum;
  }

 private:
  struct Free {
    void operator()(void* pointer) const {
      std::free(pointer);
    }
  };
  // An allocation of exact size, so that the address sanitizer sees accesses past its end.
  struct Memory {
    const void* key = nullptr;
    std::unique_ptr<void, Free> data;
    size_t bytes = 0;
  };

  void add(const void* key, size_t bytes) {
    const sanitizers::OutsideOfThreads outside;  // not attributed to the first thread
    variables_.push_back(allocate(key, bytes));
  }
  static Memory allocate(const void* key, size_t bytes) {
    constexpr size_t kAlignment = 16;  // what FASTNN_SHARED and FASTNN_DYNAMIC_SHARED promise
    void* pointer = nullptr;
    if (posix_memalign(&pointer, kAlignment, bytes) != 0) throw std::bad_alloc();
    constexpr int kNaN = 0xFF;  // in every floating-point format; as an integer, -1
    std::memset(pointer, kNaN, bytes);
    sanitizers::release(pointer);
    return {key, std::unique_ptr<void, Free>(pointer), bytes};
  }
  static void* seen_by_thread(const Memory& memory) {
    sanitizers::acquire(memory.data.get());
    return memory.data.get();
  }

  Memory dynamic_;
  std::vector<Memory> variables_;
};

}  // namespace fastnn::cuda_emulation
