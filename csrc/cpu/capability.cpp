#include "cpu/capability.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <string_view>

namespace fastnn::cpu {
namespace {

enum class Capability { Default, Avx2, Avx512 };
constexpr const char* kNames[] = {"default", "avx2", "avx512"};

// __builtin_cpu_supports also checks that the operating system saves the wide registers.
Capability available() {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512) return Capability::Avx512;
  if (avx2) return Capability::Avx2;
#endif
  return Capability::Default;
}

Capability requested() {
  const char* value = std::getenv("FASTNN_CPU_CAPABILITY");
  if (value == nullptr || *value == '\0') return Capability::Avx512;
  const auto name = std::find(std::begin(kNames), std::end(kNames), std::string_view(value));
  TORCH_CHECK_VALUE(name != std::end(kNames),
                    "FASTNN_CPU_CAPABILITY must be default, avx2 or avx512, got ", value);
  return Capability(name - std::begin(kNames));
}

Capability chosen() {
  static const Capability capability = std::min(available(), requested());
  return capability;
}

}  // namespace

const char* capability() {
  return kNames[int(chosen())];
}

bool multiplies_bfloat16() {
#if defined(__x86_64__)
  return chosen() == Capability::Avx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

bool library_has_our_vectors() {
#if defined(__x86_64__)
  return chosen() != Capability::Avx512 || __builtin_cpu_is("intel");
#else
  return true;
#endif
}

template <typename T>
const simd::Kernels<T>& kernels() {
  switch (chosen()) {
#if defined(__x86_64__)
    case Capability::Avx512:
      return simd::avx512::kernels<T>();
    case Capability::Avx2:
      return simd::avx2::kernels<T>();
#endif
    default:
      return simd::generic::kernels<T>();
  }
}

template const simd::Kernels<double>& kernels<double>();
template const simd::Kernels<float>& kernels<float>();
template const simd::Kernels<simd::bfloat16>& kernels<simd::bfloat16>();
template const simd::Kernels<simd::float16>& kernels<simd::float16>();

}  // namespace fastnn::cpu
