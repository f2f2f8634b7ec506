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
#define KAKEYA_UNROLL_2 _Pragma("unroll 2")
#define KAKEYA_UNROLL_4 _Pragma("unroll 4")
#define KAKEYA_ROLLED _Pragma("unroll 1")
#else
#define KAKEYA_HD inline
#define KAKEYA_UNROLL
#define KAKEYA_UNROLL_2
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

// `MASK` chooses from x, elsewhere from y. One LOP3: the compiler would take two, for it splits the mask and its
// complement.
template <uint32_t MASK>
KAKEYA_HD uint32_t choose(uint32_t x, uint32_t y) {
#ifdef __CUDA_ARCH__
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xe2;" : "=r"(d) : "r"(x), "n"(MASK), "r"(y));
  return d;
#else
  return (x & MASK) | (y & ~MASK);
#endif
}
// x & MASK | y, likewise.
template <uint32_t MASK>
KAKEYA_HD uint32_t masked_or(uint32_t x, uint32_t y) {
#ifdef __CUDA_ARCH__
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(x), "n"(MASK), "r"(y));
  return d;
#else
  return (x & MASK) | y;
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

// A lane's sixteen codes of a unit, a byte each.
struct CodeBytes {
  uint32_t quarter[4];

  KAKEYA_HD uint32_t operator()(int n) const { return quarter[n / 4] >> 8 * (n % 4) & 0xffu; }
  // Quarters are put in descending (ascending) order.
  KAKEYA_HD void push_front(uint32_t x) {
    quarter[3] = quarter[2];
    quarter[2] = quarter[1];
    quarter[1] = quarter[0];
    quarter[0] = x;
  }
  KAKEYA_HD void push_back(uint32_t x) {
    quarter[0] = quarter[1];
    quarter[1] = quarter[2];
    quarter[2] = quarter[3];
    quarter[3] = x;
  }
};

// Writes the 16 codes of a lane's unit.
template <int W>
KAKEYA_HD void store_codes(uint8_t *unit, int lane, const CodeBytes &codes) {
  LaneWords w = {0, 0, 0};
#define KAKEYA_PUT(M, C) put<W, M, C>(w, codes(4 * M + C) | codes(8 + 4 * M + C) << 16)
  KAKEYA_PUT(0, 0);
  KAKEYA_PUT(0, 1);
  KAKEYA_PUT(0, 2);
  KAKEYA_PUT(0, 3);
  KAKEYA_PUT(1, 0);
  KAKEYA_PUT(1, 1);
  KAKEYA_PUT(1, 2);
  KAKEYA_PUT(1, 3);
#undef KAKEYA_PUT
  store_lane<W>(unit, lane, w);
}

KAKEYA_HD void store_codes(int width, uint8_t *unit, int lane, const CodeBytes &codes) {
  switch (width) {
    case 1:
      return store_codes<1>(unit, lane, codes);
    case 2:
      return store_codes<2>(unit, lane, codes);
    case 3:
      return store_codes<3>(unit, lane, codes);
    case 4:
      return store_codes<4>(unit, lane, codes);
    case 5:
      return store_codes<5>(unit, lane, codes);
    default:
      return store_codes<6>(unit, lane, codes);
  }
}

// ---- the trellis' parities -----------------------------------------------------------------------------------------
// z1 = u_n ^ u_(n-1) ^ u_(n-3), z0 = u_(n-2), of all 16 codes of a lane's unit at once: of path bits one beside the
// other, and of path bits as the units hold them. A lane's chain runs through its units, so the last three path bits of
// the unit before count.

// Bit n + 3 of a window is path bit u_n, bits 2..0 are u_(-1), u_(-2), u_(-3). Parities at bit n.
KAKEYA_HD uint32_t trellis_window(uint32_t path, uint32_t past) {
  return path << 3 | past;
}
KAKEYA_HD uint32_t trellis_z1(uint32_t window) {
  return (window >> 3 ^ window >> 2 ^ window) & 0xffffu;
}
KAKEYA_HD uint32_t trellis_z0(uint32_t window) {
  return window >> 1 & 0xffffu;
}

// The high word of high:low << s, 0 < s < 32.
KAKEYA_HD uint32_t funnel_left(uint32_t low, uint32_t high, int s) {
#ifdef __CUDA_ARCH__
  return __funnelshift_l(low, high, s);
#else
  return high << s | low >> (32 - s);
#endif
}

// Parities of a unit from its lane's word (u_n at bit 2n + 1, anything at bit 2n) and that of the chain's unit before
// (only u_13..u_15 at bits 27, 29 and 31 matter; 0 at the chain's start): z1 at bit 2n + 1, z0 at bit 2n. So the pair
// of code k of both halves is `x >> 2k & 0x00030003`.
KAKEYA_HD uint32_t trellis_pairs(uint32_t word, uint32_t before) {
  const uint32_t z1 = word ^ funnel_left(before, word, 2) ^ funnel_left(before, word, 6);
  return choose<0xaaaaaaaau>(z1, funnel_left(before, word, 3));
}

// Such a word of a unit of width 1, whose 16 path bits lie one beside the other: bit n to bit 2n + 1.
KAKEYA_HD uint32_t spread_path(uint32_t path) {
  uint32_t x = path & 0xffffu;
  x = (x | x << 8) & 0x00ff00ffu;
  x = (x | x << 4) & 0x0f0f0f0fu;
  x = (x | x << 2) & 0x33333333u;
  return (x << 1 | x << 2) & 0xaaaaaaaau;
}

// Only what the chain's next unit needs of it: bits 13, 14, 15 to bits 27, 29, 31.
KAKEYA_HD uint32_t spread_path_end(uint32_t path) {
  return (path << 14 & 0x08000000u) | (path << 15 & 0x20000000u) | path >> 15 << 31;
}

// ---- units of the trellis ------------------------------------------------------------------------------------------
// Width 1: the path bits as a unit of width 1. Wider ones: codes 2 u + top in the layout of width 2, `top` the highest
// bit of the (W - 1)-bit refinement, then the refinement's other W - 2 bits in the layout of width W - 2; at W = 3 in
// an order of their own.

// Lowest refinement bits of a unit of width 3 from the lane's u16: bit of code k of half h at bit 16h + 2k + 3 for even
// k, at bit 16h + 2k for odd k.
KAKEYA_HD uint32_t spread_low(uint32_t x) {
#ifdef __CUDA_ARCH__
  x = __byte_perm(x, 0, 0x1100);
#else
  x = spread_bytes(x) * 0x0101u;
#endif
  return (x & 0x00ff00ffu) | (x << 2 & 0xff00ff00u);
}

struct TrellisWords {
  uint32_t word;  // u_n at bit 2n + 1, highest bit of the refinement at bit 2n (width 1: 0)
  LaneWords low;  // the refinement's other bits as load_lane reads them; at W = 3 `low.c` is what spread_low makes
};

// What a lane reads of a unit of width W.
template <int W>
KAKEYA_HD TrellisWords unpack_trellis(const uint8_t *unit, int lane) {
  static_assert(W >= 1 && W <= 6, "widths are 1..6");
  TrellisWords x = {0, {0, 0, 0}};
  if constexpr (W == 1) {
    x.word = spread_path(load_u16(unit + 2 * lane));
  } else {
    x.word = load_u32(unit + 4 * lane);
    if constexpr (W == 3) x.low.c = spread_low(load_u16(unit + unit_bytes(2) + 2 * lane));
    if constexpr (W >= 4) x.low = load_lane<W - 2>(unit + unit_bytes(2), lane);
  }
  return x;
}

// Refinements of pair (M, C), in bits 0..15 and 16..31.
template <int W, int M, int C>
KAKEYA_HD uint32_t trellis_refinements(const TrellisWords &x) {
  constexpr int k = 4 * M + C;
  if constexpr (W == 1) {
    return 0;
  } else {
    const uint32_t top = x.word >> 2 * k & 0x00010001u;
    if constexpr (W == 2) return top;
    if constexpr (W == 3) return top << 1 | (x.low.c >> (k % 2 ? 2 * k : 2 * k + 3) & 0x00010001u);
    if constexpr (W >= 4) return top << (W - 2) | field<W - 2, M, C>(x.low) >> field_bit<W - 2, M, C>();
  }
}

// Their symbols: 4 * refinement + 2 * z1 + z0. `pairs`: trellis_pairs of the unit.
template <int W, int M, int C>
KAKEYA_HD uint32_t trellis_symbols(const TrellisWords &x, uint32_t pairs) {
  return trellis_refinements<W, M, C>(x) << 2 | (pairs >> 2 * (4 * M + C) & 0x00030003u);
}

// Writes a lane's unit: path bit of code n at bit n of `path`, refinements as bytes.
KAKEYA_HD void pack_trellis(int width, uint8_t *unit, int lane, uint32_t path, const CodeBytes &refinement) {
  if (width == 1) return store_u16(unit + 2 * lane, path);
  // The products put one bit of each of four bytes beside each other into byte 3, without a carry: no two of the
  // sixteen partial products share a bit.
  uint32_t word = spread_path(path);
  KAKEYA_UNROLL
  for (int q = 0; q < 4; ++q)
    word |= (refinement.quarter[q] >> (width - 2) & 0x01010101u) * 0x01041040u >> 24 << 8 * q;  // to bits 0, 2, 4, 6
  store_u32(unit + 4 * lane, word);
  unit += unit_bytes(2);
  if (width == 2) return;
  if (width == 3) {
    uint32_t low = 0;
    KAKEYA_UNROLL
    for (int q = 0; q < 4; ++q) {
      const uint32_t bits = (refinement.quarter[q] & 0x01010101u) * 0x08048040u >> 24 & 0xccu;  // to bits 3, 2, 7, 6
      low |= bits >> (q % 2 ? 2 : 0) << 8 * (q / 2);
    }
    return store_u16(unit + 2 * lane, low);
  }
  const uint32_t mask = 0x01010101u * ((1u << (width - 2)) - 1u);
  CodeBytes low;
  KAKEYA_UNROLL
  for (int q = 0; q < 4; ++q) low.quarter[q] = refinement.quarter[q] & mask;
  switch (width) {
    case 4:
      return store_codes<2>(unit, lane, low);
    case 5:
      return store_codes<3>(unit, lane, low);
    default:
      return store_codes<4>(unit, lane, low);
  }
}

}  // namespace kakeya
