// Random numbers and expectations, for the tests of the kernels of every device.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>

namespace fastnn::tests {

// ---- random numbers ----

inline std::mt19937_64& generator() {
  static std::mt19937_64 engine(20240229);
  return engine;
}

inline double uniform(double low, double high) {
  return std::uniform_real_distribution<double>(low, high)(generator());
}

inline int64_t random_index(int64_t n) {
  return std::uniform_int_distribution<int64_t>(0, n - 1)(generator());
}

// ---- expectations ----

// The test that runs, for the message of a failure.
struct Running {
  std::string test;
  std::string detail;
  int64_t values_compared = 0;
};

inline Running& running() {
  static Running running;
  return running;
}

template <typename... Args>
std::string format(const char* format, Args... args) {
  char text[256];
  std::snprintf(text, sizeof(text), format, args...);
  return text;
}

template <typename... Args>
void describe(const char* text, Args... args) {
  running().detail = format(text, args...);
}

[[noreturn]] inline void fail(const std::string& what) {
  std::fprintf(stderr, "FAILED: %s, %s: %s\n", running().test.c_str(), running().detail.c_str(),
               what.c_str());
  std::_Exit(1);  // runs no destructors: other threads may still use the objects
}

inline void expect(bool condition, const char* what) {
  ++running().values_compared;
  if (!condition) fail(what);
}

inline void expect_within(const char* name, int64_t i, double actual, double expected,
                          double bound) {
  ++running().values_compared;
  const bool same = actual == expected || (std::isnan(actual) && std::isnan(expected));
  const bool close = std::isfinite(expected) && std::abs(actual - expected) <= bound;
  if (same || close) return;
  fail(format("%s[%lld] is %.17g, expected %.17g within %.3g", name, static_cast<long long>(i),
              actual, expected, bound));
}

}  // namespace fastnn::tests
