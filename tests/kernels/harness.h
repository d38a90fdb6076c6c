// Shared by the tests of the CPU kernels, which need neither torch nor Python, so that sanitizers
// and emulators can run them: each operator's tests are a file that registers itself, and main.cpp
// runs them on every instruction set.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <tuple>
#include <vector>

#include "cpu/simd/kernels.h"
#include "expectations.h"
#include "number_formats.h"
#include "vec_functions.h"

namespace fastnn::tests {

using simd::accum;
using simd::bfloat16;
using simd::float16;
using simd::Layout;

// ---- instruction sets and tests ----

// The kernels of one instruction set.
struct Target {
  const char* name;
  const char* not_run;  // why, or null
  template <typename T>
  struct Tables {
    const simd::Kernels<T>& (*kernels)();
    simd::VecFunctions<T> (*vec)();
  };
  std::tuple<Tables<double>, Tables<float>, Tables<bfloat16>, Tables<float16>> tables;

  template <typename T>
  const simd::Kernels<T>& kernels() const {
    return std::get<Tables<T>>(tables).kernels();
  }
  template <typename T>
  simd::VecFunctions<T> vec() const {
    return std::get<Tables<T>>(tables).vec();
  }
  // The elements of a vector of T's accumulation type.
  template <typename T>
  int64_t lanes() const {
    return vec<T>().lanes;
  }
};

// Each test makes one of these at namespace scope.
struct Test {
  const char* name;
  void (*run)(const Target&);

  Test(const char* name, void (*run)(const Target&)) : name(name), run(run) {
    all().push_back(*this);
  }
  static std::vector<Test>& all() {
    static std::vector<Test> tests;
    return tests;
  }
};

template <typename F>
void for_each_dtype(F f) {
  f.template operator()<double>();
  f.template operator()<float>();
  f.template operator()<bfloat16>();
  f.template operator()<float16>();
}

// Sizes around a vector's end, around that of four (where rows count as long), and primes.
inline std::vector<int64_t> odd_sizes(int64_t lanes) {
  return {0,  1,  2, 3, lanes - 1, lanes, lanes + 1, 4 * lanes - 1, 4 * lanes, 4 * lanes + 1,
          97, 257};
}

template <typename T>
constexpr const char* kName = "";
template <>
inline constexpr const char* kName<double> = "float64";
template <>
inline constexpr const char* kName<float> = "float32";
template <>
inline constexpr const char* kName<bfloat16> = "bfloat16";
template <>
inline constexpr const char* kName<float16> = "float16";

// ---- memory ----

// Exactly n elements on the heap, so that the first byte past them is poisoned. With an `offset`
// they start that many elements into the allocation: kernels may assume no more alignment than an
// element's own. An empty buffer is a null pointer, as torch's empty tensors have. Unwritten
// elements are NaN.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t n, int64_t offset = 0)
      : size_(n), offset_(offset), memory_(n == 0 ? nullptr : new T[n + offset]) {
    if (n != 0) std::memset(data(), 0xff, n * sizeof(T));
  }
  Buffer(const Buffer& other) : Buffer(other.size_, other.offset_) {
    if (size_ != 0) std::memcpy(data(), other.data(), size_ * sizeof(T));
  }
  T* data() {
    return size_ == 0 ? nullptr : memory_.get() + offset_;
  }
  const T* data() const {
    return size_ == 0 ? nullptr : memory_.get() + offset_;
  }
  T& operator[](int64_t i) {
    return data()[i];
  }
  T operator[](int64_t i) const {
    return data()[i];
  }
  // The element's value, exactly.
  double operator()(int64_t i) const {
    return to_double(data()[i]);
  }
  int64_t size() const {
    return size_;
  }

 private:
  int64_t size_;
  int64_t offset_;
  std::unique_ptr<T[]> memory_;
};

template <typename T>
Buffer<T> random_buffer(int64_t n, int64_t offset, double low = -3, double high = 3) {
  Buffer<T> buffer(n, offset);
  for (int64_t i = 0; i < n; ++i) buffer[i] = from_double<T>(uniform(low, high));
  return buffer;
}

// The pointer of an optional operand.
template <typename B>
auto data_if(bool wanted, B& buffer) {
  return wanted ? buffer.data() : nullptr;
}

// ---- expectations ----

// Expects an element to be the value, after as many `roundings` in accum<T>, of magnitudes up to
// `scale`, and one to T.
template <typename T>
void expect_close(const char* name, int64_t i, T actual, double expected, double roundings,
                  double scale) {
  const double rounded = kEpsilon<T> * std::abs(expected) + kSmallest<T>;
  expect_within(name, i, to_double(actual), expected,
                roundings * kEpsilon<accum<T>> * scale + rounded);
}

template <typename T>
void expect_same_bits(const char* name, const Buffer<T>& actual, const Buffer<T>& expected) {
  running().values_compared += actual.size();
  if (actual.size() == 0) return;
  if (std::memcmp(actual.data(), expected.data(), actual.size() * sizeof(T)) != 0) {
    fail(format("%s differs from that of a single thread", name));
  }
}

// ---- threads ----

// Calls f(begin, end) on pieces of [0, n) as at::parallel_for does: one per thread, as equal as
// possible, and none empty. But a single thread gets even an empty range, which kernels take.
template <typename F>
void parallel_for(int threads, int64_t n, F f) {
  if (threads == 1) return f(int64_t{0}, n);
  const int64_t piece = (n + threads - 1) / threads;
  std::vector<std::thread> workers;
  for (int64_t begin = 0; begin < n; begin += piece) {
    workers.emplace_back(f, begin, std::min(begin + piece, n));
  }
  for (std::thread& worker : workers) worker.join();
}

// Runs `run(threads)`, which returns a tuple of buffers, on one thread and on several, and expects
// the same bits of all; returns those of one.
template <typename Run>
auto same_on_any_threads(Run run) {
  const auto expected = run(1);
  for (const int threads : {2, 5}) {
    const auto actual = run(threads);
    std::apply(
        [&](const auto&... outputs) {
          std::apply(
              [&](const auto&... wanted) { (expect_same_bits("output", outputs, wanted), ...); },
              expected);
        },
        actual);
  }
  return expected;
}

}  // namespace fastnn::tests
