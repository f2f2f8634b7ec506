// kernels/instructions.cuh without a GPU: the same functions, in C++ and with emulation.h's warps. Layouts of operands
// are those of "Matrix Fragments for mma.m16n8k16", "mma.m16n8k8" and "ldmatrix" in the PTX ISA.
#pragma once

#include "emulation.h"

// Whether pages come by bulk copies, as from compute capability 9.0 on, or by cp.async: the build says.
#ifndef KAKEYA_BULK
#error "KAKEYA_BULK must be 0 or 1"
#endif

namespace kakeya {

inline uint32_t shared_address(const void *p) {
  return uint32_t(static_cast<const uint8_t *>(p) - emulated::dynamic_shared);
}
template <typename T>
T lds(uint32_t a) {
  T x;
  memcpy(&x, emulated::shared_at(a, sizeof x, sizeof x), sizeof x);
  return x;
}
template <typename T>
void sts(uint32_t a, const T &x) {
  memcpy(emulated::shared_at(a, sizeof x, sizeof x), &x, sizeof x);
}
inline uint32_t lds_u8(uint32_t a) {
  return lds<uint8_t>(a);
}
inline uint32_t lds_u16(uint32_t a) {
  return lds<uint16_t>(a);
}
inline uint32_t lds_u32(uint32_t a) {
  return lds<uint32_t>(a);
}
inline uint2 lds_u64(uint32_t a) {
  return lds<uint2>(a);
}
inline uint4 lds_u128(uint32_t a) {
  return lds<uint4>(a);
}
inline void sts_u8(uint32_t a, uint32_t x) {
  sts(a, uint8_t(x));
}
inline void sts_u16(uint32_t a, uint32_t x) {
  sts(a, uint16_t(x));
}
inline void sts_u32(uint32_t a, uint32_t x) {
  sts(a, x);
}
inline void sts_u64(uint32_t a, uint32_t x, uint32_t y) {
  sts(a, uint2{x, y});
}
inline void sts_f32x2(uint32_t a, float x, float y) {
  sts(a, float2{x, y});
}
inline void sts_f32x4(uint32_t a, float x, float y, float z, float w) {
  sts(a, float4{x, y, z, w});
}

// Registers of a lane. Lane 4 g + t has: of A (16 rows) pairs of columns 2 t and 2 t + 8 in rows g and g + 8, of B (8
// columns) pairs of rows 2 t and 2 t + 8 in column g, of C columns 2 t and 2 t + 1 in rows g and g + 8.
struct MmaLane {
  float c[4];
  uint16_t a[4][2], b[2][2];  // a: rows g and g + 8 of the first eight columns, then of the others
};

inline float bf16_value(uint16_t x) {
  return __uint_as_float(uint32_t(x) << 16);
}

template <int K, float (*VALUE)(uint16_t)>
void mma_of_warp(emulated::WarpSlots &slots) {
  double a[16][K], b[8][K];
  MmaLane x[32];
  for (int lane = 0; lane < 32; ++lane) {
    x[lane] = slots.get<MmaLane>(lane);
    const int g = lane / 4, t = lane % 4;
    for (int k8 = 0; k8 < K / 8; ++k8)
      for (int e = 0; e < 2; ++e) {
        const int k = 8 * k8 + 2 * t + e;
        a[g][k] = double(VALUE(x[lane].a[2 * k8][e]));
        a[g + 8][k] = double(VALUE(x[lane].a[2 * k8 + 1][e]));
        b[g][k] = double(VALUE(x[lane].b[k8][e]));
      }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const double *row = a[g + 8 * (i / 2)], *column = b[2 * t + i % 2];
      double sum = double(x[lane].c[i]);
      for (int k = 0; k < K; ++k) sum += row[k] * column[k];
      x[lane].c[i] = float(sum);
    }
    memcpy(slots.lane[lane], x[lane].c, sizeof x[lane].c);
  }
}

template <int K, float (*VALUE)(uint16_t)>
void mma_with(const char *operation, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  MmaLane mine;
  memcpy(mine.c, c, sizeof mine.c);
  memcpy(mine.a, a, sizeof mine.a);
  memcpy(mine.b, b, sizeof mine.b);
  const int lane = emulated::lane();
  memcpy(c, emulated::meet(operation, mine, mma_of_warp<K, VALUE>).lane[lane], sizeof c);
}

inline void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  mma_with<16, emulated::half_value>("mma.m16n8k16.f16", c, {a0, a1, a2, a3}, {b0, b1});
}
inline void mma_k8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
  mma_with<8, emulated::half_value>("mma.m16n8k8.f16", c, {a0, a1, 0, 0}, {b0, 0});
}
inline void mma_bf16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  mma_with<16, bf16_value>("mma.m16n8k16.bf16", c, {a0, a1, a2, a3}, {b0, b1});
}

// Lane 8 m + r gives the address of row r of matrix m; lane l takes elements 2 (l % 4) and the next one of column l / 4
// of each.
inline void load_matrices(emulated::WarpSlots &slots) {
  uint32_t rows[32];
  uint32_t r[32][4] = {};
  for (int lane = 0; lane < 32; ++lane) rows[lane] = slots.get<uint32_t>(lane);
  for (int lane = 0; lane < 32; ++lane)
    for (int m = 0; m < 4; ++m)
      for (int e = 0; e < 2; ++e) {
        const uint8_t *row = emulated::shared_at(rows[8 * m + 2 * (lane % 4) + e], 16, 16);
        uint16_t x;
        memcpy(&x, row + 2 * (lane / 4), 2);
        r[lane][m] |= uint32_t(x) << 16 * e;
      }
  for (int lane = 0; lane < 32; ++lane) memcpy(slots.lane[lane], r[lane], sizeof r[lane]);
}
inline void load_transposed(uint32_t (&r)[4], uint32_t a) {
  const int lane = emulated::lane();
  memcpy(r, emulated::meet("ldmatrix.x4.trans", a, load_matrices).lane[lane], sizeof r);
}

inline float exp2_fast(float x) {
  const float y = exp2f(x);
  return y < 1.17549435e-38f ? 0.0f : y;
}
inline uint32_t pack_bf16(float lo, float hi) {
  return emulated::bf16_bits(lo) | uint32_t(emulated::bf16_bits(hi)) << 16;
}
inline uint32_t opaque(uint32_t x) {
  return x;
}
inline int lane_index() {
  return emulated::lane();
}
inline int add_acquire_release(int *counter, int x) {
  ++emulated::atomics;
  const int before = *counter;
  *counter += x;
  return before;
}

#if KAKEYA_BULK
inline void barrier_init(uint32_t bar, int count) {
  emulated::barrier_init(bar, uint32_t(count));
}
inline void barriers_made() {}
inline void barrier_wait(uint32_t bar, uint32_t parity) {
  emulated::barrier_wait(bar, parity);
}
inline void barrier_arrive(uint32_t bar) {
  emulated::barrier_expect(bar, 0);
}
inline void barrier_expect(uint32_t bar, uint32_t bytes) {
  emulated::barrier_expect(bar, bytes);
}
inline void bulk_load(uint32_t dst, const void *src, uint32_t bytes, uint32_t bar) {
  emulated::bulk_copy(dst, src, bytes, bar);
}
#else
inline void copy16_async(uint32_t dst, const void *src) {
  emulated::copy_async(dst, src, 16);
}
inline void end_copy_group() {
  emulated::end_copy_group();
}
inline void await_copies_but_last_group() {
  emulated::await_copy_groups(1);
}
#endif

}  // namespace kakeya
