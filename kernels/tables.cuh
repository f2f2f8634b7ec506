// A codec's static tables in one block of bytes, as crates/codec/src/device.rs writes it. Offsets count bytes from the
// block's start; every table begins at a multiple of 16.
#pragma once

#include "unit.cuh"

namespace kakeya {

constexpr int kBlock = 128;   // tokens of a block
constexpr int kHeader = 16;   // bytes of a page's header
constexpr int kMaxSlots = 8;  // exact slots of a page
constexpr int kMaxThresholds = 128;
constexpr int kMaxUnits = 8;
constexpr int kMaxActive = 32;

struct Tables {
  uint32_t head_dim, num_kv_heads, num_layers, pairs, max_blocks, page_bytes, unit_channels, unit_tokens;
  uint32_t calibrated, trellis, scale_codes, head_stride;
  uint32_t layers, heads, natural, centre_cos, centre_sin, offset_cos, offset_sin;
  uint32_t factors, scale_thresholds, grids, thresholds, total_bytes;
  uint32_t interleaved;
  uint32_t seal, turns;  // what sealing copies: SealTables, SealState::turns
  // What attention reads, see crates/codec/src/fragments.rs: u32 [4][head_dim / 32][32][2][4]; by width {u32, f32}.
  uint32_t offsets, alphabets;

  template <typename T>
  KAKEYA_HD const T *at(uint32_t offset) const {
    return reinterpret_cast<const T *>(reinterpret_cast<const uint8_t *>(this) + offset);
  }
};

// Byte layout of one layer's pages.
struct LayerLayout {
  uint32_t code_bits, num_slots, side_offset, slots_offset;
};

// One width's alphabet: x = y (alpha + beta y^2), y = (symbol + 1/2) 2^(1 - bits) - 1.
struct GridParams {
  float alpha, beta;
  uint32_t per_subset, symbol_bits;
};

struct StreamView {
  const float *mean, *step, *sigma;
  const uint16_t *order;     // channel at each code position
  const uint16_t *position;  // code position of each channel
  const uint8_t *widths;
};

struct HeadView {
  StreamView k, v;
  const float *sink_query;
  // Neighbours of eight key channels that count for scores: their numbers, and at kMaxActive how many.
  const uint8_t *active;
};

KAKEYA_HD HeadView head_view(const Tables &t, int layer, int head) {
  const int d = int(t.head_dim);
  const uint8_t *base = t.at<uint8_t>(t.heads) + size_t(layer * int(t.num_kv_heads) + head) * t.head_stride;
  const float *f = reinterpret_cast<const float *>(base);
  const uint16_t *order = reinterpret_cast<const uint16_t *>(f + 7 * d);
  const uint8_t *widths = reinterpret_cast<const uint8_t *>(order + 4 * d);
  HeadView h;
  h.k = {f, f + d, f + 2 * d, order, order + 2 * d, widths};
  h.v = {f + 3 * d, f + 4 * d, f + 5 * d, order + d, order + 3 * d, widths + kMaxUnits};
  h.sink_query = f + 6 * d;
  h.active = widths + 2 * kMaxUnits;
  return h;
}

}  // namespace kakeya
