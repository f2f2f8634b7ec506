// The query as matrix operands: made of each page's statistics ahead of the page, and as it is for open blocks. Part of
// Attend, see attend.cuh.
#pragma once

#include "attend.cuh"

namespace kakeya {

// Prepares the page at shared address `page`: reads its statistics, writes query and mean registers, and value
// registers of buffer `value`; turns the query on to the next block's centre. kPairThreads threads share a channel
// pair of K and two channels of V; each also has its rows.
template <int D, int Q, int ROWS, bool CAPPED>
template <bool CALIBRATED>
KAKEYA_D void Attend<D, Q, ROWS, CAPPED>::prepare(uint32_t page, uint32_t value) {
  if (!has_unit()) return;
  // Statistics lie pair by pair, as threads do.
  const uint32_t s = page + side, own = s + S::kStats * (32 * warp + lane);
  uint32_t codes, rest;
  if constexpr (CALIBRATED) {
    const int f = (32 * warp + lane) / S::kPairThreads, first = lane % S::kPairThreads * S::kStats;
    codes = S::kStats == 2 ? lds_u16(own) : lds_u8(own);
    rest = lds_u8(s + 2 * D + (first / 2 ? D / 4 : 0) + f / 2) >> (4 * (f & 1) + 2 * (first & 1));
  } else {
    codes = S::kStats == 2 ? lds_u16(own) : lds_u8(own);
    rest = S::kStats == 2 ? lds_u32(own + 2 * D + S::kStats * (32 * warp + lane))
                          : lds_u16(own + 2 * D + S::kStats * (32 * warp + lane));
  }
  float scale[S::kStats], base[S::kStats];
#pragma unroll
  for (int e = 0; e < S::kStats; ++e) {
    float mean;
    if constexpr (CALIBRATED) {
      scale[e] = lds_f32(shared + M::kFactors + 4 * (codes >> 8 * e & 15u));
      // 32 steps less: in stat_mean.
      mean = float(int((codes >> (8 * e + 4) & 15u) | (rest >> 2 * e & 3u) << 4)) * stat_step[e];
    } else {
      // One of 256 deviations 2^((code - 128) / 8).
      scale[e] = exp2_fast(0.125f * float(int(codes >> 8 * e & 255u) - 128));
      mean = e ? half_high(rest) : half_low(rest);
    }
    scale[e] *= stat_scale[e];
    base[e] = stat_mean[e] + mean;
  }
  if (lane % S::kPairThreads * S::kStats >= 2)
#pragma unroll
    for (int e = 0; e < S::kStats; ++e)
      sts_f32x2(shared + M::kValue + value * (D * 8) + (e ? value_at >> 16 : value_at & 0xffffu), scale[e],
                base[e] + scale[e] * stat_zero[e]);
  const float scale_a = of_k(scale, 0), scale_b = of_k(scale, 1), base_a = of_k(base, 0), base_b = of_k(base, 1);
  const uint32_t query = shared + M::kQuery, means = shared + M::kMean + mean_at;
  const uint32_t at_a = query + (query_at & 0xffffu), at_b = query + (query_at >> 16);
  const auto bounded = [](float x) { return CALIBRATED ? x : clamp_half(x); };
#pragma unroll
  for (int e = 0; e < kPerThread; ++e) {
    const float a = qa[e], b = qb[e];
    qa[e] = a * turn_cos + b * turn_sin;
    qb[e] = b * turn_cos - a * turn_sin;
    store_two(at_a + query_row(e), at_b + query_row(e), bounded(a * scale_a), bounded(b * scale_b));
    // The mean turned by offset o, times the query: cos o (a m_a + b m_b) + sin o (b m_a - a m_b).
    const uint32_t at = means + mean_row(e);
    const float2 rest = store_two(at, at + 8, bounded((a * base_a + b * base_b) * kMeanScale),
                                  bounded((b * base_a - a * base_b) * kMeanScale));
    const uint32_t low = at + (R::kSplit ? 64 : NB * kTileBytes);
    store_two(low, low + 8, rest.x, rest.y);
  }
}

// The raw query of a segment, element type, for open blocks.
template <int D, int Q, int ROWS, bool CAPPED>
KAKEYA_D void Attend<D, Q, ROWS, CAPPED>::prepare_raw(const AttendCursor &c) {
  const int rows = rows_of(c);
  for (int i = thread; i < NB * 8 * D; i += S::kThreads) {
    const int column = i / D, channel = i % D;
    const int row = R::kSplit ? column / 2 : column;
    uint32_t x = 0;
    if (!(R::kSplit && column % 2) && chunk_row + row < rows) {
      const int r = chunk_row + row;
      const int64_t at = int64_t(p.query_start[c.sequence] + r / p.group) * p.q_token_stride +
                         int64_t(c.head * p.group + r % p.group) * p.q_head_stride + channel;
      x = static_cast<const uint16_t *>(p.q)[at];
    }
    sts_u16(shared + M::kRawQuery + (column / 8) * kTileBytes + query_place(channel, column % 8, 8), x);
  }
}

}  // namespace kakeya
