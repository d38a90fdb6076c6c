#include "harness.h"

namespace fastnn::tests {
namespace {

template <typename To, typename From, typename F>
Buffer<To> map(const std::vector<From>& from, F f) {
  Buffer<To> to(from.size());
  f(to.data(), from.data(), to.size());
  return to;
}

template <typename A, typename F, typename Reference>
void expect_function(const char* name, const std::vector<A>& x, F f, Reference reference) {
  describe("%s of %s", name, kName<A>);
  const auto y = map<A>(x, f);
  for (int64_t i = 0; i < y.size(); ++i) {
    const double expected = static_cast<A>(reference(double(x[i])));
    expect_close(format("at %.17g, %s", double(x[i]), name).c_str(), i, y[i], expected, 2,
                 std::abs(expected));
  }
}

template <typename A>
void exp_and_log(const Target& target) {
  using Limits = std::numeric_limits<A>;
  constexpr int64_t kCount = 20011;
  const double largest = std::log(double(Limits::max()));
  std::vector<A> x = {0, -A(0), INFINITY, -INFINITY, NAN, -NAN};
  x.insert(x.end(), {Limits::max(), Limits::lowest(), Limits::min()});
  for (int64_t i = 0; i < kCount; ++i) x.push_back(A(uniform(-1.3, 1.1) * largest));
  // Far out on both sides, at every magnitude.
  for (int k = 6; k < Limits::max_exponent - 1; ++k) {
    for (int i = 0; i < 8; ++i) x.push_back(A(std::ldexp(uniform(-2, 2), k)));
  }
  expect_function("exp", x, target.vec<A>().exp, [](double v) { return std::exp(v); });
  for (A& value : x) value = -std::abs(value);
  const auto exp_nonpositive = target.vec<A>().exp_nonpositive;
  expect_function("exp_nonpositive", x, exp_nonpositive, [](double v) { return std::exp(v); });

  x = {1, 2, Limits::min(), Limits::max(), NAN};
  for (int64_t i = 0; i < kCount; ++i) {
    x.push_back(A(std::exp(uniform(-0.98, 0.98) * largest)));
    x.push_back(A(uniform(0.5, 2)));
  }
  expect_function("log", x, target.vec<A>().log, [](double v) { return std::log(v); });
}

template <typename T>
std::vector<T> all_numbers() {
  std::vector<T> result;
  for (int bits = 0; bits <= 0xffff; ++bits) result.push_back(T{uint16_t(bits)});
  return result;
}

// Each number of T, the midpoint to the next one, and the floats on both sides of that.
template <typename T>
std::vector<float> around_all_numbers() {
  std::vector<float> result;
  for (const T number : all_numbers<T>()) {
    const double value = to_double(number);
    const int exponent = std::max(std::ilogb(value), Format<T>::lowest_exponent);
    const double quantum = kEpsilon<T> * std::ldexp(1.0, exponent);
    const float midpoint = float(value + std::copysign(quantum / 2, value));
    result.insert(result.end(), {float(value), midpoint, std::nextafter(midpoint, -INFINITY),
                                 std::nextafter(midpoint, INFINITY)});
  }
  return result;
}

template <typename T>
void conversions(const Target& target) {
  describe("%s to float", kName<T>);
  const auto numbers = all_numbers<T>();
  const auto wide = map<float>(numbers, target.vec<T>().widen);
  for (int64_t i = 0; i < wide.size(); ++i) {
    expect_within("widen", i, wide(i), to_double(numbers[i]), 0);
  }
  describe("float to %s", kName<T>);
  const auto floats = around_all_numbers<T>();
  const auto narrow = map<T>(floats, target.vec<T>().narrow);
  for (int64_t i = 0; i < narrow.size(); ++i) {
    const T expected = from_double<T>(floats[i]);
    expect_within("narrow", i, narrow(i), to_double(expected), 0);
    expect(std::isnan(floats[i]) || narrow[i].bits == expected.bits, "a zero's sign is lost");
  }
}

const Test test("vec", [](const Target& target) {
  exp_and_log<double>(target);
  exp_and_log<float>(target);
  conversions<bfloat16>(target);
  conversions<float16>(target);
});

}  // namespace
}  // namespace fastnn::tests
