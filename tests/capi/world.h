/*
 * One step of a serving engine in miniature, for the C tests: k, v, q, out, pages, open blocks, tables, and the
 * arguments of kakeya_seal, kakeya_write and kakeya_attend over them. Every output begins as a known pattern, so
 * that a refused call can be shown to have written nothing.
 */

#ifndef KAKEYA_TESTS_WORLD_H
#define KAKEYA_TESTS_WORLD_H

#include "fixture.h"

typedef struct {
  const kakeya_codec *codec;
  uint32_t dtype;
  size_t page_bytes;
  uint32_t tokens, blocks, open; /* tokens of a step, blocks of the cache, slots of open_blocks */

  void *k, *v, *q;    /* [tokens][heads][HEAD_DIM] */
  void *out;          /* [tokens][Q_HEADS][HEAD_DIM] */
  float *lse;         /* [tokens][Q_HEADS] */
  uint8_t *pages;     /* [blocks][KV_HEADS] */
  void *open_blocks;  /* [open][2][KV_HEADS][128][HEAD_DIM] */
  int64_t *slots;     /* [tokens] */
  int32_t *positions; /* [tokens] */
  int32_t *open_slot; /* [blocks] */
  int32_t *blocks_of; /* block_table of one sequence: [blocks] */
  int32_t query_start[2], seq_lens[1];

  kakeya_seal_args seal;
  kakeya_write_args write;
  kakeya_attend_args attend;
} world;

/* A step of `tokens` tokens of one sequence that begins at position `first`; its logical block i is block
 * blocks - 1 - i of the cache. Blocks have no open slots yet. All args are valid; seal takes the first 128
 * tokens. */
world *world_new(const kakeya_codec *codec, uint32_t dtype, uint32_t tokens, uint32_t first, uint32_t blocks,
                 uint32_t open);
void world_free(world *w);

/* Sets all outputs to the known pattern, and counts the bytes of them that differ from it. */
void world_mark(world *w);
size_t world_touched(const world *w);

#endif
