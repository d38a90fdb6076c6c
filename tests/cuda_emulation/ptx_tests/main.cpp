// Tests of what executes PTX: kernels.ptx, translated, with results that are known, and faults that
// must be seen. The kernels below only lend their names and parameters.
#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <limits>
#include <string>
#include <vector>

#include "cuda_emulation/expect.h"
#include "ptx/memory.h"

namespace {

namespace emulation = fastnn::cuda_emulation;
using emulation::tests::expect;
using emulation::tests::expect_fault;

struct Floats {
  float a, b, c;
};

// Of kernel `faults`; as they are here, there is none.
struct Faults {
  int64_t global_offset = 0;
  int64_t shared_offset = 0;
  int64_t parameter_offset = 0;
  unsigned threads_asserted = 32;
  unsigned threads_at_barrier = 0;
  unsigned divisor = 1;
};

}  // namespace

extern "C" {
__global__ void integers(int64_t*, int, int) {
}
__global__ void floats(float*, Floats) {
}
__global__ void shuffles(int*) {
}
__global__ void faults(const float*, Faults) {
}
__global__ void dynamic(int*, unsigned) {
}
__global__ void not_translated() {
}
}

namespace {

// Memory that kernels may access, of exact size.
template <typename T>
class Tensor {
 public:
  explicit Tensor(size_t size) : values_(size) {
    emulation::ptx::add_tensor(values_.data(), size * sizeof(T));
  }
  ~Tensor() {
    emulation::ptx::remove_tensor(values_.data());
  }
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;

  T* data() {
    return values_.data();
  }
  T operator[](size_t i) const {
    return values_[i];
  }

 private:
  std::vector<T> values_;
};

void expect_equal(double actual, double expected, const std::string& what) {
  const bool equal = actual == expected || (std::isnan(actual) && std::isnan(expected));
  expect(equal, what + ": " + std::to_string(actual) + " is not " + std::to_string(expected));
}

int64_t two_words(int low, int high) {
  return static_cast<int64_t>(uint64_t{static_cast<unsigned>(high)} << 32 |
                              static_cast<unsigned>(low));
}

void test_integers() {
  Tensor<int64_t> out(11);
  FASTNN_LAUNCH(integers, dim3(1, 3), dim3(2), 0, nullptr, out.data(), -5, 3);
  const auto check = [&](int i, int64_t expected, const char* what) {
    expect(out[i] == expected, std::string(what) + ": " + std::to_string(out[i]));
  };
  check(0, -2, "add, cvt.s64.s32");
  check(1, -15, "mul.wide.s32");
  check(2, int64_t{0xfffffffb} * 3, "mul.wide.u32");
  check(3, int64_t{0xfffffff8}, "mad.lo, cvt.u64.u32");
  check(4, two_words(0, -1), "shifts past the width");
  check(5, 0x0fffffff, "shr.u32");
  check(6, two_words(-1, -2), "div and rem of a negative number");
  // -5 < 3, but not as unsigned numbers: 1; ~1 is -2, negated 2; min(2, -1).
  check(7, two_words(2, -1), "comparisons, selp, not, neg, min");
  check(8, 2, "the upper word of mul.wide.u32");
  check(9, std::numeric_limits<int64_t>::min(), "a negated predicate");
  // Of the block that ran last.
  check(10, two_words(2, 2), "ntid.x, ctaid.y");
}

void test_floats() {
  Tensor<float> out(14);
  // The product is 1 - 2^-46 exactly: plus 1 it rounds to 2, and down to 2 - 2^-23.
  const float a = 1 + std::ldexp(1.f, -23), b = 1 - std::ldexp(1.f, -23);
  FASTNN_LAUNCH(floats, dim3(1), dim3(1), 0, nullptr, out.data(), Floats{a, b, 1});
  expect_equal(out[0], 2, "fma.rn");
  expect_equal(out[1], 2 - std::ldexp(1.f, -23), "fma.rm");
  expect_equal(out[2], 1, "mul");
  expect_equal(out[3], 2, "add");
  expect_equal(out[4], a, "max with NaN");
  expect_equal(out[5], 1, "cvt.sat");
  expect_equal(out[6], 0, "ex2.approx.ftz of -130, whose result is denormal");
  expect_equal(out[7], a / b, "div.rn");
  expect_equal(out[8], 1, "bfloat16");
  expect_equal(out[9], 1, "float16");
  expect_equal(out[10], -3, "cvt.rn.f32.s32");
  expect_equal(out[11], 3, "abs");
  expect_equal(out[12], 2, "comparisons with NaN");
  // The lower half of a double's bits is missing: 20 of 52 bits are left.
  expect(out[13] < 0 && out[13] > -std::ldexp(1.f, -20), "rcp.approx.ftz.f64");

  // What a float cannot hold is lost by rounding down, too: 1 - 2^-60.
  FASTNN_LAUNCH(floats, dim3(1), dim3(1), 0, nullptr, out.data(),
                Floats{-std::ldexp(1.f, -30), std::ldexp(1.f, -30), 1});
  expect_equal(out[0], 1, "fma.rn of a tiny product");
  expect_equal(out[1], 1 - std::ldexp(1.f, -24), "fma.rm of a tiny product");

  // 1 + 2^-8 lies between two neighbours of bfloat16, and goes to the even one; 1 + 2^-7 + 2^-8
  // goes up.
  FASTNN_LAUNCH(floats, dim3(1), dim3(1), 0, nullptr, out.data(), Floats{1.00390625f, 0, 0});
  expect_equal(out[8], 1, "bfloat16 to even, down");
  FASTNN_LAUNCH(floats, dim3(1), dim3(1), 0, nullptr, out.data(), Floats{1.01171875f, 0, 0});
  expect_equal(out[8], 1.015625, "bfloat16 to even, up");

  const float nan = std::numeric_limits<float>::quiet_NaN();
  FASTNN_LAUNCH(floats, dim3(1), dim3(1), 0, nullptr, out.data(), Floats{nan, 1, 1});
  expect_equal(out[0], nan, "fma.rn of NaN");
  expect_equal(out[1], nan, "fma.rm of NaN");
  expect_equal(out[5], 0, "cvt.sat of NaN");
  expect_equal(out[8], nan, "bfloat16 of NaN");
  expect_equal(out[12], 6, "comparisons of NaN");
}

void test_shuffles() {
  for (const auto order : {emulation::ThreadOrder::Forward, emulation::ThreadOrder::Reverse}) {
    emulation::set_settings({.order = order});
    Tensor<int> out(96);
    FASTNN_LAUNCH(shuffles, dim3(1), dim3(32), 0, nullptr, out.data());
    for (int i = 0; i < 32; ++i) {
      expect_equal(out[i], i ^ 1, "shfl.sync.bfly");
      expect_equal(out[32 + i], i & ~7, "shfl.sync.idx");
      expect_equal(out[64 + i], 31 - i, "shared memory");
    }
  }
  emulation::set_settings({});
}

void test_faults() {
  Tensor<float> four(4);
  const auto launch = [&](Faults faults_there) {
    FASTNN_LAUNCH(faults, dim3(1), dim3(32), 0, nullptr, four.data(), faults_there);
  };
  launch({});
  launch({.global_offset = 12, .shared_offset = 12, .parameter_offset = 36});
  expect_fault([&] { launch({.global_offset = 16}); }, {"belong to no tensor", "kernels.ptx"});
  expect_fault([&] { launch({.global_offset = -4}); }, {"belong to no tensor"});
  expect_fault([&] { launch({.global_offset = 2}); }, {"4 bytes at", "misaligned"});
  expect_fault([&] { launch({.shared_offset = 16}); }, {"past the end of four_floats"});
  expect_fault([&] { launch({.shared_offset = -4}); }, {"past the end of numbers"});
  expect_fault([&] { launch({.shared_offset = 1}); }, {"misaligned"});
  expect_fault([&] { launch({.parameter_offset = 40}); }, {"not a parameter's"});
  expect_fault([&] { launch({.threads_asserted = 31}); },
               {"device-side assert triggered: i < n", "thread (31, 0, 0)"});
  expect_fault([&] { launch({.threads_at_barrier = 7}); }, {"divergent barriers", "bar.sync"});
  expect_fault([&] { launch({.divisor = 0}); }, {"divided by zero"});
  expect_fault([&] { FASTNN_LAUNCH(not_translated, dim3(1), dim3(1), 0, nullptr); },
               {"the PTX has no kernel not_translated"});
  Tensor<int64_t> out(11);
  expect_fault([&] { FASTNN_LAUNCH(integers, dim3(1), dim3(33), 0, nullptr, out.data(), 1, 1); },
               {"33 threads are more than integers is compiled for"});
}

void test_dynamic_memory() {
  Tensor<int> out(1);
  FASTNN_LAUNCH(dynamic, dim3(1), dim3(1), 16, nullptr, out.data(), 0);
  expect_equal(out[0], 5, "dynamic shared memory");
  expect_fault([&] { FASTNN_LAUNCH(dynamic, dim3(1), dim3(1), 16, nullptr, out.data(), 16); },
               {"past the end of dynamic_memory"});
}

}  // namespace

int main() {
  test_integers();
  test_floats();
  test_shuffles();
  test_faults();
  test_dynamic_memory();
  std::printf("%d expectations hold\n", emulation::tests::expectations);
}
