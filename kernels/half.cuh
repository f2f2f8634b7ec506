// Numbers by their bits: f32, fp16 and pairs of fp16, with the device's arithmetic on pairs. On the host the same comes
// from double, rounded once, to nearest even.
#pragma once

#include <math.h>

#include "unit.cuh"

#ifdef __CUDACC__
#include <cuda_fp16.h>
#endif

namespace kakeya {

KAKEYA_HD uint32_t float_bits(float x) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(x);
#else
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
#endif
}

KAKEYA_HD float bits_float(uint32_t u) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(u);
#else
  float x;
  memcpy(&x, &u, 4);
  return x;
#endif
}

#ifndef __CUDA_ARCH__
// Bits of the nearest half, even where two are; beyond all of them infinity.
inline uint16_t half_nearest(double x) {
  const uint32_t sign = signbit(x) ? 0x8000u : 0u;
  if (x != x) return uint16_t(sign | 0x7e00u);
  if (fabs(x) >= 65520.0) return uint16_t(sign | 0x7c00u);
  int exponent = x == 0.0 ? -24 : ilogb(x) - 10;
  if (exponent < -24) exponent = -24;
  // Whole steps of this exponent; 2048 of them are 1024 of the next.
  const uint32_t steps = uint32_t(nearbyint(ldexp(fabs(x), -exponent)));
  return uint16_t(sign | (uint32_t(exponent + 24) * 1024u + steps));
}
#endif

// f32 -> f16 bits, round to nearest even, overflow to infinity.
KAKEYA_HD uint16_t half_bits(float x) {
#ifdef __CUDA_ARCH__
  return __half_as_ushort(__float2half_rn(x));
#else
  return half_nearest(x);
#endif
}

KAKEYA_HD float half_value(uint16_t h) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(h));
#else
  const uint32_t sign = uint32_t(h & 0x8000u) << 16, e = h >> 10 & 31u, m = h & 1023u;
  if (e == 31u) return bits_float(sign | 0x7f800000u | m << 13);
  // Subnormals are m * 2^-24, exact in f32.
  if (e == 0u) return bits_float(sign | float_bits(float(m) * 5.9604644775390625e-8f));
  return bits_float(sign | (e + 112u) << 23 | m << 13);
#endif
}

// fp16 bits of m * 2^e, exact for what is asked here: m below 2^11, the result normal.
KAKEYA_HD constexpr uint32_t half_constant(int m, int e) {
  if (m == 0) return 0;
  const bool negative = m < 0;
  if (negative) m = -m;
  while (m >= 2048) m /= 2, ++e;
  while (m < 1024) m *= 2, --e;
  return uint32_t(negative ? 0x8000 : 0) | uint32_t(e + 25) << 10 | uint32_t(m - 1024);
}

// ---- pairs: the low half first -------------------------------------------------------------------------------------

KAKEYA_HD constexpr uint32_t both(uint32_t h) {
  return h | h << 16;
}
KAKEYA_HD float half_low(uint32_t x) {
  return half_value(uint16_t(x));
}
KAKEYA_HD float half_high(uint32_t x) {
  return half_value(uint16_t(x >> 16));
}
KAKEYA_HD uint32_t pack_half(float lo, float hi) {
#ifdef __CUDA_ARCH__
  const __half2 h = __floats2half2_rn(lo, hi);
  return *reinterpret_cast<const uint32_t *>(&h);
#else
  return half_bits(lo) | uint32_t(half_bits(hi)) << 16;
#endif
}

#ifndef __CUDA_ARCH__
// f of three numbers, half by half: exact in double wherever the kernels use it.
template <typename F>
uint32_t half_pairs(uint32_t a, uint32_t b, uint32_t c, F f) {
  return half_nearest(f(half_low(a), half_low(b), half_low(c))) |
         uint32_t(half_nearest(f(half_high(a), half_high(b), half_high(c)))) << 16;
}
#endif

KAKEYA_HD uint32_t half_add(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  uint32_t d;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
#else
  return half_pairs(a, b, 0, [](double x, double y, double) { return x + y; });
#endif
}
KAKEYA_HD uint32_t half_mul(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  uint32_t d;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
#else
  return half_pairs(a, b, 0, [](double x, double y, double) { return x * y; });
#endif
}
KAKEYA_HD uint32_t half_fma(uint32_t a, uint32_t b, uint32_t c) {
#ifdef __CUDA_ARCH__
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
#else
  return half_pairs(a, b, c, [](double x, double y, double z) { return x * y + z; });
#endif
}

}  // namespace kakeya
