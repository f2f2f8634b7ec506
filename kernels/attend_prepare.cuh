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
  const uint32_t s = page + side;
  float scale[S::kStats], base[S::kStats];
#pragma unroll
  for (int e = 0; e < S::kStats; ++e) {
    const int i = stat_index[e];
    float mean;
    if constexpr (CALIBRATED) {
      const uint32_t code = lds_u8(s + (i >> 1)) >> 4 * (i & 1) & 15u;
      const uint32_t low = lds_u8(s + D + (i >> 1)) >> 4 * (i & 1) & 15u;
      const uint32_t high = lds_u8(s + 2 * D + (i >> 2)) >> 2 * (i & 3) & 3u;
      scale[e] = lds_f32(shared + M::kFactors + 4 * code);
      mean = float(int(low | high << 4)) * stat_step[e];  // 32 steps less: in stat_mean
    } else {
      // One of 256 deviations 2^((code - 128) / 8).
      scale[e] = exp2_fast(0.125f * float(int(lds_u8(s + i)) - 128));
      mean = half_low(lds_u16(s + 2 * D + 2 * i));
    }
    scale[e] *= stat_scale[e];
    base[e] = stat_mean[e] + mean;
  }
  if (thread % S::kPairThreads * S::kStats >= 2)
#pragma unroll
    for (int e = 0; e < S::kStats; ++e)
      sts_f32x2(shared + M::kValue + value * (D * 8) + value_at[e], scale[e], base[e] + scale[e] * stat_zero[e]);
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
  const int rows = rows_of(c.sequence);
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
