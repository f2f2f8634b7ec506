// Values of a page: sums over the block's tokens. Part of Attend, see attend.cuh.
#pragma once

#include "attend.cuh"

namespace kakeya {

// Sums over the block's tokens: of codes, and of probabilities alone.
template <int D, int Q, int ROWS, bool CAPPED>
template <int W>
KAKEYA_D void Attend<D, Q, ROWS, CAPPED>::value_unit_sums(uint32_t page, float (&acc)[NB][S::kTiles][4],
                                                          float (&total)[NB][4]) const {
  constexpr uint32_t ones = 0x3c003c00u;
  constexpr int kEach = kNarrow ? 1 : 2;  // groups of 32 tokens
  uint32_t at = page + v_unit, prob = prob_at(0, lane);
  const auto load = [&](UnitWords(&words)[kEach]) {
#pragma unroll
    for (int e = 0; e < kEach; ++e) words[e] = Dequant<Q, W, kNarrow>::load(at + e * v_stride, v_past, lane);
  };
  UnitWords next[kEach];
  load(next);
#pragma unroll kUnroll
  for (int x = 0, end = kUnroll > 1 ? 4 : int(opaque(4)); x < end; ++x) {  // rolled: a loop to the compiler's eyes
    UnitWords words[kEach];
#pragma unroll
    for (int e = 0; e < kEach; ++e) words[e] = next[e];
    uint32_t b[NB][4];
#pragma unroll
    for (int n = 0; n < NB; ++n) load_transposed(b[n], prob + n * M::kProbTile);
    prob += 32 * 16;
    if (x < 3) at += kEach * v_stride;
    load(next);  // the last time in vain
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      uint32_t f[4][2];
      Dequant<Q, W, kNarrow>::run(f, words[e], v_past.mask, v_gamma, magic);
#pragma unroll
      for (int n = 0; n < NB; ++n) {
        if constexpr (kNarrow) {
          mma(acc[n][0], f[0][0], f[1][0], f[0][1], f[1][1], b[n][0], b[n][1]);
          mma(acc[n][0], f[2][0], f[3][0], f[2][1], f[3][1], b[n][2], b[n][3]);
        } else {
          mma(acc[n][0], f[0][0], f[1][0], f[0][1], f[1][1], b[n][2 * e], b[n][2 * e + 1]);
          mma(acc[n][S::kTiles - 1], f[2][0], f[3][0], f[2][1], f[3][1], b[n][2 * e], b[n][2 * e + 1]);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < NB; ++n) {
      mma(total[n], ones, ones, ones, ones, b[n][0], b[n][1]);
      mma(total[n], ones, ones, ones, ones, b[n][2], b[n][3]);
    }
  }
}

// Of a unit without codes.
template <int D, int Q, int ROWS, bool CAPPED>
KAKEYA_D void Attend<D, Q, ROWS, CAPPED>::value_totals(float (&total)[NB][4]) const {
  constexpr uint32_t ones = 0x3c003c00u;
#pragma unroll 1
  for (int x = 0; x < 4; ++x)
#pragma unroll
    for (int n = 0; n < NB; ++n) {
      uint32_t b[4];
      load_probs(b, n, x);
      mma(total[n], ones, ones, ones, ones, b[0], b[1]);
      mma(total[n], ones, ones, ones, ones, b[2], b[3]);
    }
}

template <int D, int Q, int ROWS, bool CAPPED>
KAKEYA_D void Attend<D, Q, ROWS, CAPPED>::values(uint32_t page, uint32_t buffer) {
  if (!has_unit()) return;
  float acc[NB][S::kTiles][4], total[NB][4];
#pragma unroll
  for (int n = 0; n < NB; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      total[n][e] = 0.0f;
#pragma unroll
      for (int i = 0; i < S::kTiles; ++i) acc[n][i][e] = 0.0f;
    }
  if (num_slots) value_slots(acc, page);
  switch (v_width) {
    case 0:
      value_totals(total);
      break;
    case 1:
      value_unit_sums<1>(page, acc, total);
      break;
    case 2:
      value_unit_sums<2>(page, acc, total);
      break;
    case 3:
      value_unit_sums<3>(page, acc, total);
      break;
    case 4:
      value_unit_sums<4>(page, acc, total);
      break;
    case 5:
      value_unit_sums<5>(page, acc, total);
      break;
    default:
      value_unit_sums<6>(page, acc, total);
  }
  constexpr int classes = 2 * S::kTiles;
  const uint32_t parameters = shared + M::kValue + buffer * (D * 8) + (value_unit() * 8 + g) * classes * 8;
#pragma unroll
  for (int i = 0; i < S::kTiles; ++i) {
    const uint4 x = lds_u128(parameters + i * 16);
    const float scale[2] = {__uint_as_float(x.x), __uint_as_float(x.z)};
    const float offset[2] = {__uint_as_float(x.y), __uint_as_float(x.w)};
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int n = 0; n < NB; ++n)
#pragma unroll
        for (int e = 0; e < NC; ++e) {
          float &o = out[n][i][r][e];
          o = fmaf(scale[r], acc[n][i][2 * r + e], o);
          o = fmaf(offset[r], total[n][e], o);
        }
  }
#pragma unroll
  for (int n = 0; n < NB; ++n)
#pragma unroll
    for (int e = 0; e < NC; ++e) sum[n][e] += total[n][e];
}

// The exact slots: 8 more tokens, whose probabilities are picked from the page's. They are where sums of codes begin.
template <int D, int Q, int ROWS, bool CAPPED>
KAKEYA_D void Attend<D, Q, ROWS, CAPPED>::value_slots(float (&acc)[NB][S::kTiles][4], uint32_t page) const {
  // Two slots of this lane: where there are fewer, their tokens are none, and any finite numbers will do.
  const uint32_t tokens = lds_u16(page + 8 + 2 * t4), first = tokens & 0xffu, second = tokens >> 8;
  const uint2 scales = lds_u64(page + (v_slot >> 16));
  uint32_t word[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t a = page + (v_slot & 0xffffu) + i * D;
    word[i] = (kNarrow ? lds_u16(a) : lds_u32(a)) ^ 0x80808080u;
  }
  uint32_t scale = __byte_perm(scales.x, scales.y, 0x7632);
  if (first >= kBlock) scale = 0;
  if (second >= kBlock) scale &= 0xffffu;
  const uint32_t prob[2] = {prob_at(0, first & (kBlock - 1)) + 2 * g, prob_at(0, second & (kBlock - 1)) + 2 * g};
  // Channels' classes in turn, both slots of each; then 1024 + 128 + value, then the value.
  uint32_t e[2 * S::kTiles];
#pragma unroll
  for (int c = 0; c < S::kTiles; ++c) {
    const uint32_t x = __byte_perm(word[0], word[1], c ? 0x7362 : 0x5140);
    e[2 * c] = half_add(__byte_perm(x, 0x64646464u, 0x4140), both(half_constant(-1152, 0)));
    e[2 * c + 1] = half_add(__byte_perm(x, 0x64646464u, 0x4342), both(half_constant(-1152, 0)));
  }
  const uint4 u = lds_u128(shared + M::kConstants + warp * 48 + 32);
  const float undo[4] = {__uint_as_float(u.x), __uint_as_float(u.y), __uint_as_float(u.z), __uint_as_float(u.w)};
#pragma unroll
  for (int n = 0; n < NB; ++n) {
    const uint32_t p0 = lds_u16(prob[0] + n * M::kProbTile), p1 = lds_u16(prob[1] + n * M::kProbTile);
    const uint32_t b = half_mul(p0 | p1 << 16, scale);
#pragma unroll
    for (int i = 0; i < S::kTiles; ++i) {
      float x[4] = {0, 0, 0, 0};
      mma_k8(x, e[2 * i], e[2 * i + 1], b);
      // The page's scale turns sums of codes into values; slots are in units of the deviation.
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int k = 0; k < NC; ++k) acc[n][i][2 * r + k] = x[2 * r + k] * undo[2 * i + r];
    }
  }
}

}  // namespace kakeya
