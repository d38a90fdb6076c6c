// A separate stack for each CUDA thread; one system thread switches between them.
#pragma once

#include <cstddef>

#include "context.h"

namespace fastnn::cuda_emulation {

class Fiber {
 public:
  using Body = void (*)();

  // `body` never returns: it suspends instead, and may be resumed for other work.
  explicit Fiber(Body body);
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Runs the fiber until it suspends itself. Must not be called on a fiber.
  void resume();
  // Goes back to where the running fiber was resumed.
  static void suspend();

 private:
  static void start();

  Body body_;
  void* mapping_;
  size_t mapping_bytes_;
  char* stack_;
  Context context_;
  void* sanitizer_stack_ = nullptr;   // what the address sanitizer keeps for a stack not in use
  void* sanitizer_thread_ = nullptr;  // what the thread sanitizer takes for a thread
};

}  // namespace fastnn::cuda_emulation
