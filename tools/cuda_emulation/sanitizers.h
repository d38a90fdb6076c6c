// Tells the address and thread sanitizers about fibers; without them it does nothing.
//
// The thread sanitizer sees each CUDA thread as a thread: the only order between them is what
// acquire() and release() declare, so it reports what a missing barrier leaves unordered. This
// runtime must be compiled without -fsanitize=thread, so that its own memory isn't checked, and
// with -DFASTNN_EMULATION_TSAN.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(FASTNN_EMULATION_TSAN)
#include <sanitizer/tsan_interface.h>
#endif

namespace fastnn::cuda_emulation::sanitizers {

#if defined(__SANITIZE_ADDRESS__)
constexpr bool kAddress = true;
#else
constexpr bool kAddress = false;
#endif
#if defined(FASTNN_EMULATION_TSAN)
constexpr bool kThread = true;
#else
constexpr bool kThread = false;
#endif
constexpr bool kActive = kAddress || kThread;

struct Stack {
  const void* bottom = nullptr;
  size_t bytes = 0;
};

// Called before a switch to `stack`; `*saved` keeps the state of the present one.
inline void start_switch([[maybe_unused]] void** saved, [[maybe_unused]] const Stack& stack,
                         [[maybe_unused]] void* thread) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(saved, stack.bottom, stack.bytes);
#endif
#if defined(FASTNN_EMULATION_TSAN)
  __tsan_switch_to_fiber(thread, __tsan_switch_to_fiber_no_sync);
#endif
}

// Called after the switch, on the new stack; `previous` receives the old one, unless null.
inline void finish_switch([[maybe_unused]] void* saved, [[maybe_unused]] Stack* previous) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(saved, previous ? &previous->bottom : nullptr,
                                  previous ? &previous->bytes : nullptr);
#endif
}

inline void* current_thread() {
#if defined(FASTNN_EMULATION_TSAN)
  return __tsan_get_current_fiber();
#else
  return nullptr;
#endif
}

inline void* create_thread() {
#if defined(FASTNN_EMULATION_TSAN)
  return __tsan_create_fiber(0);
#else
  return nullptr;
#endif
}

inline void destroy_thread([[maybe_unused]] void* thread) {
#if defined(FASTNN_EMULATION_TSAN)
  __tsan_destroy_fiber(thread);
#endif
}

// What precedes a release() of an address happens before what follows an acquire() of it.
inline void release([[maybe_unused]] const void* address) {
#if defined(FASTNN_EMULATION_TSAN)
  __tsan_release(const_cast<void*>(address));
#endif
}
inline void acquire([[maybe_unused]] const void* address) {
#if defined(FASTNN_EMULATION_TSAN)
  __tsan_acquire(const_cast<void*>(address));
#endif
}

// While it lives, the runtime's work on a fiber counts as that of a separate thread: its own
// allocations aren't attributed to the kernel's threads.
class OutsideOfThreads {
 public:
  OutsideOfThreads() : thread_(current_thread()) {
#if defined(FASTNN_EMULATION_TSAN)
    static void* const outside = create_thread();
    __tsan_switch_to_fiber(outside, __tsan_switch_to_fiber_no_sync);
#endif
  }
  ~OutsideOfThreads() {
    release(&token);
#if defined(FASTNN_EMULATION_TSAN)
    __tsan_switch_to_fiber(thread_, __tsan_switch_to_fiber_no_sync);
#endif
  }
  // Called by the thread that later frees the allocations.
  static void acquire_all() {
    acquire(&token);
  }

 private:
  static inline char token;
  [[maybe_unused]] void* thread_;
};

}  // namespace fastnn::cuda_emulation::sanitizers
