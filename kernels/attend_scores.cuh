// Scores of a page: codes, exact slots and the mean. Part of Attend, see attend.cuh.
#pragma once

#include "attend.cuh"

namespace kakeya {

// The scores of a pair of tiles as their owners want them, [tile][m][n][c]: both columns of a row added up.
template <int D, int Q, int ROWS, bool CAPPED>
KAKEYA_D void Attend<D, Q, ROWS, CAPPED>::fold(const float (&acc)[2][NB][4], float (&x)[2][2 * NB * NC]) {
#pragma unroll
  for (int tile = 0; tile < 2; ++tile)
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int n = 0; n < NB; ++n)
#pragma unroll
        for (int c = 0; c < NC; ++c)
          x[tile][(m * NB + n) * NC + c] =
              R::kSplit ? acc[tile][n][2 * m] + acc[tile][n][2 * m + 1] : acc[tile][n][2 * m + c];
}

// Leaves the partial scores of a pair of tiles with their owners, or adds them to `own`. Pairs come one after the
// other, `part` is the next owner's.
template <int D, int Q, int ROWS, bool CAPPED>
KAKEYA_D void Attend<D, Q, ROWS, CAPPED>::hand_over(int pair, const float (&acc)[2][NB][4], uint32_t &part,
                                                    float (&own)[kScores]) const {
  constexpr int N = 2 * NB * NC, owners = 2 / S::kWarpTiles;
  float x[2][N];
  fold(acc, x);
#pragma unroll
  for (int i = 0; i < owners; ++i) {
    if (owners * pair + i == warp) {
#pragma unroll
      for (int k = 0; k < kScores; ++k) own[k] += x[i + k / N][k % N];
      part += S::kWarps * M::kPartBytes;  // part numbers go down, and begin anew behind this warp
    } else {
      store_floats<kScores>(part, x[i]);
    }
    part += M::kOwnerBytes - M::kPartBytes;
  }
}

// The mean's part of this warp's tokens.
template <int D, int Q, int ROWS, bool CAPPED>
KAKEYA_D void Attend<D, Q, ROWS, CAPPED>::mean_scores(float (&own)[kScores]) const {
  float acc[2][NB][4];  // cosines, sines
#pragma unroll
  for (int n = 0; n < NB; ++n)
#pragma unroll
    for (int k = 0; k < 4; ++k) acc[0][n][k] = acc[1][n][k] = 0.0f;
#pragma unroll
  for (int n = 0; n < R::kMeanTiles; ++n)
#pragma unroll
    for (int s = 0; s < S::kPairSteps; ++s) {
      const uint4 b = lds_u128(shared + M::kMean + n * kTileBytes + s * 512 + lane * 16);
      const uint32_t (&c)[4] = table[s][0], (&d)[4] = table[s][1];
      mma(acc[0][n % NB], c[0], c[1], c[2], c[3], b.x, b.y);
      mma(acc[1][n % NB], d[0], d[1], d[2], d[3], b.z, b.w);
    }
  constexpr int N = 2 * NB * NC;
  float x[2][N];
  fold(acc, x);
#pragma unroll
  for (int k = 0; k < N; ++k) {
    if constexpr (S::kWarpTiles == 2)
      own[k] = x[0][k] + x[1][k], own[N + k] = x[0][k] - x[1][k];
    else
      own[k] = warp % 2 ? x[0][k] - x[1][k] : x[0][k] + x[1][k];
  }
}

// Partial scores of this warp's unit with width W; its own tokens' are added to `own`.
template <int D, int Q, int ROWS, bool CAPPED>
template <int W>
KAKEYA_D void Attend<D, Q, ROWS, CAPPED>::score_unit(uint32_t page, const uint32_t (&q)[NB][kRegs],
                                                     float (&own)[kScores]) const {
  float zero[NB][4];
#pragma unroll
  for (int n = 0; n < NB; ++n) {
    zero[n][0] = zero[n][1] = zero[n][2] = zero[n][3] = 0.0f;
    if constexpr (Q == kUniform) {
      // The codes' zero point, (2^W - 1) / 2 of each: the same for all tokens, and where all sums begin.
#pragma unroll
      for (int i = 0; i < S::kTiles; ++i) {
        constexpr int m = (1 << W) - 1;
        // Minus half of what stands for a code of ones, 2^20 times: -m / 2 * 2^(bit - 24) would be no normal number.
        const uint32_t z0 = both(half_constant(-m, code_bit(W, 2 * i, kNarrow) - 5));
        const uint32_t z1 = both(half_constant(-m, code_bit(W, 2 * i + 1, kNarrow) - 5));
        mma(zero[n], z0, z0, z1, z1, q[n][2 * i], q[n][2 * i + 1]);
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) zero[n][k] *= 1.0f / kScoreUnit;
    }
  }
  constexpr int kEach = kNarrow ? 1 : 2;  // groups of a pair of tiles
  uint32_t at = page + k_unit, part = my_part + first_part();
  const auto load = [&](UnitWords(&words)[kEach]) {
#pragma unroll
    for (int e = 0; e < kEach; ++e) words[e] = Dequant<Q, W, kNarrow>::load(at + e * k_stride, k_past, lane);
  };
  const auto products = [&](const UnitWords(&words)[kEach], float (&acc)[2][NB][4]) {
#pragma unroll
    for (int n = 0; n < NB; ++n)
#pragma unroll
      for (int k = 0; k < 4; ++k) acc[0][n][k] = acc[1][n][k] = zero[n][k];
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      uint32_t f[4][2];
      Dequant<Q, W, kNarrow>::run(f, words[e], k_past.mask, k_gamma, magic);
#pragma unroll
      for (int n = 0; n < NB; ++n) {
        if constexpr (kNarrow) {
          mma(acc[0][n], f[0][0], f[0][1], f[1][0], f[1][1], q[n][0], q[n][1]);
          mma(acc[1][n], f[2][0], f[2][1], f[3][0], f[3][1], q[n][0], q[n][1]);
        } else {
          mma(acc[e][n], f[0][0], f[0][1], f[1][0], f[1][1], q[n][0], q[n][1]);
          mma(acc[e][n], f[2][0], f[2][1], f[3][0], f[3][1], q[n][2], q[n][3]);
        }
      }
    }
  };
  float acc[2][NB][4];
  if constexpr (kUnroll > 1 && S::kWarpTiles == 2) {
    // From the own pair of tiles on: which is the own is then known when the kernel is compiled.
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int pair = (warp + i) & 3;
      at = page + k_unit + pair * kEach * k_stride;
      UnitWords words[kEach];
      load(words);
      products(words, acc);
      constexpr int N = 2 * NB * NC;
      float x[2][N];
      fold(acc, x);
      if (i == 0) {
#pragma unroll
        for (int k = 0; k < kScores; ++k) own[k] += x[k / N][k % N];
      } else {
        store_floats<kScores>(my_part + pair * M::kOwnerBytes + (3 - i) * M::kPartBytes, x[0]);
      }
    }
  } else {
    UnitWords next[kEach];
    load(next);
#pragma unroll 1
    for (int pair = 0, end = int(opaque(4)); pair < end; ++pair) {  // a loop to the compiler's eyes
      UnitWords words[kEach];
#pragma unroll
      for (int e = 0; e < kEach; ++e) words[e] = next[e];
      at += kEach * k_stride;
      load(next);  // the last time in vain, of what lies behind: the launcher knows that it is still the page's
      products(words, acc);
      hand_over(pair, acc, part, own);
    }
  }
}

template <int D, int Q, int ROWS, bool CAPPED>
KAKEYA_D void Attend<D, Q, ROWS, CAPPED>::scores(uint32_t page, float (&own)[kScores]) const {
  uint32_t q[NB][kRegs];
#pragma unroll
  for (int n = 0; n < NB; ++n) load_regs(q[n], my_query + n * kTileBytes);
  if (num_slots && has_unit()) slot_scores(page, q);  // without a unit the width is 0, and the query is nobody's
  mean_scores(own);
  switch (k_width) {  // the same for the whole warp and for as long as the head stays
    case 0:
      return no_scores(own);
    case 1:
      return score_unit<1>(page, q, own);
    case 2:
      return score_unit<2>(page, q, own);
    case 3:
      return score_unit<3>(page, q, own);
    case 4:
      return score_unit<4>(page, q, own);
    case 5:
      return score_unit<5>(page, q, own);
    default:
      return score_unit<6>(page, q, own);
  }
}

// Nothing, of a unit without codes.
template <int D, int Q, int ROWS, bool CAPPED>
KAKEYA_D void Attend<D, Q, ROWS, CAPPED>::no_scores(float (&own)[kScores]) const {
  float acc[2][NB][4];
#pragma unroll
  for (int n = 0; n < NB; ++n)
#pragma unroll
    for (int k = 0; k < 4; ++k) acc[0][n][k] = acc[1][n][k] = 0.0f;
  uint32_t part = my_part + first_part();
#pragma unroll 1
  for (int pair = 0; pair < 4; ++pair) hand_over(pair, acc, part, own);
}

// The exact slots' part of this warp's unit. Row g of the product is slot g; what rows beyond the last slot hold does
// not matter, their token byte says none.
template <int D, int Q, int ROWS, bool CAPPED>
KAKEYA_D void Attend<D, Q, ROWS, CAPPED>::slot_scores(uint32_t page, const uint32_t (&q)[NB][kRegs]) const {
  const uint32_t a = page + k_slot;
  const float scale = half_low(lds_u16(page + k_slot_scale)) * k_undo;
  const uint4 up = lds_u128(shared + M::kSlotUp + warp * 32), add = lds_u128(shared + M::kSlotUp + warp * 32 + 16);
  uint32_t e[kRegs];
  const auto halves = [](uint32_t word, int pair, uint32_t up, uint32_t add) {
    return half_fma(__byte_perm(word ^ 0x80808080u, 0x64646464u, pair ? 0x4342 : 0x4140), up, add);
  };
  if constexpr (kNarrow) {
    const uint32_t w = lds_u32(a);
    e[0] = halves(w, 0, up.x, add.x), e[1] = halves(w, 1, up.y, add.y);
  } else {
    const uint2 w = lds_u64(a);
    e[0] = halves(w.x, 0, up.x, add.x), e[1] = halves(w.x, 1, up.y, add.y);
    e[2] = halves(w.y, 0, up.z, add.z), e[3] = halves(w.y, 1, up.w, add.w);
  }
#pragma unroll
  for (int n = 0; n < NB; ++n) {
    float acc[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < S::kTiles; ++i) mma(acc, e[2 * i], 0, e[2 * i + 1], 0, q[n][2 * i], q[n][2 * i + 1]);
    const uint32_t s = slot_score_at(g, warp, row_of(n, 0));
    if constexpr (R::kSplit)
      sts_f32(s, (acc[0] + acc[1]) * scale);
    else
      sts_f32x2(s, acc[0] * scale, acc[1] * scale);
  }
}

}  // namespace kakeya
