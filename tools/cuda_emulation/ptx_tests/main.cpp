// Tests of the PTX machine: kernels.ptx, translated, with known results, and with faults that must
// be detected. The kernels below only lend their names and parameters.
#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "cuda_emulation/expect.h"
#include "ptx/kernels.h"
#include "ptx/memory.h"

namespace {

namespace emulation = fastnn::cuda_emulation;
using emulation::tests::expect;
using emulation::tests::expect_fault;

struct Floats {
  float a, b, c;
};

// The parameters of kernel `faults`; these defaults cause no fault.
struct Faults {
  int64_t global_offset = 0;
  int64_t shared_offset = 0;
  int64_t parameter_offset = 0;
  unsigned threads_asserted = 32;
  unsigned threads_at_barrier = 0;
  unsigned divisor = 1;
};

struct SixFloats {
  float values[6];
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
__global__ void arithmetic_32(unsigned*, int, int, int) {
}
__global__ void arithmetic_64(uint64_t*, int64_t, int64_t, int) {
}
__global__ void compare_integers(int*, int, int) {
}
__global__ void compare_floats(int*, float, float) {
}
__global__ void rounded(float*, Floats) {
}
__global__ void doubles(double*, double) {
}
__global__ void shuffles_by(int*, int, int, unsigned) {
}
__global__ void copies(int*, const int*) {
}
__global__ void unwritten(void*) {
}
__global__ void load_global(uint64_t) {
}
__global__ void load_shared(uint64_t) {
}
__global__ void store_global(uint64_t) {
}
__global__ void store_shared(uint64_t) {
}
__global__ void load_param(uint64_t, SixFloats) {
}
__global__ void barrier_1() {
}
__global__ void traps() {
}
__global__ void of_another_size(uint64_t) {
}
__global__ void of_another_count(unsigned) {
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

template <typename T>
struct Named {
  const char* name;
  T value;
};

// What `launch` writes, from the first element on.
template <typename T>
void expect_written(const std::function<void(T*)>& launch, const std::string& operands,
                    const std::vector<Named<T>>& expected) {
  Tensor<T> out(expected.size());
  launch(out.data());
  for (size_t i = 0; i < expected.size(); ++i) {
    const auto [name, value] = expected[i];
    expect(out[i] == value, std::string(name) + " of " + operands + ": " + std::to_string(out[i]) +
                                " is not " + std::to_string(value));
  }
}

std::string of(auto a, auto b) {
  return std::to_string(a) + ", " + std::to_string(b);
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
  // From the block that ran last.
  check(10, two_words(2, 2), "ntid.x, ctaid.y");
}

// As in C++, except where it is undefined: by -1 they wrap around.
template <typename Unsigned, typename Signed>
Unsigned quotient(Signed a, Signed b) {
  return b == -1 ? Unsigned{0} - a : a / b;
}
template <typename Unsigned, typename Signed>
Unsigned remainder(Signed a, Signed b) {
  return b == -1 ? 0 : a % b;
}

void expect_arithmetic(int a, int b, int shift) {
  const auto launch = [&](unsigned* out) {
    FASTNN_LAUNCH(arithmetic_32, dim3(1), dim3(1), 0, nullptr, out, a, b, shift);
  };
  const unsigned ua = a, ub = b;
  const bool whole = shift == 32;
  expect_written<unsigned>(launch, of(a, b),
                           {
                               {"mul.lo.s32", ua * ub},
                               {"div.s32", quotient<unsigned>(a, b)},
                               {"rem.s32", remainder<unsigned>(a, b)},
                               {"div.u32", ua / ub},
                               {"rem.u32", ua % ub},
                               {"max.s32", a < b ? ub : ua},
                               {"min.s32", a < b ? ua : ub},
                               {"max.u32", ua < ub ? ub : ua},
                               {"min.u32", ua < ub ? ua : ub},
                               {"shl.b32", whole ? 0 : ua << shift},
                               {"shr.u32", whole ? 0 : ua >> shift},
                               {"shr.s32", static_cast<unsigned>(a >> (whole ? 31 : shift))},
                               {"and.b32", ua & ub},
                               {"or.b32", ua | ub},
                               {"xor.b32", ua ^ ub},
                               {"sub.s32", ua - ub},
                           });
}

void expect_arithmetic_64(int64_t a, int64_t b, int shift) {
  const auto launch = [&](uint64_t* out) {
    FASTNN_LAUNCH(arithmetic_64, dim3(1), dim3(1), 0, nullptr, out, a, b, shift);
  };
  const uint64_t ua = a, ub = b;
  const bool whole = shift == 64;
  expect_written<uint64_t>(launch, of(a, b),
                           {
                               {"mul.lo.s64", ua * ub},
                               {"div.s64", quotient<uint64_t>(a, b)},
                               {"rem.s64", remainder<uint64_t>(a, b)},
                               {"max.s64", a < b ? ub : ua},
                               {"min.s64", a < b ? ua : ub},
                               {"shl.b64", whole ? 0 : ua << shift},
                               {"shr.u64", whole ? 0 : ua >> shift},
                               {"shr.s64", static_cast<uint64_t>(a >> (whole ? 63 : shift))},
                               {"the low word", ua & 0xffffffff},
                               {"the high word", ua >> 32},
                           });
}

void test_arithmetic() {
  constexpr int kMin = std::numeric_limits<int>::min();
  expect_arithmetic(7, -1, 32);
  expect_arithmetic(kMin, -1, 32);
  expect_arithmetic(-6, 3, 31);
  expect_arithmetic(0x7ffffff3, 0x10005, 1);
  constexpr int64_t kMin64 = std::numeric_limits<int64_t>::min();
  expect_arithmetic_64(7, -1, 64);
  expect_arithmetic_64(kMin64, -1, 64);
  expect_arithmetic_64(-(int64_t{1} << 40) - 6, 5, 63);
  expect_arithmetic_64(0x1234567890abcdef, 0x100000003, 33);
}

void expect_comparisons(int a, int b) {
  const auto launch = [&](int* out) {
    FASTNN_LAUNCH(compare_integers, dim3(1), dim3(1), 0, nullptr, out, a, b);
  };
  const unsigned ua = a, ub = b;
  expect_written<int>(launch, of(a, b),
                      {
                          {"setp.eq.s32", a == b},
                          {"setp.ne.s32", a != b},
                          {"setp.lt.s32", a < b},
                          {"setp.le.s32", a <= b},
                          {"setp.gt.s32", a > b},
                          {"setp.ge.s32", a >= b},
                          {"setp.lt.u32", ua < ub},
                          {"setp.le.u32", ua <= ub},
                          {"setp.gt.u32", ua > ub},
                          {"setp.ge.u32", ua >= ub},
                      });
}

void expect_comparisons(float a, float b) {
  const auto launch = [&](int* out) {
    FASTNN_LAUNCH(compare_floats, dim3(1), dim3(1), 0, nullptr, out, a, b);
  };
  const bool nan = std::isnan(a) || std::isnan(b);
  expect_written<int>(launch, of(a, b),
                      {
                          {"setp.eq.f32", a == b},
                          {"setp.lt.f32", a < b},
                          {"setp.le.f32", a <= b},
                          {"setp.gt.f32", a > b},
                          {"setp.ge.f32", a >= b},
                          {"setp.neu.f32", nan || a != b},
                          {"setp.gtu.f32", nan || a > b},
                          {"setp.geu.f32", nan || a >= b},
                          {"setp.ltu.f32", nan || a < b},
                      });
}

void test_comparisons() {
  for (const auto& [a, b] : {std::pair(3, 3), {3, 4}, {4, 3}, {-5, 3}, {3, -5}, {-5, -5}}) {
    expect_comparisons(a, b);
    expect_comparisons(static_cast<float>(a), static_cast<float>(b));
  }
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const auto& [a, b] : {std::pair(nan, 1.f), {1.f, nan}, {nan, nan}}) {
    expect_comparisons(a, b);
  }
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

void test_rounding() {
  Tensor<float> out(9);
  const auto launch = [&](float a, float b, float c) {
    FASTNN_LAUNCH(rounded, dim3(1), dim3(1), 0, nullptr, out.data(), Floats{a, b, c});
  };
  const auto power = [](int exponent) { return std::ldexp(1.f, exponent); };

  // The product is 1 + 2^-11 + 2^-24, whose last bit a float has no room for.
  launch(1 + power(-12), 1 + power(-12), -1);
  expect_equal(out[0], power(-11) + power(-24), "fma.rn, whose product is not rounded");
  expect_equal(out[1], 2 + power(-11), "add.rn");
  // The sum is 2^-64 less than the middle of two floats, and in double that middle.
  launch(power(-12) * (1 + power(-20)), power(-12) * (1 - power(-20)), 1 + power(-23));
  expect_equal(out[0], 1 + power(-23), "fma.rn, which rounds once");
  launch(1, power(-24) + power(-40), 0);
  expect_equal(out[1], 1 + power(-23), "add.rn to the nearest");

  const float nan = std::numeric_limits<float>::quiet_NaN();
  launch(2, 3, 0);
  expect_equal(out[2], 2, "min");
  expect_equal(out[3], 3, "max");
  expect_equal(out[4], 8, "ex2.approx.ftz");
  for (const auto& [a, b] : {std::pair(2.f, nan), {nan, 2.f}}) {
    launch(a, b, 0);
    expect_equal(out[2], 2, "min with NaN");
    expect_equal(out[3], 2, "max with NaN");
  }

  // As for bfloat16: halfway between two neighbours of float16, the even one.
  launch(1 + power(-11), 0, 0);
  expect_equal(out[5], 1, "float16 to even, down");
  launch(1 + power(-10) + power(-11), 0, 0);
  expect_equal(out[5], 1 + power(-9), "float16 to even, up");

  launch(-4, 3, 0);
  expect_equal(out[6], -0.25, "rcp.approx.ftz.f32");
  expect_equal(out[7], -3, "copysign.f32");
  launch(-power(127), -0.f, 0);
  expect(out[6] == 0 && std::signbit(out[6]), "rcp.approx.ftz.f32, whose result is denormal");
  expect(std::signbit(out[7]), "copysign.f32 of zero");
  launch(-power(-127), 0, 0);
  expect_equal(out[6], -std::numeric_limits<float>::infinity(), "rcp.approx.ftz.f32 of a denormal");
  for (const auto& [a, whole] : {std::pair(2.5f, 2.f), {3.5f, 4.f}, {-2.75f, -3.f}}) {
    launch(a, 0, 0);
    expect_equal(out[8], whole, "cvt.rni");
  }
}

void test_doubles() {
  Tensor<double> out(4);
  const auto launch = [&](double value) {
    FASTNN_LAUNCH(doubles, dim3(1), dim3(1), 0, nullptr, out.data(), value);
  };
  launch(3);
  expect_equal(out[0], 1. / 3, "rcp.rn.f64");
  launch(1 + std::ldexp(3., -25));  // three quarters of the way to the next float
  expect_equal(out[2], 1 + std::ldexp(1., -23), "cvt.rn.f32.f64");
  launch(1 + std::ldexp(1., -30));
  expect_equal(out[3], std::ldexp(1., -29) + std::ldexp(1., -60), "fma.rn.f64");
  const double denormal = std::ldexp(1., -1023);  // whose reciprocal is a number
  const double infinity = std::numeric_limits<double>::infinity();
  launch(denormal);
  expect_equal(out[1], infinity, "rcp.approx.ftz.f64 of a denormal number");
  launch(-denormal);
  expect_equal(out[1], -infinity, "rcp.approx.ftz.f64 of a negative denormal number");
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

// `first` and `last`: of the lane's segment.
void expect_shuffled(int b, int clamp, const std::function<int(int)>& first,
                     const std::function<int(int)>& last) {
  Tensor<int> out(128);
  FASTNN_LAUNCH(shuffles_by, dim3(1), dim3(32), 0, nullptr, out.data(), b, clamp, ~0u);
  const std::string how = " by " + std::to_string(b) + ", " + std::to_string(clamp);
  for (int i = 0; i < 32; ++i) {
    const int across = i ^ b, at = first(i) + b;
    expect_equal(out[i], across <= last(i) ? across : i, "shfl.sync.bfly" + how);
    expect_equal(out[32 + i], across <= last(i), "shfl.sync.bfly's predicate" + how);
    expect_equal(out[64 + i], at <= last(i) ? at : i, "shfl.sync.idx" + how);
    expect_equal(out[96 + i], at <= last(i), "shfl.sync.idx's predicate" + how);
  }
}

void test_shuffles_by() {
  const auto zero = [](int) { return 0; };
  for (const int b : {0, 1, 4, 9, 16, 31}) {
    expect_shuffled(b, 31, zero, [](int) { return 31; });
    expect_shuffled(b, 15, zero, [](int) { return 15; });
  }
  // Segments of eight lanes, then only the first four of each.
  const auto first_of_eight = [](int lane) { return lane & ~7; };
  for (const int b : {1, 3, 4, 6}) {
    expect_shuffled(b, 24 << 8 | 7, first_of_eight, [](int lane) { return lane | 7; });
    expect_shuffled(b, 24 << 8 | 3, first_of_eight, [](int lane) { return (lane & ~7) + 3; });
  }
  Tensor<int> out(128);
  const auto launch = [&](unsigned mask) {
    FASTNN_LAUNCH(shuffles_by, dim3(1), dim3(32), 0, nullptr, out.data(), 0, 31, mask);
  };
  launch(~0u);
  expect_fault([&] { launch(~0u >> 1); }, {"shfl.sync.bfly", "lane is not in its mask"});
}

void test_vectors() {
  Tensor<int> in(8), out(8);
  for (int i = 0; i < 8; ++i) in.data()[i] = 10 + i;
  FASTNN_LAUNCH(copies, dim3(1), dim3(1), 0, nullptr, out.data(), in.data());
  for (int i = 0; i < 8; ++i) expect_equal(out[i], 10 + i, "vectors in memory");
}

void test_unwritten_registers() {
  struct Registers {
    float f = 0;
    int r = 0;
    double fd = 0;
    int64_t rd = 0;
  };
  Tensor<Registers> out(1);
  FASTNN_LAUNCH(unwritten, dim3(1), dim3(1), 0, nullptr, out.data());
  expect(std::isnan(out[0].f) && std::isnan(out[0].fd), "a number that was not written");
  expect(out[0].r == -1 && out[0].rd == -1, "bits that were not written");
}

// Kernels that access 16 bytes.
using Access = void (*)(uint64_t);

void test_global_addresses(Access access) {
  const auto launch = [&](const float* at) {
    FASTNN_LAUNCH(access, dim3(1), dim3(1), 0, nullptr, reinterpret_cast<uint64_t>(at));
  };
  Tensor<float> six(6);
  launch(six.data());
  expect_fault([&] { launch(six.data() + 4); }, {"16 bytes", "belong to no tensor"});
  expect_fault([&] { launch(six.data() + 1); }, {"misaligned"});
  expect_fault([&] { launch(six.data() + 2); }, {"misaligned"});
}

void test_shared_addresses(Access access) {
  const auto launch = [&](uint64_t at) {
    FASTNN_LAUNCH(access, dim3(1), dim3(1), 6 * sizeof(float), nullptr, at);
  };
  // It is the first variable that kernels.ptx declares; eight_numbers is the fourth.
  const uint64_t dynamic_memory = emulation::ptx::window_address(1);
  launch(dynamic_memory);
  expect_fault([&] { launch(dynamic_memory + 16); }, {"past the end of dynamic_memory"});
  expect_fault([&] { launch(dynamic_memory + 8); }, {"misaligned"});
  expect_fault([&] { launch(16); }, {"not in shared memory"});
  for (const int variable : {5, 1000}) {
    const uint64_t nobodys = emulation::ptx::window_address(variable);
    expect_fault([&] { launch(nobodys); }, {"not in shared memory"});
  }
}

void test_parameter_addresses() {
  const auto launch = [](uint64_t at) {
    FASTNN_LAUNCH(load_param, dim3(1), dim3(1), 0, nullptr, at, SixFloats{});
  };
  const uint64_t six_floats = emulation::ptx::window_address(2);
  launch(six_floats);
  expect_fault([&] { launch(six_floats + 16); }, {"not a parameter's"});
  expect_fault([&] { launch(six_floats + 8); }, {"misaligned"});
  expect_fault([&] { launch(16); }, {"not a parameter's"});
  const uint64_t nobodys = emulation::ptx::window_address(3);
  expect_fault([&] { launch(nobodys); }, {"not a parameter's"});
}

void test_removed_tensor() {
  alignas(16) static float memory[4];
  const auto load = [&] {
    FASTNN_LAUNCH(load_global, dim3(1), dim3(1), 0, nullptr, reinterpret_cast<uint64_t>(memory));
  };
  emulation::ptx::add_tensor(memory, sizeof(memory));
  load();
  emulation::ptx::remove_tensor(memory);
  expect_fault(load, {"belong to no tensor"});
}

void test_other_parameters() {
  expect_fault([] { FASTNN_LAUNCH(of_another_size, dim3(1), dim3(1), 0, nullptr, 1); },
               {"the two compilers differ in the parameters of of_another_size"});
  expect_fault([] { FASTNN_LAUNCH(of_another_count, dim3(1), dim3(1), 0, nullptr, 1); },
               {"the two compilers differ in the parameters of of_another_count"});
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
  expect_fault([] { FASTNN_LAUNCH(barrier_1, dim3(1), dim3(1), 0, nullptr); },
               {"a barrier other than 0"});
  expect_fault([] { FASTNN_LAUNCH(traps, dim3(1), dim3(1), 0, nullptr); }, {"trap"});
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
  using emulation::ptx::kernel_count;
  using emulation::ptx::never_launched;
  expect(never_launched().size() == kernel_count(), "no kernel is launched at first");
  test_integers();
  test_arithmetic();
  test_comparisons();
  test_floats();
  test_rounding();
  test_doubles();
  test_shuffles();
  test_shuffles_by();
  test_vectors();
  test_unwritten_registers();
  for (const Access access : {load_global, store_global}) test_global_addresses(access);
  for (const Access access : {load_shared, store_shared}) test_shared_addresses(access);
  test_parameter_addresses();
  test_removed_tensor();
  test_faults();
  test_other_parameters();
  test_dynamic_memory();
  expect(never_launched() == std::vector<std::string>{"of_another_count", "of_another_size"},
         "all but those that can't be are launched");
  std::printf("%d expectations hold\n", emulation::tests::expectations);
}
