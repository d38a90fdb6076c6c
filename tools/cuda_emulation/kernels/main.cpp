// Runs every test with the threads of a block, and the blocks, in each order; with arguments, the
// tests whose names begin with one of them. See run.py.
#include "harness.h"

namespace {

bool chosen(const char* name, int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    if (std::strncmp(name, argv[i], std::strlen(argv[i])) == 0) return true;
  }
  return argc == 1;
}

}  // namespace

int main(int argc, char** argv) {
  using namespace fastnn::cuda::tests;
  using fastnn::cuda_emulation::ThreadOrder;
  // Line-buffered everywhere: a sanitizer's abort would lose buffered output.
  std::setvbuf(stdout, nullptr, _IOLBF, BUFSIZ);
  const std::vector<std::pair<ThreadOrder, const char*>> orders = {
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
      // What a sanitizer reports hardly depends on the order, and each order takes minutes.
      {ThreadOrder::Forward, "forward"},
      {ThreadOrder::Reverse, "reverse"},
#endif
      {ThreadOrder::Shuffled, "shuffled"}};
  for (const auto& [order, name] : orders) {
    fastnn::cuda_emulation::set_settings({.order = order});
    generator().seed(20240229);
    record().next = 0;
    const int64_t before = running().values_compared;
    for (const Test& test : Test::all()) {
      if (!chosen(test.name, argc, argv)) continue;
      running().test = format("%s %s", name, test.name);
      running().detail.clear();
      try {
        test.run();
      } catch (const fastnn::cuda_emulation::Fault& fault) {
        fail(fault.what());
      }
    }
    std::printf("%-8s  %lld values compared\n", name,
                static_cast<long long>(running().values_compared - before));
  }
}
