#include "block.h"

#include <bit>
#include <cstring>
#include <exception>

#include "cuda_runtime.h"
#include "sanitizers.h"

namespace fastnn::cuda_emulation {

Block* running_block = nullptr;

std::string text(const char* name, const uint3& index) {
  return std::string(name) + " (" + std::to_string(index.x) + ", " + std::to_string(index.y) +
         ", " + std::to_string(index.z) + ")";
}

namespace {

std::string text(const Site& site) {
  return std::string(site.file_name()) + ":" + std::to_string(site.line());
}

bool same_text(const char* a, const char* b) {
  return a == b || std::strcmp(a, b) == 0;
}

bool same_place(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         same_text(a.file_name(), b.file_name());
}

// Ends a thread whose block has failed.
struct Unwind {};

// The fibers, kept from launch to launch.
class FiberPool {
 public:
  // For the thread sanitizer each thread has its own fiber: two on one would count as ordered.
  Fiber* take(int position) {
    if (sanitizers::kThread) return at(position);
    if (free_.empty()) return at(static_cast<int>(fibers_.size()));
    Fiber* fiber = free_.back();
    free_.pop_back();
    return fiber;
  }
  void give_back(Fiber* fiber) {
    if (!sanitizers::kThread) free_.push_back(fiber);
  }

 private:
  Fiber* at(int position) {
    while (static_cast<int>(fibers_.size()) <= position) {
      fibers_.push_back(std::make_unique<Fiber>(Block::fiber_body));
    }
    return fibers_[position].get();
  }

  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> free_;
};

FiberPool fibers;
int64_t switches = 0;

// For the thread sanitizer.
char started_token;
char finished_token;

void resume(Fiber* fiber) {
  ++switches;
  fiber->resume();
}

}  // namespace

int64_t fiber_switches() {
  return switches;
}

void begin_launch() {
  sanitizers::release(&started_token);
}

Block::Block(const Kernel& kernel, const uint3& index, const std::vector<int>& order)
    : kernel_(kernel),
      index_(index),
      order_(order),
      threads_(order.size()),
      warps_((order.size() + kWarpSize - 1) / kWarpSize),
      shared_(kernel.config.dynamic_shared_bytes) {
  const dim3& size = kernel.config.block;
  for (unsigned i = 0; i < threads_.size(); ++i) {
    threads_[i].index = {i % size.x, i / size.x % size.y, i / size.x / size.y};
    threads_[i].position = static_cast<int>(i);
    warp_of(threads_[i]).existing |= 1u << i % kWarpSize;
  }
  for (const int position : order) {
    std::vector<int>& of_warp = warp_of(threads_[position]).order;
    if (of_warp.empty()) warp_order_.push_back(position / kWarpSize);
    of_warp.push_back(position);
  }
}

// --- turns

void Block::run() {
  running_block = this;
  blockIdx = index_;
  start_threads();
  while (!all_finished()) {
    if (!resume_threads()) record_deadlock();
  }
  running_block = nullptr;
  sanitizers::acquire(&finished_token);
  sanitizers::OutsideOfThreads::acquire_all();
}

// Each thread runs until it first waits.
void Block::start_threads() {
  while (started_ < order_.size() && fault_.empty()) {
    Thread& first = threads_[order_[started_]];
    first.fiber = fibers.take(first.position);
    resume(first.fiber);
  }
  finished_ += static_cast<int>(order_.size() - started_);  // after a fault the rest never run
}

// The endless loop of each fiber.
void Block::fiber_body() {
  for (;;) {
    running_block->run_unstarted_threads();
    Fiber::suspend();
  }
}

// Runs one thread after the other as long as none waits, which saves switches.
void Block::run_unstarted_threads() {
  Fiber* fiber = threads_[order_[started_]].fiber;
  do {
    Thread& thread = threads_[order_[started_++]];
    thread.fiber = fiber;
    set_current(thread);
    run_current_thread();
  } while (!sanitizers::kThread && started_ < order_.size() && fault_.empty());
  fibers.give_back(fiber);
}

void Block::set_current(Thread& thread) {
  current_ = &thread;
  threadIdx = thread.index;
  thread.state = Thread::State::Running;
}

void Block::run_current_thread() {
  sanitizers::acquire(&started_token);
  try {
    kernel_.thread_body();
    if (barrier_.arrived != 0) {
      fail("the thread exits while others wait at " + std::string(barrier_.function),
           barrier_.site);
    }
  } catch (const Unwind&) {
  } catch (const std::exception& error) {
    record_fault(error.what(), text("thread", current_->index));
  }
  sanitizers::release(&finished_token);
  current_->state = Thread::State::Finished;
  warp_of(*current_).exited |= 1u << current_->lane();
  ++finished_;
}

// Resumes the threads whose meeting is over; returns whether there were any. Each warp runs as far
// ahead of the others as it can: what a missing barrier lets it overwrite is then still unread.
bool Block::resume_threads() {
  bool any = false;
  for (const int warp : warp_order_) {
    while (resume_warp(warps_[warp])) any = true;
  }
  return any;
}

bool Block::resume_warp(const Warp& warp) {
  bool any = false;
  for (const int position : warp.order) {
    Thread& thread = threads_[position];
    if (!may_go_on(thread)) continue;
    set_current(thread);
    resume(thread.fiber);
    any = true;
  }
  return any;
}

bool Block::may_go_on(const Thread& thread) const {
  if (thread.state != Thread::State::Waiting) return false;
  const bool to_be_ended = !fault_.empty();
  return to_be_ended || thread.meeting->number != thread.meeting_number;
}

void Block::wait(const Meeting& meeting, const char* function, const Site& site) {
  Thread& thread = *current_;
  thread.meeting = &meeting;
  thread.meeting_number = meeting.number;
  thread.function = function;
  thread.site = site;
  thread.state = Thread::State::Waiting;
  Fiber::suspend();
  if (!fault_.empty()) throw Unwind{};
}

// --- the barrier

void Block::check_barrier(const char* function, const Site& site) {
  if (finished_ != 0) {
    fail(std::string(function) + " where " + std::to_string(finished_) +
             " threads of the block have exited",
         site);
  }
  if (barrier_.arrived != 0 && !same_place(barrier_.site, site)) {
    fail("divergent barriers: this thread is at " + std::string(function) + ", others wait at " +
             barrier_.function + ", " + text(barrier_.site),
         site);
  }
}

BarrierResult Block::meet_block(const char* function, bool predicate, const Site& site) {
  check_barrier(function, site);
  const uint64_t number = barrier_.number;
  sanitizers::release(barrier_.token(number));
  barrier_.function = function;
  barrier_.site = site;
  barrier_.true_predicates += predicate;
  if (++barrier_.arrived == static_cast<int>(threads_.size())) {
    barrier_.results[number % 2] = {barrier_.true_predicates, barrier_.arrived};
    barrier_.arrived = barrier_.true_predicates = 0;
    ++barrier_.number;
  } else {
    wait(barrier_, function, site);
  }
  sanitizers::acquire(barrier_.token(number));
  return barrier_.results[number % 2];
}

// --- warps

void Block::check_mask(const char* function, unsigned mask, const Site& site) {
  if ((mask >> current_->lane() & 1) == 0) {
    fail(std::string(function) + ": the calling lane is not in its mask", site);
  }
  const Warp& warp = warp_of(*current_);
  const unsigned absent = mask & (~warp.existing | warp.exited);
  if (absent == 0) return;
  const int lane = std::countr_zero(absent);
  fail(std::string(function) + ": lane " + std::to_string(lane) + " of its mask " +
           (warp.existing >> lane & 1 ? "has exited" : "does not exist"),
       site);
}

WarpGroup& Block::group(unsigned mask) {
  Warp& warp = warp_of(*current_);
  for (const auto& group : warp.groups) {
    if (group->mask == mask) return *group;
  }
  const sanitizers::OutsideOfThreads outside;
  warp.groups.push_back(std::make_unique<WarpGroup>());
  warp.groups.back()->mask = mask;
  return *warp.groups.back();
}

// Returns the values by lane; only those of lanes in the mask are valid.
const uint64_t* Block::meet_warp(const char* function, unsigned mask, uint64_t value,
                                 const Site& site) {
  check_mask(function, mask, site);
  WarpGroup& group = this->group(mask);
  if (group.arrived == 0) group.function = function;
  if (!same_text(group.function, function)) {
    fail("divergent lanes: this one is at " + std::string(function) +
             ", others of its mask are at " + group.function,
         site);
  }
  const uint64_t number = group.number;
  sanitizers::release(group.token(number));
  group.values[number % 2][current_->lane()] = value;
  group.arrived |= 1u << current_->lane();
  if (group.arrived == mask) {
    group.arrived = 0;
    ++group.number;
  } else {
    wait(group, function, site);
  }
  sanitizers::acquire(group.token(number));
  return group.values[number % 2];
}

uint64_t Block::exchange(const char* function, unsigned mask, uint64_t bits, int source,
                         const Site& site) {
  const uint64_t* values = meet_warp(function, mask, bits, site);
  if ((mask >> source & 1) == 0) {
    fail(std::string(function) + " reads lane " + std::to_string(source) +
             ", which is not in its mask",
         site);
  }
  return values[source];
}

unsigned Block::vote(const char* function, unsigned mask, bool predicate, const Site& site) {
  const uint64_t* votes = meet_warp(function, mask, predicate, site);
  unsigned result = 0;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if ((mask >> lane & 1) != 0 && votes[lane] != 0) result |= 1u << lane;
  }
  return result;
}

// --- shared memory

void* Block::shared_memory(const void* variable, size_t bytes) {
  void* memory = shared_.variable(variable, bytes);
  const size_t all = shared_.bytes();
  if (all > kernel_.max_shared_bytes) {
    fail("the block has " + std::to_string(all) + " bytes of shared memory, more than " +
             std::to_string(kernel_.max_shared_bytes),
         Site());
  }
  return memory;
}

void* Block::dynamic_shared_memory() {
  return shared_.dynamic();
}

// --- faults

void Block::record_fault(const std::string& what, const std::string& where) {
  if (!fault_.empty()) return;
  fault_ = std::string(kernel_.name) + ": " + what + ", " + text("block", index_) + ", " + where;
}

void Block::fail(const std::string& what, const Site& site) {
  record_fault(what, text("thread", current_->index) + ", " + text(site));
  throw Unwind{};
}

void Block::record_deadlock() {
  constexpr int kShown = 4;
  std::string where;
  int waiting = 0;
  for (const Thread& thread : threads_) {
    if (thread.state != Thread::State::Waiting || waiting++ >= kShown) continue;
    where += text("thread", thread.index) + " waits at " + thread.function + ", " +
             text(thread.site) + "; ";
  }
  record_fault("deadlock", where + std::to_string(waiting) + " threads wait, " +
                               std::to_string(finished_) + " have exited");
}

}  // namespace fastnn::cuda_emulation
