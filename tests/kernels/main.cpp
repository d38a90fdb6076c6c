// Runs every test on every instruction set that this CPU has. See run.py.
#include "harness.h"

namespace fastnn::tests {
namespace {

#define TABLES(set, T) {simd::set::kernels<T>, simd::set::vec_functions<T>}
#define TARGET(set, runs_here)                                                             \
  {                                                                                        \
    #set, runs_here, {                                                                     \
      TABLES(set, double), TABLES(set, float), TABLES(set, bfloat16), TABLES(set, float16) \
    }                                                                                      \
  }

std::vector<Target> targets() {
  std::vector<Target> result;
  result.push_back(TARGET(generic, true));
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  result.push_back(TARGET(avx2, avx2));
  result.push_back(TARGET(avx512, avx2 && avx512));
#endif
  return result;
}

void run_all(const Target& target) {
  if (!target.runs_here) {
    std::printf("%-8s compiled, not run: this CPU doesn't have it\n", target.name);
    return;
  }
  const int64_t before = running().values_compared;
  for (const Test& test : Test::all()) {
    running().test = format("%s %s", target.name, test.name);
    test.run(target);
  }
  std::printf("%-8s %zu tests passed, %lld values compared\n", target.name, Test::all().size(),
              static_cast<long long>(running().values_compared - before));
}

}  // namespace
}  // namespace fastnn::tests

int main() {
  for (const auto& target : fastnn::tests::targets()) fastnn::tests::run_all(target);
}
