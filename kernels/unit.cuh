// A lane's codes of a unit: load, unpack, pack, and the trellis. Device functions without state, which also compile for
// the host (define nothing, include this file from C++17 or later): Rust tests compare them there with the codec, over
// every code.
//
// A unit is 512 codes of one width, 32 lanes x 16 codes; docs/page-format.md and crates/codec/src/unit.rs have the
// tables. Code (m, c) of half h: m in 0..1, c in 0..3, h in 0..1, position in the lane n = 8h + 4m + c. Both halves of
// a pair lie in one 32-bit word at the same bit, 16 apart, so a pair costs one AND: the result is two fp16 subnormals
// code * 2^(bit - 24), which the matrix instructions take exactly. `field` returns such a pair with the bit still in
// it; `field_bit` tells it.
#pragma once

#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define KAKEYA_HD __host__ __device__ __forceinline__
#define KAKEYA_UNROLL _Pragma("unroll")
#define KAKEYA_UNROLL_4 _Pragma("unroll 4")
#define KAKEYA_ROLLED _Pragma("unroll 1")
#else
#define KAKEYA_HD inline
#define KAKEYA_UNROLL
#define KAKEYA_UNROLL_4
#define KAKEYA_ROLLED
#endif

namespace kakeya {

constexpr int kLanes = 32;
constexpr int kCodes = 16;

// Bytes of a unit whose codes have `width` bits.
KAKEYA_HD constexpr int unit_bytes(int width) {
  return 64 * width;
}

// A lane's words: up to two of the first column, one of the second. The second column's word of widths 1, 3 and 5 is 16
// bits wide; its byte h belongs to half h, and load_lane has moved byte 1 to bit 16 already.
struct LaneWords {
  uint32_t a, b, c;
};

// Byte h of a 16-bit word to bits 16h: one PRMT on the device.
KAKEYA_HD uint32_t spread_bytes(uint32_t x) {
#ifdef __CUDA_ARCH__
  return __byte_perm(x, 0, 0x4140);
#else
  return (x & 0xffu) | (x & 0xff00u) << 8;
#endif
}

// Inverse of spread_bytes.
KAKEYA_HD uint32_t gather_bytes(uint32_t x) {
#ifdef __CUDA_ARCH__
  return __byte_perm(x, 0, 0x4420);
#else
  return (x & 0xffu) | (x >> 8 & 0xff00u);
#endif
}

KAKEYA_HD uint32_t load_u32(const uint8_t *p) {
#ifdef __CUDA_ARCH__
  return *reinterpret_cast<const uint32_t *>(p);
#else
  uint32_t x;
  memcpy(&x, p, 4);
  return x;
#endif
}

KAKEYA_HD uint32_t load_u16(const uint8_t *p) {
#ifdef __CUDA_ARCH__
  return *reinterpret_cast<const uint16_t *>(p);
#else
  uint16_t x;
  memcpy(&x, p, 2);
  return x;
#endif
}

KAKEYA_HD void store_u32(uint8_t *p, uint32_t x) {
#ifdef __CUDA_ARCH__
  *reinterpret_cast<uint32_t *>(p) = x;
#else
  memcpy(p, &x, 4);
#endif
}

KAKEYA_HD void store_u16(uint8_t *p, uint32_t x) {
  const uint16_t y = static_cast<uint16_t>(x);
#ifdef __CUDA_ARCH__
  *reinterpret_cast<uint16_t *>(p) = y;
#else
  memcpy(p, &y, 2);
#endif
}

// Words of the first column of a lane.
template <int W>
KAKEYA_HD constexpr int first_words() {
  return W == 1 ? 0 : W <= 3 ? 1 : 2;
}

template <int W>
KAKEYA_HD LaneWords load_lane(const uint8_t *unit, int lane) {
  static_assert(W >= 1 && W <= 6, "widths are 1..6");
  LaneWords w = {0, 0, 0};
  constexpr int first = first_words<W>();
  if constexpr (first >= 1) w.a = load_u32(unit + 4 * first * lane);
  if constexpr (first == 2) w.b = load_u32(unit + 8 * lane + 4);
  const uint8_t *second = unit + 128 * first;
  if constexpr (W % 2 == 1) w.c = spread_bytes(load_u16(second + 2 * lane));
  if constexpr (W == 6) w.c = load_u32(second + 4 * lane);
  return w;
}

template <int W>
KAKEYA_HD void store_lane(uint8_t *unit, int lane, const LaneWords &w) {
  constexpr int first = first_words<W>();
  if constexpr (first >= 1) store_u32(unit + 4 * first * lane, w.a);
  if constexpr (first == 2) store_u32(unit + 8 * lane + 4, w.b);
  uint8_t *second = unit + 128 * first;
  if constexpr (W % 2 == 1) store_u16(second + 2 * lane, gather_bytes(w.c));
  if constexpr (W == 6) store_u32(second + 4 * lane, w.c);
}

// Bit at which field<W, M, C> leaves the code, in each half.
template <int W, int M, int C>
KAKEYA_HD constexpr int field_bit() {
  if (W == 1) return 4 * M + C;
  if (W == 2) return 2 * C;
  if (W == 3) return C == 2 ? 6 : C == 3 ? 0 : 3 * C;
  if (W == 4) return 4 * (C % 2);
  if (W == 5) return C == 1 ? 5 : 0;
  return 0;
}

// Code (M, C) of both halves: value << field_bit in bits 0..15 (h = 0) and 16..31 (h = 1), all other bits zero.
template <int W, int M, int C>
KAKEYA_HD uint32_t field(const LaneWords &w) {
  constexpr uint32_t mask = ((1u << W) - 1u) * 0x00010001u;
  constexpr int bit = field_bit<W, M, C>();
  if constexpr (W == 1) {
    return w.c & mask << bit;
  } else if constexpr (W == 2) {
    return w.a >> 8 * M & mask << bit;
  } else if constexpr (W == 3) {
    if constexpr (C == 3) return w.c >> 3 * M & mask;
    if constexpr (C == 2 && M == 1) return (w.a >> 7 & 0x01000100u) | (w.c & 0x00c000c0u);
    return w.a >> (M ? 9 : 0) & mask << bit;
  } else if constexpr (W == 4) {
    return (C < 2 ? w.a : w.b) >> 8 * M & mask << bit;
  } else if constexpr (W == 5) {
    const uint32_t x = M ? w.b : w.a;
    if constexpr (C == 3) return (x >> 11 & 0x00100010u) | (w.c >> 4 * M & 0x000f000fu);
    if constexpr (C == 2) return x >> 10 & mask;
    return x & mask << bit;
  } else {
    const uint32_t x = M ? w.b : w.a;
    if constexpr (C == 3) return (x >> 10 & 0x003c003cu) | (w.c >> (12 + 2 * M) & 0x00030003u);
    if constexpr (C == 2) return w.c >> 6 * M & mask;
    return x >> 6 * C & mask;
  }
}

// Puts code pair (M, C) into a lane's words, which begin as zero. `pair`: code of half h in bits 16h.
template <int W, int M, int C>
KAKEYA_HD void put(LaneWords &w, uint32_t pair) {
  constexpr int bit = field_bit<W, M, C>();
  if constexpr (W == 1) {
    w.c |= pair << bit;
  } else if constexpr (W == 2) {
    w.a |= pair << (8 * M + bit);
  } else if constexpr (W == 3) {
    if constexpr (C == 3) {
      w.c |= pair << 3 * M;
    } else if constexpr (C == 2 && M == 1) {
      w.a |= (pair & 0x00040004u) << 13;
      w.c |= (pair & 0x00030003u) << 6;
    } else {
      w.a |= pair << ((M ? 9 : 0) + bit);
    }
  } else if constexpr (W == 4) {
    (C < 2 ? w.a : w.b) |= pair << (8 * M + bit);
  } else if constexpr (W == 5) {
    uint32_t &x = M ? w.b : w.a;
    if constexpr (C == 3) {
      x |= (pair & 0x00100010u) << 11;
      w.c |= (pair & 0x000f000fu) << 4 * M;
    } else {
      x |= pair << 5 * C;
    }
  } else {
    uint32_t &x = M ? w.b : w.a;
    if constexpr (C == 3) {
      x |= (pair & 0x003c003cu) << 10;
      w.c |= (pair & 0x00030003u) << (12 + 2 * M);
    } else if constexpr (C == 2) {
      w.c |= pair << 6 * M;
    } else {
      x |= pair << 6 * C;
    }
  }
}

// ---- trellis -------------------------------------------------------------------------------------------------------
// A lane's chain runs through its units; bit n + 3 of `window` is path bit u_n of this unit, bits 2..0 the last three
// of the unit before: u_(-1), u_(-2), u_(-3).

// `path`: the lane's 16 path bits as load_u16 reads them. `past`: 0 at the chain's start, then next_past of the unit
// before.
KAKEYA_HD uint32_t trellis_window(uint32_t path, uint32_t past) {
  return path << 3 | past;
}
KAKEYA_HD uint32_t trellis_next_past(uint32_t window) {
  return window >> 16 & 7u;
}

// Subset bits of all 16 codes at once, at bit n: z1 = u_n ^ u_(n-1) ^ u_(n-3), z0 = u_(n-2).
KAKEYA_HD uint32_t trellis_z1(uint32_t window) {
  return (window >> 3 ^ window >> 2 ^ window) & 0xffffu;
}
KAKEYA_HD uint32_t trellis_z0(uint32_t window) {
  return window >> 1 & 0xffffu;
}

// Symbols of pair (M, C): 4 * refinement + 2 * z1 + z0 in bits 0..15 and 16..31. `z1`, `z0` after spread_bytes;
// `refinement`: a pair with its codes at bit 0.
template <int M, int C>
KAKEYA_HD uint32_t trellis_symbols(uint32_t refinement, uint32_t z1, uint32_t z0) {
  constexpr int n = 4 * M + C;
  return refinement << 2 | (z1 >> n & 0x00010001u) << 1 | (z0 >> n & 0x00010001u);
}

}  // namespace kakeya
