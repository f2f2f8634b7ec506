/*
 * attend - one sequence of a model's layer, from its prompt to its last token, without a serving engine.
 *
 * What an engine does for each layer, in miniature: a cache of blocks, one open block, a block table; kakeya_write for
 * the tokens of a step, then kakeya_attend for their queries. The prompt is one step, every later token one of its own,
 * and on the way blocks fill and are sealed. Each answer is compared with attention over the uncompressed K and V in
 * double precision; leaves with 1 if anything fails or if they lie further apart than MAX_RELATIVE_RMS.
 *
 *     cc -std=c99 -I csrc/include csrc/examples/attend.c -L target/release -lkakeya -lm -o attend
 *     LD_LIBRARY_PATH=target/release ./attend
 *
 * Copyright the KAKEYA authors. Licence: Apache-2.0.
 */

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kakeya.h"

#define KV_HEADS 2
#define Q_HEADS 4
#define HEAD_DIM 64
#define PROMPT 300
#define TOKENS 400
#define BLOCKS ((TOKENS + KAKEYA_BLOCK_TOKENS - 1) / KAKEYA_BLOCK_TOKENS)

/* The RMS of the error over the RMS of the answer. Values are mostly noise here, which compresses worst; the bound
 * leaves room for other seeds. */
#define MAX_RELATIVE_RMS 0.15

static const char MODEL[] =
    "{\"num_layers\":1,\"num_kv_heads\":2,\"num_q_heads\":4,\"head_dim\":64,\"max_position\":4096,\"rope\":null}";
static const char RECIPE[] = "kakeya-free-4.6x";

/* What a model would compute for this layer. */
static float q[TOKENS][Q_HEADS][HEAD_DIM], k[TOKENS][KV_HEADS][HEAD_DIM], v[TOKENS][KV_HEADS][HEAD_DIM];
static float out[TOKENS][Q_HEADS][HEAD_DIM];

/* The cache: pages, and raw K and V of the one block that is not full. */
static uint8_t *pages;
static size_t page_bytes;
static float open_block[2][KV_HEADS][KAKEYA_BLOCK_TOKENS][HEAD_DIM];
static int32_t open_slot[BLOCKS];
static int32_t block_table[BLOCKS];

/* Roughly normal noise: the sum of twelve uniform numbers from a 64-bit linear congruential generator. */
static float noise(uint64_t *state) {
  double sum = -6.0;
  for (int i = 0; i < 12; ++i) {
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    sum += (double)(*state >> 40) / (double)(1 << 24);
  }
  return (float)sum;
}

/* [tokens][heads][HEAD_DIM], each channel with its own mean and scale. */
static void fill(float *x, size_t heads, float mean, uint64_t seed) {
  for (size_t i = 0; i < TOKENS * heads * HEAD_DIM; ++i) {
    const float channel = (float)(i % HEAD_DIM) / HEAD_DIM;
    x[i] = mean * sinf(20.0f * channel) + (0.5f + channel) * noise(&seed);
  }
}

/* Writes and answers tokens first to end - 1 of the sequence. */
static kakeya_status step(const kakeya_codec *codec, uint32_t first, uint32_t end) {
  static int64_t slots[TOKENS];
  static int32_t positions[TOKENS];
  /* A block that a step begins or ends inside of needs an open slot. With one slot that is one block: here a step
   * begins at 0, or holds one token. */
  const uint32_t partial = (first % KAKEYA_BLOCK_TOKENS != 0 ? first : end - 1) / KAKEYA_BLOCK_TOKENS;
  for (uint32_t b = 0; b < BLOCKS; ++b) open_slot[b] = -1;
  open_slot[block_table[partial]] = 0;
  for (uint32_t t = first; t < end; ++t) {
    const uint32_t block = (uint32_t)block_table[t / KAKEYA_BLOCK_TOKENS];
    slots[t] = (int64_t)block * KAKEYA_BLOCK_TOKENS + t % KAKEYA_BLOCK_TOKENS;
    positions[t] = (int32_t)t;
  }
  const kakeya_write_args write = {
      .struct_size = sizeof write,
      .num_heads = KV_HEADS,
      .dtype = KAKEYA_DTYPE_F32,
      .num_tokens = end - first,
      .num_blocks = BLOCKS,
      .num_open = 1,
      .k = k[first],
      .v = v[first],
      .k_token_stride = KV_HEADS * HEAD_DIM,
      .k_head_stride = HEAD_DIM,
      .v_token_stride = KV_HEADS * HEAD_DIM,
      .v_head_stride = HEAD_DIM,
      .slot_mapping = slots + first,
      .positions = positions + first,
      .pages = pages,
      .page_block_stride = (int64_t)(KV_HEADS * page_bytes),
      .page_head_stride = (int64_t)page_bytes,
      .open_blocks = open_block,
      .open_slot = open_slot,
  };
  kakeya_status status = kakeya_write(codec, &write);
  if (status != KAKEYA_OK) return status;

  const int32_t query_start[2] = {0, (int32_t)(end - first)};
  const int32_t seq_lens[1] = {(int32_t)end};
  const kakeya_attend_args attend = {
      .struct_size = sizeof attend,
      .num_kv_heads = KV_HEADS,
      .num_q_heads = Q_HEADS,
      .dtype = KAKEYA_DTYPE_F32,
      .num_seqs = 1,
      .num_tokens = end - first,
      .num_blocks = BLOCKS,
      .num_open = 1,
      .max_blocks_per_seq = BLOCKS,
      .scale = 0.125f, /* 1 / sqrt(HEAD_DIM) */
      .q = q[first],
      .k = k[first],
      .v = v[first],
      .q_token_stride = Q_HEADS * HEAD_DIM,
      .q_head_stride = HEAD_DIM,
      .k_token_stride = KV_HEADS * HEAD_DIM,
      .k_head_stride = HEAD_DIM,
      .v_token_stride = KV_HEADS * HEAD_DIM,
      .v_head_stride = HEAD_DIM,
      .out = out[first],
      .out_token_stride = Q_HEADS * HEAD_DIM,
      .out_head_stride = HEAD_DIM,
      .query_start = query_start,
      .seq_lens = seq_lens,
      .block_table = block_table,
      .block_table_stride = BLOCKS,
      .pages = pages,
      .page_block_stride = (int64_t)(KV_HEADS * page_bytes),
      .page_head_stride = (int64_t)page_bytes,
      .open_blocks = open_block,
      .open_slot = open_slot,
  };
  return kakeya_attend(codec, &attend);
}

/* Adds to error and energy what one query head of token t makes of it, against all of K and V. */
static void compare(uint32_t t, uint32_t head, double *error, double *energy) {
  static double weight[TOKENS];
  const uint32_t kv = head / (Q_HEADS / KV_HEADS);
  double most = -INFINITY, sum = 0.0;
  for (uint32_t p = 0; p <= t; ++p) {
    weight[p] = 0.0;
    for (size_t c = 0; c < HEAD_DIM; ++c) weight[p] += 0.125 * q[t][head][c] * k[p][kv][c];
    most = fmax(most, weight[p]);
  }
  for (uint32_t p = 0; p <= t; ++p) sum += weight[p] = exp(weight[p] - most);
  for (size_t c = 0; c < HEAD_DIM; ++c) {
    double answer = 0.0;
    for (uint32_t p = 0; p <= t; ++p) answer += weight[p] / sum * v[p][kv][c];
    *error += (out[t][head][c] - answer) * (out[t][head][c] - answer);
    *energy += answer * answer;
  }
}

/* The relative RMS error of tokens first to end - 1. */
static double relative_rms(uint32_t first, uint32_t end) {
  double error = 0.0, energy = 0.0;
  for (uint32_t t = first; t < end; ++t) {
    for (uint32_t head = 0; head < Q_HEADS; ++head) compare(t, head, &error, &energy);
  }
  return sqrt(error / energy);
}

static int fail(const char *what, kakeya_status status) {
  fprintf(stderr, "attend: %s: %s: %s\n", what, kakeya_status_name(status), kakeya_last_error());
  return 1;
}

/* The whole sequence; 0, or 1 with the reason on stderr. */
static int serve(const kakeya_codec *codec) {
  kakeya_status status = step(codec, 0, PROMPT);
  if (status != KAKEYA_OK) return fail("prompt", status);
  for (uint32_t t = PROMPT; t < TOKENS; ++t) {
    status = step(codec, t, t + 1);
    if (status != KAKEYA_OK) return fail("token", status);
  }
  const double prompt = relative_rms(0, PROMPT), later = relative_rms(PROMPT, TOKENS);
  printf("a block: %zu bytes in pages, %zu in bfloat16\n", KV_HEADS * page_bytes,
         (size_t)2 * 2 * KV_HEADS * KAKEYA_BLOCK_TOKENS * HEAD_DIM);
  printf("relative RMS error of the answers: %.2e in the prompt, %.4f after it\n", prompt, later);
  /* A prompt sees its own step raw: what is left is float against double. Written so that a NaN fails too. */
  if (!(prompt <= 1e-5 && later <= MAX_RELATIVE_RMS)) {
    fprintf(stderr, "attend: errors above 1e-5, %.2f\n", MAX_RELATIVE_RMS);
    return 1;
  }
  return 0;
}

int main(void) {
  kakeya_codec *codec = NULL;
  kakeya_status status = kakeya_require_abi(KAKEYA_ABI_VERSION);
  if (status != KAKEYA_OK) return fail("kakeya_require_abi", status);
  status = kakeya_codec_new(RECIPE, strlen(RECIPE), MODEL, strlen(MODEL), NULL, 0, &codec);
  if (status != KAKEYA_OK) return fail("kakeya_codec_new", status);
  int result = 1;
  status = kakeya_codec_page_bytes(codec, 0, &page_bytes);
  if (status == KAKEYA_OK) {
    /* Where a sequence's blocks lie is the engine's business: here, backwards. */
    for (int32_t b = 0; b < BLOCKS; ++b) block_table[b] = BLOCKS - 1 - b;
    fill(&q[0][0][0], Q_HEADS, 0.0f, 1);
    fill(&k[0][0][0], KV_HEADS, 2.0f, 2);
    fill(&v[0][0][0], KV_HEADS, 0.5f, 3);
    pages = calloc(BLOCKS * KV_HEADS, page_bytes);
    if (pages == NULL) fprintf(stderr, "attend: out of memory\n");
    if (pages != NULL) result = serve(codec);
  } else {
    fail("kakeya_codec_page_bytes", status);
  }
  free(pages);
  kakeya_codec_free(codec);
  return result;
}
