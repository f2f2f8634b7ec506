// bf16 and f16, eight at a time: the engine's element types as f32 and back.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "unit.cuh"

namespace kakeya {

__device__ __forceinline__ float widen(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
__device__ __forceinline__ float widen(__half x) {
  return __half2float(x);
}
template <typename T>
__device__ __forceinline__ T narrow(float x);
template <>
__device__ __forceinline__ __nv_bfloat16 narrow(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half narrow(float x) {
  return __float2half_rn(x);
}

template <typename T>
struct alignas(16) Eight {
  T x[8];
};

// Eight neighbours; in one access where they lie at a multiple of 16.
template <typename T>
__device__ __forceinline__ Eight<T> load8(const T *p, bool aligned) {
  if (aligned) return *reinterpret_cast<const Eight<T> *>(p);
  Eight<T> r;
  KAKEYA_UNROLL
  for (int k = 0; k < 8; ++k) r.x[k] = p[k];
  return r;
}

template <typename T>
__device__ __forceinline__ void store8(T *p, const Eight<T> &x, bool aligned) {
  if (aligned) {
    *reinterpret_cast<Eight<T> *>(p) = x;
    return;
  }
  KAKEYA_UNROLL
  for (int k = 0; k < 8; ++k) p[k] = x.x[k];
}

// Whether one of eight is above 2^24 in magnitude, infinite or NaN, by their bits: halves end below 2^24.
template <typename T>
__device__ __forceinline__ bool refused8(const Eight<T> &x) {
  constexpr uint32_t largest = std::is_same_v<T, __half> ? 0x7bffu : 0x4b80u;
  uint4 words;
  memcpy(&words, &x, sizeof words);
  const uint32_t a = __vmaxu2(words.x & 0x7fff7fffu, words.y & 0x7fff7fffu);
  const uint32_t b = __vmaxu2(words.z & 0x7fff7fffu, words.w & 0x7fff7fffu);
  const uint32_t m = __vmaxu2(a, b);
  return (m & 0xffffu) > largest || m >> 16 > largest;
}

// Whether all rows of a strided tensor begin at multiples of 16 bytes.
__device__ __forceinline__ bool aligned_rows(const void *p, int64_t token_stride, int64_t head_stride) {
  return ((reinterpret_cast<uintptr_t>(p) | uintptr_t(2 * token_stride) | uintptr_t(2 * head_stride)) & 15u) == 0;
}

}  // namespace kakeya
