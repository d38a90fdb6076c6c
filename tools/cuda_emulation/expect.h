// The expectations of the emulation's own tests: values and faults.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "cuda_emulation/runtime.h"

namespace fastnn::cuda_emulation::tests {

inline int expectations = 0;

inline void expect(bool condition, const std::string& what) {
  ++expectations;
  if (condition) return;
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
  std::exit(1);
}

// Expects that `launch` ends in a fault whose message has each of the words.
inline void expect_fault(const std::function<void()>& launch,
                         const std::vector<std::string>& words) {
  std::string message = "no fault";
  try {
    launch();
  } catch (const Fault& fault) {
    message = fault.what();
  }
  for (const std::string& word : words) {
    expect(message.find(word) != std::string::npos, "\"" + word + "\" is not in: " + message);
  }
}

}  // namespace fastnn::cuda_emulation::tests
