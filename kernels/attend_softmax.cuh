// Partial scores gathered by the owners of tokens; exponentials against a maximum that all warps share. Part of Attend,
// see attend.cuh.
#pragma once

#include "attend.cuh"

namespace kakeya {

// Adds the other units' partial scores to this warp's own.
template <int D, int Q, int ROWS, bool CAPPED>
KAKEYA_D void Attend<D, Q, ROWS, CAPPED>::gather(float (&s)[kScores]) const {
  const uint32_t a = my_part + warp * M::kOwnerBytes;
#pragma unroll
  for (int i = 0; i < S::kWarps - 1; ++i) add_floats<kScores>(a + i * M::kPartBytes, s);
}

// Adds the scores of the page's exact slots whose tokens this warp owns to another unit's, which gather() will add.
template <int D, int Q, int ROWS, bool CAPPED>
KAKEYA_D void Attend<D, Q, ROWS, CAPPED>::place_slots(uint32_t page) const {
  // The token of slot g in steps from the centre, ~ of them below it; without a token far from all.
  const int from = int(lds_u8(page + 8 + g)) - kBlock / 2, steps = from ^ from >> 31, row = steps & 15;
  const int pair = S::kWarpTiles == 2 ? warp : warp / 2;
  if (steps >> 4 == pair && (S::kWarpTiles == 2 || (from < 0) == bool(warp % 2))) {
    // The lane that has this token and this lane's rows, and where among its scores they are.
    const int half = row / 8 + (S::kWarpTiles == 2 && from < 0 ? 2 : 0);
    const uint32_t a =
        shared + M::kPart + warp * M::kOwnerBytes + (((row & 7) * 4 + t4) * kScores + half * NB * NC) * 4;
#pragma unroll
    for (int n = 0; n < NB; ++n)
#pragma unroll
      for (int c = 0; c < NC; ++c) {
        float x = lds_f32(a + (n * NC + c) * 4);
#pragma unroll
        for (int u = 0; u < S::kUnits; ++u) x += lds_f32(slot_score_at(g, u, row_of(n, c)));
        sts_f32(a + (n * NC + c) * 4, x);
      }
  }
  __syncwarp();
}

// Caps gathered scores, of which `unit` makes units of log2.
template <int D, int Q, int ROWS, bool CAPPED>
KAKEYA_D void Attend<D, Q, ROWS, CAPPED>::cap_scores(float (&s)[kScores], float unit) const {
  const float cap = p.soft_cap * (1.4426950408889634f / unit), inverse = __fdividef(1.0f, cap);
#pragma unroll
  for (int i = 0; i < kScores; ++i) s[i] = cap * tanh_fast(s[i] * inverse);
}

// Takes the item's last page from the rows whose tokens lie in it: they read it as the open block that it also is.
template <int D, int Q, int ROWS, bool CAPPED>
KAKEYA_D void Attend<D, Q, ROWS, CAPPED>::hide_rows(float (&s)[kScores]) const {
  const int hidden = int(lds_u32(shared + M::kHidden)) - chunk_row;
  if (hidden <= 0) return;
#pragma unroll
  for (int n = 0; n < NB; ++n)
#pragma unroll
    for (int c = 0; c < NC; ++c)
#pragma unroll
      for (int h = 0; h < 2 * S::kWarpTiles; ++h)
        if (row_of(n, c) < hidden) s[(h * NB + n) * NC + c] = -INFINITY;
}

// Probabilities of this warp's tokens: fp16, and zeros in the columns of low parts. Of an open block (RAW): element
// type, high parts and what is left, beside them or in tiles of its own.
template <int D, int Q, int ROWS, bool CAPPED>
template <bool RAW>
KAKEYA_D void Attend<D, Q, ROWS, CAPPED>::store_probs(const float (&s)[kScores]) const {
  constexpr float unit = RAW ? 1.0f : kScoreUnit;
#pragma unroll
  for (int h = 0; h < 2 * S::kWarpTiles; ++h)
#pragma unroll
    for (int n = 0; n < NB; ++n) {
      float e[2] = {0, 0};
#pragma unroll
      for (int c = 0; c < NC; ++c) e[c] = exp2_fast(fmaf(s[(h * NB + n) * NC + c], unit, -peak[n][c]));
      const uint32_t at = prob_at(n, my_token(h / 2, h % 2)) + t4 * 4;
      if constexpr (!RAW) {
        sts_u32(at, pack_half(e[0], e[1]));
      } else {
        const uint32_t high = is_f16() ? pack_half(e[0], e[1]) : pack_bf16(e[0], e[1]);
        float rest[2];
        rest[0] = e[0] - (is_f16() ? half_low(high) : __uint_as_float(high << 16));
        rest[1] = e[1] - (is_f16() ? half_high(high) : __uint_as_float(high & 0xffff0000u));
        const uint32_t low = is_f16() ? pack_half(rest[0], rest[1]) : pack_bf16(rest[0], rest[1]);
        if constexpr (R::kSplit) {
          sts_u32(at, __byte_perm(high, low, 0x5410));
        } else {
          sts_u32(at, high);
          sts_u32(at + NB * M::kProbTile, low);
        }
      }
    }
}

// Exponentials of the gathered scores, which are 1 / kScoreUnit too large where they are not RAW; ends with the
// barrier after which probabilities may be read.
template <int D, int Q, int ROWS, bool CAPPED>
template <bool RAW>
KAKEYA_D void Attend<D, Q, ROWS, CAPPED>::softmax(const float (&s)[kScores]) {
  constexpr float unit = RAW ? 1.0f : kScoreUnit;
  float top[NB][NC];
  bool above = false;
#pragma unroll
  for (int n = 0; n < NB; ++n)
#pragma unroll
    for (int c = 0; c < NC; ++c) {
      top[n][c] = s[n * NC + c];
#pragma unroll
      for (int h = 1; h < 2 * S::kWarpTiles; ++h) top[n][c] = fmaxf(top[n][c], s[(h * NB + n) * NC + c]);
      top[n][c] *= unit;
      above |= top[n][c] > peak[n][c] + kSlack;
    }
  store_probs<RAW>(s);
  if (__syncthreads_or(above)) {
    raise_peak<RAW>(top);
    store_probs<RAW>(s);
    __syncthreads();
  }
}

// A new shared maximum for the rows that need one, from this thread's largest scores; their sums so far are scaled to
// it. Other rows stay as they are, so that no row's result depends on what else is in the pass.
template <int D, int Q, int ROWS, bool CAPPED>
template <bool RAW>
KAKEYA_D void Attend<D, Q, ROWS, CAPPED>::raise_peak(const float (&top)[NB][NC]) {
  const uint32_t maxima = shared + M::kMax;
#pragma unroll
  for (int n = 0; n < NB; ++n)
#pragma unroll
    for (int c = 0; c < NC; ++c) {
      float x = top[n][c];
#pragma unroll
      for (int k = 4; k < 32; k *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, k));
      if (g == 0) sts_f32(maxima + (warp * ROWS + row_of(n, c)) * 4, x);
    }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < NB; ++n)
#pragma unroll
    for (int c = 0; c < NC; ++c) {
      float x = kNoScore;
      for (int w = 0; w < S::kWarps; ++w) x = fmaxf(x, lds_f32(maxima + (w * ROWS + row_of(n, c)) * 4));
      if (x <= peak[n][c] + kSlack) x = peak[n][c];
      const float fade = exp2_fast(peak[n][c] - x);
      peak[n][c] = x;
      sum[n][c] *= fade;
#pragma unroll
      for (int i = 0; i < S::kTiles; ++i) {
        out[n][i][0][c] *= fade, out[n][i][1][c] *= fade;
        if constexpr (RAW) {
          raw[n][i][c] *= fade, raw[n][i][c + 2] *= fade;
          if constexpr (R::kSplit) raw[n][i][1] *= fade, raw[n][i][3] *= fade;
        }
      }
    }
}

}  // namespace kakeya
