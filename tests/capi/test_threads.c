/*
 * One codec, several threads: each writes and attends in its own memory and gets what it gets alone, and each
 * reads its own last error.
 */

#include <pthread.h>

#include "check.h"
#include "sequence.h"

enum { THREADS = 4, TOKENS = 2 * BLOCK + 9, ROUNDS = 5 };

typedef struct {
  const kakeya_codec *codec;
  const world *alone; /* what a single thread got */
  int number;
  int failed;
} job;

static int same(const world *a, const world *b) {
  const size_t rows = (size_t)TOKENS * Q_HEADS;
  return memcmp(a->out, b->out, rows * HEAD_DIM * element_size(a->dtype)) == 0 &&
         memcmp(a->lse, b->lse, rows * sizeof(float)) == 0 &&
         memcmp(a->pages, b->pages, 2 * KV_HEADS * a->page_bytes) == 0;
}

static int run(world *w) {
  return sequence_write(w, 0, 200) == KAKEYA_OK && sequence_attend(w, 0, 200, 0) == KAKEYA_OK &&
         sequence_write(w, 200, TOKENS) == KAKEYA_OK && sequence_attend(w, 200, TOKENS, 0) == KAKEYA_OK;
}

static void *work(void *argument) {
  job *self = argument;
  char want[64];
  for (int round = 0; round < ROUNDS; ++round) {
    world *w = world_new(self->codec, KAKEYA_DTYPE_BF16, TOKENS, 0, 3, 2);
    if (!run(w) || !same(w, self->alone)) ++self->failed;
    world_free(w);
    /* A refusal of its own, and its own text after the others had theirs. */
    size_t bytes = 0;
    snprintf(want, sizeof want, "layer is %d;", 100 + self->number);
    if (kakeya_codec_page_bytes(self->codec, (uint32_t)(100 + self->number), &bytes) != KAKEYA_ERR_OUT_OF_RANGE ||
        strstr(kakeya_last_error(), want) == NULL) {
      ++self->failed;
    }
  }
  return NULL;
}

int main(void) {
  kakeya_codec *codec = codec_of("kakeya-free-4.6x");
  world *alone = world_new(codec, KAKEYA_DTYPE_BF16, TOKENS, 0, 3, 2);
  CHECK(run(alone), "%s", kakeya_last_error());
  pthread_t threads[THREADS];
  job jobs[THREADS];
  for (int i = 0; i < THREADS; ++i) {
    jobs[i] = (job){.codec = codec, .alone = alone, .number = i};
    CHECK(pthread_create(&threads[i], NULL, work, &jobs[i]) == 0, "thread %d", i);
  }
  for (int i = 0; i < THREADS; ++i) {
    pthread_join(threads[i], NULL);
    CHECK(jobs[i].failed == 0, "thread %d failed %d times", i, jobs[i].failed);
  }
  CHECK(strcmp(kakeya_last_error(), "") == 0, "another thread's error: %s", kakeya_last_error());
  world_free(alone);
  kakeya_codec_free(codec);
  return failures("test_threads");
}
