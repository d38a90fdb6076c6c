// Shared by the tests of the CUDA kernels, which need neither torch's libraries nor CUDA: each
// kernel's tests are a file that registers itself, and main.cpp runs them in every order of
// threads.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "cuda/vec.cuh"
#include "kernels/expectations.h"

namespace fastnn::cuda::tests {

using namespace fastnn::tests;
using c10::BFloat16;
using c10::Half;

// Each test makes one of these at namespace scope.
struct Test {
  const char* name;
  void (*run)();

  Test(const char* name, void (*run)()) : name(name), run(run) {
    all().push_back(*this);
  }
  static std::vector<Test>& all() {
    static std::vector<Test> tests;
    return tests;
  }
};

template <typename F>
void for_each_dtype(F f) {
  f.template operator()<float>();
  f.template operator()<BFloat16>();
#if !defined(__SANITIZE_THREAD__)  // the barriers are the same, and each takes minutes
  f.template operator()<double>();
  f.template operator()<Half>();
#endif
}

template <typename T>
constexpr const char* kName = "";
template <>
inline constexpr const char* kName<double> = "float64";
template <>
inline constexpr const char* kName<float> = "float32";
template <>
inline constexpr const char* kName<BFloat16> = "bfloat16";
template <>
inline constexpr const char* kName<Half> = "float16";
template <>
inline constexpr const char* kName<Widened<BFloat16>> = "bfloat16 beside float32";

// ---- memory ----

// n elements that start `offset` elements past a 16-byte boundary. Unwritten ones are NaN; the
// memory around them is checked, or poisoned by the address sanitizer.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t n, int64_t offset = 0)
      : size_(n), offset_(offset), memory_(new unsigned char[bytes()]) {
    std::memset(memory_.get(), kGuardByte, bytes());
    if (n != 0) std::memset(data(), 0xff, n * sizeof(T));
  }
  Buffer(const Buffer& other) : Buffer(other.size_, other.offset_) {
    if (size_ != 0) std::memcpy(data(), other.data(), size_ * sizeof(T));
  }
  ~Buffer() {
    for (int64_t i = 0; i < front(); ++i) expect_guard(memory_[i]);
    for (int64_t i = front() + size_ * int64_t(sizeof(T)); i < bytes(); ++i)
      expect_guard(memory_[i]);
  }
  T* data() {
    return size_ == 0 ? nullptr : reinterpret_cast<T*>(memory_.get() + front());
  }
  const T* data() const {
    return const_cast<Buffer*>(this)->data();
  }
  T& operator[](int64_t i) {
    return data()[i];
  }
  T operator[](int64_t i) const {
    return data()[i];
  }
  double operator()(int64_t i) const {
    return static_cast<double>(data()[i]);
  }
  int64_t size() const {
    return size_;
  }

 private:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr int64_t kGuard = 0;
#else
  static constexpr int64_t kGuard = 64;
#endif
  static constexpr unsigned char kGuardByte = 0xa5;

  int64_t front() const {
    return kGuard + offset_ * int64_t(sizeof(T));
  }
  int64_t bytes() const {
    return front() + size_ * int64_t(sizeof(T)) + kGuard;
  }
  static void expect_guard(unsigned char byte) {
    if (byte != kGuardByte) fail("memory around a buffer was written");
  }

  int64_t size_;
  int64_t offset_;
  std::unique_ptr<unsigned char[]> memory_;
};

template <typename T>
Buffer<T> random_buffer(int64_t n, int64_t offset = 0, double low = -3, double high = 3) {
  Buffer<T> buffer(n, offset);
  for (int64_t i = 0; i < n; ++i) buffer[i] = static_cast<T>(uniform(low, high));
  return buffer;
}

// ---- comparisons ----

// The distance from 1 to the next number: twice the largest relative error of a rounding.
template <typename T>
constexpr double kEpsilon = std::numeric_limits<T>::epsilon();
template <>
inline constexpr double kEpsilon<Half> = 1.0 / 1024;
template <>
inline constexpr double kEpsilon<BFloat16> = 1.0 / 128;
template <>
inline constexpr double kEpsilon<Widened<BFloat16>> = kEpsilon<BFloat16>;
template <>
inline constexpr double kEpsilon<Widened<Half>> = kEpsilon<Half>;

// Expects an element to be the value, after as many `roundings` in accum<T>, of magnitudes up to
// `scale`, and one to T.
template <typename T>
void expect_close(const char* name, int64_t i, T actual, double expected, double roundings,
                  double scale) {
  const double smallest = 1e-7;  // of any format's subnormal numbers
  const double rounded = kEpsilon<T> * std::abs(expected) + smallest;
  expect_within(name, i, static_cast<double>(actual), expected,
                roundings * kEpsilon<accum<T>> * scale + rounded);
}

// Expects a sum of n terms, of magnitudes that sum to `scale`, to be the value: it is summed in
// float64 and rounded once to T.
template <typename T>
void expect_sum(const char* name, T actual, double expected, int64_t n, double scale) {
  ++running().values_compared;
  const double value = static_cast<double>(actual);
  const double bound = static_cast<double>(n) * kEpsilon<double> * scale + kEpsilon<T> * scale;
  if (std::abs(value - expected) <= bound) return;
  fail(format("%s is %.17g, expected %.17g within %.3g", name, value, expected, bound));
}

// The results in the first order of threads, which those in the others are compared with.
struct Record {
  std::vector<uint64_t> hashes;
  size_t next = 0;
};
inline Record& record() {
  static Record record;
  return record;
}

// Expects the same bits in the buffer in every order of threads. (main.cpp makes each order draw
// the same random numbers.)
template <typename T>
void expect_same_in_every_order(const Buffer<T>& buffer) {
  uint64_t hash = 14695981039346656037u;  // FNV-1a
  const auto* bytes = reinterpret_cast<const unsigned char*>(buffer.data());
  for (int64_t i = 0; i < buffer.size() * int64_t(sizeof(T)); ++i) {
    hash = (hash ^ bytes[i]) * 1099511628211u;
  }
  Record& known = record();
  if (known.next == known.hashes.size()) known.hashes.push_back(hash);
  expect(known.hashes[known.next++] == hash, "another order of threads gives another result");
}

}  // namespace fastnn::cuda::tests
