/* See world.h. */

#include "world.h"

#include <math.h>
#include <string.h>

/* Read as elements of any dtype, the pattern is a small number: open blocks that hold it can be sealed. */
enum { PATTERN = 0x3a };

static size_t kv_row(void) {
  return (size_t)KV_HEADS * HEAD_DIM;
}

static size_t q_row(void) {
  return (size_t)Q_HEADS * HEAD_DIM;
}

static size_t open_bytes(const world *w) {
  return (size_t)w->open * 2 * KV_HEADS * BLOCK * HEAD_DIM * element_size(w->dtype);
}

static size_t out_bytes(const world *w) {
  return w->tokens * q_row() * element_size(w->dtype);
}

static size_t lse_bytes(const world *w) {
  return (size_t)w->tokens * Q_HEADS * sizeof(float);
}

static size_t pages_bytes(const world *w) {
  return (size_t)w->blocks * KV_HEADS * w->page_bytes;
}

world *world_new(const kakeya_codec *codec, uint32_t dtype, uint32_t tokens, uint32_t first, uint32_t blocks,
                 uint32_t open) {
  world *w = reserve(sizeof *w);
  memset(w, 0, sizeof *w);
  w->codec = codec;
  w->dtype = dtype;
  w->page_bytes = page_bytes_of(codec);
  w->tokens = tokens;
  w->blocks = blocks;
  w->open = open;
  w->k = noise(dtype, tokens * kv_row(), 2.0f, 1 + first);
  w->v = noise(dtype, tokens * kv_row(), 0.1f, 2 + first);
  w->q = noise(dtype, tokens * q_row(), 0.5f, 3 + first);
  w->out = reserve(out_bytes(w));
  w->lse = reserve(lse_bytes(w));
  w->pages = reserve(pages_bytes(w));
  w->open_blocks = reserve(open_bytes(w));
  w->slots = reserve(tokens * sizeof *w->slots);
  w->positions = reserve(tokens * sizeof *w->positions);
  w->open_slot = reserve(blocks * sizeof *w->open_slot);
  w->blocks_of = reserve(blocks * sizeof *w->blocks_of);
  for (uint32_t b = 0; b < blocks; ++b) {
    w->open_slot[b] = -1;
    w->blocks_of[b] = (int32_t)(blocks - 1 - b);
  }
  for (uint32_t t = 0; t < tokens; ++t) {
    const uint32_t position = first + t;
    w->positions[t] = (int32_t)position;
    w->slots[t] = (int64_t)w->blocks_of[position / BLOCK] * BLOCK + position % BLOCK;
  }
  w->query_start[1] = (int32_t)tokens;
  w->seq_lens[0] = (int32_t)(first + tokens);

  w->seal = (kakeya_seal_args){
      .struct_size = sizeof w->seal,
      .layer = 1,
      .num_heads = KV_HEADS,
      .dtype = dtype,
      .block_index = first / BLOCK,
      .k = w->k,
      .v = w->v,
      .k_token_stride = KV_HEADS * HEAD_DIM,
      .k_head_stride = HEAD_DIM,
      .v_token_stride = KV_HEADS * HEAD_DIM,
      .v_head_stride = HEAD_DIM,
      .pages = w->pages,
      .page_head_stride = (int64_t)w->page_bytes,
  };
  w->write = (kakeya_write_args){
      .struct_size = sizeof w->write,
      .layer = 1,
      .num_heads = KV_HEADS,
      .dtype = dtype,
      .num_tokens = tokens,
      .num_blocks = blocks,
      .num_open = open,
      .k = w->k,
      .v = w->v,
      .k_token_stride = KV_HEADS * HEAD_DIM,
      .k_head_stride = HEAD_DIM,
      .v_token_stride = KV_HEADS * HEAD_DIM,
      .v_head_stride = HEAD_DIM,
      .slot_mapping = w->slots,
      .positions = w->positions,
      .pages = w->pages,
      .page_block_stride = (int64_t)(KV_HEADS * w->page_bytes),
      .page_head_stride = (int64_t)w->page_bytes,
      .open_blocks = w->open_blocks,
      .open_slot = w->open_slot,
  };
  w->attend = (kakeya_attend_args){
      .struct_size = sizeof w->attend,
      .layer = 1,
      .num_kv_heads = KV_HEADS,
      .num_q_heads = Q_HEADS,
      .dtype = dtype,
      .num_seqs = 1,
      .num_tokens = tokens,
      .num_blocks = blocks,
      .num_open = open,
      .max_blocks_per_seq = blocks,
      .scale = 1.0f / sqrtf((float)HEAD_DIM),
      .q = w->q,
      .k = w->k,
      .v = w->v,
      .q_token_stride = Q_HEADS * HEAD_DIM,
      .q_head_stride = HEAD_DIM,
      .k_token_stride = KV_HEADS * HEAD_DIM,
      .k_head_stride = HEAD_DIM,
      .v_token_stride = KV_HEADS * HEAD_DIM,
      .v_head_stride = HEAD_DIM,
      .out = w->out,
      .out_token_stride = Q_HEADS * HEAD_DIM,
      .out_head_stride = HEAD_DIM,
      .query_start = w->query_start,
      .seq_lens = w->seq_lens,
      .block_table = w->blocks_of,
      .block_table_stride = blocks,
      .pages = w->pages,
      .page_block_stride = (int64_t)(KV_HEADS * w->page_bytes),
      .page_head_stride = (int64_t)w->page_bytes,
      .open_blocks = w->open_blocks,
      .open_slot = w->open_slot,
      .lse = w->lse,
  };
  world_mark(w);
  return w;
}

void world_free(world *w) {
  void *memory[] = {w->k,           w->v,     w->q,         w->out,       w->lse,       w->pages,
                    w->open_blocks, w->slots, w->positions, w->open_slot, w->blocks_of, w};
  for (size_t i = 0; i < sizeof memory / sizeof memory[0]; ++i) release(memory[i]);
}

void world_mark(world *w) {
  memset(w->out, PATTERN, out_bytes(w));
  memset(w->lse, PATTERN, lse_bytes(w));
  memset(w->pages, PATTERN, pages_bytes(w));
  memset(w->open_blocks, PATTERN, open_bytes(w));
}

static size_t differing(const void *memory, size_t bytes) {
  size_t count = 0;
  for (size_t i = 0; i < bytes; ++i) count += ((const uint8_t *)memory)[i] != PATTERN;
  return count;
}

size_t world_touched(const world *w) {
  return differing(w->out, out_bytes(w)) + differing(w->lse, lse_bytes(w)) + differing(w->pages, pages_bytes(w)) +
         differing(w->open_blocks, open_bytes(w));
}
