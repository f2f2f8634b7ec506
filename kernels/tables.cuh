// A codec's static tables in one block of bytes, as crates/codec/src/device.rs writes it. Offsets count bytes from the
// block's start; every table begins at a multiple of 16.
#pragma once

#include "unit.cuh"

namespace kakeya {

constexpr int kBlock = 128;  // tokens of a block
constexpr int kHeader = 16;  // bytes of a page's header
constexpr uint8_t kFormatVersion = 2;
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
  // What attention reads, see crates/codec/src/fragments.rs: u32 [4][head_dim / 32][32][2][4]; records of heads.
  uint32_t offsets, attend, attend_stride;

  template <typename T>
  KAKEYA_HD const T *at(uint32_t offset) const {
    return reinterpret_cast<const T *>(reinterpret_cast<const uint8_t *>(this) + offset);
  }
};

// K's channels of pair f: those that turn together, or neighbours that do not turn.
KAKEYA_HD int pair_channel(int f, int which, int pairs) {
  return f < pairs ? f + which * pairs : 2 * f + which;
}
// Its inverse for K, and for V's neighbours with no pairs: 2 * pair + which.
KAKEYA_HD int channel_place(int channel, int pairs) {
  if (channel >= 2 * pairs) return channel;
  return channel < pairs ? 2 * channel : 2 * (channel - pairs) + 1;
}

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

// What attention reads of a head, as crates/codec/src/fragments.rs makes and explains it.
struct alignas(16) AttendUnit {
  uint32_t offset;
  uint8_t width, before, unused[2];
  uint32_t gamma;
  float undo;
};
struct alignas(16) AttendWarp {
  AttendUnit k, v;
  uint32_t constants[12];  // by class of channels: up, add, undo
};
struct alignas(16) AttendStats {
  float mean, step, scale, zero;
};
struct alignas(16) AttendPair {
  float limit, turn_cos, turn_sin;
  uint32_t natural, k_position, v_position;  // u16 x 2
  uint32_t unused[2];
  AttendStats stats[4];
};
struct alignas(16) AttendHead {
  AttendWarp warps[kMaxUnits];
  uint32_t k_stride, v_stride, side_offset, slots_offset, num_slots, unused[3];
  uint8_t v_order[kMaxUnits * 32];  // V's channel at each code position
};

static_assert(sizeof(AttendWarp) == 80 && sizeof(AttendPair) == 96 && sizeof(AttendHead) == 928, "fragments.rs");

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
