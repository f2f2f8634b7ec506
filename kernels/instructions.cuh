// Instructions that C++ has no name for, and small helpers around them. Device code only; with KAKEYA_EMULATED
// tests/emulated writes them out in C++.
#pragma once

#include <cuda_bf16.h>
#include <stdint.h>

#define KAKEYA_D __device__ __forceinline__

#ifdef KAKEYA_EMULATED
#include "emulated_instructions.h"
#else

namespace kakeya {

KAKEYA_D uint32_t shared_address(const void *p) {
  return uint32_t(__cvta_generic_to_shared(p));
}
KAKEYA_D uint32_t lds_u8(uint32_t a) {
  uint32_t v;
  asm volatile("ld.shared.u8 %0, [%1];" : "=r"(v) : "r"(a));
  return v;
}
KAKEYA_D uint32_t lds_u16(uint32_t a) {
  uint16_t v;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(a));
  return v;
}
KAKEYA_D uint32_t lds_u32(uint32_t a) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(a));
  return v;
}
KAKEYA_D uint2 lds_u64(uint32_t a) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(a));
  return v;
}
KAKEYA_D uint4 lds_u128(uint32_t a) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(a));
  return v;
}
KAKEYA_D void sts_u8(uint32_t a, uint32_t x) {
  asm volatile("st.shared.u8 [%0], %1;" ::"r"(a), "r"(x) : "memory");
}
KAKEYA_D void sts_u16(uint32_t a, uint32_t x) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(a), "h"(uint16_t(x)) : "memory");
}
KAKEYA_D void sts_u32(uint32_t a, uint32_t x) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(a), "r"(x) : "memory");
}
KAKEYA_D void sts_u64(uint32_t a, uint32_t x, uint32_t y) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(a), "r"(x), "r"(y) : "memory");
}
KAKEYA_D void sts_f32x2(uint32_t a, float x, float y) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(a), "f"(x), "f"(y) : "memory");
}
KAKEYA_D void sts_f32x4(uint32_t a, float x, float y, float z, float w) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(a), "f"(x), "f"(y), "f"(z), "f"(w) : "memory");
}

KAKEYA_D void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
KAKEYA_D void mma_k8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(b0));
}
KAKEYA_D void mma_bf16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// Four 8x8 matrices of 16-bit elements, transposed: rows at the addresses that lanes 0..31 give.
KAKEYA_D void load_transposed(uint32_t (&r)[4], uint32_t a) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(a));
}
KAKEYA_D float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
KAKEYA_D uint32_t pack_bf16(float lo, float hi) {
  const __nv_bfloat162 h = __floats2bfloat162_rn(lo, hi);
  return *reinterpret_cast<const uint32_t *>(&h);
}
// The same value, of which the compiler knows nothing: it keeps it instead of computing it again and again.
KAKEYA_D uint32_t opaque(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}
// Lane of this thread; volatile, so that the compiler keeps it instead of computing it again and again.
KAKEYA_D int lane_index() {
  uint32_t x;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(x));
  return int(x);
}
// Adds to a counter; what this thread has seen is seen by whom the sum reaches. Returns what it was.
KAKEYA_D int add_acquire_release(int *counter, int x) {
  int before;
  asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(x) : "memory");
  return before;
}

// Transfers of a page to shared memory. From sm_90 on one instruction of one thread, completed by a barrier object;
// before that 16 bytes a thread and instruction.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define KAKEYA_BULK 1
#else
#define KAKEYA_BULK 0
#endif

#if KAKEYA_BULK
KAKEYA_D void barrier_init(uint32_t bar, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count));
}
// Transfers may use the barrier objects that this thread has made.
KAKEYA_D void barriers_made() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
KAKEYA_D void barrier_wait(uint32_t bar, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred p;\nAGAIN:\n"
      "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%0], %1;\n"
      "@p bra DONE;\nbra AGAIN;\nDONE:\n}" ::"r"(bar),
      "r"(parity)
      : "memory");
}
KAKEYA_D void barrier_expect(uint32_t bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
// The source is read once and should not push other data out of L2.
KAKEYA_D void bulk_load(uint32_t dst, const void *src, uint32_t bytes, uint32_t bar) {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
          "r"(dst),
      "l"(src), "r"(bytes), "r"(bar), "l"(policy)
      : "memory");
}
#else
KAKEYA_D void copy16_async(uint32_t dst, const void *src) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(dst), "l"(src) : "memory");
}
// Copies since the last call are a group.
KAKEYA_D void end_copy_group() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits for this thread's groups but the last one.
KAKEYA_D void await_copies_but_last_group() {
  asm volatile("cp.async.wait_group 1;" ::: "memory");
}
#endif

}  // namespace kakeya

#endif  // KAKEYA_EMULATED

namespace kakeya {

KAKEYA_D float lds_f32(uint32_t a) {
  return __uint_as_float(lds_u32(a));
}
KAKEYA_D void sts_f32(uint32_t a, float x) {
  sts_u32(a, __float_as_uint(x));
}

// N floats of a lane: 2, or a multiple of 4 at a multiple of 16 bytes.
template <int N>
KAKEYA_D void store_floats(uint32_t a, const float *x) {
  if constexpr (N == 2) {
    sts_f32x2(a, x[0], x[1]);
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 4) sts_f32x4(a + 4 * i, x[i], x[i + 1], x[i + 2], x[i + 3]);
  }
}
template <int N>
KAKEYA_D void add_floats(uint32_t a, float *x) {
  if constexpr (N == 2) {
    const uint2 v = lds_u64(a);
    x[0] += __uint_as_float(v.x), x[1] += __uint_as_float(v.y);
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const uint4 v = lds_u128(a + 4 * i);
      x[i] += __uint_as_float(v.x), x[i + 1] += __uint_as_float(v.y);
      x[i + 2] += __uint_as_float(v.z), x[i + 3] += __uint_as_float(v.w);
    }
  }
}

// Product in the elements' own type.
KAKEYA_D void mma_element(bool f16, float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                          uint32_t b1) {
  if (f16) return mma(c, a0, a1, a2, a3, b0, b1);
  mma_bf16(c, a0, a1, a2, a3, b0, b1);
}
KAKEYA_D float clamp_half(float x) {
  return fminf(fmaxf(x, -kHalfMax), kHalfMax);
}
KAKEYA_D float power2(int e) {
  return __int_as_float((127 + e) << 23);
}

}  // namespace kakeya
