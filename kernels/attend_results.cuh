// A segment's result: written, or left for the last block of its item to merge. Part of Attend, see attend.cuh.
#pragma once

#include "attend.cuh"

namespace kakeya {

// Writes the segment's result: to `out` if it is all of the item, else to the workspace, where the last block to
// arrive merges the parts.
template <int D, int Q, int ROWS, bool CAPPED>
KAKEYA_D void Attend<D, Q, ROWS, CAPPED>::flush(const AttendCursor &c, bool whole, int item_begin, int item_end) {
  const uint32_t coded = shared + M::kCoded, plain = shared + M::kPlain, totals = shared + M::kTotals;
  __syncthreads();
  if (has_unit())
#pragma unroll
    for (int n = 0; n < NB; ++n)
#pragma unroll
      for (int e = 0; e < NC; ++e) {
        const int row = row_of(n, e);
#pragma unroll
        for (int i = 0; i < S::kTiles; ++i)
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const uint32_t channel = lds_u8(shared + M::kOrder + warp * 32 + 16 * i + 8 * r + g);
            sts_f32(coded + (row * D + channel) * 4, out[n][i][r][e]);
            sts_f32(plain + (row * D + value_unit() * S::kUnitChannels + 16 * i + 2 * g + r) * 4,
                    R::kSplit ? raw[n][i][2 * r] + raw[n][i][2 * r + 1] : raw[n][i][2 * r + e]);
          }
        if (warp == 0 && g == 0) sts_f32x2(totals + row * 8, peak[n][e], sum[n][e]);
      }
  __syncthreads();
  const int rows = min(rows_of(c) - chunk_row, ROWS);
  const int item = c.sequence * p.num_kv_heads + c.head;
  const int64_t records = gridDim.x + int64_t(p.num_seqs) * p.num_kv_heads;
  float *record = p.workspace + (blockIdx.y * records + blockIdx.x + item) * record_floats();
  for (int row = warp; row < rows; row += S::kWarps) {
    // Back from Hadamard space: butterflies inside the lane, then across lanes.
    float x[kLane];
#pragma unroll
    for (int i = 0; i < kLane; ++i) x[i] = lds_f32(coded + (row * D + kLaneFirst * lane + kLaneNext * i) * 4);
#pragma unroll
    for (int k = 1; k < kLaneFirst; k *= 2)
#pragma unroll
      for (int i = 0; i < kLane; ++i)
        if (!(i & k)) {
          const float a = x[i], b = x[i + k];
          x[i] = a + b;
          x[i + k] = a - b;
        }
#pragma unroll
    for (int k = 1; k < 32; k *= 2)
#pragma unroll
      for (int i = 0; i < kLane; ++i) {
        const float y = __shfl_xor_sync(~0u, x[i], k);
        x[i] = lane & k ? y - x[i] : x[i] + y;
      }
    constexpr float root = D == 64 ? 0.125f : D == 96 ? 0.176776695297f : D == 128 ? 0.088388347648f : 0.0625f;
#pragma unroll
    for (int i = 0; i < kLane; ++i)
      x[i] = x[i] * root + lds_f32(plain + (row * D + kLaneFirst * lane + kLaneNext * i) * 4);
    const float maximum = lds_f32(totals + row * 8), total = lds_f32(totals + row * 8 + 4);
    if (whole) {
      write_row(c, row, x, maximum, total);
    } else {
#pragma unroll
      for (int i = 0; i < kLane; ++i) record[row * D + kLaneFirst * lane + kLaneNext * i] = x[i];
      if (lane == 0) record[record_rows() * D + 2 * row] = maximum, record[record_rows() * D + 2 * row + 1] = total;
    }
  }
  if (!whole) merge(c, item, rows, records, item_begin, item_end);
  __syncthreads();
}

// A row's weighted sum of values, whose weights are relative to `maximum` and add up to `total`. A sink is one more
// weight without a value; one far above all scores makes the sum infinite and the row zero.
template <int D, int Q, int ROWS, bool CAPPED>
KAKEYA_D void Attend<D, Q, ROWS, CAPPED>::write_row(const AttendCursor &c, int row, const float (&x)[kLane],
                                                    float maximum, float total) const {
  const int r = chunk_row + row, head = c.head * p.group + r % p.group;
  uint16_t *at = static_cast<uint16_t *>(p.out) +
                 int64_t(p.query_start[c.sequence] + r / p.group) * p.out_token_stride +
                 int64_t(head) * p.out_head_stride + kLaneFirst * lane;
  if (p.sinks) total += exp2_fast(fmaf(p.sinks[head], 1.4426950408889634f, -maximum));
  const float factor = 1.0f / total;
  if constexpr (kLane == 3) {
#pragma unroll
    for (int i = 0; i < 3; ++i)
      at[kLaneNext * i] = uint16_t(is_f16() ? pack_half(x[i] * factor, 0.0f) : pack_bf16(x[i] * factor, 0.0f));
  } else {
#pragma unroll
    for (int i = 0; i < kLane; i += 2)
      *reinterpret_cast<uint32_t *>(at + i) =
          is_f16() ? pack_half(x[i] * factor, x[i + 1] * factor) : pack_bf16(x[i] * factor, x[i + 1] * factor);
  }
}

// Counts this block in; the last of an item's blocks adds up all parts.
template <int D, int Q, int ROWS, bool CAPPED>
KAKEYA_D void Attend<D, Q, ROWS, CAPPED>::merge(const AttendCursor &c, int item, int rows, int64_t records,
                                                int item_begin, int item_end) {
  const int64_t blocks = working_blocks(), total = total_units();
  // The blocks whose ranges hold the item's first and last unit.
  const int first = int(((item_begin + 1) * blocks - 1) / total), last = int((item_end * blocks - 1) / total);
  // The barrier and one thread's release make all of the block's results visible to whom its count reaches.
  __syncthreads();
  const uint32_t flag = shared + M::kFlag;
  if (thread == 0) {
    int *counter = p.counters + (int64_t(blockIdx.y) * p.num_seqs * p.num_kv_heads + item);
    const bool done = add_acquire_release(counter, 1) == last - first;
    if (done) *counter = 0;
    sts_u32(flag, done);
  }
  __syncthreads();
  if (!lds_u32(flag)) return;
  const float *base = p.workspace + (blockIdx.y * records + item) * record_floats();
  for (int row = warp; row < rows; row += S::kWarps) {
    const float *totals = base + record_rows() * D + 2 * row, *sums = base + row * D + kLaneFirst * lane;
    float maximum = kNoScore;
    for (int b = first + lane; b <= last; b += 32)
      maximum = fmaxf(maximum, __ldcg(totals + int64_t(b) * record_floats()));
#pragma unroll
    for (int k = 1; k < 32; k *= 2) maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, k));
    float x[kLane], total_weight = 0.0f;
#pragma unroll
    for (int i = 0; i < kLane; ++i) x[i] = 0.0f;
    for (int b = first; b <= last; b += 32) {
      // A part a lane; then all lanes walk over the parts, many loads at a time.
      const bool mine = b + lane <= last;
      const float2 part = mine ? load_two(totals + int64_t(b + lane) * record_floats()) : make_float2(kNoScore, 0.0f);
      const float weight = mine ? exp2_fast(part.x - maximum) : 0.0f;
      total_weight += weight * part.y;
      const int count = min(32, last - b + 1);
#pragma unroll 8
      for (int i = 0; i < count; ++i) {
        float y[kLane];
        load_lane_sums(y, sums + int64_t(b + i) * record_floats());
        const float w = __shfl_sync(~0u, weight, i);
#pragma unroll
        for (int k = 0; k < kLane; ++k) x[k] = fmaf(w, y[k], x[k]);
      }
    }
#pragma unroll
    for (int k = 1; k < 32; k *= 2) total_weight += __shfl_xor_sync(~0u, total_weight, k);
    write_row(c, row, x, maximum, total_weight);
  }
}

}  // namespace kakeya
