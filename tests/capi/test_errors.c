/*
 * Every way to call kakeya_seal, kakeya_open, kakeya_write and kakeya_attend wrongly that can be told: the status
 * is the documented one, the text names the argument, and no output has changed.
 *
 * With test_abi.c this reaches every status but KAKEYA_ERR_PANIC, which only a bug could raise; its boundary is
 * tested in crates/ffi/src/panic.rs.
 */

#include <math.h>

#include "check.h"
#include "world.h"

/* Runs the call in a world whose arguments the statements before have spoilt, then restores them. */
#define REFUSED(w, noun, expected, part)                                  \
  do {                                                                    \
    CHECK_REFUSED(kakeya_##noun((w)->codec, &(w)->noun), expected, part); \
    const size_t touched = world_touched(w);                              \
    CHECK(touched == 0, "%zu bytes of outputs changed", touched);         \
    world_mark(w);                                                        \
    (w)->noun = good;                                                     \
  } while (0)

#define ODD(pointer) ((void *)((char *)(pointer) + 1))
#define NULL_OF KAKEYA_ERR_NULL_POINTER
#define RANGE KAKEYA_ERR_OUT_OF_RANGE

static void test_seal(const kakeya_codec *codec) {
  world *w = world_new(codec, KAKEYA_DTYPE_BF16, BLOCK, 0, 2, 1);
  const kakeya_seal_args good = w->seal;

  CHECK_REFUSED(kakeya_seal(NULL, &w->seal), NULL_OF, "codec is NULL");
  CHECK_REFUSED(kakeya_seal(codec, NULL), NULL_OF, "args is NULL");
  CHECK_REFUSED(kakeya_seal(codec, ODD(&w->seal)), KAKEYA_ERR_MISALIGNED, "args is at");
  w->seal.struct_size -= 8;
  w->seal.k = NULL; /* not read: the size is checked first */
  REFUSED(w, seal, KAKEYA_ERR_BAD_STRUCT_SIZE, "sizeof(kakeya_seal_args) = 88");
  w->seal.layer = LAYERS;
  REFUSED(w, seal, RANGE, "layer is 2; valid: 0..=1");
  w->seal.first_head = KV_HEADS;
  REFUSED(w, seal, RANGE, "first_head is 2; valid: 0..=1");
  w->seal.first_head = 1;
  REFUSED(w, seal, RANGE, "num_heads is 2; valid: 1..=1");
  w->seal.num_heads = 0;
  REFUSED(w, seal, RANGE, "num_heads is 0");
  w->seal.num_heads = UINT32_MAX;
  REFUSED(w, seal, RANGE, "num_heads is 4294967295");
  w->seal.dtype = 3;
  REFUSED(w, seal, KAKEYA_ERR_BAD_DTYPE, "dtype is 3; valid: 0 (bf16), 1 (f16), 2 (f32)");
  w->seal.block_index = MAX_POSITION / BLOCK;
  REFUSED(w, seal, RANGE, "block_index is 16; valid: 0..=15");
  w->seal.k = NULL;
  REFUSED(w, seal, NULL_OF, "k is NULL");
  w->seal.v = NULL;
  REFUSED(w, seal, NULL_OF, "v is NULL");
  w->seal.pages = NULL;
  REFUSED(w, seal, NULL_OF, "pages is NULL");
  w->seal.k = ODD(w->k);
  REFUSED(w, seal, KAKEYA_ERR_MISALIGNED, "k is at");
  w->seal.dtype = KAKEYA_DTYPE_F32;
  w->seal.v = (char *)w->v + 2; /* a multiple of 2 is not enough for float */
  REFUSED(w, seal, KAKEYA_ERR_MISALIGNED, "v is at");
  w->seal.k_token_stride = -1;
  REFUSED(w, seal, RANGE, "token stride of k is -1");
  w->seal.v_head_stride = INT64_MIN;
  REFUSED(w, seal, RANGE, "head stride of v");
  w->seal.k_token_stride = INT64_MAX;
  REFUSED(w, seal, KAKEYA_ERR_OVERFLOW, "k");
  w->seal.v_head_stride = INT64_MAX;
  REFUSED(w, seal, KAKEYA_ERR_OVERFLOW, "v");
  w->seal.page_head_stride = (int64_t)w->page_bytes - 1;
  REFUSED(w, seal, RANGE, "head stride of pages");
  w->seal.page_head_stride = -(int64_t)w->page_bytes;
  REFUSED(w, seal, RANGE, "head stride of pages");
  w->seal.page_head_stride = INT64_MAX;
  REFUSED(w, seal, KAKEYA_ERR_OVERFLOW, "pages");
  w->seal.k = w->pages;
  REFUSED(w, seal, KAKEYA_ERR_ALIASED, "pages");
  w->seal.num_heads = 1;
  w->seal.pages = (uint8_t *)w->v - w->page_bytes + 1; /* one shared byte */
  REFUSED(w, seal, KAKEYA_ERR_ALIASED, "v (bytes");

  /* A value of the last head: the page of the first one must not have been written. */
  const size_t last = (BLOCK * KV_HEADS - 1) * HEAD_DIM + 5;
  ((uint16_t *)w->v)[last] = 0x7fc0; /* NaN */
  REFUSED(w, seal, KAKEYA_ERR_NON_FINITE, "token 127, channel 5");
  ((uint16_t *)w->v)[last] = 0xff80; /* -infinity */
  REFUSED(w, seal, KAKEYA_ERR_NON_FINITE, "head 1");
  world_free(w);
}

static void test_open(const kakeya_codec *codec) {
  enum { FLOATS = BLOCK * HEAD_DIM };
  static float k[FLOATS + 1], v[FLOATS + 1];
  world *w = world_new(codec, KAKEYA_DTYPE_F32, BLOCK, 0, 1, 0);
  const size_t n = w->page_bytes;
  CHECK_OK(kakeya_seal(codec, &w->seal));
  for (size_t i = 0; i <= FLOATS; ++i) k[i] = v[i] = 1e30f;

  CHECK_REFUSED(kakeya_open(NULL, 1, 0, w->pages, n, k, v, FLOATS), NULL_OF, "codec is NULL");
  CHECK_REFUSED(kakeya_open(codec, LAYERS, 0, w->pages, n, k, v, FLOATS), RANGE, "layer");
  CHECK_REFUSED(kakeya_open(codec, 1, KV_HEADS, w->pages, n, k, v, FLOATS), RANGE, "head is 2; valid: 0..=1");
  CHECK_REFUSED(kakeya_open(codec, 1, 0, NULL, n, k, v, FLOATS), NULL_OF, "page is NULL");
  CHECK_REFUSED(kakeya_open(codec, 1, 0, w->pages, n, NULL, v, FLOATS), NULL_OF, "k is NULL");
  CHECK_REFUSED(kakeya_open(codec, 1, 0, w->pages, n, k, NULL, FLOATS), NULL_OF, "v is NULL");
  CHECK_REFUSED(kakeya_open(codec, 1, 0, w->pages, n, ODD(k), v, FLOATS), KAKEYA_ERR_MISALIGNED, "k is at");
  CHECK_REFUSED(kakeya_open(codec, 1, 0, w->pages, n - 1, k, v, FLOATS), KAKEYA_ERR_BUFFER_TOO_SMALL, "page_len is");
  CHECK_REFUSED(kakeya_open(codec, 1, 0, w->pages, n, k, v, FLOATS - 1), KAKEYA_ERR_BUFFER_TOO_SMALL, "out_len is");
  CHECK_REFUSED(kakeya_open(codec, 1, 0, w->pages, n, k, k + 1, FLOATS), KAKEYA_ERR_ALIASED, "k (bytes");
  CHECK_REFUSED(kakeya_open(codec, 1, 0, (uint8_t *)v, n, k, v, FLOATS), KAKEYA_ERR_ALIASED, "page (bytes");
  w->pages[0] ^= 1;
  CHECK_REFUSED(kakeya_open(codec, 1, 0, w->pages, n, k, v, FLOATS), KAKEYA_ERR_BAD_PAGE, "begins with");
  w->pages[0] ^= 1;
  w->pages[1] = 3;
  CHECK_REFUSED(kakeya_open(codec, 1, 0, w->pages, n, k, v, FLOATS), KAKEYA_ERR_WRONG_VERSION, "format version is '3'");
  w->pages[1] = 2;
  w->pages[7] = 0xff; /* position far beyond the model's */
  CHECK_REFUSED(kakeya_open(codec, 1, 0, w->pages, n, k, v, FLOATS), KAKEYA_ERR_BAD_PAGE, "block index");
  for (size_t i = 0; i <= FLOATS; ++i) CHECK(k[i] == 1e30f && v[i] == 1e30f, "output %zu was touched", i);
  world_free(w);
}

static void test_write(const kakeya_codec *codec) {
  /* Positions 64..327: a block that is completed, a whole one, and one that is begun. Open slots for the partial ones.
   */
  world *w = world_new(codec, KAKEYA_DTYPE_BF16, 264, 64, 4, 2);
  w->open_slot[w->blocks_of[0]] = 1;
  w->open_slot[w->blocks_of[2]] = 0;
  const kakeya_write_args good = w->write;

  CHECK_REFUSED(kakeya_write(NULL, &w->write), NULL_OF, "codec is NULL");
  CHECK_REFUSED(kakeya_write(codec, NULL), NULL_OF, "args is NULL");
  w->write.struct_size = 0;
  REFUSED(w, write, KAKEYA_ERR_BAD_STRUCT_SIZE, "sizeof(kakeya_write_args) = 136");
  w->write.layer = 7;
  REFUSED(w, write, RANGE, "layer is 7");
  w->write.first_head = 1;
  REFUSED(w, write, RANGE, "num_heads");
  w->write.dtype = 17;
  REFUSED(w, write, KAKEYA_ERR_BAD_DTYPE, "dtype is 17");
  w->write.k = NULL;
  REFUSED(w, write, NULL_OF, "k is NULL");
  w->write.v = ODD(w->v);
  REFUSED(w, write, KAKEYA_ERR_MISALIGNED, "v is at");
  w->write.slot_mapping = NULL;
  REFUSED(w, write, NULL_OF, "slot_mapping is NULL");
  w->write.slot_mapping = (int64_t *)(void *)((char *)w->slots + 4);
  REFUSED(w, write, KAKEYA_ERR_MISALIGNED, "slot_mapping is at");
  w->write.positions = NULL;
  REFUSED(w, write, NULL_OF, "positions is NULL");
  w->write.positions = ODD(w->positions);
  REFUSED(w, write, KAKEYA_ERR_MISALIGNED, "positions is at");
  w->write.pages = NULL;
  REFUSED(w, write, NULL_OF, "pages is NULL");
  w->write.open_blocks = NULL;
  REFUSED(w, write, NULL_OF, "open_blocks is NULL");
  w->write.open_blocks = ODD(w->open_blocks);
  REFUSED(w, write, KAKEYA_ERR_MISALIGNED, "open_blocks is at");
  w->write.open_slot = NULL;
  REFUSED(w, write, NULL_OF, "open_slot is NULL");
  w->write.open_slot = ODD(w->open_slot);
  REFUSED(w, write, KAKEYA_ERR_MISALIGNED, "open_slot is at");
  w->write.k_head_stride = -HEAD_DIM;
  REFUSED(w, write, RANGE, "head stride of k is -64");
  w->write.v_token_stride = INT64_MAX / 2;
  REFUSED(w, write, KAKEYA_ERR_OVERFLOW, "v");
  w->write.page_block_stride = (int64_t)w->page_bytes; /* the second head's page is there already */
  REFUSED(w, write, RANGE, "stride of pages");
  w->write.page_block_stride = INT64_MAX;
  REFUSED(w, write, KAKEYA_ERR_OVERFLOW, "pages");
  w->write.num_open = UINT32_MAX;
  REFUSED(w, write, RANGE, "num_open");
  w->write.num_blocks = UINT32_MAX;
  w->write.page_block_stride = INT64_MAX;
  REFUSED(w, write, KAKEYA_ERR_OVERFLOW, "pages");
  w->write.open_blocks = w->k;
  REFUSED(w, write, KAKEYA_ERR_ALIASED, "open_blocks");
  w->write.k = w->pages;
  REFUSED(w, write, KAKEYA_ERR_ALIASED, "pages");
  w->write.open_blocks = w->pages;
  REFUSED(w, write, KAKEYA_ERR_ALIASED, "open_blocks");
  w->write.positions = (const int32_t *)w->open_blocks;
  REFUSED(w, write, KAKEYA_ERR_ALIASED, "positions");
  w->write.slot_mapping = (const int64_t *)(const void *)w->pages;
  REFUSED(w, write, KAKEYA_ERR_ALIASED, "slot_mapping");
  w->write.open_slot = (const int32_t *)(const void *)w->pages;
  REFUSED(w, write, KAKEYA_ERR_ALIASED, "open_slot");

  /* What the arrays hold: the last token is spoilt, so that all others come first. */
  int64_t *const slot = &w->slots[w->tokens - 1];
  int32_t *const position = &w->positions[w->tokens - 1];
  const int64_t good_slot = *slot;
  const int32_t good_position = *position;
  *slot = 4 * BLOCK;
  REFUSED(w, write, RANGE, "slot_mapping is 512");
  *slot = INT64_MAX;
  REFUSED(w, write, RANGE, "slot_mapping is 9223372036854775807");
  *slot = -2;
  REFUSED(w, write, RANGE, "slot_mapping is -2");
  *slot = good_slot - 1;
  *position = good_position - 1;
  REFUSED(w, write, RANGE, "slot_mapping"); /* named twice */
  *slot = good_slot;
  REFUSED(w, write, RANGE, "positions"); /* not its slot's offset */
  *position = good_position + BLOCK;
  REFUSED(w, write, RANGE, "positions"); /* another block than its neighbours */
  *position = MAX_POSITION + good_position % BLOCK;
  REFUSED(w, write, RANGE, "positions");
  *position = good_position - 4 * BLOCK;
  REFUSED(w, write, RANGE, "positions is -");
  *position = good_position;

  int32_t *const open = &w->open_slot[w->blocks_of[2]];
  *open = -1;
  REFUSED(w, write, KAKEYA_ERR_NO_OPEN_SLOT, "open_slot");
  *open = 2;
  REFUSED(w, write, RANGE, "open_slot is 2");
  *open = -2;
  REFUSED(w, write, RANGE, "open_slot is -2");
  *open = 1;
  REFUSED(w, write, RANGE, "open_slot is 1"); /* two blocks */
  *open = 0;

  ((uint16_t *)w->k)[(64 + 3) * KV_HEADS * HEAD_DIM + HEAD_DIM] = 0x7f80; /* infinity in the whole block, head 1 */
  REFUSED(w, write, KAKEYA_ERR_NON_FINITE, "token 3, channel 0");
  world_free(w);
}

static void test_attend(const kakeya_codec *codec) {
  /* 300 tokens: two full blocks and 34 tokens of history, 10 tokens of this step. */
  world *w = world_new(codec, KAKEYA_DTYPE_BF16, 290, 0, 3, 1);
  w->open_slot[w->blocks_of[2]] = 0;
  CHECK_OK(kakeya_write(codec, &w->write));
  world *step = world_new(codec, KAKEYA_DTYPE_BF16, 10, 290, 3, 0);
  /* The pages and open blocks of the first are inputs of the second, whose own outputs are watched. */
  step->attend.pages = w->pages;
  step->attend.open_blocks = w->open_blocks;
  step->attend.open_slot = w->open_slot;
  step->attend.num_open = 1;
  const kakeya_attend_args good = step->attend;

  CHECK_REFUSED(kakeya_attend(NULL, &good), NULL_OF, "codec is NULL");
  CHECK_REFUSED(kakeya_attend(codec, NULL), NULL_OF, "args is NULL");
  step->attend.struct_size = sizeof step->attend + 8;
  REFUSED(step, attend, KAKEYA_ERR_BAD_STRUCT_SIZE, "sizeof(kakeya_attend_args) = 232");
  step->attend.layer = LAYERS;
  REFUSED(step, attend, RANGE, "layer");
  step->attend.num_kv_heads = 3;
  REFUSED(step, attend, RANGE, "num_kv_heads is 3; valid: 1..=2");
  step->attend.num_q_heads = 3;
  REFUSED(step, attend, RANGE, "num_q_heads is 3; valid: 4..=4");
  step->attend.dtype = 3;
  REFUSED(step, attend, KAKEYA_ERR_BAD_DTYPE, "dtype");
  step->attend.flags = 2;
  REFUSED(step, attend, RANGE, "flags is 0x2");
  step->attend.scale = NAN;
  REFUSED(step, attend, RANGE, "scale is NaN");
  step->attend.scale = INFINITY;
  REFUSED(step, attend, RANGE, "scale is inf");

  kakeya_attend_options options = {.struct_size = sizeof options};
  const float sinks[4] = {0.0f, -1.0f, NAN, 2.0f};
  CHECK_REFUSED(kakeya_attend_with(codec, &good, NULL), NULL_OF, "options is NULL");
  options.struct_size = 8;
  CHECK_REFUSED(kakeya_attend_with(codec, &good, &options), KAKEYA_ERR_BAD_STRUCT_SIZE,
                "sizeof(kakeya_attend_options) = 16");
  options.struct_size = sizeof options;
  options.soft_cap = -1.0f;
  CHECK_REFUSED(kakeya_attend_with(codec, &good, &options), RANGE, "soft_cap is -1");
  options.soft_cap = 0.0f;
  options.sinks = ODD(sinks);
  CHECK_REFUSED(kakeya_attend_with(codec, &good, &options), KAKEYA_ERR_MISALIGNED, "sinks is at");
  options.sinks = sinks;
  CHECK_REFUSED(kakeya_attend_with(codec, &good, &options), RANGE, "sinks");
  CHECK(world_touched(step) == 0, "outputs changed");
  options.sinks = good.lse;
  CHECK_REFUSED(kakeya_attend_with(codec, &good, &options), KAKEYA_ERR_ALIASED, "sinks");

#define NOT_NULL(field)      \
  step->attend.field = NULL; \
  REFUSED(step, attend, NULL_OF, #field " is NULL")
  NOT_NULL(q);
  NOT_NULL(k);
  NOT_NULL(v);
  NOT_NULL(out);
  NOT_NULL(query_start);
  NOT_NULL(seq_lens);
  NOT_NULL(block_table);
  NOT_NULL(pages);
  NOT_NULL(open_blocks);
  NOT_NULL(open_slot);
#define ALIGNED(field)                  \
  step->attend.field = ODD(good.field); \
  REFUSED(step, attend, KAKEYA_ERR_MISALIGNED, #field " is at")
  ALIGNED(q);
  ALIGNED(k);
  ALIGNED(v);
  ALIGNED(out);
  ALIGNED(query_start);
  ALIGNED(seq_lens);
  ALIGNED(block_table);
  ALIGNED(open_blocks);
  ALIGNED(open_slot);
  ALIGNED(lse);
#define STRIDES(field)                    \
  step->attend.field = -1;                \
  REFUSED(step, attend, RANGE, " is -1"); \
  step->attend.field = INT64_MAX;         \
  REFUSED(step, attend, KAKEYA_ERR_OVERFLOW, "address space")
  STRIDES(q_token_stride);
  STRIDES(q_head_stride);
  STRIDES(k_token_stride);
  STRIDES(k_head_stride);
  STRIDES(v_token_stride);
  STRIDES(v_head_stride);
  STRIDES(out_token_stride);
  STRIDES(out_head_stride);
  STRIDES(page_block_stride);
  STRIDES(page_head_stride);
  step->attend.out_token_stride = Q_HEADS * HEAD_DIM - 1;
  REFUSED(step, attend, RANGE, "token stride of out");
  step->attend.out_head_stride = HEAD_DIM - 1;
  REFUSED(step, attend, RANGE, "head stride of out");
  step->attend.block_table_stride = -1;
  REFUSED(step, attend, RANGE, "row stride of block_table");

#define ALIASES(field)                              \
  step->attend.field = (void *)good.field;          \
  step->attend.out = (void *)(uintptr_t)good.field; \
  REFUSED(step, attend, KAKEYA_ERR_ALIASED, #field " (bytes")
  ALIASES(q);
  ALIASES(k);
  ALIASES(v);
  ALIASES(lse);
  step->attend.lse = (float *)(uintptr_t)good.k;
  REFUSED(step, attend, KAKEYA_ERR_ALIASED, "lse (bytes");
  step->attend.pages = (const uint8_t *)good.out;
  REFUSED(step, attend, KAKEYA_ERR_ALIASED, "pages (bytes");
  step->attend.open_blocks = good.out;
  REFUSED(step, attend, KAKEYA_ERR_ALIASED, "open_blocks (bytes");
  step->attend.seq_lens = (const int32_t *)good.out;
  REFUSED(step, attend, KAKEYA_ERR_ALIASED, "seq_lens (bytes");

  /* What the arrays hold. */
  step->query_start[1] = 11;
  REFUSED(step, attend, RANGE, "query_start");
  step->query_start[1] = -1;
  REFUSED(step, attend, RANGE, "query_start");
  step->query_start[0] = 10;
  step->query_start[1] = 5;
  REFUSED(step, attend, RANGE, "query_start");
  step->query_start[0] = 0;
  step->query_start[1] = 10;
  step->seq_lens[0] = 9;
  REFUSED(step, attend, RANGE, "seq_lens is 9");
  step->seq_lens[0] = MAX_POSITION + 1;
  REFUSED(step, attend, RANGE, "seq_lens is 2049");
  step->seq_lens[0] = 3 * BLOCK + 1;
  REFUSED(step, attend, RANGE, "seq_lens is 385");
  step->seq_lens[0] = 300;
  step->blocks_of[1] = 3;
  REFUSED(step, attend, RANGE, "block_table is 3");
  step->blocks_of[1] = -1;
  REFUSED(step, attend, RANGE, "block_table is -1");
  step->blocks_of[1] = 1;
  w->open_slot[0] = -1;
  REFUSED(step, attend, KAKEYA_ERR_NO_OPEN_SLOT, "open_slot");
  w->open_slot[0] = 1;
  REFUSED(step, attend, RANGE, "open_slot is 1");
  w->open_slot[0] = 0;

  /* A damaged page at the end of the history, and one of another position. */
  uint8_t *const page = w->pages + (size_t)w->blocks_of[1] * KV_HEADS * w->page_bytes + w->page_bytes;
  page[0] ^= 0xff;
  REFUSED(step, attend, KAKEYA_ERR_BAD_PAGE, "begins with");
  page[0] ^= 0xff;
  page[1] += 1;
  REFUSED(step, attend, KAKEYA_ERR_WRONG_VERSION, "format version is '3', expected '2'");
  page[1] -= 1;
  page[4] += 1;
  REFUSED(step, attend, KAKEYA_ERR_BAD_PAGE, "block index 2");
  page[4] -= 1;

  CHECK_OK(kakeya_attend(codec, &step->attend));
  CHECK(world_touched(step) > 0, "nothing was written");
  world_free(step);
  world_free(w);
}

int main(void) {
  kakeya_codec *codec = codec_of("kakeya-free-4.6x");
  test_seal(codec);
  test_open(codec);
  test_write(codec);
  test_attend(codec);
  kakeya_codec_free(codec);
  return failures("test_errors");
}
