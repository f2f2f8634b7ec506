// The list of work units, and the transfers that run ahead of it. Part of Attend, see attend.cuh.
#pragma once

#include "attend.cuh"

namespace kakeya {

// The unit at place `at` of the list.
template <int D, int Q, int ROWS, bool CAPPED>
KAKEYA_D AttendCursor Attend<D, Q, ROWS, CAPPED>::seek(int at) const {
  int lo = 0, hi = p.num_seqs - 1;  // last sequence that begins at or before `at`
  while (lo < hi) {
    const int mid = (lo + hi + 1) / 2;
    if (cumulative[mid] * p.num_kv_heads <= at)
      lo = mid;
    else
      hi = mid - 1;
  }
  AttendCursor c;
  c.sequence = lo;
  c.units = cumulative[lo + 1] - cumulative[lo];
  const int local = at - cumulative[lo] * p.num_kv_heads;
  c.head = c.units ? local / c.units : 0;
  c.unit = local - c.head * c.units;
  c.pages = blocks_of(lo).pages;
  return c;
}

// The first unit of the item after c's; there must be one.
template <int D, int Q, int ROWS, bool CAPPED>
KAKEYA_D AttendCursor Attend<D, Q, ROWS, CAPPED>::following(AttendCursor c) const {
  c.unit = 0;
  if (++c.head == p.num_kv_heads) {
    c.head = 0;
    do {
      ++c.sequence;
      c.units = cumulative[c.sequence + 1] - cumulative[c.sequence];
    } while (c.units == 0);
    c.pages = blocks_of(c.sequence).pages;
  }
  return c;
}

template <int D, int Q, int ROWS, bool CAPPED>
KAKEYA_D void Attend<D, Q, ROWS, CAPPED>::fetch_begin() {
  fetch.stage = 0;
  fetch.at = begin;
  fetch.cursor = seek(begin);
  fetch_item();
}

// Goes to the next sealed page of this block's range, from the cursor's own item on; fetch.at is the cursor's place.
template <int D, int Q, int ROWS, bool CAPPED>
KAKEYA_D void Attend<D, Q, ROWS, CAPPED>::fetch_item() {
  while (fetch.at < end) {
    const AttendCursor &c = fetch.cursor;
    fetch.left = min(end - fetch.at, c.pages - c.unit);
    if (fetch.left > 0 && rows_of(c.sequence) > chunk_row) {
      fetch.more = 1;
      return fetch_look_up();
    }
    fetch.at += c.units - c.unit;
    if (fetch.at < end) fetch.cursor = following(c);
  }
  fetch.more = 0;
}

// The block's place in the table is loaded one page ahead and met when its transfer starts: nobody waits for it.
template <int D, int Q, int ROWS, bool CAPPED>
KAKEYA_D void Attend<D, Q, ROWS, CAPPED>::fetch_look_up() {
  const AttendCursor &c = fetch.cursor;
  fetch_block = __ldg(p.block_table + c.sequence * p.block_table_stride + c.unit);
}

// Starts the transfer of the next sealed page, if there is one. From sm_90 on thread 0 alone calls this.
template <int D, int Q, int ROWS, bool CAPPED>
KAKEYA_D void Attend<D, Q, ROWS, CAPPED>::fetch_page() {
  if (fetch.more) {
    const uint8_t *page = p.pages + fetch_block * p.page_block_stride + fetch.cursor.head * p.page_head_stride;
    const uint32_t dst = stage_at(fetch.stage);
#if KAKEYA_BULK
    const uint32_t bar = shared + M::kBarriers + 8 * fetch.stage;
    barrier_expect(bar, page_bytes);
    bulk_load(dst, page, page_bytes, bar);
#else
    copy_async(dst, page, page_bytes);
#endif
    if (++fetch.stage == stages) fetch.stage = 0;
    ++fetch.at;
    if (--fetch.left > 0) {
      ++fetch.cursor.unit;
      fetch_look_up();
    } else {
      fetch.at += fetch.cursor.units - fetch.cursor.unit - 1;
      if (fetch.at < end) fetch.cursor = following(fetch.cursor);
      fetch_item();
    }
  }
#if !KAKEYA_BULK
  end_copy_group();
#endif
}

#if !KAKEYA_BULK
template <int D, int Q, int ROWS, bool CAPPED>
KAKEYA_D void Attend<D, Q, ROWS, CAPPED>::copy_async(uint32_t dst, const void *src, uint32_t bytes) const {
  for (uint32_t i = 16 * thread; i < bytes; i += 16 * S::kThreads)
    copy16_async(dst + i, static_cast<const uint8_t *>(src) + i);
}
#endif

// Waits until a page is there. Before sm_90 a barrier must follow.
template <int D, int Q, int ROWS, bool CAPPED>
KAKEYA_D void Attend<D, Q, ROWS, CAPPED>::await_page([[maybe_unused]] int stage,
                                                     [[maybe_unused]] uint32_t parity) const {
#if KAKEYA_BULK
  barrier_wait(shared + M::kBarriers + 8 * stage, parity);
#else
  // Groups complete in order; those after the next page's may still be under way. There are three stages at least.
  await_copies_but_last_group();
#endif
}

}  // namespace kakeya
