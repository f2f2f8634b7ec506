/*
 * The life of a key through the ABI: written token by token or at once, sealed to the same bytes, opened within
 * a bound, and attended to as a naive reference does.
 */

#include <math.h>

#include "check.h"
#include "sequence.h"

/* Relative RMS error of values without structure, at 4.6x and with the coarsest quantiser; see
 * csrc/examples/seal_open.c. */
#define MAX_RELATIVE_RMS 0.35

static const uint32_t DTYPES[] = {KAKEYA_DTYPE_BF16, KAKEYA_DTYPE_F16, KAKEYA_DTYPE_F32};

/* Rounding of an output to its dtype (half a unit in the last place), and float arithmetic in between. */
static double tolerance(uint32_t dtype, double value) {
  const double last = dtype == KAKEYA_DTYPE_BF16 ? ldexp(1.0, -8) : dtype == KAKEYA_DTYPE_F16 ? ldexp(1.0, -11) : 0.0;
  return 1e-4 + last * fabs(value);
}

static const uint8_t *page_of(const world *w, uint32_t block, uint32_t head) {
  return w->pages + ((size_t)w->blocks_of[block] * KV_HEADS + head) * w->page_bytes;
}

static void test_seal_and_open(const kakeya_codec *codec, uint32_t dtype) {
  static float k[BLOCK * HEAD_DIM], v[BLOCK * HEAD_DIM];
  world *w = world_new(codec, dtype, BLOCK, 5 * BLOCK, 6, 1);
  CHECK_OK(kakeya_seal(codec, &w->seal));
  for (uint32_t head = 0; head < KV_HEADS; ++head) {
    CHECK_OK(kakeya_open(codec, 1, head, w->pages + head * w->page_bytes, w->page_bytes, k, v, BLOCK * HEAD_DIM));
    double error[2] = {0}, energy[2] = {0};
    for (size_t t = 0; t < BLOCK; ++t) {
      for (size_t c = 0; c < HEAD_DIM; ++c) {
        const size_t i = (t * KV_HEADS + head) * HEAD_DIM + c;
        const double want[2] = {load(dtype, w->k, i), load(dtype, w->v, i)};
        const double got[2] = {k[t * HEAD_DIM + c], v[t * HEAD_DIM + c]};
        for (int s = 0; s < 2; ++s) {
          error[s] += (got[s] - want[s]) * (got[s] - want[s]);
          energy[s] += want[s] * want[s];
        }
      }
    }
    for (int s = 0; s < 2; ++s) {
      const double rms = sqrt(error[s] / energy[s]);
      CHECK(rms > 0.0 && rms <= MAX_RELATIVE_RMS, "dtype %u, %s of head %u: %f", dtype, s ? "V" : "K", head, rms);
    }
  }

  /* A rank that holds only the second head seals the same page. */
  uint8_t *alone = reserve(w->page_bytes);
  kakeya_seal_args args = w->seal;
  args.first_head = args.num_heads = 1;
  args.k = (const char *)w->k + HEAD_DIM * element_size(dtype);
  args.v = (const char *)w->v + HEAD_DIM * element_size(dtype);
  args.pages = alone;
  CHECK_OK(kakeya_seal(codec, &args));
  CHECK(memcmp(alone, w->pages + w->page_bytes, w->page_bytes) == 0, "dtype %u", dtype);
  release(alone);
  world_free(w);
}

/* However the tokens arrive, the pages of the full blocks are those of kakeya_seal. */
static void test_write_is_seal(const kakeya_codec *codec, uint32_t dtype, uint32_t step) {
  enum { TOKENS = 3 * BLOCK + 17 };
  world *w = world_new(codec, dtype, TOKENS, 0, 4, 2);
  for (uint32_t t = 0; t < TOKENS; t += step) {
    CHECK_OK(sequence_write(w, t, t + step < TOKENS ? t + step : TOKENS));
  }
  uint8_t *sealed = reserve(KV_HEADS * w->page_bytes);
  for (uint32_t block = 0; block < 3; ++block) {
    const size_t skip = (size_t)block * BLOCK * KV_HEADS * HEAD_DIM * element_size(dtype);
    kakeya_seal_args args = w->seal;
    args.block_index = block;
    args.k = (const char *)w->k + skip;
    args.v = (const char *)w->v + skip;
    args.pages = sealed;
    CHECK_OK(kakeya_seal(codec, &args));
    for (uint32_t head = 0; head < KV_HEADS; ++head) {
      CHECK(memcmp(sealed + head * w->page_bytes, page_of(w, block, head), w->page_bytes) == 0,
            "dtype %u, steps of %u: page of block %u, head %u", dtype, step, block, head);
    }
  }
  release(sealed);

  /* The rest lies raw in the open block. */
  const size_t slot = (size_t)w->open_slot[w->blocks_of[3]];
  for (size_t t = 0; t < 17; ++t) {
    for (size_t head = 0; head < KV_HEADS; ++head) {
      const size_t size = HEAD_DIM * element_size(dtype);
      const size_t row = ((3 * BLOCK + t) * KV_HEADS + head) * size;
      const size_t k = (((slot * 2 + 0) * KV_HEADS + head) * BLOCK + t) * size;
      const size_t v = (((slot * 2 + 1) * KV_HEADS + head) * BLOCK + t) * size;
      CHECK(memcmp((char *)w->open_blocks + k, (char *)w->k + row, size) == 0, "K of token %zu", t);
      CHECK(memcmp((char *)w->open_blocks + v, (char *)w->v + row, size) == 0, "V of token %zu", t);
    }
  }
  world_free(w);
}

/* Padding changes nothing, no tokens are fine, and a token that is written again re-seals its block. */
static void test_padding_and_rewriting(const kakeya_codec *codec) {
  world *w = world_new(codec, KAKEYA_DTYPE_BF16, BLOCK, 0, 1, 1);
  CHECK_OK(sequence_write(w, 0, BLOCK));
  uint8_t *want = reserve(w->page_bytes);
  memcpy(want, page_of(w, 0, 1), w->page_bytes);

  world_mark(w);
  kakeya_write_args args = w->write;
  args.num_tokens = 0;
  args.k = args.v = NULL;
  args.slot_mapping = NULL;
  args.positions = NULL;
  CHECK_OK(kakeya_write(codec, &args));
  for (uint32_t t = 0; t < BLOCK; ++t) w->slots[t] = -1;
  CHECK_OK(kakeya_write(codec, &w->write));
  CHECK(world_touched(w) == 0, "padding wrote something");
  for (uint32_t t = 0; t < BLOCK; ++t) w->slots[t] = t;

  /* The last two tokens first hold others' values, as rejected drafts do; then their own, one after the other. */
  const size_t row = KV_HEADS * HEAD_DIM * element_size(w->dtype);
  char *const last = (char *)w->k + (BLOCK - 2) * row;
  char *own = reserve(2 * row);
  memcpy(own, last, 2 * row);
  memcpy(last, w->k, 2 * row);
  CHECK_OK(sequence_write(w, 0, BLOCK - 1));
  CHECK_OK(sequence_write(w, BLOCK - 2, BLOCK));
  CHECK_OK(sequence_write(w, 1, BLOCK)); /* sealed again */
  CHECK(memcmp(want, page_of(w, 0, 1), w->page_bytes) != 0, "drafts and tokens gave the same page");
  memcpy(last, own, 2 * row);
  CHECK_OK(sequence_write(w, BLOCK - 2, BLOCK - 1));
  CHECK_OK(sequence_write(w, BLOCK - 1, BLOCK));
  CHECK(memcmp(want, page_of(w, 0, 1), w->page_bytes) == 0, "a rewritten block differs");
  release(own);
  release(want);
  world_free(w);
}

/* Pages whose heads are the outer dimension, with room between them. */
static void test_head_major_pages(const kakeya_codec *codec) {
  world *w = world_new(codec, KAKEYA_DTYPE_F16, 2 * BLOCK, 0, 2, 0);
  CHECK_OK(sequence_write(w, 0, 2 * BLOCK));
  const size_t block_stride = w->page_bytes + 48, head_stride = 2 * block_stride + 16;
  uint8_t *pages = reserve(2 * head_stride);
  memset(pages, 0x11, 2 * head_stride);
  kakeya_write_args args = w->write;
  args.pages = pages;
  args.page_block_stride = (int64_t)block_stride;
  args.page_head_stride = (int64_t)head_stride;
  args.open_slot = NULL; /* no open blocks: none are needed */
  args.open_blocks = NULL;
  CHECK_OK(kakeya_write(codec, &args));
  for (uint32_t block = 0; block < 2; ++block) {
    for (uint32_t head = 0; head < KV_HEADS; ++head) {
      const uint8_t *page = pages + (size_t)w->blocks_of[block] * block_stride + head * head_stride;
      CHECK(memcmp(page, page_of(w, block, head), w->page_bytes) == 0, "block %u, head %u", block, head);
      CHECK(page[w->page_bytes] == 0x11, "wrote between the pages");
    }
  }
  release(pages);
  world_free(w);
}

static void compare(world *w, uint32_t first, uint32_t end, uint32_t flags) {
  const size_t rows = (size_t)(end - first) * Q_HEADS;
  double *out = reserve(rows * HEAD_DIM * sizeof *out), *lse = reserve(rows * sizeof *lse);
  sequence_reference(w, first, end, flags, out, lse);
  double worst = 0.0, worst_lse = 0.0;
  for (size_t r = 0; r < rows; ++r) {
    for (size_t c = 0; c < HEAD_DIM; ++c) {
      const double want = out[r * HEAD_DIM + c];
      const double got = load(w->dtype, w->out, ((size_t)first * Q_HEADS + r) * HEAD_DIM + c);
      const double excess = fabs(got - want) / tolerance(w->dtype, want);
      worst = excess <= worst ? worst : excess; /* a NaN stays */
    }
    const double excess = fabs(w->lse[(size_t)first * Q_HEADS + r] - lse[r]) / 1e-4;
    worst_lse = excess <= worst_lse ? worst_lse : excess;
  }
  CHECK(worst <= 1.0, "dtype %u, tokens %u..%u, flags %u: %.2f of the bound", w->dtype, first, end, flags, worst);
  CHECK(worst_lse <= 1.0, "lse, dtype %u, tokens %u..%u, flags %u: %.2f of the bound", w->dtype, first, end, flags,
        worst_lse);
  release(out);
  release(lse);
}

/* Steps as an engine takes them: a prompt in two pieces, single tokens over the end of a block, drafts. */
static void test_attend(const kakeya_codec *codec, uint32_t dtype, uint32_t flags) {
  static const uint32_t ends[] = {200, 382, 383, 384, 385, 386, 394, 402, 520};
  world *w = world_new(codec, dtype, 520, 0, 5, 2);
  uint32_t first = 0;
  for (size_t i = 0; i < sizeof ends / sizeof ends[0]; ++i) {
    CHECK_OK(sequence_write(w, first, ends[i]));
    CHECK_OK(sequence_attend(w, first, ends[i], flags));
    compare(w, first, ends[i], flags);
    first = ends[i];
  }
  world_free(w);
}

/* Two sequences in one step compute the bits that each computes alone; rows of no sequence stay untouched. */
static void test_company(const kakeya_codec *codec) {
  enum { FIRST = 140, ALONE = 10, ROWS = 14 };
  world *w = world_new(codec, KAKEYA_DTYPE_F32, FIRST + ROWS, 0, 2, 2);
  CHECK_OK(sequence_write(w, 0, FIRST + ALONE));
  CHECK_OK(sequence_attend(w, FIRST, FIRST + ALONE, 0));
  const size_t row = Q_HEADS * HEAD_DIM;
  float *const out = (float *)w->out + FIRST * row;
  float *alone = reserve(ALONE * row * sizeof *alone);
  memcpy(alone, out, ALONE * row * sizeof *alone);

  /* Rows 0..9 are the sequence from above; the second sequence has no tokens in this step; rows 10..12 are the last
   * ones of a sequence of 131 tokens that shares the first page; row 13 is nobody's. */
  const int32_t start[] = {0, ALONE, ALONE, ALONE + 3}, lens[] = {FIRST + ALONE, 0, BLOCK + 3};
  const int32_t none = -9;
  const int32_t table[3][2] = {{w->blocks_of[0], w->blocks_of[1]}, {none, none}, {w->blocks_of[0], w->blocks_of[1]}};
  kakeya_attend_args args = w->attend;
  args.num_seqs = 3;
  args.num_tokens = ROWS;
  args.query_start = start;
  args.seq_lens = lens;
  args.block_table = &table[0][0];
  args.block_table_stride = 2;
  args.q = (float *)w->q + FIRST * row;
  args.k = (float *)w->k + (size_t)FIRST * KV_HEADS * HEAD_DIM;
  args.v = (float *)w->v + (size_t)FIRST * KV_HEADS * HEAD_DIM;
  args.out = out;
  args.lse = NULL; /* optional */
  for (size_t i = 0; i < ROWS * row; ++i) out[i] = -7.0f;
  CHECK_OK(kakeya_attend(codec, &args));
  CHECK(memcmp(alone, out, ALONE * row * sizeof *alone) == 0, "company changed the result");
  for (size_t i = 0; i < row; ++i) {
    CHECK(out[(ALONE + 2) * row + i] != -7.0f, "the last row of the third sequence was not written");
    CHECK(out[(ALONE + 3) * row + i] == -7.0f, "a row of no sequence was written");
  }
  args.num_seqs = 0;
  args.num_tokens = 0;
  CHECK_OK(kakeya_attend(codec, &args));
  release(alone);
  world_free(w);
}

int main(void) {
  static const char *const recipes[] = {"kakeya-free-4.6x", "kakeya-free-4.6x-lloyd-max", "kakeya-free-4.6x-trellis"};
  for (size_t r = 0; r < sizeof recipes / sizeof recipes[0]; ++r) {
    kakeya_codec *codec = codec_of(recipes[r]);
    for (size_t d = 0; d < sizeof DTYPES / sizeof DTYPES[0]; ++d) {
      test_seal_and_open(codec, DTYPES[d]);
      test_write_is_seal(codec, DTYPES[d], 3 * BLOCK + 17);
      test_write_is_seal(codec, DTYPES[d], 100);
      test_attend(codec, DTYPES[d], 0);
    }
    test_write_is_seal(codec, KAKEYA_DTYPE_BF16, 1);
    test_attend(codec, KAKEYA_DTYPE_BF16, KAKEYA_ATTEND_SEALED_PREFILL);
    test_padding_and_rewriting(codec);
    test_head_major_pages(codec);
    test_company(codec);
    kakeya_codec_free(codec);
  }
  return failures("test_step");
}
