// Runs every test on every instruction set that this CPU has, and names those that it lacks; or on
// those that the arguments name, which it must have. See run.py.
#include <span>
#include <string_view>

#include "harness.h"

namespace fastnn::tests {
namespace {

#define TABLES(set, T) {simd::set::kernels<T>, simd::set::vec_functions<T>}
#define TARGET(set, name, not_run)                                                         \
  {                                                                                        \
    name, not_run, {                                                                       \
      TABLES(set, double), TABLES(set, float), TABLES(set, bfloat16), TABLES(set, float16) \
    }                                                                                      \
  }

std::vector<Target> targets() {
  std::vector<Target> result;
  result.push_back(TARGET(generic, "generic", nullptr));
#if defined(__x86_64__)
  const char* missing = "this CPU doesn't have it";
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  result.push_back(TARGET(avx2, "avx2", avx2 ? nullptr : missing));
  result.push_back(TARGET(avx512, "avx512", avx512 ? nullptr : missing));
#if defined(FASTNN_TESTS_SPLIT)
  // The same source with vectors as wide, but without AVX-512's instructions and intrinsics.
  const char* not_split = avx512 ? "avx512 itself was run" : avx2 ? nullptr : "it takes avx2";
  result.push_back(TARGET(avx512_split, "avx512's vectors split for avx2", not_split));
#endif
#endif
  return result;
}

void run_all(const Target& target) {
  constexpr int kWidth = 31;  // the longest name's
  if (target.not_run) {
    std::printf("%-*s  compiled, not run: %s\n", kWidth, target.name, target.not_run);
    return;
  }
  const int64_t before = running().values_compared;
  for (const Test& test : Test::all()) {
    running().test = format("%s %s", target.name, test.name);
    test.run(target);
  }
  std::printf("%-*s  %zu tests passed, %lld values compared\n", kWidth, target.name,
              Test::all().size(), static_cast<long long>(running().values_compared - before));
}

const Target& named(const std::vector<Target>& targets, std::string_view name) {
  running().test = name;
  for (const Target& target : targets) {
    if (target.name != name) continue;
    if (target.not_run) fail(target.not_run);
    return target;
  }
  fail("there is no such instruction set");
}

}  // namespace
}  // namespace fastnn::tests

int main(int argc, char** argv) {
  using namespace fastnn::tests;
  // Line-buffered everywhere: a sanitizer's abort would lose buffered output.
  std::setvbuf(stdout, nullptr, _IOLBF, BUFSIZ);
  const std::vector<Target> targets = fastnn::tests::targets();
  if (argc == 1) {
    for (const Target& target : targets) run_all(target);
  }
  for (const std::string_view name : std::span(argv, argc).subspan(1)) {
    run_all(named(targets, name));
  }
}
