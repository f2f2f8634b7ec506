// Scores of a page: codes, exact slots and the mean. Part of Attend, see attend.cuh.
#pragma once

#include "attend.cuh"

namespace kakeya {

// The scores of a pair of tiles as their owners want them, [tile][m][n][c]. Where columns are split the odd ones carry
// low parts, which are added (LOW), or are empty.
template <int D, int Q, int ROWS, bool CAPPED>
template <bool LOW>
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
              R::kSplit && LOW ? acc[tile][n][2 * m] + acc[tile][n][2 * m + 1] : acc[tile][n][2 * m + c];
}

// Leaves the partial scores of a pair of tiles with their owners, or adds them to `own`. Pairs come one after the
// other, `part` is the next owner's.
template <int D, int Q, int ROWS, bool CAPPED>
KAKEYA_D void Attend<D, Q, ROWS, CAPPED>::hand_over(int pair, const float (&acc)[2][NB][4], uint32_t &part,
                                                    float (&own)[kScores]) const {
  constexpr int N = 2 * NB * NC, owners = 2 / S::kWarpTiles;
  float x[2][N];
  fold<false>(acc, x);
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

// What all of a page's scores begin with: the mean's part of this warp's tokens, the exact slots' part of this warp's
// unit if there are SLOTS, and what the zero point of its codes adds to every token. Loads first, then all products:
// the chains of one hide the others' latencies.
template <int D, int Q, int ROWS, bool CAPPED>
template <bool SLOTS>
KAKEYA_D void Attend<D, Q, ROWS, CAPPED>::first_scores(uint32_t page, const uint32_t (&q)[NB][kRegs],
                                                       float (&own)[kScores], float (&zero)[NB][NC]) const {
  // Rows of one product: the slots, and below them what stands for codes of the zero point.
  uint32_t e[kRegs], z[kRegs];
  const float scale = load_slots<SLOTS>(page, e, z);
  constexpr int kAhead = R::kMeanTiles == 1 ? S::kPairSteps : 1;  // registers allow no more
  float acc[2][NB][4];                                            // cosines, sines
#pragma unroll
  for (int n = 0; n < NB; ++n)
#pragma unroll
    for (int k = 0; k < 4; ++k) acc[0][n][k] = acc[1][n][k] = 0.0f;
#pragma unroll
  for (int n = 0; n < R::kMeanTiles; ++n)
#pragma unroll
    for (int s = 0; s < S::kPairSteps; s += kAhead) {
      uint4 b[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) b[i] = lds_u128(shared + M::kMean + n * kTileBytes + (s + i) * 512 + lane * 16);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const uint32_t (&c)[4] = table[s + i][0], (&d)[4] = table[s + i][1];
        mma(acc[0][n % NB], c[0], c[1], c[2], c[3], b[i].x, b[i].y);
        mma(acc[1][n % NB], d[0], d[1], d[2], d[3], b[i].z, b[i].w);
      }
    }
#pragma unroll
  for (int n = 0; n < NB; ++n) {
    float x[4] = {0, 0, 0, 0};
    if constexpr (SLOTS || Q == kUniform)
#pragma unroll
      for (int i = 0; i < S::kTiles; ++i)
        mma(x, e[2 * i], z[2 * i], e[2 * i + 1], z[2 * i + 1], q[n][2 * i], q[n][2 * i + 1]);
#pragma unroll
    for (int c = 0; c < NC; ++c) zero[n][c] = x[2 + c] * (1.0f / kScoreUnit);
    if constexpr (SLOTS) {
      const uint32_t at = slot_score_at(g, warp, row_of(n, 0));
      if constexpr (R::kSplit)
        sts_f32(at, x[0] * scale);
      else
        sts_f32x2(at, x[0] * scale, x[1] * scale);
    }
  }
  constexpr int N = 2 * NB * NC;
  float x[2][N];
  fold<true>(acc, x);
#pragma unroll
  for (int k = 0; k < N; ++k) {
    if constexpr (S::kWarpTiles == 2)
      own[k] = x[0][k] + x[1][k], own[N + k] = x[0][k] - x[1][k];
    else
      own[k] = warp % 2 ? x[0][k] - x[1][k] : x[0][k] + x[1][k];
  }
}

// Partial scores of this warp's unit with width W; its own tokens' are added to `own`. `zero`: of its zero point.
template <int D, int Q, int ROWS, bool CAPPED>
template <int W>
KAKEYA_D void Attend<D, Q, ROWS, CAPPED>::score_unit(uint32_t page, const uint32_t (&q)[NB][kRegs],
                                                     const float (&zero)[NB][NC], float (&own)[kScores]) const {
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
      for (int k = 0; k < 4; ++k) acc[0][n][k] = acc[1][n][k] = R::kSplit ? 0.0f : zero[n][k % NC];
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
    // Split columns: the odd ones are empty and take nothing.
    if constexpr (R::kSplit && Q == kUniform)
#pragma unroll
      for (int tile = 0; tile < 2; ++tile)
#pragma unroll
        for (int m = 0; m < 2; ++m) acc[tile][0][2 * m] += zero[0][0];
  };
  if constexpr (kUnroll > 1 && S::kWarpTiles == 2) {
    // From the own pair of tiles on: which is the own is then known when the kernel is compiled. A pair's codes are
    // loaded while the one before is multiplied, whose results are stored while its own products are under way.
    UnitWords words[2][kEach];
    float acc[2][2][NB][4];
    const auto finish = [&](int i, const float (&acc)[2][NB][4]) {
      constexpr int N = 2 * NB * NC;
      float x[2][N];
      fold<false>(acc, x);
      if (i == 0) {
#pragma unroll
        for (int k = 0; k < kScores; ++k) own[k] += x[k / N][k % N];
      } else {
        store_floats<kScores>(my_part + ((warp + i) & 3) * M::kOwnerBytes + (3 - i) * M::kPartBytes, x[0]);
      }
    };
    at = page + k_unit + warp * kEach * k_stride;
    load(words[0]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      at = page + k_unit + ((warp + i + 1) & 3) * kEach * k_stride;
      if (i < 3) load(words[(i + 1) % 2]);
      products(words[i % 2], acc[i % 2]);
      if (i > 0) finish(i - 1, acc[(i - 1) % 2]);
    }
    finish(3, acc[1]);
  } else {
    float acc[2][NB][4];
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
  float zero[NB][NC];
#pragma unroll
  for (int n = 0; n < NB; ++n) load_regs(q[n], my_query + n * kTileBytes);
  if (num_slots && has_unit())  // without a unit the width is 0, and the query is nobody's
    first_scores<true>(page, q, own, zero);
  else
    first_scores<false>(page, q, own, zero);
  switch (k_width) {  // the same for the whole warp and for as long as the head stays
    case 0:
      return no_scores(own);
    case 1:
      return score_unit<1>(page, q, zero, own);
    case 2:
      return score_unit<2>(page, q, zero, own);
    case 3:
      return score_unit<3>(page, q, zero, own);
    case 4:
      return score_unit<4>(page, q, zero, own);
    case 5:
      return score_unit<5>(page, q, zero, own);
    default:
      return score_unit<6>(page, q, zero, own);
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

// This lane's registers of the exact slots as rows of products with the query, slot g in row g; what rows beyond the
// last slot hold does not matter, their token byte says none. And, of uniform codes, of a row of their zero points,
// (2^W - 1) / 2 of each, 2^20 times: half of what stands for a code of ones would be no normal number. Returns the
// factor of slot g's products.
template <int D, int Q, int ROWS, bool CAPPED>
template <bool SLOTS>
KAKEYA_D float Attend<D, Q, ROWS, CAPPED>::load_slots(uint32_t page, uint32_t (&e)[kRegs], uint32_t (&z)[kRegs]) const {
  const uint32_t constants = shared + M::kConstants + warp * 48, a = page + (k_slot & 0xffffu);
  uint32_t word[2] = {0, 0};
  float scale = 0.0f;
  if constexpr (SLOTS) {
    if constexpr (kNarrow) {
      word[0] = lds_u32(a);
    } else {
      const uint2 w = lds_u64(a);
      word[0] = w.x, word[1] = w.y;
    }
    scale = half_low(lds_u16(page + (k_slot >> 16))) * k_undo;
  }
  const uint4 up4 = lds_u128(constants);
  const uint32_t up[4] = {up4.x, up4.y, up4.z, up4.w};
  if constexpr (SLOTS) {
    const uint4 add4 = lds_u128(constants + 16);
    const uint32_t add[4] = {add4.x, add4.y, add4.z, add4.w};
#pragma unroll
    for (int i = 0; i < kRegs; ++i)
      e[i] = half_fma(__byte_perm(word[i / 2] ^ 0x80808080u, 0x64646464u, i % 2 ? 0x4342 : 0x4140), up[i], add[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kRegs; ++i) e[i] = 0;
  }
#pragma unroll
  for (int i = 0; i < kRegs; ++i) z[i] = Q == kUniform ? half_mul(up[i], k_gamma) : 0;
  return scale;
}

}  // namespace kakeya
