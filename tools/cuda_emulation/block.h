// One block of a launch: its threads, what they wait for, and its shared memory. Nothing of it
// outlives the block, so that the thread sanitizer, too, sees nothing that blocks share.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "cuda_emulation/runtime.h"
#include "fiber.h"
#include "shared_memory.h"

namespace fastnn::cuda_emulation {

// What all blocks of a launch share.
struct Kernel {
  const char* name;
  LaunchConfig config;
  size_t max_dynamic_bytes;
  size_t max_shared_bytes;
  const std::function<void()>& thread_body;
};

// A recurring meeting of threads: its number tells those that wait that it is over.
struct Meeting {
  uint64_t number = 0;
  char tokens[2];  // for the thread sanitizer

  // By parity, so that arrivals at the next meeting aren't ordered before what follows this one.
  const void* token(uint64_t which) const {
    return &tokens[which % 2];
  }
};

struct Barrier : Meeting {
  const char* function = nullptr;
  Site site;
  int arrived = 0;
  int true_predicates = 0;
  // By parity: a late thread reads one while others have reached the next meeting.
  BarrierResult results[2];
};

// The lanes of one warp that are in a mask.
struct WarpGroup : Meeting {
  unsigned mask = 0;
  unsigned arrived = 0;
  const char* function = nullptr;
  uint64_t values[2][kWarpSize];  // by parity
};

struct Warp {
  unsigned existing = 0;  // lanes; the last warp may have fewer
  unsigned exited = 0;
  std::vector<int> order;  // of its threads' turns
  std::vector<std::unique_ptr<WarpGroup>> groups;
};

struct Thread {
  enum class State { NotStarted, Running, Waiting, Finished };

  uint3 index;
  int position;  // in the block
  State state = State::NotStarted;
  Fiber* fiber = nullptr;
  // While it waits:
  const Meeting* meeting = nullptr;
  uint64_t meeting_number = 0;
  const char* function = nullptr;
  Site site;

  int lane() const {
    return position % kWarpSize;
  }
};

class Block {
 public:
  // `order`: the positions of the threads in the order of their turns.
  Block(const Kernel& kernel, const uint3& index, const std::vector<int>& order);

  void run();
  // What went wrong; empty if nothing did.
  const std::string& fault() const {
    return fault_;
  }

  // Called on fibers.
  static void fiber_body();
  BarrierResult meet_block(const char* function, bool predicate, const Site& site);
  uint64_t exchange(const char* function, unsigned mask, uint64_t bits, int source,
                    const Site& site);
  unsigned vote(const char* function, unsigned mask, bool predicate, const Site& site);
  void* shared_memory(const void* variable, size_t bytes);
  void* dynamic_shared_memory();
  size_t dynamic_shared_bytes() const {
    return kernel_.config.dynamic_shared_bytes;
  }
  int lane_id() const {
    return current_->lane();
  }
  [[noreturn]] void fail(const std::string& what, const Site& site);

 private:
  void start_threads();
  void run_unstarted_threads();
  bool resume_threads();
  bool resume_warp(const Warp& warp);
  bool may_go_on(const Thread& thread) const;
  void set_current(Thread& thread);
  void run_current_thread();
  void wait(const Meeting& meeting, const char* function, const Site& site);
  void check_barrier(const char* function, const Site& site);
  void check_mask(const char* function, unsigned mask, const Site& site);
  WarpGroup& group(unsigned mask);
  const uint64_t* meet_warp(const char* function, unsigned mask, uint64_t value, const Site& site);
  Warp& warp_of(const Thread& thread) {
    return warps_[thread.position / kWarpSize];
  }
  bool all_finished() const {
    return finished_ == static_cast<int>(threads_.size());
  }
  void record_fault(const std::string& what, const std::string& where);
  void record_deadlock();

  const Kernel& kernel_;
  const uint3 index_;
  const std::vector<int>& order_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<int> warp_order_;
  Barrier barrier_;
  SharedMemory shared_;
  size_t started_ = 0;  // how many of `order_`
  int finished_ = 0;
  Thread* current_ = nullptr;
  std::string fault_;
};

// The block that runs, or null.
extern Block* running_block;

int64_t fiber_switches();

// For the thread sanitizer: what was done until here happens before what the blocks do.
void begin_launch();

std::string text(const char* name, const uint3& index);

}  // namespace fastnn::cuda_emulation
