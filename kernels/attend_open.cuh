// Open blocks: rows of the element type, without a page. Part of Attend, see attend.cuh.
#pragma once

#include "attend.cuh"

namespace kakeya {

// Attention of the rows whose tokens lie in an open block over its tokens up to their own.
template <int D, int Q, int ROWS, bool CAPPED>
KAKEYA_D void Attend<D, Q, ROWS, CAPPED>::open_block(const AttendCursor &c, int index) {
  const int len = c.length, history = len - c.tokens;
  const int block = p.block_table[c.sequence * p.block_table_stride + index];
  const int slot = p.open_slot[block];
  // Without a slot there is nothing to read: no token counts, and a result of nothing is not a number.
  const int tokens = slot < 0 ? 0 : min(len - index * kBlock, kBlock);
  const uint16_t *k = open_rows(slot, 0, c.head), *v = open_rows(slot, 1, c.head);
  float s[kScores];
#pragma unroll
  for (int i = 0; i < kScores; ++i) s[i] = 0.0f;
  {
    uint32_t q[NB][kRegs];  // zeros, as the keys, where the warp has no unit
#pragma unroll
    for (int n = 0; n < NB; ++n) {
      if (has_unit())
        load_regs(q[n], shared + M::kRawQuery + my_regs() + n * kTileBytes);
      else
#pragma unroll
        for (int r = 0; r < kRegs; ++r) q[n][r] = 0;
    }
    uint32_t part = my_part + first_part();
#pragma unroll 1
    for (int pair = 0; pair < 4; ++pair) {
      float acc[2][NB][4];
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
        for (int n = 0; n < NB; ++n) acc[tile][n][0] = acc[tile][n][1] = acc[tile][n][2] = acc[tile][n][3] = 0.0f;
        uint32_t a[S::kTiles][4];
#pragma unroll
        for (int j = 0; j < S::kTiles; ++j)
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            const int row = tile_token(2 * pair + tile, g + 8 * (r & 1));
            const int channel = warp * S::kUnitChannels + 16 * j + 8 * (r >> 1) + 2 * t4;
            a[j][r] = has_unit() && row < tokens ? *reinterpret_cast<const uint32_t *>(k + row * D + channel) : 0u;
          }
#pragma unroll
        for (int n = 0; n < NB; ++n)
#pragma unroll
          for (int j = 0; j < S::kTiles; ++j)
            mma_element(is_f16(), acc[tile][n], a[j][0], a[j][1], a[j][2], a[j][3], q[n][2 * j], q[n][2 * j + 1]);
      }
      hand_over(pair, acc, part, s);
    }
  }
  __syncthreads();
  gather(s);
  float unit = p.scale * 1.4426950408889634f;
  if constexpr (CAPPED) {
#pragma unroll
    for (int i = 0; i < kScores; ++i) s[i] *= unit;
    cap_scores(s, 1.0f);
    unit = 1.0f;
  }
#pragma unroll
  for (int h = 0; h < 2 * S::kWarpTiles; ++h) {
    const int token = my_token(h / 2, h % 2);
#pragma unroll
    for (int n = 0; n < NB; ++n)
#pragma unroll
      for (int e = 0; e < NC; ++e) {
        float &x = s[(h * NB + n) * NC + e];
        x *= unit;
        // Where the row's own token lies in this block; one behind it has read the block's page.
        const int place = history + (chunk_row + row_of(n, e)) / p.group - index * kBlock;
        if (token > place || place >= kBlock || token >= tokens) x = -INFINITY;
      }
  }
  softmax<true>(s);
  // Row g of a tile is channel 2g, row g + 8 channel 2g + 1, so that a lane loads pairs of channels.
  if (has_unit())
#pragma unroll
    for (int n = 0; n < R::kMeanTiles; ++n) {
      float total[4] = {0, 0, 0, 0};
      const uint32_t ones = is_f16() ? 0x3c003c00u : 0x3f803f80u;
#pragma unroll 1
      for (int m = 0; m < 8; ++m) {
        uint32_t x4[4];
        load_probs(x4, n, m / 2);
        const uint32_t b[2] = {m % 2 ? x4[2] : x4[0], m % 2 ? x4[3] : x4[1]};
        mma_element(is_f16(), total, ones, ones, ones, ones, b[0], b[1]);
        const int token = 16 * m + 2 * t4;
#pragma unroll
        for (int i = 0; i < S::kTiles; ++i) {
          const uint16_t *at = v + value_unit() * S::kUnitChannels + 16 * i + 2 * g;
          uint32_t x[4];
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            const int row = token + (r & 1) + 8 * (r >> 1);
            x[r] = row < tokens ? *reinterpret_cast<const uint32_t *>(at + row * D) : 0u;
          }
          mma_element(is_f16(), raw[n % NB][i], __byte_perm(x[0], x[1], 0x5410), __byte_perm(x[0], x[1], 0x7632),
                      __byte_perm(x[2], x[3], 0x5410), __byte_perm(x[2], x[3], 0x7632), b[0], b[1]);
        }
      }
      if constexpr (R::kSplit) {
        sum[0][0] += total[0] + total[1];
      } else {
        sum[n % NB][0] += total[0];
        sum[n % NB][NC - 1] += total[1];
      }
    }
  __syncthreads();  // the next block's scores and probabilities may be written
}

}  // namespace kakeya
