/*
 * Many threads at once, by what the header says of each handle: one codec shared by all, codecs of their own that
 * are made and released meanwhile, codecs that one thread makes and another releases, and a last error for each.
 */

#include <pthread.h>
#include <stdlib.h>

#include "check.h"
#include "sequence.h"

enum { THREADS = 16, TOKENS = 2 * BLOCK + 9 };

typedef struct {
  const kakeya_codec *shared;
  const world *alone;   /* what a single thread got */
  kakeya_codec *handed; /* made by another thread, released by this one */
  int number, rounds;
  int failed;
  char refused[64]; /* what this thread's last refusal must say */
} job;

/* All threads begin at once. (pthread_barrier_t is no part of strict C99's headers.) */
static pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t opened = PTHREAD_COND_INITIALIZER;
static int waiting;

static void meet(void) {
  pthread_mutex_lock(&gate);
  if (++waiting == THREADS) pthread_cond_broadcast(&opened);
  while (waiting < THREADS) pthread_cond_wait(&opened, &gate);
  pthread_mutex_unlock(&gate);
}

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

/* Writes and attends in memory of its own; the result is the one of a single thread. */
static int works(const kakeya_codec *codec, const world *alone) {
  world *w = world_new(codec, KAKEYA_DTYPE_BF16, TOKENS, 0, 3, 2);
  const int good = run(w) && same(w, alone);
  world_free(w);
  return good;
}

/* A refusal of its own: a layer that only this thread asks for. */
static void refuse(job *self, int round) {
  const int layer = 100 + self->number * 1000 + round;
  size_t bytes = 7;
  snprintf(self->refused, sizeof self->refused, "layer is %d;", layer);
  if (kakeya_codec_page_bytes(self->shared, (uint32_t)layer, &bytes) != KAKEYA_ERR_OUT_OF_RANGE || bytes != 7) {
    ++self->failed;
  }
}

static int still_refused(const job *self) {
  return strstr(kakeya_last_error(), self->refused) != NULL;
}

static void *work(void *argument) {
  job *self = argument;
  meet();
  if (strcmp(kakeya_last_error(), "") != 0) ++self->failed; /* a new thread has none */
  for (int round = 0; round < self->rounds; ++round) {
    refuse(self, round);
    if (!works(self->shared, self->alone)) ++self->failed;
    if (!still_refused(self)) ++self->failed; /* others have failed meanwhile; successes leave the text */
    kakeya_codec *own = NULL;
    const char *recipe = "kakeya-free-4.6x", *model = model_json();
    if (kakeya_codec_new(recipe, strlen(recipe), model, strlen(model), NULL, 0, &own) != KAKEYA_OK) ++self->failed;
    if (own == NULL || page_bytes_of(own) != page_bytes_of(self->shared)) ++self->failed;
    kakeya_codec_free(own);
    if (!still_refused(self)) ++self->failed;
  }
  if (!works(self->handed, self->alone)) ++self->failed;
  kakeya_codec_free(self->handed);
  return NULL;
}

int main(int argc, char **argv) {
  const int rounds = argc > 1 ? atoi(argv[1]) : 5; /* tools that slow programs down ask for fewer */
  kakeya_codec *codec = codec_of("kakeya-free-4.6x");
  world *alone = world_new(codec, KAKEYA_DTYPE_BF16, TOKENS, 0, 3, 2);
  CHECK(run(alone), "%s", kakeya_last_error());
  pthread_t threads[THREADS];
  job jobs[THREADS];
  for (int i = 0; i < THREADS; ++i) {
    jobs[i] =
        (job){.shared = codec, .alone = alone, .handed = codec_of("kakeya-free-4.6x"), .number = i, .rounds = rounds};
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
