// The list of work units, and the transfers that run ahead of it. Part of Attend, see attend.cuh.
#pragma once

#include "attend.cuh"

namespace kakeya {

// What of a cursor's sequence does not depend on its head.
template <int D, int Q, int ROWS, bool CAPPED>
KAKEYA_D void Attend<D, Q, ROWS, CAPPED>::enter_sequence(AttendCursor &c) const {
  c.units = cumulative[c.sequence + 1] - cumulative[c.sequence];
  c.tokens = p.query_start[c.sequence + 1] - p.query_start[c.sequence];
  c.length = p.seq_lens[c.sequence];
  c.pages = sequence_blocks(c.tokens, c.length).pages;
}

// The unit at place `at` of the list. Called by whole warps: a load of all lanes is a step of the search.
template <int D, int Q, int ROWS, bool CAPPED>
KAKEYA_D AttendCursor Attend<D, Q, ROWS, CAPPED>::seek(int at) const {
  int first = 0;  // the last sequence that begins at or before `at` is one of so many from here on
  for (int count = p.num_seqs; count > 1;) {
    const int step = (count + 31) / 32;
    const bool before = lane * step < count && cumulative[first + lane * step] * p.num_kv_heads <= at;
    const int skip = (__popc(__ballot_sync(~0u, before)) - 1) * step;
    first += skip;
    count = min(step, count - skip);
  }
  AttendCursor c;
  c.sequence = first;
  enter_sequence(c);
  const int local = at - cumulative[first] * p.num_kv_heads;
  c.head = c.units ? local / c.units : 0;
  c.unit = local - c.head * c.units;
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
    } while (cumulative[c.sequence + 1] == cumulative[c.sequence]);
    enter_sequence(c);
  }
  return c;
}

// Goes to the first sealed page from unit c on, which is at place `at`, within this block's range.
template <int D, int Q, int ROWS, bool CAPPED>
KAKEYA_D void Attend<D, Q, ROWS, CAPPED>::fetch_item(AttendCursor c, int at) {
  fetch.left = 0;
  while (at < end) {
    const int left = min(end - at, c.pages - c.unit);
    at += c.units - c.unit;
    if (left > 0 && rows_of(c) > chunk_row) {
      fetch.next = p.block_table + c.sequence * p.block_table_stride + c.unit;
      fetch.left = left;
      fetch.pages = p.pages + c.head * p.page_head_stride;
      fetch.at = at;
      fetch.cursor = c;
      // The table's entry is loaded one page ahead and met when its transfer starts: nobody waits for it.
      fetch_block = __ldg(fetch.next);
      return;
    }
    if (at < end) c = following(c);
  }
}

// Starts the transfer of the next sealed page, if there is one. From sm_90 on thread 0 alone calls this.
template <int D, int Q, int ROWS, bool CAPPED>
KAKEYA_D void Attend<D, Q, ROWS, CAPPED>::fetch_page() {
  const int left = fetch.left;
  if (left > 0) {
    const int stage = fetch.stage;
    const uint8_t *page = fetch.pages + fetch_block * p.page_block_stride;
    const uint32_t dst = stage_at(stage);
#if KAKEYA_BULK
    const uint32_t bar = shared + M::kBarriers + 8 * stage;
    barrier_expect(bar, page_bytes);
    bulk_load(dst, page, page_bytes, bar);
#else
    copy_async(dst, page, page_bytes);
#endif
    fetch.stage = stage + 1 == stages ? 0 : stage + 1;
    if (left > 1) {
      fetch.left = left - 1;
      fetch_block = __ldg(++fetch.next);
    } else if (fetch.at < end) {
      fetch_item(following(fetch.cursor), fetch.at);
    } else {
      fetch.left = 0;
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
