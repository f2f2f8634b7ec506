// What a segment sets up once: where its units lie, constants of their widths, its query. Part of Attend, see
// attend.cuh.
#pragma once

#include "attend.cuh"

namespace kakeya {

// Loads come first and all at once: what a segment begins with is what they take, one after the other three times (the
// record's place, the record, the query).
template <int D, int Q, int ROWS, bool CAPPED>
KAKEYA_D void Attend<D, Q, ROWS, CAPPED>::begin_segment(const AttendCursor &c) {
  const AttendHead &h =
      *t.at<AttendHead>(t.attend + uint32_t(p.layer * int(t.num_kv_heads) + p.first_head + c.head) * t.attend_stride);
  const auto words = [](const auto &x) { return reinterpret_cast<const uint4 *>(&x); };
  const AttendWarp &own = h.warps[warp];
  const uint4 of_k = __ldg(words(own.k)), of_v = __ldg(words(own.v)), layout = __ldg(words(h.k_stride));
  num_slots = __ldg(&h.num_slots);
  const uint32_t constant = __ldg(own.constants + min(lane, 11));
  const uint8_t channel =
      __ldg(h.v_order + (has_unit() ? value_unit() : 0) * S::kUnitChannels + lane % S::kUnitChannels);
  // A warp without units gets a pair of another's: it only reads.
  const int f = has_unit() ? thread / S::kPairThreads : S::kPairs - 1, role = thread % S::kPairThreads;
  const AttendPair &pair = reinterpret_cast<const AttendPair *>(&h + 1)[f];
  const uint4 common = __ldg(words(pair));
  const uint2 positions = __ldg(reinterpret_cast<const uint2 *>(&pair.k_position));
  value_at = 0;
#pragma unroll
  for (int e = 0; e < S::kStats; ++e) {
    const int which = role * S::kStats + e;
    const uint4 x = __ldg(words(pair.stats[which]));
    stat_mean[e] = __uint_as_float(x.x);
    stat_step[e] = __uint_as_float(x.y);
    stat_scale[e] = __uint_as_float(x.z);
    stat_zero[e] = __uint_as_float(x.w);
    const int position = which % 2 ? positions.y >> 16 : positions.y & 0xffffu, in_unit = position % S::kUnitChannels;
    value_at |= uint32_t(((position / S::kUnitChannels * 8 + in_unit % 8) * (S::kUnitChannels / 8) + in_unit / 8) * 8)
                << 16 * e;
  }
  // The query at the first block's centre; natural channels, in units of log2.
  float cos = 1.0f, sin = 0.0f;
  if (f < pairs) {
    const int first = min(c.unit, c.pages);  // behind the pages nobody asks, and the table may end
    cos = __ldg(t.at<float>(t.centre_cos) + first * pairs + f);
    sin = __ldg(t.at<float>(t.centre_sin) + first * pairs + f);
  }
  const int rows = rows_of(c);
  const float scale = p.scale * 1.4426950408889634f, limit = __uint_as_float(common.x);
  const int64_t first_token = p.query_start[c.sequence];
#pragma unroll
  for (int e = 0; e < kPerThread; ++e) {
    const int row = chunk_row + role + S::kPairThreads * e;
    float a = 0.0f, b = 0.0f;
    if (row < rows) {
      const int64_t at = (first_token + row / p.group) * p.q_token_stride +
                         int64_t(c.head * p.group + row % p.group) * p.q_head_stride;
      a = scale * load_element(p.q, at + (common.w & 0xffffu));
      b = scale * load_element(p.q, at + (common.w >> 16));
      // |a|, |b| <= norm <= limit keeps every fp16 register finite.
      const float norm = fabsf(a) + fabsf(b);
      if (norm > limit) a *= limit / norm, b *= limit / norm;
    }
    qa[e] = a * cos + b * sin;
    qb[e] = b * cos - a * sin;
  }
  turn_cos = __uint_as_float(common.y);
  turn_sin = __uint_as_float(common.z);
  constexpr int columns = R::kSplit ? 4 : 8;
  query_at = query_place(positions.x & 0xffffu, role, columns) | query_place(positions.x >> 16, role, columns) << 16;
  mean_at = mean_place(f, R::kSplit ? 2 * role : role);

  k_stride = layout.x;
  v_stride = layout.y;
  side = layout.z;
  slots = layout.w;
  k_unit = kHeader + of_k.x;
  v_unit = kHeader + S::kGroups * k_stride + of_v.x;
  k_width = of_k.y & 0xffu;
  v_width = of_v.y & 0xffu;
  k_past = unit_past(of_k.y >> 8);
  v_past = unit_past(of_v.y >> 8);
  k_gamma = of_k.z;
  v_gamma = of_v.z;
  k_undo = __uint_as_float(of_k.w);
  const uint32_t last = num_slots ? num_slots - 1 : 0, slot = min(uint32_t(g), last), two = min(2u * t4, last & ~1u);
  const uint32_t scales = slots + 2 * num_slots * D;
  k_slot = opaque((slots + slot * D + warp * S::kUnitChannels + 4 * S::kTiles * t4) | (scales + 4 * slot) << 16);
  v_slot = opaque((slots + (num_slots + two) * D + value_unit() * S::kUnitChannels + 2 * S::kTiles * g) |
                  (scales + 4 * two) << 16);
  if (lane < 12) sts_u32(shared + M::kConstants + warp * 48 + 4 * lane, constant);
  sts_u8(shared + M::kOrder + warp * 32 + lane % S::kUnitChannels, channel);
  if (thread == 0) {
    const SequenceBlocks b = sequence_blocks(c.tokens, c.length);
    const int inside = b.pages * kBlock - (c.length - c.tokens);
    sts_u32(shared + M::kHidden, b.first_open < b.pages ? inside * p.group : 0);
  }
#pragma unroll
  for (int n = 0; n < NB; ++n)
#pragma unroll
    for (int e = 0; e < NC; ++e) {
      sum[n][e] = 0.0f;
      peak[n][e] = kNoScore;
#pragma unroll
      for (int i = 0; i < S::kTiles; ++i) out[n][i][0][e] = out[n][i][1][e] = 0.0f;
    }
}

}  // namespace kakeya
