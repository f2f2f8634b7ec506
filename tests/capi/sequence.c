/* See sequence.h. */

#include "sequence.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

static void *at(void *data, uint32_t dtype, size_t element) {
  return (char *)data + element * element_size(dtype);
}

/* The block of `position` gets a slot; neighbours get different ones as long as there are two. */
static void give_slot(world *w, uint32_t position) {
  const uint32_t block = position / BLOCK;
  w->open_slot[w->blocks_of[block]] = (int32_t)(block % w->open);
}

kakeya_status sequence_write(world *w, uint32_t first, uint32_t end) {
  for (uint32_t b = 0; b < w->blocks; ++b) w->open_slot[b] = -1;
  if (first % BLOCK != 0) give_slot(w, first);
  if (end % BLOCK != 0) give_slot(w, end - 1);
  kakeya_write_args args = w->write;
  args.num_tokens = end - first;
  args.k = at(w->k, w->dtype, (size_t)first * KV_HEADS * HEAD_DIM);
  args.v = at(w->v, w->dtype, (size_t)first * KV_HEADS * HEAD_DIM);
  args.slot_mapping = w->slots + first;
  args.positions = w->positions + first;
  return kakeya_write(w->codec, &args);
}

kakeya_status sequence_attend(world *w, uint32_t first, uint32_t end, uint32_t flags) {
  kakeya_attend_args args = w->attend;
  w->query_start[0] = 0;
  w->query_start[1] = (int32_t)(end - first);
  w->seq_lens[0] = (int32_t)end;
  args.num_tokens = end - first;
  args.flags = flags;
  args.q = at(w->q, w->dtype, (size_t)first * Q_HEADS * HEAD_DIM);
  args.k = at(w->k, w->dtype, (size_t)first * KV_HEADS * HEAD_DIM);
  args.v = at(w->v, w->dtype, (size_t)first * KV_HEADS * HEAD_DIM);
  args.out = at(w->out, w->dtype, (size_t)first * Q_HEADS * HEAD_DIM);
  args.lse = w->lse + (size_t)first * Q_HEADS;
  return kakeya_attend(w->codec, &args);
}

/* K and V of a block of the sequence, [128][HEAD_DIM], from its page. */
static void open_page(const world *w, uint32_t block, uint32_t head, float *k, float *v) {
  const uint8_t *page = w->pages + ((size_t)w->blocks_of[block] * KV_HEADS + head) * w->page_bytes;
  if (kakeya_open(w->codec, w->attend.layer, head, page, w->page_bytes, k, v, BLOCK * HEAD_DIM) != KAKEYA_OK) {
    fprintf(stderr, "sequence_reference: block %u: %s\n", (unsigned)block, kakeya_last_error());
    exit(2);
  }
}

void sequence_reference(const world *w, uint32_t first, uint32_t end, uint32_t flags, double *out, double *lse) {
  const uint32_t blocks = (end + BLOCK - 1) / BLOCK;
  const size_t n = (size_t)blocks * BLOCK * HEAD_DIM;
  float *k_page = reserve(n * sizeof *k_page), *v_page = reserve(n * sizeof *v_page);
  double *score = reserve(end * sizeof *score);
  for (uint32_t h = 0; h < Q_HEADS; ++h) {
    const uint32_t head = h / (Q_HEADS / KV_HEADS);
    for (uint32_t b = 0; b < end / BLOCK; ++b) {
      open_page(w, b, head, k_page + (size_t)b * BLOCK * HEAD_DIM, v_page + (size_t)b * BLOCK * HEAD_DIM);
    }
    for (uint32_t t = first; t < end; ++t) {
      const uint32_t sealed = flags & KAKEYA_ATTEND_SEALED_PREFILL ? t / BLOCK * BLOCK : first / BLOCK * BLOCK;
      double max = -INFINITY, sum = 0.0;
      for (uint32_t p = 0; p <= t; ++p) {
        score[p] = 0.0;
        for (size_t c = 0; c < HEAD_DIM; ++c) {
          const double key = p < sealed ? k_page[(size_t)p * HEAD_DIM + c]
                                        : load(w->dtype, w->k, ((size_t)p * KV_HEADS + head) * HEAD_DIM + c);
          score[p] += key * load(w->dtype, w->q, ((size_t)t * Q_HEADS + h) * HEAD_DIM + c);
        }
        score[p] *= w->attend.scale;
        max = fmax(max, score[p]);
      }
      double *row = out + ((size_t)(t - first) * Q_HEADS + h) * HEAD_DIM;
      for (size_t c = 0; c < HEAD_DIM; ++c) row[c] = 0.0;
      for (uint32_t p = 0; p <= t; ++p) {
        const double weight = exp(score[p] - max);
        sum += weight;
        for (size_t c = 0; c < HEAD_DIM; ++c) {
          row[c] += weight * (p < sealed ? v_page[(size_t)p * HEAD_DIM + c]
                                         : load(w->dtype, w->v, ((size_t)p * KV_HEADS + head) * HEAD_DIM + c));
        }
      }
      for (size_t c = 0; c < HEAD_DIM; ++c) row[c] /= sum;
      lse[(size_t)(t - first) * Q_HEADS + h] = max + log(sum);
    }
  }
  release(k_page);
  release(v_page);
  release(score);
}
