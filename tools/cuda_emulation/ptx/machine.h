// PTX's instructions for the C++ that translate.py makes: a function for each, named and typed as
// there. Registers hold bits; each instruction takes them as its type. (PTX ISA 9.0, chapter 9.)
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <span>
#include <type_traits>
#include <vector>

#include "cuda_runtime.h"
#include "ptx/kernels.h"
#include "ptx/memory.h"

namespace fastnn::cuda_emulation::ptx {

using pred = bool;
using b8 = uint8_t;
using b16 = uint16_t;
using b32 = uint32_t;
using b64 = uint64_t;
using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using f32 = float;
using f64 = double;
using f16 = c10::Half;
using bf16 = c10::BFloat16;

consteval Site here(Site site = Site::current()) {
  return site;
}

// --- registers

// Bits as a number of the type: a wider register's lower ones, or those of a literal that fit.
template <typename T, typename Register>
T get(Register bits) {
  if constexpr (std::is_integral_v<T> && std::is_integral_v<Register>) {
    return static_cast<T>(bits);
  } else {
    return std::bit_cast<T>(bits);
  }
}

// A register that is wider than the number takes it sign- or zero-extended.
template <typename Register, typename T>
void set(Register& result, T value) {
  result = get<Register>(value);
}

inline f32 float_of(u32 bits) {
  return std::bit_cast<f32>(bits);
}
inline f64 double_of(u64 bits) {
  return std::bit_cast<f64>(bits);
}

// What a register holds before it is written: NaN, and no valid address.
template <typename T>
T poison() {
  if constexpr (std::is_floating_point_v<T>) {
    return std::numeric_limits<T>::quiet_NaN();
  } else {
    return static_cast<T>(-1);
  }
}

template <typename T, typename A>
T mov(A a) {
  return get<T>(a);
}
template <typename T, typename A, typename B>
T selp(A a, B b, pred choose_a) {
  return choose_a ? get<T>(a) : get<T>(b);
}

// The first of two parts has the lower bits.
template <typename Register, typename Low, typename High>
void pack(Register& result, Low low, High high) {
  using Part = std::conditional_t<sizeof(Register) == 4, u16, u32>;
  using Whole = std::conditional_t<sizeof(Register) == 4, u32, u64>;
  set(result, static_cast<Whole>(Whole{get<Part>(high)} << sizeof(Part) * 8 | get<Part>(low)));
}
template <typename Register, typename Low, typename High>
void unpack(Register whole, Low& low, High& high) {
  using Part = std::conditional_t<sizeof(Register) == 4, u16, u32>;
  using Whole = std::conditional_t<sizeof(Register) == 4, u32, u64>;
  set(low, static_cast<Part>(get<Whole>(whole)));
  set(high, static_cast<Part>(get<Whole>(whole) >> sizeof(Part) * 8));
}

// Addresses are the same in each space: variables of the block and parameters have small ones.
template <typename T, typename A>
T cvta_to_global(A a) {
  return get<T>(a);
}
template <typename T, typename A>
T cvta_global(A a) {
  return get<T>(a);
}
template <typename T, typename A>
T cvta_shared(A a) {
  return get<T>(a);
}

// --- arithmetic. Integers wrap around (-fwrapv), nothing is contracted (-ffp-contract=off).

template <typename T, typename A, typename B>
T add(A a, B b) {
  return static_cast<T>(get<T>(a) + get<T>(b));
}
template <typename T, typename A, typename B>
T sub(A a, B b) {
  return static_cast<T>(get<T>(a) - get<T>(b));
}
template <typename T, typename A, typename B>
T mul(A a, B b) {
  static_assert(std::is_floating_point_v<T>);
  return get<T>(a) * get<T>(b);
}
template <typename T, typename A, typename B>
T add_rn(A a, B b) {
  return add<T>(a, b);
}
template <typename T, typename A, typename B>
T mul_rn(A a, B b) {
  return mul<T>(a, b);
}
template <typename T, typename A, typename B>
T mul_lo(A a, B b) {
  return static_cast<T>(get<T>(a) * get<T>(b));
}
template <typename T, typename A, typename B>
auto mul_wide(A a, B b) {
  static_assert(sizeof(T) == 4);
  using Wide = std::conditional_t<std::is_signed_v<T>, s64, u64>;
  return Wide{get<T>(a)} * Wide{get<T>(b)};
}
template <typename T, typename A, typename B, typename C>
T mad_lo(A a, B b, C c) {
  return static_cast<T>(get<T>(a) * get<T>(b) + get<T>(c));
}
template <typename T, typename A, typename B, typename C>
T fma_rn(A a, B b, C c) {
  return std::fma(get<T>(a), get<T>(b), get<T>(c));
}

// Rounded down. The product of two floats is exact in double, and the error of the sum is known.
template <typename T, typename A, typename B, typename C>
T fma_rm(A a, B b, C c) {
  static_assert(std::is_same_v<T, f32>);
  const f64 product = f64{get<f32>(a)} * get<f32>(b);
  const f64 addend = get<f32>(c);
  const f64 sum = product + addend;
  const f64 addend_in_sum = sum - product;
  const f64 lost = (product - (sum - addend_in_sum)) + (addend - addend_in_sum);
  const f32 nearest = static_cast<f32>(sum);
  const bool above = nearest > sum || (nearest == sum && lost < 0);
  return above ? std::nextafter(nearest, -std::numeric_limits<f32>::infinity()) : nearest;
}

// A division by zero is undefined.
template <typename T, typename B>
T divisor(B b) {
  const T value = get<T>(b);
  if (std::is_integral_v<T> && value == 0) fail("an integer is divided by zero", Site());
  return value;
}
template <typename T, typename A, typename B>
T div(A a, B b) {
  static_assert(std::is_integral_v<T>);
  if constexpr (std::is_signed_v<T>) {
    if (divisor<T>(b) == -1) return static_cast<T>(0 - get<T>(a));
  }
  return get<T>(a) / divisor<T>(b);
}
template <typename T, typename A, typename B>
T rem(A a, B b) {
  static_assert(std::is_integral_v<T>);
  if constexpr (std::is_signed_v<T>) {
    if (divisor<T>(b) == -1) return 0;
  }
  return get<T>(a) % divisor<T>(b);
}
template <typename T, typename A, typename B>
T div_rn(A a, B b) {
  return get<T>(a) / get<T>(b);
}
template <typename T, typename A>
T rcp_rn(A a) {
  return 1 / get<T>(a);
}
// What .ftz makes of a denormal number: zero.
template <typename T>
T flushed(T value) {
  return std::fpclassify(value) == FP_SUBNORMAL ? std::copysign(T{0}, value) : value;
}
// Only the upper half of a double's bits, as in hardware: a start for Newton's method.
template <typename T, typename A>
T rcp_approx_ftz(A a) {
  constexpr u64 kUpperHalf = 0xFFFFFFFF00000000;
  const T result = flushed(1 / flushed(get<T>(a)));
  if constexpr (std::is_same_v<T, f32>) {
    return result;
  } else {
    return std::bit_cast<f64>(std::bit_cast<u64>(result) & kUpperHalf);
  }
}
template <typename T, typename A>
T ex2_approx_ftz(A a) {
  static_assert(std::is_same_v<T, f32>);
  return flushed(std::exp2(get<f32>(a)));
}

template <typename T, typename A>
T neg(A a) {
  return static_cast<T>(-get<T>(a));
}
template <typename T, typename A>
T abs(A a) {
  return std::abs(get<T>(a));
}
template <typename T, typename A, typename B>
T copysign(A sign, B value) {
  return std::copysign(get<T>(value), get<T>(sign));
}
// Return the number if the other operand is NaN.
template <typename T, typename A, typename B>
T min(A a, B b) {
  if constexpr (std::is_floating_point_v<T>) return std::fmin(get<T>(a), get<T>(b));
  return std::min(get<T>(a), get<T>(b));
}
template <typename T, typename A, typename B>
T max(A a, B b) {
  if constexpr (std::is_floating_point_v<T>) return std::fmax(get<T>(a), get<T>(b));
  return std::max(get<T>(a), get<T>(b));
}

// --- bits

template <typename T, typename A, typename B>
T and_(A a, B b) {
  return get<T>(a) & get<T>(b);
}
template <typename T, typename A, typename B>
T or_(A a, B b) {
  return get<T>(a) | get<T>(b);
}
template <typename T, typename A, typename B>
T xor_(A a, B b) {
  return get<T>(a) ^ get<T>(b);
}
template <typename T, typename A>
T not_(A a) {
  if constexpr (std::is_same_v<T, pred>) return !get<pred>(a);
  return static_cast<T>(~get<T>(a));
}
// A shift past the width leaves only zeros, or the sign.
template <typename T, typename A, typename B>
T shl(A a, B bits) {
  return get<u32>(bits) < sizeof(T) * 8 ? static_cast<T>(get<T>(a) << get<u32>(bits)) : T{0};
}
template <typename T, typename A, typename B>
T shr(A a, B bits) {
  const u32 count = get<u32>(bits);
  constexpr u32 kWidth = sizeof(T) * 8;
  if (count < kWidth) return static_cast<T>(get<T>(a) >> count);
  return std::is_signed_v<T> && get<T>(a) < 0 ? static_cast<T>(-1) : T{0};
}

// --- comparisons. With a NaN those that end in u are true, the others (except ne) false.

#define FASTNN_PTX_COMPARISON(name, expression) \
  template <typename T, typename A, typename B> \
  pred setp_##name(A a_bits, B b_bits) {        \
    const T a = get<T>(a_bits);                 \
    const T b = get<T>(b_bits);                 \
    return expression;                          \
  }
FASTNN_PTX_COMPARISON(eq, a == b)
FASTNN_PTX_COMPARISON(lt, a < b)
FASTNN_PTX_COMPARISON(le, a <= b)
FASTNN_PTX_COMPARISON(gt, a > b)
FASTNN_PTX_COMPARISON(ge, a >= b)
FASTNN_PTX_COMPARISON(ltu, !(a >= b))
FASTNN_PTX_COMPARISON(neu, !(a == b))
FASTNN_PTX_COMPARISON(gtu, !(a <= b))
FASTNN_PTX_COMPARISON(geu, !(a < b))
#undef FASTNN_PTX_COMPARISON

template <typename T, typename A, typename B>
pred setp_ne(A a, B b) {
  static_assert(std::is_integral_v<T>);
  return get<T>(a) != get<T>(b);
}

// --- conversions

template <typename To, typename From, typename A>
To cvt(A a) {
  static_assert(sizeof(To) > sizeof(From) || std::is_integral_v<To>, "a rounding is missing");
  static_assert(std::is_integral_v<To> == std::is_integral_v<From>);
  return static_cast<To>(get<From>(a));
}
template <typename To, typename From, typename A>
To cvt_rn(A a) {
  static_assert(!std::is_integral_v<To>);
  if constexpr (std::is_same_v<From, bf16> || std::is_same_v<From, f16>) {
    return static_cast<To>(static_cast<f32>(get<From>(a)));
  } else {
    return static_cast<To>(get<From>(a));
  }
}
template <typename To, typename From, typename A>
To cvt_rni(A a) {
  static_assert(std::is_same_v<To, f32> && std::is_same_v<From, f32>);
  return std::nearbyint(get<f32>(a));  // the even one of two
}
template <typename To, typename From, typename A>
To cvt_sat(A a) {
  static_assert(std::is_same_v<To, f32> && std::is_same_v<From, f32>);
  const f32 value = get<f32>(a);
  return value > 0 ? std::min(value, 1.f) : 0.f;  // 0 for NaN
}

// --- memory

// Each access is checked: it must lie in one variable, at a multiple of its size.
class Memory {
 public:
  Memory(std::span<const Parameter> parameters, std::span<const SharedVariable> shared)
      : parameters_(parameters), shared_(shared) {
  }

  template <typename T, typename... Registers>
  void ld_global(const Site& site, u64 address, Registers&... registers) const {
    load<T>(global(address, sizeof(T) * sizeof...(Registers), site), registers...);
  }
  template <typename T, typename... Registers>
  void st_global(const Site& site, u64 address, Registers... registers) const {
    store<T>(global(address, sizeof(T) * sizeof...(Registers), site), registers...);
  }
  template <typename T, typename... Registers>
  void ld_shared(const Site& site, u64 address, Registers&... registers) const {
    load<T>(shared(address, sizeof(T) * sizeof...(Registers), site), registers...);
  }
  template <typename T, typename... Registers>
  void st_shared(const Site& site, u64 address, Registers... registers) const {
    store<T>(shared(address, sizeof(T) * sizeof...(Registers), site), registers...);
  }
  template <typename T, typename... Registers>
  void ld_param(const Site& site, u64 address, Registers&... registers) const {
    load<T>(parameter(address, sizeof(T) * sizeof...(Registers), site), registers...);
  }

 private:
  static void* global(u64 address, size_t bytes, const Site& site);
  void* shared(u64 address, size_t bytes, const Site& site) const;
  const void* parameter(u64 address, size_t bytes, const Site& site) const;

  template <typename T, typename... Registers>
  static void load(const void* from, Registers&... registers) {
    T values[sizeof...(Registers)];
    std::memcpy(values, from, sizeof(values));
    const T* next = values;
    (set(registers, *next++), ...);
  }
  template <typename T, typename... Registers>
  static void store(void* to, Registers... registers) {
    const T values[] = {get<T>(registers)...};
    std::memcpy(to, values, sizeof(values));
  }

  const std::span<const Parameter> parameters_;
  const std::span<const SharedVariable> shared_;
};

// --- threads

inline void bar_sync(const Site& site, s64 barrier) {
  if (barrier != 0) fail("a barrier other than 0", site);
  meet_block("bar.sync", false, site);
}

// `c` encodes the warp's segments and the last lane of one. `source` gives the lane to take the
// value from; past the last lane, the thread keeps its own.
template <typename T, typename Register, typename A, typename B, typename C, typename Mask>
void shuffle(const char* function, int (*source)(int lane, int b, int segments), const Site& site,
             Register& result, pred& inside, A a, B b, C c, Mask mask) {
  const int lane = lane_id();
  const int segments = get<u32>(c) >> 8 & 31;
  const int last = (lane & segments) | (get<u32>(c) & 31 & ~segments);
  const int from = source(lane, get<u32>(b) & 31, segments);
  inside = from <= last;
  const u64 bits = exchange(function, get<u32>(mask), get<T>(a), inside ? from : lane, site);
  set(result, static_cast<T>(bits));
}
template <typename T, typename... Operands>
void shfl_sync_bfly(const Site& site, Operands&&... operands) {
  constexpr auto kSource = [](int lane, int b, int) { return lane ^ b; };
  shuffle<T>("shfl.sync.bfly", kSource, site, operands...);
}
template <typename T, typename... Operands>
void shfl_sync_idx(const Site& site, Operands&&... operands) {
  constexpr auto kSource = [](int lane, int b, int segments) {
    return (lane & segments) | (b & ~segments);
  };
  shuffle<T>("shfl.sync.idx", kSource, site, operands...);
}

[[noreturn]] inline void assertion_failed(const Site& site, u64 message) {
  fail(std::string("device-side assert triggered: ") + reinterpret_cast<const char*>(message),
       site);
}

}  // namespace fastnn::cuda_emulation::ptx
