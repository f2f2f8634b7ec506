/*
 * What the C tests share: a small model, its codec, noise in every dtype, memory with guard bytes, and a
 * calibration artefact made by hand.
 */

#ifndef KAKEYA_TESTS_FIXTURE_H
#define KAKEYA_TESTS_FIXTURE_H

#include <stddef.h>
#include <stdint.h>

#include "kakeya.h"

/* The model of the tests: 2 layers, 2 KV heads with 2 query heads each, head_dim 64, 2048 positions, RoPE. */
enum { LAYERS = 2, KV_HEADS = 2, Q_HEADS = 4, HEAD_DIM = 64, MAX_POSITION = 2048, BLOCK = KAKEYA_BLOCK_TOKENS };

/* Its description; static text. */
const char *model_json(void);

/* A codec of a recipe for that model; the process ends if it cannot be made. */
kakeya_codec *codec_of(const char *recipe);

/* Bytes of its pages. */
size_t page_bytes_of(const kakeya_codec *codec);

/* Memory whose end is the end of a page, before one that may not be touched: whoever reads or writes past the end dies
 * there. Aligned as far as `bytes` is. The process ends if there is none. Give it to release(). */
void *reserve(size_t bytes);
void release(void *memory);

/* Bytes of an element. */
size_t element_size(uint32_t dtype);

/* Element i of an array of dtype, exact. */
float load(uint32_t dtype, const void *data, size_t i);

/* n elements of noise with a mean and a scale per channel (i % HEAD_DIM), as K and V have them. The same
 * seed gives the same values, cut off (not rounded) to dtype. Give them to release(). */
void *noise(uint32_t dtype, size_t n, float mean, uint64_t seed);

/* A calibration artefact for the model with `heads` KV heads, KAKEYA's own tensors all 1 or 0; KV_HEADS fits the
 * model. Sets *len. Give it to release(). */
uint8_t *calibration(size_t heads, size_t *len);

#endif
