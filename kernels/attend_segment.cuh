// What a segment sets up once: where its units lie, constants of their widths, its query. Part of Attend, see
// attend.cuh.
#pragma once

#include "attend.cuh"

namespace kakeya {

// Offset of unit u from its group's start, bytes of all of a group's units, and where the chain's unit before is.
template <int D, int Q, int ROWS, bool CAPPED>
KAKEYA_D void Attend<D, Q, ROWS, CAPPED>::find_unit(const uint8_t *widths, int u, uint32_t &offset, uint32_t &total,
                                                    UnitPast &past) const {
  offset = total = 0;
  past = {0, 0, false};
  uint32_t at = 0;
  for (int i = 0; i < S::kUnits; ++i) {
    if (i == u) offset = total;
    if (i < u && widths[i]) at = total, past.mask = ~0u, past.one = widths[i] == 1;
    total += 64 * widths[i];
  }
  if (past.mask) past.back = offset - at;
}

// What brings a slot's deviations to the scale of this warp's codes. Keys, as sixteenths 2^-4 (128 + 1024 + value):
// by class of channels, factors and addends that take off 1152; uniform queries carry 2^(4 - bit) of the codes, 2^bit
// makes up for it. Values: by class, the sum's factor. `k_factor`, `v_factor`: the alphabets' own, unless
// codes are uniform.
template <int D, int Q, int ROWS, bool CAPPED>
KAKEYA_D void Attend<D, Q, ROWS, CAPPED>::slot_constants(float k_factor, float v_factor) {
  k_undo = 16.0f;
  float undo = 1.0f;
  if (Q == kUniform) {
    if (k_width) k_undo *= power2(k_width - 1) / grid_alpha(k_width);
    k_undo *= 1.0f / 16777216.0f;
    if (v_width) undo = power2(v_width - 1) / grid_alpha(v_width);
  } else {
    k_undo /= k_factor;
    undo = 1.0f / v_factor;
  }
  if (lane < 4) {
    const float up = power2((Q == kUniform && k_width ? code_bit(k_width, lane, kNarrow) : 0) - 4);
    if (Q == kUniform && v_width) undo *= power2(code_bit(v_width, lane, kNarrow) - 24);
    sts_u32(shared + M::kSlotUp + warp * 32 + 4 * lane, pack_half(up, up));
    sts_u32(shared + M::kSlotUp + warp * 32 + 16 + 4 * lane, pack_half(-1152.0f * up, -1152.0f * up));
    sts_f32(shared + M::kSlotUndo + warp * 16 + 4 * lane, undo);
  }
  __syncwarp();
}

template <int D, int Q, int ROWS, bool CAPPED>
KAKEYA_D void Attend<D, Q, ROWS, CAPPED>::begin_segment(const AttendCursor &c) {
  const HeadView h = head_view(t, p.layer, p.first_head + c.head);
  const LayerLayout layout = t.at<LayerLayout>(t.layers)[p.layer];
  side = layout.side_offset;
  slots = layout.slots_offset;
  num_slots = layout.num_slots;
  const int vu = value_unit();
  find_unit(h.k.widths, warp, k_unit, k_stride, k_past);
  k_width = h.k.widths[warp];
  k_unit += kHeader;
  const uint32_t v_start = kHeader + S::kGroups * k_stride;
  find_unit(h.v.widths, vu, v_unit, v_stride, v_past);
  v_width = h.v.widths[vu];
  v_unit += v_start;
  const uint32_t last = num_slots ? num_slots - 1 : 0, slot = min(uint32_t(g), last), two = min(2u * t4, last & ~1u);
  const uint32_t scales = slots + 2 * num_slots * D;
  k_slot = opaque(slots + slot * D + warp * S::kUnitChannels + 4 * S::kTiles * t4);
  k_slot_scale = opaque(scales + 4 * slot);
  v_slot = opaque(slots + (num_slots + two) * D + vu * S::kUnitChannels + 2 * S::kTiles * g);
  v_slot_scale = opaque(scales + 4 * two);
  if constexpr (Q == kUniform) {
    slot_constants(1.0f, 1.0f);
  } else {
    const Alphabet k = alphabet(k_width), v = alphabet(v_width);
    k_gamma = k.gamma;
    v_gamma = v.gamma;
    slot_constants(k.factor, v.factor);
  }

  // A warp without units gets a pair of another's: it only reads.
  const int f = has_unit() ? thread / S::kPairThreads : S::kPairs - 1, role = thread % S::kPairThreads;
  const int2 pair = pair_channels(f);
#pragma unroll
  for (int e = 0; e < S::kStats; ++e) {
    const int which = role * S::kStats + e;
    const bool is_k = which < 2;
    const StreamView &s = is_k ? h.k : h.v;
    const int channel = which == 0 ? pair.x : which == 1 ? pair.y : 2 * f + which - 2;
    stat_index[e] = (is_k ? 0 : D) + channel;
    stat_mean[e] = s.mean[channel];
    stat_step[e] = s.step[channel];
    stat_scale[e] = s.sigma[channel];
    stat_zero[e] = 0.0f;
    const int position = s.position[channel], w = s.widths[position / S::kUnitChannels];
    const int in_unit = position % S::kUnitChannels;
    value_at[e] =
        uint32_t(((position / S::kUnitChannels * 8 + in_unit % 8) * (S::kUnitChannels / 8) + in_unit / 8) * 8);
    if constexpr (Q == kUniform) {
      const int bit = w ? code_bit(w, in_unit / 8, kNarrow) : 0;
      const float step = w ? grid_alpha(w) * power2(1 - w) : 1.0f;
      // Keys: their score misses 2^20 (kScoreUnit). Values: the sum's scale makes up for the subnormal.
      if (is_k) {
        stat_scale[e] *= step * power2(4 - bit);
      } else if (w) {
        stat_scale[e] *= step * power2(24 - bit);
        stat_zero[e] = -0.5f * float((1 << w) - 1) * power2(bit - 24);
      }
    } else {
      stat_scale[e] *= alphabet(w).factor;
      if (is_k) stat_scale[e] *= kTableScale;
    }
  }
  // What a page's statistics can make of it: the largest factors and means there are.
  float largest_scale = 0.0f, largest_mean = 0.0f;
  if (calibrated) {
    const float factor = t.at<float>(t.factors)[t.scale_codes - 1];
    float mean[S::kStats];
#pragma unroll
    for (int e = 0; e < S::kStats; ++e) {
      mean[e] = fabsf(stat_mean[e]) + 32.0f * fabsf(stat_step[e]);
      stat_mean[e] -= 32.0f * stat_step[e];
    }
    largest_scale = factor * fmaxf(fabsf(of_k(stat_scale, 0)), fabsf(of_k(stat_scale, 1)));
    largest_mean = fmaxf(of_k(mean, 0), of_k(mean, 1));
  }  // A block's own statistics have no bound to speak of: 65504 would clamp ordinary queries. prepare() saturates.
  // |a|, |b| <= norm <= limit keeps every fp16 register finite. A query beyond it would need scores of thousands.
  const float limit = kHalfMax / fmaxf(largest_scale, 2.0f * kMeanScale * largest_mean);
  constexpr int columns = R::kSplit ? 4 : 8;
  query_at = query_place(h.k.position[pair.x], role, columns) | query_place(h.k.position[pair.y], role, columns) << 16;
  mean_at = mean_place(f, R::kSplit ? 2 * role : role);
  // By how much a block turns, and the query at the first block's centre; natural channels, in units of log2.
  float cos = 1.0f, sin = 0.0f;
  turn_cos = 1.0f;
  turn_sin = 0.0f;
  if (f < pairs) {
    const float *cosines = t.at<float>(t.centre_cos) + f, *sines = t.at<float>(t.centre_sin) + f;
    const int first = min(c.unit, c.pages);  // behind the pages nobody asks, and the table may end
    cos = cosines[first * pairs];
    sin = sines[first * pairs];
    if (t.max_blocks > 1) {
      turn_cos = cosines[pairs] * cosines[0] + sines[pairs] * sines[0];
      turn_sin = sines[pairs] * cosines[0] - cosines[pairs] * sines[0];
    }
  }
  if (thread == 0) {
    const SequenceBlocks b = blocks_of(c.sequence);
    const int inside = b.pages * kBlock - (p.seq_lens[c.sequence] - rows_of(c.sequence) / p.group);
    sts_u32(shared + M::kHidden, b.first_open < b.pages ? inside * p.group : 0);
  }
  const uint16_t *natural = t.at<uint16_t>(t.natural);
  const int rows = rows_of(c.sequence);
  const float scale = p.scale * 1.4426950408889634f;
#pragma unroll
  for (int e = 0; e < kPerThread; ++e) {
    const int row = chunk_row + role + S::kPairThreads * e;
    float a = 0.0f, b = 0.0f;
    if (row < rows) {
      const int64_t at = int64_t(p.query_start[c.sequence] + row / p.group) * p.q_token_stride +
                         int64_t(c.head * p.group + row % p.group) * p.q_head_stride;
      a = scale * load_element(p.q, at + natural[pair.x]);
      b = scale * load_element(p.q, at + natural[pair.y]);
      const float norm = fabsf(a) + fabsf(b);
      if (norm > limit) a *= limit / norm, b *= limit / norm;
    }
    qa[e] = a * cos + b * sin;
    qb[e] = b * cos - a * sin;
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
