// What a step of an engine does to the cache before attention: a plan of its work, and its tokens into open blocks.
#pragma once

#include "params.cuh"

namespace kakeya {

constexpr int kPlanThreads = 1024;
constexpr int kAppendThreads = 256;

// One sequence's share of a step.
struct SequenceWork {
  int first_block, tasks;  // blocks completed in this step
  int units;               // of attention
  int history, tokens;
};

KAKEYA_HD SequenceWork sequence_work(int tokens, int length, int max_query) {
  SequenceWork w = {0, 0, 0, length - tokens, tokens};
  if (tokens <= 0) return w;
  w.first_block = w.history / kBlock;
  w.tasks = length / kBlock - w.first_block;
  if (tokens <= max_query) w.units = sequence_blocks(tokens, length).units;
  return w;
}

KAKEYA_HD SealTask seal_task(const PlanParams &p, int sequence, const SequenceWork &w, int index) {
  const int logical = w.first_block + index;
  const int block = p.block_table[sequence * p.block_table_stride + logical], before = logical * kBlock - w.history;
  if (before >= 0) return {block, logical, p.query_start[sequence] + before, -1};
  return {block, logical, -1, p.open_slot[block]};
}

}  // namespace kakeya
