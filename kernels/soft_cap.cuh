// A soft cap of scores: s becomes cap * tanh(s / cap).
#pragma once

#include "half.cuh"

namespace kakeya {

// tanh, off by 2e-6 of itself at most: near zero from its series, so that a score far below the cap stays what it is;
// beyond as 1 - 2 / (e^2x + 1), which is exact at both ends, also where e^2x is infinite.
KAKEYA_HD float tanh_fast(float x) {
  constexpr float kNear = 0.125f, kTwoLog2e = 2.8853900817779268f;
  const float square = x * x;
  const float near = x * fmaf(square, fmaf(square, 2.0f / 15.0f, -1.0f / 3.0f), 1.0f);
  float power, inverse;
#ifdef __CUDA_ARCH__
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * kTwoLog2e));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(power + 1.0f));
#else
  power = exp2f(x * kTwoLog2e);
  inverse = 1.0f / (power + 1.0f);
#endif
  return fabsf(x) < kNear ? near : fmaf(-2.0f, inverse, 1.0f);
}

}  // namespace kakeya
