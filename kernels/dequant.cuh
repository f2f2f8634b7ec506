// A lane's codes of a unit as operands of matrix instructions: fp16 subnormals of uniform codes, points of the cubic
// alphabets. docs/page-format.md and unit.cuh say how codes lie. All but the loads from shared memory also compiles for
// the host, where it is compared with the codec's alphabets (csrc/bridge/tests/dequant.rs).
#pragma once

#include "attend_shape.cuh"
#include "half.cuh"

#ifdef __CUDACC__
#include "instructions.cuh"
#else
#define KAKEYA_D inline
#endif

namespace kakeya {

// Bit at which a unit's codes of class c stand in uniform mode. With 16-channel units classes c and c + 2 are the same
// channels, so they must agree.
KAKEYA_HD constexpr int code_bit(int width, int c, bool narrow) {
  if (narrow) c %= 2;
  if (width == 1) return c;
  if (width == 2) return 2 * c;
  if (width == 3) return c == 2 ? 6 : c == 3 ? 0 : 3 * c;
  if (width == 4) return 4 * (c % 2);
  if (width == 5) return c == 1 ? 5 : 0;
  return 0;
}

#ifdef __CUDACC__
// A lane's words of a unit in shared memory.
template <int W>
KAKEYA_D LaneWords lane_words(uint32_t unit, int lane) {
  LaneWords w = {0, 0, 0};
  constexpr int first = first_words<W>();
  if constexpr (first == 1) w.a = lds_u32(unit + 4 * lane);
  if constexpr (first == 2) {
    const uint2 x = lds_u64(unit + 8 * lane);
    w.a = x.x;
    w.b = x.y;
  }
  if constexpr (W % 2 == 1) w.c = spread_bytes(lds_u16(unit + 128 * first + 2 * lane));
  if constexpr (W == 6) w.c = lds_u32(unit + 256 + 4 * lane);
  return w;
}
#endif

// Code pair (M, C) at bit code_bit(W, C, NARROW) of both halves.
template <int W, int M, int C, bool NARROW>
KAKEYA_D uint32_t code_field(const LaneWords &w) {
  constexpr uint32_t mask = ((1u << W) - 1u) * 0x00010001u;
  constexpr int bit = code_bit(W, C, NARROW);
  if constexpr (W == 1) return w.c >> (4 * M + C - bit) & mask << bit;
  if constexpr (NARROW && W == 2 && C >= 2) return w.a >> (8 * M + 4) & mask << bit;
  if constexpr (NARROW && W == 3 && C == 2) {
    if constexpr (M == 0) return w.a >> 6 & mask;
    return (w.a >> 13 & 0x00040004u) | (w.c >> 6 & 0x00030003u);
  }
  if constexpr (NARROW && W == 3 && C == 3) return (M == 0 ? w.c << 3 : w.c) & mask << bit;
  if constexpr (NARROW && W == 5 && C == 3) {
    const uint32_t x = M ? w.b : w.a;
    return (x >> 6 & 0x02000200u) | ((M == 0 ? w.c << 5 : w.c << 1) & 0x01e001e0u);
  }
  if constexpr (NARROW && W == 5 && C == 2) return (M ? w.b : w.a) >> 10 & mask;
  return field<W, M, C>(w);
}

// Where a chain's path bits before a unit are: in the unit before, `back` bytes before the unit's own; `mask` is zero
// where there is none, else all ones. Units' widths never rise along a chain (crates/codec/src/widths.rs), so only
// units of width 1 come after units of width 1, whose path words are shorter: `one`.
struct UnitPast {
  uint32_t back, mask;
  bool one;
};

// What a lane reads of a unit. Trellis, widths from 2 on: `path` has a code's path bit and its refinement's top bit,
// `w` the rest of the refinement. Width 1: `path` is the path alone. `past`: the three path bits before the unit, at
// bits 27, 29 and 31, or anything where UnitPast::mask is zero.
struct UnitWords {
  LaneWords w;
  uint32_t path, past;
};

// The codes of a lane's unit as half2 registers f[class][m]. Uniform: fp16 subnormals code * 2^(bit - 24). Others:
// points U (U^2 + gamma), U = 4 y; gamma and the factor that is missing, which is part of the channel's scale, come
// from crates/codec/src/fragments.rs.
template <int Q, int W, bool NARROW>
struct Dequant {
#ifdef __CUDACC__
  // `unit`: shared address.
  static KAKEYA_D UnitWords load(uint32_t unit, const UnitPast &past, int lane) {
    UnitWords x;
    x.w = {0, 0, 0};
    x.path = x.past = 0;
    if constexpr (Q == kTrellis) {
      if constexpr (W == 1) {
        if (past.one)
          x.past = spread_path_end(lds_u16(unit - past.back + 2 * lane));
        else
          x.past = lds_u32(unit - past.back + 4 * lane);
        x.path = lds_u16(unit + 2 * lane);
      } else {
        x.past = lds_u32(unit - past.back + 4 * lane);
        x.path = lds_u32(unit + 4 * lane);
        // Width 3 keeps one more bit a code; its byte h comes twice into half h.
        if constexpr (W == 3) x.w.c = __byte_perm(lds_u16(unit + 128 + 2 * lane), 0, 0x1100);
        if constexpr (W > 3) x.w = lane_words<(W > 3 ? W - 2 : 1)>(unit + 128, lane);
      }
    } else {
      x.w = lane_words<W>(unit, lane);
    }
    return x;
  }
#endif

  // `gamma`: half2 constant of the width's alphabet. `magic`: 0x64006400 in a register, of which the compiler knows
  // nothing; two constants would make two instructions of one.
  static KAKEYA_D void run(uint32_t (&f)[4][2], const UnitWords &x, uint32_t past_mask, uint32_t gamma,
                           uint32_t magic) {
    const LaneWords &w = x.w;
    const uint32_t past = x.past & past_mask;
    if constexpr (Q == kUniform) {
      f[0][0] = code_field<W, 0, 0, NARROW>(w);
      f[0][1] = code_field<W, 1, 0, NARROW>(w);
      f[1][0] = code_field<W, 0, 1, NARROW>(w);
      f[1][1] = code_field<W, 1, 1, NARROW>(w);
      f[2][0] = code_field<W, 0, 2, NARROW>(w);
      f[2][1] = code_field<W, 1, 2, NARROW>(w);
      f[3][0] = code_field<W, 0, 3, NARROW>(w);
      f[3][1] = code_field<W, 1, 3, NARROW>(w);
    } else if constexpr (Q == kCubic) {
      cubic<0, 0>(f, w, gamma, magic);
      cubic<0, 1>(f, w, gamma, magic);
      cubic<1, 0>(f, w, gamma, magic);
      cubic<1, 1>(f, w, gamma, magic);
      cubic<2, 0>(f, w, gamma, magic);
      cubic<2, 1>(f, w, gamma, magic);
      cubic<3, 0>(f, w, gamma, magic);
      cubic<3, 1>(f, w, gamma, magic);
    } else if constexpr (W == 1) {
      const uint32_t z = trellis_pairs(spread_path(x.path), past);
      one_bit<0, 0>(f, z, gamma, magic);
      one_bit<0, 1>(f, z, gamma, magic);
      one_bit<1, 0>(f, z, gamma, magic);
      one_bit<1, 1>(f, z, gamma, magic);
      one_bit<2, 0>(f, z, gamma, magic);
      one_bit<2, 1>(f, z, gamma, magic);
      one_bit<3, 0>(f, z, gamma, magic);
      one_bit<3, 1>(f, z, gamma, magic);
    } else {
      const uint32_t p = x.path;
      const uint32_t z = trellis_pairs(p, past);
      if constexpr (W <= 4) {
        // Symbols of even and of odd codes, four bits apart; the fifth bit of width 4 stays where it is.
        uint32_t even, odd;
        if constexpr (W == 2) {
          even = choose<0x33333333u>(z, p << 2);
          odd = choose<0x33333333u>(z >> 2, p);
        } else if constexpr (W == 3) {
          const uint32_t low = choose<0x00ff00ffu>(w.c, w.c << 2);
          even = choose<0x88888888u>(p << 3, choose<0x44444444u>(low >> 1, z));
          odd = choose<0x88888888u>(p << 1, choose<0x44444444u>(low, z >> 2));
        } else {
          even = choose<0x33333333u>(z, w.a << 2);
          odd = choose<0x33333333u>(z >> 2, w.a);
        }
        nibbles<0>(f, even, p, gamma, magic);
        nibbles<1>(f, odd, p, gamma, magic);
      } else {
        wide<0, 0>(f, w, z, p, gamma, magic);
        wide<0, 1>(f, w, z, p, gamma, magic);
        wide<1, 0>(f, w, z, p, gamma, magic);
        wide<1, 1>(f, w, z, p, gamma, magic);
        wide<2, 0>(f, w, z, p, gamma, magic);
        wide<2, 1>(f, w, z, p, gamma, magic);
        wide<3, 0>(f, w, z, p, gamma, magic);
        wide<3, 1>(f, w, z, p, gamma, magic);
      }
    }
  }

  // Symbol m of S bits, standing at bit BIT of the mantissa of halves that begin at 1024, to its point. U = 4 y =
  // (2 m + 1) 2^(2-S) - 4 is exact in fp16. From bit 1 on one product gets there; at bit 0 the constant would need 12
  // bits, so 1024 goes first.
  template <int S, int BIT>
  static KAKEYA_D uint32_t point(uint32_t h, uint32_t gamma) {
    uint32_t u;
    if constexpr (BIT > 0) {
      constexpr int offset = -((1 << (11 - BIT)) + (1 << S) - 1);
      u = half_fma(h, both(half_constant(1, 3 - S - BIT)), both(half_constant(offset, 2 - S)));
    } else {
      const uint32_t m = half_add(h, both(half_constant(-1024, 0)));
      u = half_fma(m, both(half_constant(1, 3 - S)), both(half_constant(1 - (1 << S), 2 - S)));
    }
    return half_mul(u, half_fma(u, u, gamma));
  }
  template <int C, int M>
  static KAKEYA_D void cubic(uint32_t (&f)[4][2], const LaneWords &w, uint32_t gamma, uint32_t magic) {
    f[C][M] = point<W, field_bit<W, M, C>()>(field<W, M, C>(w) | magic, gamma);
  }
  template <int SHIFT>
  static KAKEYA_D uint32_t shifted(uint32_t x) {
    if constexpr (SHIFT > 0) return x << SHIFT;
    if constexpr (SHIFT < 0) return x >> -SHIFT;
    return x;
  }
  template <int C, int M>
  static KAKEYA_D void one_bit(uint32_t (&f)[4][2], uint32_t z, uint32_t gamma, uint32_t magic) {
    f[C][M] = point<2, 1>(masked_or<0x00060006u>(shifted<1 - 2 * (4 * M + C)>(z), magic), gamma);
  }
  // The four codes of a parity: symbols of W + 1 bits, of which four (three at width 2) stand in `x`; the top bit of
  // width 4 is in the path's words `p`. Symbols go where one shift brings two of them, never to bit 0.
  template <int ODD>
  static KAKEYA_D void nibbles(uint32_t (&f)[4][2], uint32_t x, uint32_t p, uint32_t gamma, uint32_t magic) {
    nibble<ODD, 0, 1>(f, x << 1, shifted<5 - 2 * ODD>(p), gamma, magic);
    nibble<2 + ODD, 0, 4>(f, x, shifted<4 - 2 * ODD>(p), gamma, magic);
    nibble<ODD, 1, 1>(f, x >> 7, shifted<-3 - 2 * ODD>(p), gamma, magic);
    nibble<2 + ODD, 1, 5>(f, x >> 7, shifted<-3 - 2 * ODD>(p), gamma, magic);
  }
  template <int C, int M, int BIT>
  static KAKEYA_D void nibble(uint32_t (&f)[4][2], uint32_t x, uint32_t top, uint32_t gamma, uint32_t magic) {
    uint32_t h = masked_or<both((W == 2 ? 7u : 15u) << BIT)>(x, magic);
    if constexpr (W == 4) h = masked_or<both(16u << BIT)>(top, h);
    f[C][M] = point<W + 1, BIT>(h, gamma);
  }
  // Widths 5 and 6: three pieces a symbol, from bit 1 on.
  template <int C, int M>
  static KAKEYA_D void wide(uint32_t (&f)[4][2], const LaneWords &w, uint32_t z, uint32_t p, uint32_t gamma,
                            uint32_t magic) {
    constexpr int V = W > 4 ? W - 2 : 3, k = 4 * M + C, stands = field_bit<V, M, C>();
    uint32_t h = magic | shifted<3 - stands>(field<V, M, C>(w));
    h = masked_or<0x00060006u>(shifted<1 - 2 * k>(z), h);
    h = masked_or<both(1u << (W + 1))>(shifted<W + 1 - 2 * k>(p), h);
    f[C][M] = point<W + 1, 1>(h, gamma);
  }
};

}  // namespace kakeya
