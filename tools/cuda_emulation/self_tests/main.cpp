// Tests of the emulation itself: correct kernels, and kernels with a fault that it must detect. See
// run.py.
//
//   self_tests          runs all that a plain build can detect
//   self_tests NAME     plants a fault that ends the program, for a sanitizer to report
#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "cuda/portability.cuh"
#include "cuda_emulation/expect.h"

namespace {

namespace emulation = fastnn::cuda_emulation;
using emulation::ThreadOrder;
using emulation::tests::expect;
using emulation::tests::expect_fault;

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr ThreadOrder kOrders[] = {ThreadOrder::Forward, ThreadOrder::Reverse,
                                   ThreadOrder::Shuffled};

template <typename F>
void in_each_order(F f) {
  for (const ThreadOrder order : kOrders) {
    emulation::set_settings({.order = order});
    f();
  }
  emulation::set_settings({});
}

// ---- what a kernel may do ----

__global__ void write_indices(uint3* threads, uint3* blocks, int* visits) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const unsigned i = block * blockDim.x * blockDim.y * blockDim.z + thread;
  threads[i] = threadIdx;
  blocks[i] = blockIdx;
  ++visits[i];
}

void test_indices() {
  const dim3 grid(3, 2, 2), block(5, 4, 3);
  const int count = 12 * 60;
  in_each_order([&] {
    std::vector<uint3> threads(count), blocks(count);
    std::vector<int> visits(count);
    FASTNN_LAUNCH(write_indices, grid, block, 0, nullptr, threads.data(), blocks.data(),
                  visits.data());
    for (int i = 0; i < count; ++i) expect(visits[i] == 1, "a thread did not run once");
    expect(threads[60 + 37].x == 2 && threads[60 + 37].y == 3 && threads[60 + 37].z == 1,
           "threadIdx");
    expect(blocks[60 * 7].x == 1 && blocks[60 * 7].y == 0 && blocks[60 * 7].z == 1, "blockIdx");
  });
}

// A sum in shared memory, with or without the barrier it needs.
template <bool kBarrier>
__global__ void sum_in_shared_memory(const float* x, float* sums) {
  FASTNN_SHARED(float, values, [96]);
  values[threadIdx.x] = x[blockIdx.x * blockDim.x + threadIdx.x];
  if constexpr (kBarrier) __syncthreads();
  float sum = 0;
  for (unsigned i = 0; i < blockDim.x; ++i) sum += values[i];
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

template <bool kBarrier>
std::vector<float> sums_in_shared_memory() {
  std::vector<float> x(3 * 96), sums(3);
  std::iota(x.begin(), x.end(), 1.0f);
  FASTNN_LAUNCH((sum_in_shared_memory<kBarrier>), 3, 96, 0, nullptr, x.data(), sums.data());
  return sums;
}

void test_barrier() {
  in_each_order([] {
    expect(sums_in_shared_memory<true>() == std::vector<float>{4656, 13872, 23088}, "sums");
  });
#if !defined(__SANITIZE_THREAD__)  // which reports it: see plant()
  // Thread 0 comes first, or somewhere: what the others have not written yet is NaN.
  for (const ThreadOrder order : {ThreadOrder::Forward, ThreadOrder::Shuffled}) {
    emulation::set_settings({.order = order});
    for (const float sum : sums_in_shared_memory<false>()) {
      expect(std::isnan(sum), "a missing barrier did no harm");
    }
  }
  emulation::set_settings({});
#endif
}

__global__ void count_predicates(int* results) {
  const int third = threadIdx.x % 3 == 0;
  const int count = __syncthreads_count(third);
  const int any = __syncthreads_or(third && threadIdx.x > 90);
  const int all = __syncthreads_and(threadIdx.x < 96);
  const int not_all = __syncthreads_and(threadIdx.x < 95);
  if (threadIdx.x == 50) {
    results[0] = count;
    results[1] = any;
    results[2] = all;
    results[3] = not_all;
  }
}

void test_predicates() {
  in_each_order([] {
    std::vector<int> results(4);
    FASTNN_LAUNCH(count_predicates, 1, 96, 0, nullptr, results.data());
    expect(results == std::vector<int>{32, 1, 1, 0}, "__syncthreads_count, _or, _and");
  });
}

__global__ void use_dynamic_memory(double* out) {
  FASTNN_DYNAMIC_SHARED(double, values);
  const bool starts_poisoned = std::isnan(values[threadIdx.x]);
  values[threadIdx.x] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = starts_poisoned ? values[blockDim.x - 1 - threadIdx.x] : -1;
}

void test_dynamic_memory() {
  std::vector<double> out(64);
  FASTNN_LAUNCH(use_dynamic_memory, 2, 64, 64 * sizeof(double), nullptr, out.data());
  for (int i = 0; i < 64; ++i) expect(out[i] == 63 - i, "dynamic shared memory");
}

// Five numbers for each lane, in segments of `width` lanes.
__global__ void shuffle_lanes(int width, int* out) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  int* row = out + threadIdx.x * 5;
  row[0] = __shfl_sync(kAllLanes, lane, 3, width);
  row[1] = __shfl_xor_sync(kAllLanes, lane, 1, width);
  row[2] = __shfl_down_sync(kAllLanes, lane, 2, width);
  row[3] = __shfl_up_sync(kAllLanes, lane, 2, width);
  row[4] = static_cast<int>(__ballot_sync(kAllLanes, lane % 2));
}

void test_shuffles() {
  in_each_order([] {
    for (const int width : {4, 8, 32}) {
      std::vector<int> out(64 * 5);
      FASTNN_LAUNCH(shuffle_lanes, 1, 64, 0, nullptr, width, out.data());
      for (int i = 0; i < 64; ++i) {
        const int lane = i % 32, first = lane / width * width;
        const int* row = &out[i * 5];
        expect(row[0] == first + 3, "__shfl_sync");
        expect(row[1] == (lane ^ 1), "__shfl_xor_sync");
        expect(row[2] == (lane + 2 < first + width ? lane + 2 : lane), "__shfl_down_sync");
        expect(row[3] == (lane - 2 >= first ? lane - 2 : lane), "__shfl_up_sync");
        expect(row[4] == static_cast<int>(0xaaaaaaaau), "__ballot_sync");
      }
    }
  });
}

// Halves of a warp that never meet, and votes.
__global__ void use_half_warps(int* out) {
  const bool lower = threadIdx.x < 16;
  const unsigned mask = lower ? 0x0000ffffu : 0xffff0000u;
  int sum = 1;
  if (lower) {
    for (int d = 8; d > 0; d /= 2) sum += __shfl_xor_sync(mask, sum, d);
    __syncwarp(mask);
  } else {
    sum = __any_sync(mask, threadIdx.x == 20) + 2 * __all_sync(mask, threadIdx.x != 20);
  }
  out[threadIdx.x] = sum;
}

void test_half_warps() {
  in_each_order([] {
    std::vector<int> out(32);
    FASTNN_LAUNCH(use_half_warps, 1, 32, 0, nullptr, out.data());
    expect(out[0] == 16 && out[15] == 16 && out[16] == 1 && out[31] == 1, "halves of a warp");
  });
}

__global__ void count_threads(int* counter) {
  atomicAdd(counter, 1);
}

// Launches from several system threads.
void test_concurrent_launches() {
  std::vector<int> counters(4);
  std::vector<std::thread> threads;
  for (int& counter : counters) {
    threads.emplace_back([&counter] {
      for (int i = 0; i < 20; ++i) FASTNN_LAUNCH(count_threads, 2, 64, 0, nullptr, &counter);
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const int counter : counters) expect(counter == 20 * 128, "launches from several threads");
}

// ---- what it may not ----

__global__ void meet_at_two_barriers() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void exit_before_barrier() {
  if (threadIdx.x == 7) return;
  __syncthreads();
}

__global__ void wait_for_each_other() {
  if (threadIdx.x % 32 == 0) {
    __syncthreads();
  } else {
    __syncwarp();
  }
  __syncthreads();
}

__global__ void shuffle_after_exit(int* out) {
  if (threadIdx.x == 5) return;
  for (int i = 0; i < 2; ++i) out[threadIdx.x] = __shfl_xor_sync(kAllLanes, 1, 1);
}

__global__ void shuffle_outside_mask(int* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(0x0000ffffu, 1, 20);
}

__global__ void shuffle_with_another_mask(int* out) {
  out[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, 1, 1);
}

__global__ void mix_warp_functions(int* out) {
  out[threadIdx.x] = threadIdx.x == 3 ? __any_sync(kAllLanes, 1) : __all_sync(kAllLanes, 1);
}

__global__ void use_masks_that_overlap(int* out) {
  out[threadIdx.x] = __any_sync(threadIdx.x < 16 ? kAllLanes : 0xffff0000u, 1);
}

__global__ void assert_small(int limit) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  CUDA_KERNEL_ASSERT(i < limit && "too large");
}

__global__ void trap_in_thread(int i) {
  if (int(threadIdx.x) == i) __trap();
}

template <int kBytes>
__global__ void use_shared_bytes(char* out) {
  FASTNN_SHARED(char, bytes, [kBytes]);
  bytes[threadIdx.x] = 1;
  out[threadIdx.x] = bytes[threadIdx.x];
}

void test_faults() {
  std::vector<int> out(64 * 5);
  const auto launch = [&](auto kernel, unsigned threads) {
    FASTNN_LAUNCH(kernel, 1, threads, 0, nullptr, out.data());
  };
  in_each_order([&] {
    expect_fault([] { FASTNN_LAUNCH(meet_at_two_barriers, 1, 64, 0, nullptr); },
                 {"meet_at_two_barriers: divergent barriers", "main.cpp:", "block (0, 0, 0)"});
    expect_fault([] { FASTNN_LAUNCH(exit_before_barrier, 1, 64, 0, nullptr); }, {"exit"});
    expect_fault([] { FASTNN_LAUNCH(wait_for_each_other, 1, 64, 0, nullptr); },
                 {"deadlock", "waits at __syncwarp", "waits at __syncthreads", "64 threads wait"});
    expect_fault([&] { launch(shuffle_after_exit, 32); }, {"lane 5 of its mask has exited"});
    expect_fault([&] { launch(shuffle_outside_mask, 32); }, {"reads lane 20", "not in its mask"});
    expect_fault([&] { launch(shuffle_with_another_mask, 32); },
                 {"the calling lane is not in its mask"});
    expect_fault([&] { launch(mix_warp_functions, 32); }, {"divergent lanes"});
    expect_fault([&] { launch(use_masks_that_overlap, 32); }, {"__any_sync"});
    expect_fault([&] { FASTNN_LAUNCH(shuffle_lanes, 1, 48, 0, nullptr, 32, out.data()); },
                 {"does not exist"});
    expect_fault([&] { FASTNN_LAUNCH(shuffle_lanes, 1, 32, 0, nullptr, 12, out.data()); },
                 {"a width that is not a power of 2"});
  });
  expect_fault([] { FASTNN_LAUNCH(assert_small, 3, 32, 0, nullptr, 70); },
               {"device-side assert triggered: i < limit && \"too large\"", "block (2, 0, 0)",
                "thread (6, 0, 0)"});
  expect_fault([] { FASTNN_LAUNCH(trap_in_thread, 1, 32, 0, nullptr, 6); },
               {"trap", "main.cpp:", "thread (6, 0, 0)"});
  // The next launch is as if nothing had happened.
  expect(sums_in_shared_memory<true>()[0] == 4656, "a launch after a fault");
}

__global__ void do_nothing(int) {
}

void launch_nothing(dim3 grid, dim3 block, size_t shared_bytes = 0) {
  FASTNN_LAUNCH(do_nothing, grid, block, shared_bytes, nullptr, 1);
}

void test_invalid_launches() {
  const auto expect_invalid = [](dim3 grid, dim3 block, const char* word) {
    expect_fault([&] { launch_nothing(grid, block); }, {"invalid launch of do_nothing", word});
  };
  expect_invalid(0, 32, "the grid is empty");
  expect_invalid(dim3(1, 0), 32, "the grid is empty");
  expect_invalid(1, 0, "the block is empty");
  expect_invalid(1, 1025, "block (1025, 1, 1) is too large");
  expect_invalid(1, dim3(32, 33), "block (32, 33, 1) is too large");
  expect_invalid(1, dim3(1, 1, 65), "block (1, 1, 65) is too large");
  expect_invalid(dim3(1, 65536), 1, "grid (1, 65536, 1) is too large");
  expect_invalid(dim3(1, 1, 65536), 1, "grid (1, 1, 65536) is too large");
  expect_invalid(0x80000000u, 1, "is too large");
  launch_nothing(dim3(1, 65535), 1);
  launch_nothing(1, dim3(16, 1, 64));
}

void test_amounts_of_shared_memory() {
  std::vector<char> out(32);
  const auto use_bytes = [&](auto kernel, size_t dynamic_bytes) {
    FASTNN_LAUNCH(kernel, 1, 32, dynamic_bytes, nullptr, out.data());
  };
  use_bytes(use_shared_bytes<40 << 10>, 8 << 10);
  expect_fault([&] { use_bytes(use_shared_bytes<40 << 10>, (8 << 10) + 1); },
               {"49153 bytes of shared memory, more than 49152"});
  expect_fault([] { launch_nothing(1, 32, 50000); }, {"50000 bytes of shared memory"});
  const auto allow = [](int bytes) {
    return cudaFuncSetAttribute(do_nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  };
  expect(allow(50000) == cudaSuccess, "cudaFuncSetAttribute");
  launch_nothing(1, 32, 50000);
  expect_fault([] { launch_nothing(1, 32, 50001); },
               {"50001 bytes of shared memory are more than"});
  expect(cudaFuncSetAttribute(use_shared_bytes<40 << 10>,
                              cudaFuncAttributeMaxDynamicSharedMemorySize, 24 << 10) == cudaSuccess,
         "cudaFuncSetAttribute");
  use_bytes(use_shared_bytes<40 << 10>, 24 << 10);
  expect_fault([&] { use_bytes(use_shared_bytes<40 << 10>, (24 << 10) + 1); },
               {"65537 bytes of shared memory, more than 65536"});
  expect_fault([&] { allow(100 << 10); }, {"more than any block may have"});
}

// ---- what only a sanitizer can see ----

__global__ void write_element(int* x, int i) {
  x[i] = 1;
}

__global__ void write_past_shared_memory(int i) {
  FASTNN_SHARED(int, values, [32]);
  values[i + static_cast<int>(threadIdx.x)] = 1;
}

__global__ void write_past_dynamic_memory(int i) {
  FASTNN_DYNAMIC_SHARED(int, values);
  values[i + static_cast<int>(threadIdx.x)] = 1;
}

__global__ void read_past_local_array(const int* indices, int* out) {
  int values[4] = {1, 2, 3, 4};
  out[threadIdx.x] = values[indices[threadIdx.x]];
}

__global__ void load_misaligned(const float* x, float* out) {
  out[threadIdx.x] = reinterpret_cast<const float4*>(x + 1)->w;
}

__global__ void write_from_each_block(int* x) {
  if (threadIdx.x == blockIdx.x) *x = static_cast<int>(blockIdx.x);
}

__global__ void write_from_each_thread(int* x) {
  *x = static_cast<int>(threadIdx.x);
}

// Each thread passes its number to its neighbour, again and again; two barriers are needed.
template <bool kSecondBarrier>
__global__ void pass_on(int* out) {
  FASTNN_SHARED(int, values, [64]);
  int value = static_cast<int>(threadIdx.x);
  for (int i = 0; i < 4; ++i) {
    values[threadIdx.x] = value;
    __syncthreads();
    value = values[(threadIdx.x + 1) % 64];
    if constexpr (kSecondBarrier) __syncthreads();
  }
  out[threadIdx.x] = value;
}

#if !defined(__SANITIZE_THREAD__)  // which reports it: see plant()
// One warp overwrites what another has not read yet.
void test_passing_on_without_second_barrier() {
  in_each_order([] {
    std::vector<int> out(64);
    FASTNN_LAUNCH((pass_on<false>), 1, 64, 0, nullptr, out.data());
    bool all_right = true;
    for (int i = 0; i < 64; ++i) all_right = all_right && out[i] == (i + 4) % 64;
    expect(!all_right, "a missing second barrier did no harm");
  });
}
#endif

void test_passing_on() {
  in_each_order([] {
    std::vector<int> out(64);
    FASTNN_LAUNCH((pass_on<true>), 2, 64, 0, nullptr, out.data());
    for (int i = 0; i < 64; ++i) expect(out[i] == (i + 4) % 64, "what neighbours passed on");
  });
}

void plant(const std::string& fault) {
  const std::vector<int> indices(32, 4);
  std::vector<int> out(64);
  std::vector<float> floats(64);
  const std::map<std::string, std::function<void()>> faults = {
      {"global_overflow", [&] { FASTNN_LAUNCH(write_element, 1, 1, 0, nullptr, out.data(), 64); }},
      {"shared_overflow", [] { FASTNN_LAUNCH(write_past_shared_memory, 1, 32, 0, nullptr, 1); }},
      {"dynamic_overflow",
       [] { FASTNN_LAUNCH(write_past_dynamic_memory, 1, 32, 128, nullptr, 1); }},
      {"local_overflow",
       [&] {
         FASTNN_LAUNCH(read_past_local_array, 1, 32, 0, nullptr, indices.data(), out.data());
       }},
      {"misaligned_load",
       [&] {
         FASTNN_LAUNCH(load_misaligned, 1, 8, 0, nullptr, floats.data(), floats.data() + 16);
       }},
      {"missing_barrier", [] { sums_in_shared_memory<false>(); }},
      {"missing_second_barrier",
       [&] { FASTNN_LAUNCH((pass_on<false>), 1, 64, 0, nullptr, out.data()); }},
      {"race_of_threads",
       [&] { FASTNN_LAUNCH(write_from_each_thread, 1, 32, 0, nullptr, out.data()); }},
      {"race_of_blocks",
       [&] { FASTNN_LAUNCH(write_from_each_block, 2, 32, 0, nullptr, out.data()); }},
  };
  faults.at(fault)();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) {
    plant(argv[1]);
    return 0;
  }
  test_indices();
  test_barrier();
  test_predicates();
  test_dynamic_memory();
  test_shuffles();
  test_half_warps();
  test_concurrent_launches();
  test_passing_on();
#if !defined(__SANITIZE_THREAD__)
  test_passing_on_without_second_barrier();
#endif
  test_faults();
  test_invalid_launches();
  test_amounts_of_shared_memory();
  std::printf("%d expectations hold\n", emulation::tests::expectations);
}
