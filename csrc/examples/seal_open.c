/*
 * seal_open - seal one block of K and V into pages, open them again, and say what it cost.
 *
 * The shortest complete program over kakeya.h: it makes a codec from a preset that needs no
 * calibration, checks every status, and leaves with 1 if anything fails or if the error of the
 * opened values is above MAX_RELATIVE_RMS.
 *
 *     cc -std=c99 -I csrc/include csrc/examples/seal_open.c -L target/release -lkakeya -lm -o seal_open
 *     LD_LIBRARY_PATH=target/release ./seal_open
 *
 * Copyright the KAKEYA authors. Licence: Apache-2.0.
 */

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kakeya.h"

#define HEADS 2
#define HEAD_DIM 64
#define ROW ((size_t)HEADS * HEAD_DIM)            /* elements of one token */
#define BLOCK ((size_t)KAKEYA_BLOCK_TOKENS * ROW) /* elements of one block */

/* Of V this preset codes most channels in 2 bits. Noise without structure to exploit then keeps 0.26 of its RMS as
 * error; real values keep less. The bound leaves room for other seeds. */
#define MAX_RELATIVE_RMS 0.30

static const char MODEL[] =
    "{\"num_layers\":1,\"num_kv_heads\":2,\"num_q_heads\":4,\"head_dim\":64,\"max_position\":4096,\"rope\":null}";

static int fail(const char *what, kakeya_status status) {
  fprintf(stderr, "seal_open: %s: %s: %s\n", what, kakeya_status_name(status), kakeya_last_error());
  return 1;
}

/* Roughly normal noise: the sum of twelve uniform numbers from a 64-bit linear congruential generator. */
static float noise(uint64_t *state) {
  double sum = -6.0;
  for (int i = 0; i < 12; ++i) {
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    sum += (double)(*state >> 40) / (double)(1 << 24);
  }
  return (float)sum;
}

/* Values with what real K and V have: every channel its own mean and its own scale. */
static void fill(float *x, float mean, uint64_t seed) {
  for (size_t i = 0; i < BLOCK; ++i) {
    const float channel = (float)(i % HEAD_DIM) / HEAD_DIM;
    x[i] = mean * sinf(20.0f * channel) + (0.5f + channel) * noise(&seed);
  }
}

/* RMS of (opened - original) over RMS of the original, for one head. */
static double relative_rms(const float *original, const float *opened, size_t head) {
  double error = 0.0, energy = 0.0;
  for (size_t t = 0; t < KAKEYA_BLOCK_TOKENS; ++t) {
    for (size_t c = 0; c < HEAD_DIM; ++c) {
      const double x = original[t * ROW + head * HEAD_DIM + c];
      const double e = opened[t * HEAD_DIM + c] - x;
      error += e * e;
      energy += x * x;
    }
  }
  return sqrt(error / energy);
}

int main(void) {
  static const char recipe[] = "kakeya-free-4.6x-trellis";
  static float k[BLOCK], v[BLOCK];
  static float k_opened[KAKEYA_BLOCK_TOKENS * HEAD_DIM], v_opened[KAKEYA_BLOCK_TOKENS * HEAD_DIM];
  kakeya_codec *codec = NULL;
  uint8_t *pages = NULL;
  size_t page_bytes = 0;
  int result = 1;

  if (kakeya_abi_version() != KAKEYA_ABI_VERSION) {
    fprintf(stderr, "seal_open: libkakeya has ABI %u, this program %u\n", (unsigned)kakeya_abi_version(),
            (unsigned)KAKEYA_ABI_VERSION);
    return 1;
  }
  kakeya_status status = kakeya_codec_new(recipe, strlen(recipe), MODEL, strlen(MODEL), NULL, 0, &codec);
  if (status != KAKEYA_OK) return fail("kakeya_codec_new", status);

  status = kakeya_codec_page_bytes(codec, 0, &page_bytes);
  if (status != KAKEYA_OK) {
    fail("kakeya_codec_page_bytes", status);
    goto done;
  }
  pages = malloc(HEADS * page_bytes);
  if (pages == NULL) {
    fprintf(stderr, "seal_open: out of memory\n");
    goto done;
  }

  fill(k, 2.0f, 1);
  fill(v, 0.1f, 2);
  const kakeya_seal_args args = {
      .struct_size = sizeof args,
      .layer = 0,
      .first_head = 0,
      .num_heads = HEADS,
      .dtype = KAKEYA_DTYPE_F32,
      .block_index = 5, /* tokens 640 to 767 of their sequence */
      .k = k,
      .v = v,
      .k_token_stride = ROW,
      .k_head_stride = HEAD_DIM,
      .v_token_stride = ROW,
      .v_head_stride = HEAD_DIM,
      .pages = pages,
      .page_head_stride = (int64_t)page_bytes,
  };
  status = kakeya_seal(codec, &args);
  if (status != KAKEYA_OK) {
    fail("kakeya_seal", status);
    goto done;
  }

  const double raw = 2.0 * 2.0 * KAKEYA_BLOCK_TOKENS * HEAD_DIM; /* K and V in bfloat16 */
  printf("libkakeya %s (%s), recipe %s\n", kakeya_version(), kakeya_simd(), recipe);
  printf("page: %zu bytes, bf16: %.0f bytes, ratio %.2f\n", page_bytes, raw, raw / (double)page_bytes);
  result = 0;
  for (uint32_t head = 0; head < HEADS; ++head) {
    status = kakeya_open(codec, 0, head, pages + head * page_bytes, page_bytes, k_opened, v_opened,
                         sizeof k_opened / sizeof k_opened[0]);
    if (status != KAKEYA_OK) {
      result = fail("kakeya_open", status);
      goto done;
    }
    const double k_error = relative_rms(k, k_opened, head);
    const double v_error = relative_rms(v, v_opened, head);
    printf("head %u: relative RMS error of K %.4f, of V %.4f\n", (unsigned)head, k_error, v_error);
    /* Written so that a NaN fails too. */
    if (!(k_error <= MAX_RELATIVE_RMS && v_error <= MAX_RELATIVE_RMS)) {
      fprintf(stderr, "seal_open: head %u: error above %.2f\n", (unsigned)head, MAX_RELATIVE_RMS);
      result = 1;
    }
  }

done:
  free(pages);
  kakeya_codec_free(codec);
  return result;
}
