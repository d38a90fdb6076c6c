// Switches stacks, by assembly on the processors below: swapcontext() asks the system for the
// signal mask at each switch and takes 50 times as long.
#pragma once

#include <ucontext.h>

#include <cstddef>
#include <cstdint>

#if !defined(FASTNN_EMULATION_UCONTEXT) && (defined(__x86_64__) || defined(__aarch64__))
#define FASTNN_EMULATION_SWITCHES 1
#endif

namespace fastnn::cuda_emulation {

using Entry = void (*)();

#if defined(FASTNN_EMULATION_SWITCHES)

// Pushes the registers that a function must preserve, stores the stack pointer in *from, and
// continues with the registers saved at `to`.
extern "C" void fastnn_emulation_switch(void** from, void* to);

#if defined(__x86_64__)
asm(R"(
  .text
  .p2align 4
  .weak fastnn_emulation_switch
  .hidden fastnn_emulation_switch
  .type fastnn_emulation_switch, @function
fastnn_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
constexpr size_t kSavedWords = 8;     // six registers, the return address, and one for alignment
constexpr size_t kReturnAddress = 6;  // the index of that word
#else
asm(R"(
  .text
  .p2align 4
  .weak fastnn_emulation_switch
  .hidden fastnn_emulation_switch
  .type fastnn_emulation_switch, %function
fastnn_emulation_switch:
  stp x29, x30, [sp, #-160]!
  stp x19, x20, [sp, #16]
  stp x21, x22, [sp, #32]
  stp x23, x24, [sp, #48]
  stp x25, x26, [sp, #64]
  stp x27, x28, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #16]
  ldp x21, x22, [sp, #32]
  ldp x23, x24, [sp, #48]
  ldp x25, x26, [sp, #64]
  ldp x27, x28, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  ldp x29, x30, [sp], #160
  ret
)");
constexpr size_t kSavedWords = 20;
constexpr size_t kReturnAddress = 1;
#endif

class Context {
 public:
  // The first switch to it calls `entry`, which never returns, on the stack.
  void prepare(char* stack, size_t bytes, Entry entry) {
    auto* words = reinterpret_cast<uintptr_t*>(stack + bytes) - kSavedWords;
    for (size_t i = 0; i < kSavedWords; ++i) words[i] = 0;
    words[kReturnAddress] = reinterpret_cast<uintptr_t>(entry);
    stack_pointer_ = words;
  }
  static void switch_between(Context& from, Context& to) {
    fastnn_emulation_switch(&from.stack_pointer_, to.stack_pointer_);
  }

 private:
  void* stack_pointer_ = nullptr;
};

#else

class Context {
 public:
  void prepare(char* stack, size_t bytes, Entry entry) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = bytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
  }
  static void switch_between(Context& from, Context& to) {
    swapcontext(&from.context_, &to.context_);
  }

 private:
  ucontext_t context_;
};

#endif

}  // namespace fastnn::cuda_emulation
