/* See fixture.h. */

/* mmap and MAP_ANONYMOUS beside strict C99. */
#define _GNU_SOURCE

#include "fixture.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

const char *model_json(void) {
  static char text[4096];
  if (text[0] == '\0') {
    int n = snprintf(text, sizeof text,
                     "{\"num_layers\":%d,\"num_kv_heads\":%d,\"num_q_heads\":%d,\"head_dim\":%d,\"max_position\":%d,"
                     "\"rope\":{\"rotary_dim\":%d,\"interleaved\":false,\"inv_freq\":[",
                     LAYERS, KV_HEADS, Q_HEADS, HEAD_DIM, MAX_POSITION, HEAD_DIM);
    for (int i = 0; i < HEAD_DIM / 2; ++i) {
      n += snprintf(text + n, sizeof text - (size_t)n, "%s%.9g", i ? "," : "", pow(10000.0, -2.0 * i / HEAD_DIM));
    }
    snprintf(text + n, sizeof text - (size_t)n, "]}}");
  }
  return text;
}

kakeya_codec *codec_of(const char *recipe) {
  kakeya_codec *codec = NULL;
  const char *model = model_json();
  const kakeya_status status = kakeya_codec_new(recipe, strlen(recipe), model, strlen(model), NULL, 0, &codec);
  if (status != KAKEYA_OK) {
    fprintf(stderr, "codec_of(%s): %s: %s\n", recipe, kakeya_status_name(status), kakeya_last_error());
    exit(2);
  }
  return codec;
}

size_t page_bytes_of(const kakeya_codec *codec) {
  size_t bytes = 0;
  if (kakeya_codec_page_bytes(codec, 0, &bytes) != KAKEYA_OK) {
    fprintf(stderr, "page_bytes_of: %s\n", kakeya_last_error());
    exit(2);
  }
  return bytes;
}

/* One page in front keeps the length of the mapping, for release(). */
void *reserve(size_t bytes) {
  const size_t page = (size_t)sysconf(_SC_PAGESIZE);
  const size_t data = (bytes + page - 1) / page * page, length = page + data + page;
  char *start = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (start == MAP_FAILED || mprotect(start + page + data, page, PROT_NONE) != 0) {
    perror("reserve");
    exit(2);
  }
  memcpy(start, &length, sizeof length);
  return start + page + data - bytes;
}

void release(void *memory) {
  const size_t page = (size_t)sysconf(_SC_PAGESIZE);
  /* The page in front is the one before the page of the first byte, or before the guard if there are no bytes. */
  char *start = (char *)((uintptr_t)memory / page * page) - page;
  size_t length;
  memcpy(&length, start, sizeof length);
  munmap(start, length);
}

size_t element_size(uint32_t dtype) {
  return dtype == KAKEYA_DTYPE_F32 ? 4 : 2;
}

float load(uint32_t dtype, const void *data, size_t i) {
  float value;
  uint32_t bits;
  if (dtype == KAKEYA_DTYPE_F32) return ((const float *)data)[i];
  const uint16_t half = ((const uint16_t *)data)[i];
  if (dtype == KAKEYA_DTYPE_BF16) {
    bits = (uint32_t)half << 16;
    memcpy(&value, &bits, sizeof value);
    return value;
  }
  const float magnitude = (half & 0x7c00) == 0 ? ldexpf((float)(half & 0x3ff), -24)
                                               : ldexpf((float)(0x400 | (half & 0x3ff)), ((half >> 10) & 0x1f) - 25);
  return half & 0x8000 ? -magnitude : magnitude;
}

static void store(uint32_t dtype, void *data, size_t i, float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  if (dtype == KAKEYA_DTYPE_F32) {
    ((float *)data)[i] = value;
  } else if (dtype == KAKEYA_DTYPE_BF16) {
    ((uint16_t *)data)[i] = (uint16_t)(bits >> 16);
  } else {
    /* Exponents of the noise fit binary16; what is too small for a normal number becomes zero. */
    const int exponent = (int)((bits >> 23) & 0xff) - 127 + 15;
    const uint32_t magnitude = exponent <= 0 ? 0 : ((uint32_t)exponent << 10) | ((bits >> 13) & 0x3ff);
    ((uint16_t *)data)[i] = (uint16_t)(((bits >> 16) & 0x8000) | magnitude);
  }
}

void *noise(uint32_t dtype, size_t n, float mean, uint64_t seed) {
  void *data = reserve(n * element_size(dtype));
  for (size_t i = 0; i < n; ++i) {
    float x = -6.0f;
    for (int j = 0; j < 12; ++j) {
      seed = seed * 6364136223846793005u + 1442695040888963407u;
      x += (float)(seed >> 40) / (float)(1 << 24);
    }
    const float channel = (float)(i % HEAD_DIM) / HEAD_DIM;
    store(dtype, data, i, mean * sinf(20.0f * channel) + (0.5f + channel) * x);
  }
  return data;
}

uint8_t *calibration(size_t heads, size_t *len) {
  static const struct {
    const char *name;
    float value;
  } tensors[] = {{"k_mean", 0}, {"k_var", 1}, {"q_sq", 1}, {"q_mean", 0}, {"v_mean", 0}, {"v_var", 1}};
  const size_t count = sizeof tensors / sizeof tensors[0];
  const size_t floats = LAYERS * heads * HEAD_DIM;
  char header[2048];
  int n = snprintf(header, sizeof header, "{\"__metadata__\":{\"format\":\"kakeya-calibration-1\"}");
  for (size_t t = 0; t < count; ++t) {
    n += snprintf(header + n, sizeof header - (size_t)n,
                  ",\"%s\":{\"dtype\":\"F32\",\"shape\":[%d,%zu,%d],\"data_offsets\":[%zu,%zu]}", tensors[t].name,
                  LAYERS, heads, HEAD_DIM, t * floats * 4, (t + 1) * floats * 4);
  }
  n += snprintf(header + n, sizeof header - (size_t)n, "}");
  while (n % 8 != 0) header[n++] = ' ';

  *len = 8 + (size_t)n + count * floats * 4;
  uint8_t *file = reserve(*len);
  const uint64_t header_len = (uint64_t)n;
  memcpy(file, &header_len, 8);
  memcpy(file + 8, header, (size_t)n);
  for (size_t t = 0; t < count; ++t) {
    for (size_t i = 0; i < floats; ++i) {
      memcpy(file + 8 + n + (t * floats + i) * 4, &tensors[t].value, 4);
    }
  }
  return file;
}
