#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <new>

#include "sanitizers.h"

namespace fastnn::cuda_emulation {
namespace {

// Frames grow with the sanitizers' checks. Pages that are never touched cost nothing.
constexpr size_t kStackBytes = sanitizers::kActive ? 512 << 10 : 128 << 10;

// Where resume() was called, on the system's own stack.
struct Host {
  Fiber* running = nullptr;
  Context context;
  sanitizers::Stack stack;
  void* sanitizer_thread = nullptr;
};
Host host;

// Stacks that all started at the same offset in a page would compete for a few cache lines.
size_t unused_top() {
  static size_t fibers = 0;
  return fibers++ % 32 * 128;
}

}  // namespace

Fiber::Fiber(Body body) : body_(body) {
  const size_t page = sysconf(_SC_PAGESIZE);
  mapping_bytes_ = kStackBytes + page;
  mapping_ = mmap(nullptr, mapping_bytes_, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping_ == MAP_FAILED) throw std::bad_alloc();
  // The lowest page is a guard page: a stack that grows too far faults there.
  mprotect(mapping_, page, PROT_NONE);
  stack_ = static_cast<char*>(mapping_) + page;
  context_.prepare(stack_, kStackBytes - unused_top(), start);
  sanitizer_thread_ = sanitizers::create_thread();
}

Fiber::~Fiber() {
  sanitizers::destroy_thread(sanitizer_thread_);
  munmap(mapping_, mapping_bytes_);
}

void Fiber::start() {
  sanitizers::finish_switch(nullptr, &host.stack);
  host.running->body_();
}

void Fiber::resume() {
  host.running = this;
  host.sanitizer_thread = sanitizers::current_thread();
  void* sanitizer_stack = nullptr;
  sanitizers::start_switch(&sanitizer_stack, {stack_, kStackBytes}, sanitizer_thread_);
  Context::switch_between(host.context, context_);
  sanitizers::finish_switch(sanitizer_stack, nullptr);
  host.running = nullptr;
}

void Fiber::suspend() {
  Fiber* fiber = host.running;
  sanitizers::start_switch(&fiber->sanitizer_stack_, host.stack, host.sanitizer_thread);
  Context::switch_between(fiber->context_, host.context);
  sanitizers::finish_switch(fiber->sanitizer_stack_, &host.stack);
}

}  // namespace fastnn::cuda_emulation
