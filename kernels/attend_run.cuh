// A thread block's whole run: its range, segment by segment, page by page. Part of Attend, see attend.cuh.
#pragma once

#include "attend.cuh"

namespace kakeya {

template <int D, int Q, int ROWS, bool CAPPED>
KAKEYA_D void Attend<D, Q, ROWS, CAPPED>::load_table() {
  const uint4 *at = t.at<uint4>(t.offsets) + (warp * S::kWarpTiles / 2 * S::kPairSteps * 32 + lane) * 2;
#pragma unroll
  for (int s = 0; s < S::kPairSteps; ++s)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 x = __ldg(at + s * 64 + i);
      table[s][i][0] = x.x, table[s][i][1] = x.y, table[s][i][2] = x.z, table[s][i][3] = x.w;
    }
}

template <int D, int Q, int ROWS, bool CAPPED>
KAKEYA_D void Attend<D, Q, ROWS, CAPPED>::run() {
  const int64_t total = total_shares(), blocks = working_blocks();
  // Pages that this step seals may be among those that it reads. In most steps there are none: then only open blocks
  // and the launch before wait for each other, in segment().
  if (blockIdx.x >= blocks || p.plan[0]) await_previous();
  if (blockIdx.x >= blocks) return;
  begin = int(total * blockIdx.x / blocks);
  end = int(total * (blockIdx.x + 1) / blocks);
  if (p.batch_invariant) {
    begin = item_begin(begin);
    end = item_begin(end);
    if (begin == end) return await_previous();
  }
  if (calibrated && thread < 16) sts_f32(shared + M::kFactors + 4 * thread, t.at<float>(t.factors)[thread]);
  if (thread < 4) sts_u32(shared + M::kZero + 4 * thread, 0);
  AttendCursor c = seek(begin);
#if KAKEYA_BULK
  if (thread == 0) {
    for (int i = 0; i < stages; ++i) barrier_init(shared + M::kBarriers + 8 * i, 1);
    barriers_made();
    fetch.stage = 0;
    fetch_item(c, begin);
    for (int i = 0; i + 1 < stages; ++i) fetch_page();
  }
#else
  fetch.stage = 0;
  fetch_item(c, begin);
  for (int i = 0; i + 1 < stages; ++i) fetch_page();
#endif
  // Nobody waits here for the first transfers to be under way: segment() does, with its own loads on their way.
  load_table();
  magic = opaque(0x64006400u);
  int stage = 0;
  uint32_t parity = 0;
  for (int at = begin; at < end;) {
    const int count = min(end - at, c.units - c.unit);
    if (rows_of(c) > chunk_row) {
      if (calibrated)
        segment<true>(c, count, at, stage, parity);
      else
        segment<false>(c, count, at, stage, parity);
    }
    at += count;
    if (at < end) c = following(c);
  }
}

// Waits for the next page and prepares it; tells where it is.
template <int D, int Q, int ROWS, bool CAPPED>
template <bool CALIBRATED>
KAKEYA_D uint32_t Attend<D, Q, ROWS, CAPPED>::next_page(int &stage, uint32_t &parity, uint32_t buffer) {
  await_page(stage, parity);
#if !KAKEYA_BULK
  __syncthreads();
#endif
  const uint32_t page = stage_at(stage);
  prepare<CALIBRATED>(page, buffer);
  if (++stage == stages) stage = 0, parity ^= 1;
  return page;
}

// Units [c.unit, c.unit + count) of one item. `stage` and `parity` tell where its first sealed page is, and are moved
// on.
template <int D, int Q, int ROWS, bool CAPPED>
template <bool CALIBRATED>
KAKEYA_D void Attend<D, Q, ROWS, CAPPED>::segment(const AttendCursor &c, int count, int at, int &stage,
                                                  uint32_t &parity) {
  begin_segment(c);
  __syncthreads();  // barriers and constants of run() are there
  int left = max(0, int(opaque(min(c.unit + count, c.pages) - c.unit)));
  uint32_t buffer = 0, page = 0;
  if (left) page = next_page<CALIBRATED>(stage, parity, 0);
  __syncthreads();
  while (left) {
    float s[kScores];
    scores(page, s);
    __syncthreads();
    // All warps are done with the page before this one: its stage takes the next transfer.
#if !KAKEYA_BULK
    fetch_page();  // await_page() counts on it
#endif
    if (num_slots) place_slots(page);
    gather(s);
    if constexpr (CAPPED) cap_scores(s, kScoreUnit);
    const uint32_t now = page;
    if (--left)
      page = next_page<CALIBRATED>(stage, parity, buffer ^ 1);
    else if (c.unit + count >= c.pages)
      hide_rows(s);
    softmax<false>(s);
#if KAKEYA_BULK
    // There is time until the next barrier, and warps that wait for none meanwhile.
    if (warp == 0 && lane == 0) fetch_page();
#endif
    values(now, buffer);
    buffer ^= 1;
  }
#pragma unroll
  for (int n = 0; n < NB; ++n)
#pragma unroll
    for (int i = 0; i < S::kTiles; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) raw[n][i][e] = 0.0f;
  await_previous();  // open blocks, and the workspace that launches share
  if (c.unit + count > c.pages) {
    __syncthreads();  // other warps may still read the last page's probabilities, whose memory partial scores share
    prepare_raw(c);
  }
  const int first_open = sequence_blocks(c.tokens, c.length).first_open;
  for (int u = max(c.unit, c.pages); u < c.unit + count; ++u) {
    __syncthreads();
    open_block(c, first_open + u - c.pages);
  }
  const int item_begin = at - c.unit;
  flush(c, count == c.units, item_begin, item_begin + c.units);
}

}  // namespace kakeya
