// Arguments of the kernels, passed by value. crates/ffi mirrors each as a repr(C) struct of the same size; strides
// count elements unless their name says bytes. Pointers are device pointers; nothing here is allocated, copied or
// synchronised by a kernel, so every launch may be captured in a CUDA graph.
#pragma once

#include "tables.cuh"

namespace kakeya {

// Element type of q, k, v, out and the open blocks.
enum ElementType : int32_t { kBf16 = 0, kF16 = 1 };

// One full block to seal, written by kakeya_plan. Row `first_row + i` of k and v is its token i; where first_row is
// negative the block began before this step, and all its rows are in the open block `slot`.
struct SealTask {
  int32_t block, block_index, first_row, slot;
};

// What kakeya_plan writes, int32: [0] number of seal tasks, [1] work units of attention in all (per KV head), [2..3]
// zero, [4 ..] seal tasks (four int32 each, room for max_tasks), then cumulative work units [max_seqs + 1].
// A sequence's work units are the blocks that its tokens of this step read (SequenceBlocks); 0 where it has no token in
// this step or more than max_query of them (such a sequence is prefill: another kernel's business).
struct PlanParams {
  const int32_t *query_start;  // [num_seqs + 1]
  const int32_t *seq_lens;     // [num_seqs], this step's tokens included
  const int32_t *block_table;  // [num_seqs][block_table_stride]
  const int32_t *open_slot;    // by block, -1: none
  int64_t block_table_stride;
  int32_t *plan;
  int32_t num_seqs, max_seqs, max_tasks, max_query;
};

KAKEYA_HD constexpr int64_t plan_cumulative(int64_t max_tasks) {
  return 4 + 4 * max_tasks;
}
KAKEYA_HD constexpr int64_t plan_size(int64_t max_seqs, int64_t max_tasks) {
  return plan_cumulative(max_tasks) + max_seqs + 1;
}

// Copies a step's keys and values into open blocks.
struct AppendParams {
  const void *k, *v;
  int64_t k_token_stride, k_head_stride, v_token_stride, v_head_stride;
  const int64_t *slot_mapping;  // [num_tokens]: block * 128 + offset, -1: padding
  const int32_t *open_slot;     // by block
  void *open_blocks;            // [num_open][K, V][num_kv_heads][128][head_dim]
  int32_t num_tokens, num_kv_heads, head_dim, reserved;
};

// Seals the blocks of a plan, after kakeya_append of the same step.
struct SealParams {
  const Tables *tables;
  const void *k, *v;
  int64_t k_token_stride, k_head_stride, v_token_stride, v_head_stride;
  const void *open_blocks;
  const int32_t *plan;
  uint8_t *pages;
  int64_t page_block_stride, page_head_stride;  // bytes
  uint32_t *status;                             // set to kSealNonFinite where a value was refused
  int32_t layer, first_head, num_kv_heads, element;
};

// Opens pages into dense rows, for prefill that continues a sequence, and for debugging.
struct OpenParams {
  const Tables *tables;
  const uint8_t *pages;
  int64_t page_block_stride, page_head_stride;  // bytes
  const int32_t *blocks;                        // [num_blocks] block ids; block i fills rows 128 i ..
  void *k, *v;                                  // [128 num_blocks][num_kv_heads][head_dim] by these strides
  int64_t k_token_stride, k_head_stride, v_token_stride, v_head_stride;
  int32_t num_blocks, layer, first_head, num_kv_heads, element, reserved;
};

// The blocks that the last `tokens` tokens of a sequence of `length` read, each once for all of them. A token reads the
// blocks before its own from their pages and its own block as it stands, whatever other tokens come in the same step.
struct SequenceBlocks {
  int pages;       // blocks [0, pages)
  int first_open;  // then open blocks from this one on. Where tokens reach over the end of a block, it is both: a page
                   // to those behind it, sealed in this very step
  int units;       // pages and open blocks
};
KAKEYA_HD SequenceBlocks sequence_blocks(int tokens, int length) {
  const int last = (length - 1) / kBlock, first = (length - tokens) / kBlock;
  return {last, first, last + (last - first + 1)};
}

// Attention of up to max_query tokens a sequence over sealed pages and open blocks, after kakeya_seal of the same step.
struct AttendParams {
  const Tables *tables;
  const uint8_t *pages;
  int64_t page_block_stride, page_head_stride;  // bytes
  const void *q;
  int64_t q_token_stride, q_head_stride;
  void *out;
  int64_t out_token_stride, out_head_stride;
  const void *open_blocks;
  const int32_t *open_slot;
  const int32_t *block_table;
  int64_t block_table_stride;
  const int32_t *query_start, *seq_lens, *plan;
  // Partial results and arrival counters; see attend_workspace in attend.cuh. Counters must be zero before the first
  // launch and are zero after each.
  float *workspace;
  int32_t *counters;
  int32_t num_seqs, max_tasks, num_kv_heads, group;  // group: query heads of a KV head
  int32_t layer, first_head, element;
  int32_t batch_invariant;  // whether no item may be divided: a row's result is then the same in every step
  float scale;              // of the scores, such as 1 / sqrt(head_dim)
  float soft_cap;           // of scores, positive; only the kernels for models that have one look at it
  const float *sinks;       // by query head, or nullptr: a score of a key without a value
};

}  // namespace kakeya
