// Opening one stream of a page into dense rows, in phases as in seal.cuh: the same numbers as the codec's `open`.
#pragma once

#include "seal.cuh"

namespace kakeya {

template <int D>
struct alignas(16) OpenState {
  static constexpr int stride = D + 4;
  float rows[kBlock * stride];
  float points[256];  // of alphabets of s symbol bits at 2^s
  float base[D], scale[D];
  uint16_t order[D], canonical[D];
  uint8_t widths[kMaxUnits], tokens[kMaxSlots];
  int codes_start, bits, used;  // used: slots; -1 where the header is not that of a page of this layer
};

struct OpenJob {
  const Tables *tables;
  int layer, head;
  const uint8_t *page;
};

KAKEYA_HD float grid_point(const GridParams &g, uint32_t m) {
  const float y = (float(m) + 0.5f) * bits_float((128u - g.symbol_bits) << 23) - 1.0f;  // 2^(1 - bits)
  return y * (g.alpha + g.beta * (y * y));
}

// Symbols of a lane's codes of a unit: f(n, symbol). `before`: the chain's memory, what trellis_pairs wants of the unit
// before.
template <int W, bool Trellis, typename F>
KAKEYA_HD void lane_symbols(const uint8_t *unit, int lane, uint32_t &before, F f) {
  TrellisWords x = {0, {0, 0, 0}};
  LaneWords w = {0, 0, 0};
  uint32_t pairs = 0;
  if constexpr (Trellis) {
    x = unpack_trellis<W>(unit, lane);
    pairs = trellis_pairs(x.word, before);
    before = x.word;
  } else {
    w = load_lane<W>(unit, lane);
  }
  const auto put = [&](int code, uint32_t symbols) {
    f(code, symbols & 0xffffu);
    f(code + 8, symbols >> 16);
  };
#define KAKEYA_PAIR(M, C)                               \
  if constexpr (Trellis)                                \
    put(4 * M + C, trellis_symbols<W, M, C>(x, pairs)); \
  else                                                  \
    put(4 * M + C, field<W, M, C>(w) >> field_bit<W, M, C>());
  KAKEYA_PAIR(0, 0)
  KAKEYA_PAIR(0, 1)
  KAKEYA_PAIR(0, 2)
  KAKEYA_PAIR(0, 3)
  KAKEYA_PAIR(1, 0)
  KAKEYA_PAIR(1, 1)
  KAKEYA_PAIR(1, 2)
  KAKEYA_PAIR(1, 3)
#undef KAKEYA_PAIR
}

template <bool Trellis, typename F>
KAKEYA_HD void lane_symbols(int width, const uint8_t *unit, int lane, uint32_t &before, F f) {
  switch (width) {
    case 1:
      return lane_symbols<1, Trellis>(unit, lane, before, f);
    case 2:
      return lane_symbols<2, Trellis>(unit, lane, before, f);
    case 3:
      return lane_symbols<3, Trellis>(unit, lane, before, f);
    case 4:
      return lane_symbols<4, Trellis>(unit, lane, before, f);
    case 5:
      return lane_symbols<5, Trellis>(unit, lane, before, f);
    default:
      return lane_symbols<6, Trellis>(unit, lane, before, f);
  }
}

// Header, statistics and tables.
template <int D, bool K>
KAKEYA_HD void open_read(const OpenJob &job, OpenState<D> &s, int thread) {
  const Tables &t = *job.tables;
  const HeadView h = head_view(t, job.layer, job.head);
  const StreamView &v = K ? h.k : h.v;
  const LayerLayout l = t.at<LayerLayout>(t.layers)[job.layer];
  const uint8_t *page = job.page, *side = page + l.side_offset;
  const uint16_t *natural = t.at<uint16_t>(t.natural);
  if (thread == 0) {
    bool ok = page[0] == 'K' && page[1] == kFormatVersion && page[2] == 0 && page[3] <= l.num_slots;
    ok = ok && load_u32(page + 4) < t.max_blocks;
    for (int i = 0; ok && i < int(page[3]); ++i) ok = page[8 + i] < kBlock;
    s.used = ok ? int(page[3]) : -1;
    int k_bits = 0;
    s.bits = 0;
    for (int u = 0; u < Unit<D>::units; ++u) {
      k_bits += h.k.widths[u];
      s.bits += v.widths[u];
      s.widths[u] = v.widths[u];
    }
    s.codes_start = kHeader + (K ? 0 : unit_bytes(1) * Unit<D>::groups * k_bits);
  }
  if (thread < kMaxSlots) s.tokens[thread] = page[8 + thread];
  for (int i = thread; i < 256; i += kSealThreads) {
    int bits = 0;
    while (2 << bits <= i) ++bits;
    const int width = t.trellis ? bits - 1 : bits;
    s.points[i] =
        width >= 1 && width <= 6 ? grid_point(t.at<GridParams>(t.grids)[width], uint32_t(i - (1 << bits))) : 0.0f;
  }
  for (int i = thread; i < D; i += kSealThreads) {
    const int place = channel_place(i, K ? int(t.pairs) : 0), at = place / 2 * 4 + (K ? 0 : 2) + place % 2;
    const uint8_t *rest = side + 2 * D;
    uint32_t code = side[at];
    float mean;
    if (t.calibrated) {
      const uint32_t high = rest[(K ? 0 : D / 4) + place / 4] >> 2 * (place % 4) & 3u;
      mean = float(int(code >> 4 | high << 4) - 32) * v.step[i];
      code &= 15u;
    } else {
      mean = half_value(uint16_t(load_u16(rest + 2 * at)));
    }
    s.base[i] = v.mean[i] + mean;
    s.scale[i] = t.at<float>(t.factors)[code] * v.sigma[i];
    s.order[i] = v.order[i];
    s.canonical[natural[i]] = uint16_t(i);
  }
}

// Points of all codes into the rows: one thread a chain.
template <int D, bool K>
KAKEYA_HD void open_codes(const OpenJob &job, OpenState<D> &s, int thread) {
  if (s.used < 0 || thread >= Unit<D>::chains) return;
  const int group = thread / kLanes, lane = thread % kLanes;
  const uint8_t *unit = job.page + s.codes_start + unit_bytes(1) * group * s.bits;
  uint32_t before = 0;
  for (int u = 0; u < Unit<D>::units; ++u) {
    const int w = s.widths[u];
    const auto put = [&](int n, float x) {
      const int channel = s.order[u * Unit<D>::channels + code_channel<D, K>(lane, n)];
      s.rows[code_token<D, K>(group, lane, n) * s.stride + channel] = x;
    };
    if (w == 0) {
      KAKEYA_UNROLL
      for (int n = 0; n < kCodes; ++n) put(n, 0.0f);
    } else if (job.tables->trellis) {
      const float *points = s.points + (2 << w);
      lane_symbols<true>(w, unit, lane, before, [&](int n, uint32_t m) { put(n, points[m]); });
    } else {
      const float *points = s.points + (1 << w);
      lane_symbols<false>(w, unit, lane, before, [&](int n, uint32_t m) { put(n, points[m]); });
    }
    unit += unit_bytes(w);
  }
}

// Adds the slots.
template <int D, bool K>
KAKEYA_HD void open_slots(const OpenJob &job, OpenState<D> &s, int thread) {
  const LayerLayout l = job.tables->at<LayerLayout>(job.tables->layers)[job.layer];
  const uint8_t *slots = job.page + l.slots_offset;
  const int n = int(l.num_slots);
  // One channel after the other of a thread's slots: damaged pages may name a token twice.
  for (int i = thread; i < D; i += kSealThreads) {
    const int unit = i / Unit<D>::channels * Unit<D>::channels;
    const int channel = s.order[unit + slot_channel<D, K>(i - unit)];
    for (int slot = 0; slot < s.used; ++slot) {
      const float x = half_value(uint16_t(load_u16(slots + 2 * n * D + 4 * slot + (K ? 0 : 2))));
      const float scale = float_bits(x) << 1 >= 0xff000000u ? 0.0f : x;  // only a damaged page holds anything else
      s.rows[s.tokens[slot] * s.stride + channel] += float(int8_t(slots[((K ? 0 : n) + slot) * D + i])) * scale;
    }
  }
}

// Scale and mean, and keys to their positions; values: the butterflies of distances 1, 2 and 4.
template <int D, bool K>
KAKEYA_HD void open_expand(const OpenJob &job, OpenState<D> &s, int thread) {
  if (s.used < 0) return;
  if constexpr (!K) {
    for (int e = thread; e < kBlock * D / 8; e += kSealThreads) {
      const int i = e % (D / 8) * 8;
      float *row = s.rows + e / (D / 8) * s.stride + i, x[8];
      KAKEYA_UNROLL
      for (int k = 0; k < 8; ++k) x[k] = s.base[i + k] + row[k] * s.scale[i + k];
      hadamard_near(x);
      KAKEYA_UNROLL
      for (int k = 0; k < 8; ++k) row[k] = x[k];
    }
  } else {
    const Tables &t = *job.tables;
    const int h = int(t.pairs), columns = D - h;
    const float *cos = t.at<float>(t.offset_cos), *sin = t.at<float>(t.offset_sin);
    const size_t centre = size_t(load_u32(job.page + 4)) * size_t(h);
    const float *centre_cos = t.at<float>(t.centre_cos) + centre, *centre_sin = t.at<float>(t.centre_sin) + centre;
    for (int e = thread; e < kBlock * columns; e += kSealThreads) {
      const int j = e / columns, i = e - j * columns;
      float *row = s.rows + j * s.stride;
      if (i < h) {
        const float a = s.base[i], b = s.base[i + h], c = cos[j * h + i], sn = sin[j * h + i];
        const float x = (a * c - b * sn) + row[i] * s.scale[i];
        const float y = (b * c + a * sn) + row[i + h] * s.scale[i + h];
        const float cc = centre_cos[i], cs = centre_sin[i];
        row[i] = x * cc - y * cs;
        row[i + h] = y * cc + x * cs;
      } else {
        row[i + h] = s.base[i + h] + row[i + h] * s.scale[i + h];
      }
    }
  }
}

// Values: the remaining butterflies.
template <int D>
KAKEYA_HD void open_hadamard(OpenState<D> &s, int thread) {
  if (s.used >= 0) hadamard_far<D>(s.rows, thread);
}

// Eight natural channels of token j from i on. What is no page reads as NaN: no caller may take it for numbers.
template <int D>
KAKEYA_HD void open_row(const OpenState<D> &s, int j, int i, float *x) {
  KAKEYA_UNROLL
  for (int k = 0; k < 8; ++k) x[k] = s.used < 0 ? bits_float(0x7fc00000u) : s.rows[j * s.stride + s.canonical[i + k]];
}

// The phases in order; store(j, i, x) takes eight natural channels.
template <int D, bool K, typename Store, typename Run>
KAKEYA_HD void open_stream(const OpenJob &job, OpenState<D> &s, Store store, Run run) {
  run([&](int t) { open_read<D, K>(job, s, t); });
  run([&](int t) { open_codes<D, K>(job, s, t); });
  run([&](int t) { open_slots<D, K>(job, s, t); });
  run([&](int t) { open_expand<D, K>(job, s, t); });
  if (!K) run([&](int t) { open_hadamard(s, t); });
  run([&](int t) {
    for (int e = t; e < kBlock * D / 8; e += kSealThreads) {
      const int j = e / (D / 8), i = e % (D / 8) * 8;
      float x[8];
      if (K) {
        open_row(s, j, i, x);
      } else {
        KAKEYA_UNROLL
        for (int k = 0; k < 8; ++k) x[k] = s.used < 0 ? bits_float(0x7fc00000u) : s.rows[j * s.stride + i + k];
      }
      store(j, i, x);
    }
  });
}

constexpr size_t open_shared_bytes(int head_dim) {
  return head_dim == 64    ? sizeof(OpenState<64>)
         : head_dim == 96  ? sizeof(OpenState<96>)
         : head_dim == 128 ? sizeof(OpenState<128>)
                           : sizeof(OpenState<256>);
}

}  // namespace kakeya
