// CUDA's built-in vector types and dim3, with its sizes and alignments.
#pragma once

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {
  }
};

template <typename T>
struct alignas(2 * sizeof(T)) FastnnVector2 {
  T x, y;
};

// No wider than a load: 16 bytes.
template <typename T>
struct alignas(sizeof(T) < 8 ? 4 * sizeof(T) : 16) FastnnVector4 {
  T x, y, z, w;
};

using short2 = FastnnVector2<short>;
using ushort2 = FastnnVector2<unsigned short>;
using int2 = FastnnVector2<int>;
using uint2 = FastnnVector2<unsigned>;
using float2 = FastnnVector2<float>;
using double2 = FastnnVector2<double>;
using longlong2 = FastnnVector2<long long>;
using ulonglong2 = FastnnVector2<unsigned long long>;

using short4 = FastnnVector4<short>;
using ushort4 = FastnnVector4<unsigned short>;
using int4 = FastnnVector4<int>;
using uint4 = FastnnVector4<unsigned>;
using float4 = FastnnVector4<float>;

constexpr int2 make_int2(int x, int y) {
  return {x, y};
}
constexpr uint2 make_uint2(unsigned x, unsigned y) {
  return {x, y};
}
constexpr float2 make_float2(float x, float y) {
  return {x, y};
}
constexpr double2 make_double2(double x, double y) {
  return {x, y};
}
constexpr int4 make_int4(int x, int y, int z, int w) {
  return {x, y, z, w};
}
constexpr uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}
constexpr float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}
