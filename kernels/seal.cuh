// Sealing one block of one KV head, in phases. A phase is what all threads of a thread block do between two barriers;
// each is a function of (thread, shared state), so that the host can run the threads of a phase one after the other and
// compare the page with the codec's, byte for byte, and a kernel runs them at once with __syncthreads in between.
//
// Keys and values are two streams with a state each. On the device a cluster of two thread blocks seals a block: one
// its keys, one its values; all that passes between them is which tokens are exact, and whether a value was refused.
//
// Arithmetic follows docs/page-format.md exactly: f32, fixed order, no contraction. Compile with -fmad=false (nvcc) or
// -ffp-contract=off (host).
#pragma once

#include "half.cuh"
#include "tables.cuh"

namespace kakeya {

constexpr int kSealThreads = 256;
// Largest magnitude that a page accepts.
constexpr float kMaxAbs = 16777216.0f;

enum SealStatus : uint32_t {
  kSealOk = 0,
  // A value was NaN, infinite or above 2^24: its page was not written.
  kSealNonFinite = 1,
  // A block that began before this step has no open block: its page was not written.
  kSealNoOpenBlock = 2
};

KAKEYA_HD float round_even(float x) {
#ifdef __CUDA_ARCH__
  return rintf(x);
#else
  return __builtin_rintf(x);
#endif
}

// Order of total comparison: -0 < +0, as the codec sorts scores.
KAKEYA_HD int32_t total_order(float x) {
  const int32_t i = int32_t(float_bits(x));
  return i ^ int32_t(uint32_t(i >> 31) >> 1);
}

// Shape of a unit of codes, and the chains of a stream: one for each lane of each group of tokens.
template <int D>
struct Unit {
  static constexpr int head_dim = D, channels = D == 64 ? 16 : 32, tokens = 512 / channels;
  static constexpr int groups = kBlock / tokens, units = D / channels, chains = groups * kLanes;
  static_assert(chains <= kSealThreads && units <= kMaxUnits, "one thread a chain");
};

// Channel, inside the unit, and token of the block of code n of a lane.
template <int D, bool K>
KAKEYA_HD int code_channel(int lane, int n) {
  const int c = D == 64 ? n % 2 : n % 4;
  return 8 * c + (K ? 2 * (lane % 4) + n / 8 : lane / 4);
}
template <int D, bool K>
KAKEYA_HD int code_token(int group, int lane, int n) {
  const int tile = D == 64 ? 2 * group + n % 4 / 2 : group, m = 8 * (n / 4 % 2);
  if (!K) return 16 * tile + m + 2 * (lane % 4) + n / 8;
  // Tiles of keys come in pairs that mirror each other around the centre: 64 + x, and 63 - x = 64 + ~x.
  const int x = 16 * (tile / 2) + m + lane / 4;
  return kBlock / 2 + (tile % 2 ? ~x : x);
}

// Channel, inside the unit, of a byte of a slot: a lane's bytes lie together, in the order of its codes.
template <int D, bool K>
KAKEYA_HD int slot_channel(int byte) {
  constexpr int classes = Unit<D>::channels / 8;
  return K ? 8 * (byte / 2 % classes) + 2 * (byte / (2 * classes)) + byte % 2 : 8 * (byte % classes) + byte / classes;
}

// Four neighbouring floats, loaded at once.
struct alignas(16) Quad {
  float x[4];
};

struct alignas(16) Four {
  int32_t x[4];
};

// Windows of the trellis' alphabet of a width: 2^(w+1) - 3, the widths one after the other.
constexpr int kWindows = 234;
KAKEYA_HD constexpr int window_start(int width) {
  return (2 << width) - 3 * width - 1;
}

// A piece of a width's axis that holds at most one threshold: how many lie below it, and the one.
struct alignas(8) Cell {
  float threshold;
  int below;
};

// Where a width's cells lie: input z is in cell first + round(count * saturate(z * scale + 1/2)). Which cell that is
// need not be exact, only monotone and the same for inputs and thresholds: inputs of a cell are above all thresholds of
// earlier cells, below all of later ones, and are compared with its own.
struct Cells {
  float scale, count, origin;  // origin: first + 2^23
};

// Tables that every block uses, as crates/codec/src/device.rs writes them into the static tables.
struct alignas(16) SealTables {
  // Scalar quantisers: point m of width w at 2^w + m, as plain floats. Trellis: window n of width w holds the points of
  // subsets 0..3 nearest to a z above n thresholds, whichever subset these belong to: symbols n..n+3. The trellis has
  // the thresholds of its four subsets merged.
  Quad points[kWindows];
  // Cells of alphabets of s symbol bits at 4 * 2^s, 4 * 2^s of them: then none holds two thresholds.
  Cell cells[1024];
  Cells cells_of[kMaxUnits];  // by symbol bits
  float even_steps[8];        // by width: of the even grid by which scales are compared, in deviations
  float factors[256], scale_thresholds[256];
};
static_assert(sizeof(SealTables) == 16 * kWindows + 8 * 1024 + 12 * kMaxUnits + 32 + 8 * 256, "as device.rs writes it");

// How inputs are read in code order: the channel at a position, the inverse of its scale, and the base that values
// have.
struct alignas(16) Coded {
  int32_t channel;
  float inverse, base;
};

// What the threads that seal one stream share.
template <int D>
struct alignas(16) SealState {
  // Row stride: lanes of a chain walk rows and channels at once, so neighbouring rows begin four banks apart.
  static constexpr int stride = D + 4;
  float rows[kBlock * stride];
  // Partial sums by (part, channel), or scores by (token, part); later what the codes leave of the exact rows, by
  // (slot, code position).
  float part[8 * D > 8 * kBlock ? 8 * D : 8 * kBlock];
  SealTables tables;
  // cos (low half) and sin of the turns by 0.5..63.5 tokens, values of f16 as the codec's; rows begin four banks
  // apart. As they stand in the static tables.
  static constexpr int turns_stride = D / 2 + 4;
  alignas(16) uint32_t turns[kBlock / 2 * turns_stride];
  alignas(16) float mean[D];
  alignas(16) float step[D];
  alignas(16) float sigma[D];
  alignas(16) float sink[D];
  alignas(16) float base[D];
  alignas(16) float inverse[D];  // without calibration: weights of the score
  Coded coded[D];
  float left[D];        // by the best of the scales tried
  uint8_t width_of[D];  // by channel
  alignas(16) uint16_t order[D];
  alignas(16) int32_t score[kBlock];            // in total order
  alignas(16) uint8_t active[kMaxActive + 16];  // as in HeadView
  alignas(16) uint8_t widths[2][kMaxUnits];     // of keys and values
  alignas(16) LayerLayout layout;
  float turn[D];  // of the block's centre: cos, sin of `pairs` each
  float peaks[kMaxSlots * 16];
  uint16_t means[D], canonical[D];
  uint16_t exact[8];  // bit k of w: token 16 w + k is exact
  uint8_t scales[D];
  // Counts of better scores, a half of the block each; later, by channel, the deviation's scale code.
  uint8_t better[2 * kBlock];
  static_assert(D <= 2 * kBlock, "a byte a channel");
  uint8_t tokens[kMaxSlots], slot_of[kBlock];
  int codes_start, bits;  // of this stream: offset of its codes in the page, sum of its widths
  uint32_t pairs, calibrated, trellis, interleaved, scale_codes, page_bytes;
  uint32_t bad[2];  // by the parity of the task: set by any thread that met a value that is refused
};

struct SealJob {
  const Tables *tables;
  int layer, head, block_index, parity;
  uint8_t *page;
};

constexpr uint8_t kNoSlot = 0xff;

// 16 or 4 bytes into shared memory; there once copies_done() was called by the thread that copied, and a barrier
// passed.
KAKEYA_HD void copy16(void *to, const void *from) {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(uint32_t(__cvta_generic_to_shared(to))), "l"(from)
               : "memory");
#else
  memcpy(to, from, 16);
#endif
}
KAKEYA_HD void copy4(void *to, const void *from) {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(uint32_t(__cvta_generic_to_shared(to))), "l"(from)
               : "memory");
#else
  memcpy(to, from, 4);
#endif
}
KAKEYA_HD void copies_done() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// A table of whole 16 bytes, by all threads.
template <typename T, size_t N>
KAKEYA_HD void copy_table(T (&to)[N], const void *from, int thread) {
  static_assert(sizeof to % 16 == 0, "whole copies");
  KAKEYA_ROLLED
  for (int i = thread; i < int(sizeof to / 16); i += kSealThreads)
    copy16(reinterpret_cast<Quad *>(to) + i, static_cast<const Quad *>(from) + i);
}

// Number of the cell that holds z. Added to 2^23, a number is rounded to a whole one, which its bits show.
KAKEYA_HD uint32_t cell_of(const Cells &c, float z) {
#ifdef __CUDA_ARCH__
  return float_bits(__fmaf_rn(__saturatef(__fmaf_rn(z, c.scale, 0.5f)), c.count, c.origin)) - 0x4b000000u;
#else
  const float x = __builtin_fmaf(z, c.scale, 0.5f), low = x < 0.0f ? 0.0f : x;
  return float_bits(__builtin_fmaf(low > 1.0f ? 1.0f : low, c.count, c.origin)) - 0x4b000000u;
#endif
}

// Sum over channels or parts as a tree of eight.
KAKEYA_HD float tree8(float a, float b, float c, float d, float e, float f, float g, float h) {
  return ((a + b) + (c + d)) + ((e + f) + (g + h));
}

struct Turn {
  float cos, sin;
};

// Turn of pair p at token j's offset from the centre.
template <int D>
KAKEYA_HD Turn turn_of(const SealState<D> &s, int j, int p) {
  // Tokens 63 - i and 64 + i stand i + 1/2 from the centre, on either side.
  const bool below = j < kBlock / 2;
  const uint32_t x = s.turns[(below ? kBlock / 2 - 1 - j : j - kBlock / 2) * s.turns_stride + p];
  return {half_value(uint16_t(x)), half_value(uint16_t(below ? x >> 16 ^ 0x8000u : x >> 16))};
}

// Channel i of key row j before rotary embedding, up to the centre's turn (and the sign of a zero).
template <int D>
KAKEYA_HD float before(const SealState<D> &s, int j, int i) {
  const int h = int(s.pairs);
  const float *row = s.rows + j * s.stride;
  // One form for both members of a pair, and a turn by nothing for channels that do not rotate: no branch.
  const bool turns = i < 2 * h, second = i >= h;
  const int p = second ? i - h : i;
  const Turn r = turn_of(s, j, turns ? p : 0);
  const float x = row[i], y = row[turns ? (second ? p : i + h) : i];
  return x * (turns ? r.cos : 1.0f) + y * (turns ? (second ? -r.sin : r.sin) : 0.0f);
}

// ---- phases --------------------------------------------------------------------------------------------------------

// Once in a thread block, before its first block; seal_load waits for the copies.
template <int D, bool K>
KAKEYA_HD void seal_setup(const Tables &t, SealState<D> &s, int thread) {
  if (K) copy_table(s.turns, t.at<Quad>(t.turns), thread);
  const Quad *from = t.at<Quad>(t.seal);
  KAKEYA_ROLLED
  for (int i = thread; i < int(sizeof(SealTables) / 16); i += kSealThreads)
    copy16(reinterpret_cast<Quad *>(&s.tables) + i, from + i);
  if (thread == 0) {
    s.pairs = t.pairs;
    s.calibrated = t.calibrated;
    s.trellis = t.trellis;
    s.interleaved = t.interleaved;
    s.scale_codes = t.scale_codes;
    s.page_bytes = t.page_bytes;
    s.bad[0] = s.bad[1] = 0;
  }
  if (K && t.interleaved)
    for (int i = thread; i < D; i += kSealThreads) s.canonical[t.at<uint16_t>(t.natural)[i]] = uint16_t(i);
}

// The butterflies of distances 1, 2 and 4 of eight neighbours.
KAKEYA_HD void hadamard_near(float *x) {
  KAKEYA_UNROLL
  for (int len = 1; len < 8; len *= 2) {
    KAKEYA_UNROLL
    for (int k = 0; k < 8; ++k) {
      if (k & len) continue;
      const float a = x[k], b = x[k + len];
      x[k] = a + b;
      x[k + len] = a - b;
    }
  }
}

// Eight channels of a row into shared memory; whether one of them is refused.
template <int D, bool K, typename Load, typename Raw>
KAKEYA_HD bool seal_place(SealState<D> &s, int e, const Load &load, const Raw &raw) {
  const int j = e / (D / 8), i = e % (D / 8) * 8;
  float x[8];
  load.widen(raw, x);
  float *row = s.rows + j * s.stride;
  if (K && s.interleaved) {
    KAKEYA_UNROLL
    for (int k = 0; k < 8; ++k) row[s.canonical[i + k]] = x[k];
  } else {
    if (!K) hadamard_near(x);
    *reinterpret_cast<Quad *>(row + i) = {{x[0], x[1], x[2], x[3]}};
    *reinterpret_cast<Quad *>(row + i + 4) = {{x[4], x[5], x[6], x[7]}};
  }
  return load.refused(raw);
}

// Rows into shared memory as f32: keys canonical, values after the butterflies of distances 1, 2 and 4. `load(j, i)`
// gives eight natural channels of token j from i on, as they are stored, `load.scattered(j, i)` where not `aligned`;
// `widen` makes them floats, `refused` tells whether one of them is not finite or above kMaxAbs. All that a thread
// waits for is on its way before it waits: a batch of rows, and the head's tables.
template <int D, bool K, typename Load>
KAKEYA_HD void seal_load(const SealJob &job, SealState<D> &s, int thread, const Load &load) {
  constexpr int chunks = kBlock * D / 8 / kSealThreads, batch = chunks == 8 ? 8 : chunks % 4 == 0 ? 4 : 3;
  static_assert(chunks % batch == 0, "whole batches");
  const Tables &t = *job.tables;
  bool bad = false;
  decltype(load(0, 0)) raw[batch];
  const auto fetch = [&](int first) {
    KAKEYA_UNROLL
    for (int c = 0; c < batch; ++c) {
      const int e = (first + c) * kSealThreads + thread;
      raw[c] = load(e / (D / 8), e % (D / 8) * 8);
    }
  };
  if (load.aligned) fetch(0);
  const HeadView h = head_view(t, job.layer, job.head);
  const StreamView &v = K ? h.k : h.v;
  copy_table(s.mean, v.mean, thread);
  copy_table(s.step, v.step, thread);
  copy_table(s.sigma, v.sigma, thread);
  copy_table(s.order, v.order, thread);
  copy_table(s.widths, h.k.widths, thread);
  if (thread == 0) copy16(&s.layout, t.at<LayerLayout>(t.layers) + job.layer);
  if (K) {
    copy_table(s.sink, h.sink_query, thread);
    copy_table(s.active, h.active, thread);
    const int pairs = int(t.pairs);
    for (int i = thread; i < 2 * pairs; i += kSealThreads)
      copy4(s.turn + i, t.at<float>(i < pairs ? t.centre_cos : t.centre_sin) + size_t(job.block_index) * pairs +
                            (i < pairs ? i : i - pairs));
  }
  if (thread < kBlock) s.slot_of[thread] = kNoSlot;
  if (load.aligned) {
    KAKEYA_ROLLED
    for (int first = 0;;) {
      KAKEYA_UNROLL
      for (int c = 0; c < batch; ++c) bad |= seal_place<D, K>(s, (first + c) * kSealThreads + thread, load, raw[c]);
      if ((first += batch) >= chunks) break;
      fetch(first);
    }
  } else {
    KAKEYA_ROLLED
    for (int e = thread; e < kBlock * D / 8; e += kSealThreads)
      bad |= seal_place<D, K>(s, e, load, load.scattered(e / (D / 8), e % (D / 8) * 8));
  }
  if (bad) s.bad[job.parity] = 1;  // every thread that writes, writes the same
  copies_done();
}

// Keys into the frame of the block's centre.
template <int D>
KAKEYA_HD void seal_centre(SealState<D> &s, int thread) {
  const int h = int(s.pairs);
  KAKEYA_ROLLED
  for (int e = thread; e < 8 * h; e += kSealThreads) {
    const int w = e / h, p = e - w * h;
    const float c = s.turn[p], sn = s.turn[h + p];
    KAKEYA_UNROLL_4
    for (int j = 16 * w; j < 16 * w + 16; ++j) {
      float *row = s.rows + j * s.stride;
      const float a = row[p], b = row[p + h];
      row[p] = a * c + b * sn;
      row[p + h] = b * c - a * sn;
    }
  }
}

// The butterflies of distances 8 and up of all rows, and the scaling.
template <int D>
KAKEYA_HD void hadamard_far(float *rows, int thread) {
  constexpr int n = D & -D, length = n / 8;
  // 1 / sqrt(n) rounded to f32.
  constexpr float scale = n == 32 ? 0.17677669f : n == 64 ? 0.125f : n == 128 ? 0.088388346f : 0.0625f;
  KAKEYA_ROLLED
  for (int e = thread; e < kBlock * (D / length); e += kSealThreads) {
    const int j = e / (D / length), r = e % (D / length);
    float *at = rows + j * SealState<D>::stride + r / 8 * n + r % 8;
    float x[length];
    KAKEYA_UNROLL
    for (int k = 0; k < length; ++k) x[k] = at[8 * k];
    KAKEYA_UNROLL
    for (int len = 1; len < length; len *= 2) {
      KAKEYA_UNROLL
      for (int k = 0; k < length; ++k) {
        if (k & len) continue;
        const float a = x[k], b = x[k + len];
        x[k] = a + b;
        x[k + len] = a - b;
      }
    }
    KAKEYA_UNROLL
    for (int k = 0; k < length; ++k) at[8 * k] = x[k] * scale;
  }
}

template <int D>
KAKEYA_HD void seal_hadamard(SealState<D> &s, int thread) {
  hadamard_far<D>(s.rows, thread);
}

// Partial sums of each channel over sixteen neighbouring tokens, of f(token, channel, x, whether the token is exact), x
// the key before rotary embedding or the transformed value.
template <int D, bool K, typename F>
KAKEYA_HD void channel_sums(SealState<D> &s, int thread, F f) {
  const int h = K ? int(s.pairs) : 0, columns = D - h;
  KAKEYA_ROLLED
  for (int e = thread; e < 8 * columns; e += kSealThreads) {
    const int w = e / columns, i = e - w * columns;
    const uint32_t exact = s.exact[w];
    float sum = 0.0f, second = 0.0f;
    if (K && i < h) {
      KAKEYA_UNROLL_4
      for (int k = 0; k < 16; ++k) {
        const int j = 16 * w + k;
        const float a = s.rows[j * s.stride + i], b = s.rows[j * s.stride + i + h];
        const Turn r = turn_of(s, j, i);
        sum += f(j, i, a * r.cos + b * r.sin, exact >> k & 1u);
        second += f(j, i + h, b * r.cos - a * r.sin, exact >> k & 1u);
      }
      s.part[w * D + i] = sum;
      s.part[w * D + i + h] = second;
    } else {
      KAKEYA_UNROLL_4
      for (int k = 0; k < 16; ++k)
        sum += f(16 * w + k, i + h, s.rows[(16 * w + k) * s.stride + i + h], exact >> k & 1u);
      s.part[w * D + i + h] = sum;
    }
  }
}

template <int D>
KAKEYA_HD float channel_sum(const SealState<D> &s, int i) {
  const float *p = s.part + i;
  return tree8(p[0], p[D], p[2 * D], p[3 * D], p[4 * D], p[5 * D], p[6 * D], p[7 * D]);
}

// Without calibration: each channel's mean, then its weight (slow channels: 1 / variance) for the distance score.
// `base` and `inverse` hold them; nothing else does yet.
template <int D>
KAKEYA_HD void seal_moment_sums(SealState<D> &s, int thread, bool square) {
  if (!square) return channel_sums<D, true>(s, thread, [](int, int, float x, bool) { return x; });
  channel_sums<D, true>(s, thread, [&](int, int i, float x, bool) {
    const float y = x - s.base[i];
    return y * y;
  });
}
template <int D>
KAKEYA_HD void seal_moments(SealState<D> &s, int thread, bool square) {
  for (int i = thread; i < D; i += kSealThreads) {
    const float mean = channel_sum(s, i) / float(kBlock);
    if (square)
      s.inverse[i] = s.sink[i] / (mean + 1e-12f);
    else
      s.base[i] = mean;
  }
}

// How much each token wants an exact slot: eight interleaved partial sums over its channels, four of them a thread. A
// weight of zero adds a zero to a partial sum, which no partial sum notices: it begins as +0.
template <int D>
KAKEYA_HD void seal_score_sums(SealState<D> &s, int thread) {
  static_assert(kSealThreads == 2 * kBlock, "two threads a token");
  const int j = thread % kBlock, quad = thread / kBlock * 4, h = int(s.pairs), count = s.active[kMaxActive];
  const bool calibrated = s.calibrated, below = j < kBlock / 2;
  float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  const auto add = [&](int k, float x, float weight, float base) {
    const float y = x - base;
    sum[k] += calibrated ? weight * x : y * y * weight;
  };
  const float *weights = calibrated ? s.sink : s.inverse;
  const float *row = s.rows + j * s.stride;
  if (h % 4 == 0) {
    const uint32_t *turns = s.turns + (below ? kBlock / 2 - 1 - j : j - kBlock / 2) * s.turns_stride;
    KAKEYA_UNROLL_2
    for (int b = 0; b < count; ++b) {
      const int i = 8 * s.active[b] + quad;
      Quad x = *reinterpret_cast<const Quad *>(row + i);
      if (i < 2 * h) {
        const bool second = i >= h;
        const Quad y = *reinterpret_cast<const Quad *>(row + (second ? i - h : i + h));
        const Four turn = *reinterpret_cast<const Four *>(turns + (second ? i - h : i));
        const uint32_t flip = below != second ? 0x8000u : 0u;
        KAKEYA_UNROLL
        for (int k = 0; k < 4; ++k)
          x.x[k] = x.x[k] * half_value(uint16_t(turn.x[k])) +
                   y.x[k] * half_value(uint16_t(uint32_t(turn.x[k]) >> 16 ^ flip));
      }
      const Quad weight = *reinterpret_cast<const Quad *>(weights + i);
      const Quad base = *reinterpret_cast<const Quad *>(s.base + i);
      KAKEYA_UNROLL
      for (int k = 0; k < 4; ++k) add(k, x.x[k], weight.x[k], base.x[k]);
    }
  } else {
    KAKEYA_ROLLED
    for (int b = 0; b < count; ++b) {
      KAKEYA_UNROLL
      for (int k = 0; k < 4; ++k) {
        const int i = 8 * s.active[b] + quad + k;
        add(k, before(s, j, i), weights[i], s.base[i]);
      }
    }
  }
  *reinterpret_cast<Quad *>(s.part + 8 * j + quad) = {{sum[0], sum[1], sum[2], sum[3]}};
}
template <int D>
KAKEYA_HD void seal_scores(SealState<D> &s, int thread) {
  if (thread >= kBlock) return;
  const float *p = s.part + 8 * thread;
  s.score[thread] = total_order(tree8(p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]));
}

// The tokens with the best scores; of equal ones the earlier. A token's place is the number of better ones, which two
// threads count, each in a half of the block. No score is the least number.
template <int D>
KAKEYA_HD void seal_choose(SealState<D> &s, int thread) {
  const int token = thread % kBlock, from = thread / kBlock * (kBlock / 2);
  const int32_t own = s.score[token];
  int better = 0;
  KAKEYA_UNROLL_4
  for (int first = from; first < from + kBlock / 2; first += 4) {
    const Four others = *reinterpret_cast<const Four *>(s.score + first);
    const int32_t bound = own - int32_t(first + 3 < token);
    KAKEYA_UNROLL
    for (int k = 0; k < 4; ++k) better += others.x[k] > bound;
  }
  if (token / (kBlock / 2) == thread / kBlock) {
    const Four near = *reinterpret_cast<const Four *>(s.score + token / 4 * 4);
    KAKEYA_UNROLL
    for (int k = 0; k < 3; ++k) better += k < token % 4 && near.x[k] == own;
  }
  s.better[thread] = uint8_t(better);
}
template <int D>
KAKEYA_HD void seal_pick(SealState<D> &s, int thread) {
  if (thread >= kBlock) return;
  const uint32_t place = uint32_t(s.better[thread]) + s.better[kBlock + thread];
  if (place < s.layout.num_slots) s.tokens[place] = uint8_t(thread);
}

// Slot of each exact token, where this stream's codes lie; and the other task's flag is ready for its use.
template <int D, bool K>
KAKEYA_HD void seal_mark(const SealJob &job, SealState<D> &s, int thread) {
  const int n = int(s.layout.num_slots);
  if (thread < n) s.slot_of[s.tokens[thread]] = uint8_t(thread);
  if (thread >= 32 && thread < 40) {
    uint32_t exact = 0;
    for (int i = 0; i < n; ++i) exact |= uint32_t(s.tokens[i] / 16 == thread - 32) << s.tokens[i] % 16;
    s.exact[thread - 32] = uint16_t(exact);
  }
  if (thread == 64) {
    int k_bits = 0, v_bits = 0;
    KAKEYA_UNROLL
    for (int u = 0; u < Unit<D>::units; ++u) k_bits += s.widths[0][u], v_bits += s.widths[1][u];
    s.bits = K ? k_bits : v_bits;
    s.codes_start = kHeader + (K ? 0 : unit_bytes(1) * Unit<D>::groups * k_bits);
    s.bad[job.parity ^ 1] = 0;
  }
}

// Block means over the ordinary tokens.
template <int D, bool K>
KAKEYA_HD void seal_mean_sums(SealState<D> &s, int thread) {
  channel_sums<D, K>(s, thread, [&](int, int i, float x, bool exact) { return exact ? 0.0f : x - s.mean[i]; });
}

// Their codes, and the base that is taken off.
template <int D>
KAKEYA_HD void seal_means(SealState<D> &s, int thread) {
  const float ordinary = float(kBlock - int(s.layout.num_slots));
  for (int i = thread; i < D; i += kSealThreads) {
    const float mean = channel_sum(s, i) / ordinary;
    float value;
    if (s.calibrated) {
      float q = round_even(mean / s.step[i]);
      q = q < -32.0f ? -32.0f : q > 31.0f ? 31.0f : q;
      s.means[i] = uint16_t(int(q) + 32);
      value = q * s.step[i];
    } else {
      const float m = mean < -65504.0f ? -65504.0f : mean > 65504.0f ? 65504.0f : mean;
      s.means[i] = half_bits(m);
      value = half_value(s.means[i]);
    }
    s.base[i] = s.mean[i] + value;
  }
}

// Takes the base off keys, turned by the token's offset; partial sums of squares. Values keep their base until they are
// coded: it is the same for all tokens.
template <int D, bool K>
KAKEYA_HD void seal_residual(SealState<D> &s, int thread) {
  if (!K) {
    return channel_sums<D, false>(s, thread, [&](int, int i, float x, bool exact) {
      const float r = x - s.base[i];
      return exact ? 0.0f : r * r;
    });
  }
  const int h = int(s.pairs), columns = D - h;
  KAKEYA_ROLLED
  for (int e = thread; e < 8 * columns; e += kSealThreads) {
    const int w = e / columns, i = e - w * columns;
    const uint32_t exact_tokens = s.exact[w];
    float sum = 0.0f, second = 0.0f;
    if (i < h) {
      const float a = s.base[i], b = s.base[i + h];
      KAKEYA_UNROLL_4
      for (int k = 0; k < 16; ++k) {
        const int j = 16 * w + k;
        float *row = s.rows + j * s.stride;
        const Turn r = turn_of(s, j, i);
        const bool exact = exact_tokens >> k & 1u;
        const float x = row[i] - (a * r.cos - b * r.sin), y = row[i + h] - (b * r.cos + a * r.sin);
        row[i] = x;
        row[i + h] = y;
        sum += exact ? 0.0f : x * x;
        second += exact ? 0.0f : y * y;
      }
      s.part[w * D + i] = sum;
      s.part[w * D + i + h] = second;
    } else {
      KAKEYA_UNROLL_4
      for (int k = 0; k < 16; ++k) {
        float *x = s.rows + (16 * w + k) * s.stride + i + h;
        *x -= s.base[i + h];
        sum += exact_tokens >> k & 1u ? 0.0f : *x * *x;
      }
      s.part[w * D + i + h] = sum;
    }
  }
}

// Block scales of each channel by its deviation: the number of thresholds below the ratio.
template <int D>
KAKEYA_HD void seal_scales(SealState<D> &s, int thread, const uint8_t *widths) {
  const float ordinary = float(kBlock - int(s.layout.num_slots));
  for (int n = thread; n < D; n += kSealThreads) {
    const int i = s.order[n];
    const float ratio = channel_sum(s, i) / ordinary / (s.sigma[i] * s.sigma[i]);
    uint32_t lo = 0, hi = s.scale_codes - 1;
    while (lo < hi) {
      const uint32_t mid = (lo + hi) / 2;
      if (ratio > s.tables.scale_thresholds[mid])
        lo = mid + 1;
      else
        hi = mid;
    }
    s.scales[i] = s.better[i] = uint8_t(lo);
    s.left[i] = bits_float(0x7f800000u);
    s.width_of[i] = widths[n / Unit<D>::channels];
  }
}

// A residual by its scale, what is coded.
template <bool K>
KAKEYA_HD float normalised(float x, const Coded &coded) {
  return (K ? x : x - coded.base) * coded.inverse;
}

// Scale code that is tried for a channel, as crates/codec/src/stats.rs has it: the deviation's, a quarter octave less,
// one more, then as much again on the side where the best of these lies. Negative where that is past the end, or there
// is no such side.
template <int D>
KAKEYA_HD int scale_candidate(const SealState<D> &s, int channel, int attempt) {
  const int step = s.calibrated ? 1 : 2, own = s.better[channel], best = s.scales[channel];
  if (attempt == 3 && best == own) return -1;
  const int tried = attempt == 0 ? own : attempt == 1 ? own - step : attempt == 2 ? own + step : 2 * best - own;
  return tried < int(s.scale_codes) ? tried : -1;
}

// Step of the even grid, of a channel's width, that compares scales.
template <int D>
KAKEYA_HD float even_step(const SealState<D> &s, int code, int channel) {
  return s.tables.factors[code] * s.sigma[channel] * s.tables.even_steps[s.width_of[channel]];
}

// What an even grid leaves of u, as crates/codec/src/grid.rs has it; half: 2^(width - 1).
KAKEYA_HD float even_error(float u, float half) {
  constexpr float magic = 12582912.0f;
  const float above = fmaxf(u, -half), inside = fminf(above, half - 1.0f);
  return u - ((inside + magic) - magic);
}

// While scales are compared, a thread sums up so many of a channel's eight parts: about as many tasks as threads, and
// the sums of three attempts fit into `part`.
template <int D>
constexpr int kPartsTogether = D == 64 ? 2 : 4;
template <int D>
constexpr int kPieces = 8 / kPartsTogether<D>;

// Sums of what an even grid leaves of a channel, squared, at the scales of `Count` attempts from `First` on. Each is
// summed as channel_sum would.
template <int D, bool K, int First, int Count>
KAKEYA_HD void seal_scale_sums(SealState<D> &s, int thread) {
  constexpr int together = kPartsTogether<D>;
  static_assert(Count * kPieces<D> * D * sizeof(float) <= sizeof s.part, "room for the sums");
  KAKEYA_ROLLED
  for (int e = thread; e < kPieces<D> * D; e += kSealThreads) {
    const int piece = e / D, i = e % D, width = s.width_of[i];
    if (width == 0) continue;
    const float half = float(1 << width >> 1), base = K ? 0.0f : s.base[i];
    float inverse[Count], sums[Count][together];
    bool any = false;
    KAKEYA_UNROLL
    for (int c = 0; c < Count; ++c) {
      const int code = scale_candidate(s, i, First + c);
      any |= code >= 0;
      inverse[c] = 1.0f / even_step(s, code < 0 ? s.better[i] : code, i);
    }
    if (!any) continue;
    KAKEYA_UNROLL
    for (int p = 0; p < together; ++p) {
      const int w = piece * together + p;
      const uint32_t exact = s.exact[w];
      KAKEYA_UNROLL
      for (int c = 0; c < Count; ++c) sums[c][p] = 0.0f;
      KAKEYA_UNROLL_4
      for (int k = 0; k < 16; ++k) {
        const float row = s.rows[(16 * w + k) * s.stride + i], x = K ? row : row - base;
        KAKEYA_UNROLL
        for (int c = 0; c < Count; ++c) {
          const float left = even_error(x * inverse[c] - 0.5f, half);
          sums[c][p] += exact >> k & 1u ? 0.0f : left * left;
        }
      }
    }
    KAKEYA_UNROLL
    for (int c = 0; c < Count; ++c) {
      const float *p = sums[c];
      s.part[(c * kPieces<D> + piece) * D + i] =
          together == 2 ? p[0] + p[1] : (p[0] + p[1]) + (p[2 % together] + p[3 % together]);
    }
  }
}

// Of these attempts and what was best before, the scale that leaves least; the first of equal ones.
template <int D, int First, int Count>
KAKEYA_HD void choose_scale(SealState<D> &s, int i) {
  constexpr int pieces = kPieces<D>;
  if (s.width_of[i] == 0) return;
  KAKEYA_UNROLL
  for (int c = 0; c < Count; ++c) {
    const int code = scale_candidate(s, i, First + c);
    if (code < 0) continue;
    const float *p = s.part + c * pieces * D + i;
    const float sum = pieces == 2 ? p[0] + p[D] : (p[0] + p[D]) + (p[2 % pieces * D] + p[3 % pieces * D]);
    const float step = even_step(s, code, i), cost = sum * (step * step);
    if (!(cost < s.left[i])) continue;
    s.left[i] = cost;
    s.scales[i] = uint8_t(code);
  }
}

template <int D>
KAKEYA_HD void seal_scale_of_three(SealState<D> &s, int thread) {
  for (int i = thread; i < D; i += kSealThreads) choose_scale<D, 0, 3>(s, i);
}

// The last attempt; the scales then stand. From here on channels go in code order.
template <int D>
KAKEYA_HD void seal_scale_stands(SealState<D> &s, int thread) {
  for (int n = thread; n < D; n += kSealThreads) {
    const int i = s.order[n];
    choose_scale<D, 3, 1>(s, i);
    s.coded[n] = {i, 1.0f / (s.tables.factors[s.scales[i]] * s.sigma[i]), s.base[i]};
  }
}

// Rows of exact tokens are kept by slot; the codes see zeros.
template <int D, bool K>
KAKEYA_HD void seal_exact(SealState<D> &s, int thread) {
  for (int e = thread; e < int(s.layout.num_slots) * D; e += kSealThreads) {
    const Coded coded = s.coded[e % D];
    float *x = s.rows + s.tokens[e / D] * s.stride + coded.channel;
    s.part[e] = normalised<K>(*x, coded);
    *x = K ? 0.0f : coded.base;
  }
}

// Which of a lane's codes are of exact tokens: bit n.
template <int D, bool K>
KAKEYA_HD uint32_t exact_codes(const SealState<D> &s, int group, int lane) {
  uint32_t exact = 0;
  KAKEYA_UNROLL
  for (int n = 0; n < kCodes; ++n) exact |= uint32_t(s.slot_of[code_token<D, K>(group, lane, n)] != kNoSlot) << n;
  return exact;
}

KAKEYA_HD int lowest_bit(uint32_t x) {
#ifdef __CUDA_ARCH__
  return __ffs(int(x)) - 1;
#else
  return __builtin_ctz(x);
#endif
}

// Takes the points of a unit's codes off the rows of its exact tokens; `point(n)` of code n.
template <int D, bool K, typename F>
KAKEYA_HD void take_points_off(SealState<D> &s, int group, int lane, int unit, uint32_t exact, F point) {
  KAKEYA_ROLLED
  for (uint32_t rest = exact; rest; rest &= rest - 1u) {
    const int n = lowest_bit(rest);
    const int slot = s.slot_of[code_token<D, K>(group, lane, n)];
    s.part[slot * D + unit * Unit<D>::channels + code_channel<D, K>(lane, n)] -= point(n);
  }
}

// A quarter of a lane's codes of a unit, n = 4 q + c: where their inputs lie, the inputs, and how many thresholds of
// their alphabet lie below each. Quarters keep the code short: a page is sealed once a kernel when
// tokens come one by one, and then every instruction is fetched from afar.
template <int D, bool K>
struct Quarter {
  int at[4], below[4];
  float z[4];

  KAKEYA_HD void place(const SealState<D> &s, int group, int lane, int unit, int q) {
    KAKEYA_UNROLL
    for (int c = 0; c < 4; ++c) {
      const int n = 4 * q + c;
      at[c] = code_token<D, K>(group, lane, n) * s.stride +
              s.coded[unit * Unit<D>::channels + code_channel<D, K>(lane, n)].channel;
    }
  }

  KAKEYA_HD void load(const SealState<D> &s, int group, int lane, int unit, int q, const Cells &cells) {
    KAKEYA_UNROLL
    for (int c = 0; c < 4; ++c) {
      const int n = 4 * q + c;
      const Coded coded = s.coded[unit * Unit<D>::channels + code_channel<D, K>(lane, n)];
      at[c] = code_token<D, K>(group, lane, n) * s.stride + coded.channel;
      z[c] = normalised<K>(s.rows[at[c]], coded);
      const Cell cell = s.tables.cells[cell_of(cells, z[c])];
      below[c] = cell.below + (z[c] > cell.threshold);
    }
  }
};

// Codes of a scalar quantiser: one thread a chain.
template <int D, bool K>
KAKEYA_HD void seal_scalar(const SealJob &job, SealState<D> &s, int group, int lane, uint32_t exact) {
  uint8_t *out = job.page + s.codes_start + unit_bytes(1) * group * s.bits;
  const float *points = s.tables.points[0].x;
  KAKEYA_ROLLED
  for (int u = 0; u < Unit<D>::units; ++u) {
    const int w = s.widths[K ? 0 : 1][u];
    if (w == 0) continue;
    const Cells cells = s.tables.cells_of[w];
    CodeBytes codes = {{0, 0, 0, 0}};
    KAKEYA_ROLLED
    for (int q = 0; q < 4; ++q) {
      Quarter<D, K> in;
      in.load(s, group, lane, u, q, cells);
      codes.push_back(uint32_t(in.below[0] | in.below[1] << 8 | in.below[2] << 16 | in.below[3] << 24));
    }
    store_codes(w, out, lane, codes);
    // The codes of exact tokens are those of zero: half the thresholds lie below, the middle one is zero itself.
    if (exact) {
      const float zero = points[(1 << w) + (1 << w >> 1) - 1];
      take_points_off<D, K>(s, group, lane, u, exact, [&](int) { return zero; });
    }
    out += unit_bytes(w);
  }
}

KAKEYA_HD constexpr int trellis_subset(int state, int u) {
  return 2 * ((u ^ state ^ (state >> 2)) & 1) + ((state >> 1) & 1);
}

// `bits` shifted up by one, with 1 at the bottom where y < x. The sign of the difference says so without a predicate:
// it underflows to no zero, and infinity minus infinity is the device's NaN, which has no sign.
KAKEYA_HD uint32_t shift_in_less(uint32_t bits, float y, float x) {
#ifdef __CUDA_ARCH__
  return __funnelshift_l(float_bits(y - x), bits, 1);
#else
  return bits << 1 | uint32_t(y < x);
#endif
}

KAKEYA_HD float lesser(float x, float y) {
#ifdef __CUDA_ARCH__
  return fminf(x, y);
#else
  return y < x ? y : x;
#endif
}

// The bits of a state in the other order: u_(n-2) + 2 u_(n-1) + 4 u_n, as a window of path bits has them.
KAKEYA_HD constexpr int reversed(int state) {
  return (state & 1) << 2 | (state & 2) | state >> 2;
}

// Bits 0..3 of x to the lowest bits of four bytes.
KAKEYA_HD uint32_t bits_to_bytes(uint32_t x) {
  return (x & 15u) * 0x00204081u & 0x01010101u;
}

// Bytes 1 of four words.
KAKEYA_HD uint32_t second_bytes(const uint32_t *x) {
#ifdef __CUDA_ARCH__
  return __byte_perm(__byte_perm(x[0], x[1], 0x0051), __byte_perm(x[2], x[3], 0x0051), 0x5410);
#else
  return (x[0] >> 8 & 0xffu) | (x[1] & 0xff00u) | (x[2] & 0xff00u) << 8 | (x[3] & 0xff00u) << 16;
#endif
}

// Codes of the trellis: one thread a chain. The search leaves a step's decisions (bit reversed(s): state s came from
// its high predecessor) and its number of thresholds below z (byte 1) where the input was.
template <int D, bool K>
KAKEYA_HD void seal_trellis(const SealJob &job, SealState<D> &s, int group, int lane, uint32_t exact) {
  constexpr int units = Unit<D>::units;
  const uint8_t *widths = s.widths[K ? 0 : 1];
  float cost[8];
  for (int i = 0; i < 8; ++i) cost[i] = i == 0 ? 0.0f : bits_float(0x7f800000u);
  // The nearest unit after (before) u that has codes.
  const auto unit_after = [&](int u) {
    do ++u;
    while (u < units && widths[u] == 0);
    return u;
  };
  const auto unit_before = [&](int u) {
    do --u;
    while (u >= 0 && widths[u] == 0);
    return u;
  };
  const auto read = [&](Quarter<D, K> &x, int u, int q) {
    x.load(s, group, lane, u, q, s.tables.cells_of[widths[u] + 1]);
  };
  const int first_unit = unit_after(-1);
  if (first_unit == units) return;
  Quarter<D, K> in;
  read(in, first_unit, 0);
  KAKEYA_ROLLED
  for (int u = first_unit; u < units;) {
    const Quad *windows = s.tables.points + window_start(widths[u]);
    const int after = unit_after(u);
    KAKEYA_ROLLED
    for (int q = 0; q < 4; ++q) {
      // The next quarter is read while this one is searched; at the end, the same again.
      Quarter<D, K> ahead;
      const bool stays = q < 3 || after == units;
      read(ahead, stays ? u : after, q < 3 ? q + 1 : after == units ? 3 : 0);
      Quad p[4];
      KAKEYA_UNROLL
      for (int c = 0; c < 4; ++c) p[c] = windows[in.below[c]];
      uint32_t history[4];
      KAKEYA_UNROLL
      for (int c = 0; c < 4; ++c) {
        float dist[4];
        KAKEYA_UNROLL
        for (int j = 0; j < 4; ++j) {
          const float e = in.z[c] - p[c].x[j];
          dist[j] = e * e;
        }
        float low[8], high[8];
        KAKEYA_UNROLL
        for (int st = 0; st < 8; ++st) {
          const int from = st >> 1, b = st & 1;
          low[st] = cost[from] + dist[trellis_subset(from, b)];
          high[st] = cost[from | 4] + dist[trellis_subset(from | 4, b)];
        }
        history[c] = uint32_t(in.below[c]);
        KAKEYA_UNROLL
        for (int i = 7; i >= 0; --i) history[c] = shift_in_less(history[c], high[reversed(i)], low[reversed(i)]);
        KAKEYA_UNROLL
        for (int st = 0; st < 8; ++st) cost[st] = lesser(low[st], high[st]);
      }
      KAKEYA_UNROLL
      for (int c = 0; c < 4; ++c) s.rows[in.at[c]] = bits_float(history[c]);
      in = ahead;
    }
    u = after;
  }
  int state = 0;
  float best = cost[0];
  KAKEYA_UNROLL
  for (int st = 1; st < 8; ++st)
    if (cost[st] < best) best = cost[st], state = st;
  // Back through the chain, unit by unit: a step's decision is the path bit three steps before it. After a unit the
  // bits found are the window that its reader makes: bit n + 3 is u_n.
  uint32_t window = uint32_t(reversed(state));
  uint8_t *out = job.page + s.codes_start + unit_bytes(1) * (group + 1) * s.bits;
  const auto recall = [&](uint32_t *history, int u, int q) {
    Quarter<D, K> x;
    x.place(s, group, lane, u, q);
    KAKEYA_UNROLL
    for (int c = 0; c < 4; ++c) history[c] = float_bits(s.rows[x.at[c]]);
  };
  const int last_unit = unit_before(units);
  uint32_t ahead[4];
  recall(ahead, last_unit, 3);
  KAKEYA_ROLLED
  for (int u = last_unit; u >= 0;) {
    const int w = widths[u], before = unit_before(u);
    out -= unit_bytes(w);
    CodeBytes refinement = {{0, 0, 0, 0}};
    KAKEYA_ROLLED
    for (int q = 3; q >= 0; --q) {
      uint32_t history[4];
      KAKEYA_UNROLL
      for (int c = 0; c < 4; ++c) history[c] = ahead[c];
      recall(ahead, q > 0 || before < 0 ? u : before, q > 0 ? q - 1 : before < 0 ? 0 : 3);
      KAKEYA_UNROLL
      for (int c = 3; c >= 0; --c) window = window << 1 | (history[c] >> (window & 7u) & 1u);
      refinement.push_front(second_bytes(history));
    }
    const uint32_t z1 = trellis_z1(window), z0 = trellis_z0(window);
    // Of the points at n..n+3, n thresholds below z, that of subset j has refinement (n + 3 - j) / 4.
    KAKEYA_UNROLL
    for (int q = 0; q < 4; ++q) {
      const uint32_t rest = 2u * bits_to_bytes(~z1 >> 4 * q) + bits_to_bytes(~z0 >> 4 * q);
      refinement.quarter[q] = (refinement.quarter[q] + rest) >> 2 & 0x1f1f1f1fu;
    }
    pack_trellis(w, out, lane, window >> 3 & 0xffffu, refinement);
    // The codes of exact tokens are those of zero: below it lie 2^w - 2 of 2^(w+1) - 4 thresholds.
    if (exact) {
      const Quad *zero = s.tables.points + window_start(w) + (1 << w) - 2;
      take_points_off<D, K>(s, group, lane, u, exact,
                            [&](int n) { return zero->x[2u * (z1 >> n & 1u) + (z0 >> n & 1u)]; });
    }
    u = before;
  }
}

template <int D, bool K>
KAKEYA_HD void seal_codes(const SealJob &job, SealState<D> &s, int thread) {
  if (thread >= Unit<D>::chains) return;
  const int group = thread / kLanes, lane = thread % kLanes;
  const uint32_t exact = exact_codes<D, K>(s, group, lane);
  if (s.trellis)
    seal_trellis<D, K>(job, s, group, lane, exact);
  else
    seal_scalar<D, K>(job, s, group, lane, exact);
}

// Largest magnitudes of the sixteenths of each slot.
template <int D>
KAKEYA_HD void seal_peaks(SealState<D> &s, int thread) {
  if (thread >= int(s.layout.num_slots) * 16) return;
  const float *x = s.part + thread * (D / 16);
  float peak = 0.0f;
  for (int i = 0; i < D / 16; ++i) {
    const float a = x[i] < 0 ? -x[i] : x[i];
    peak = a > peak ? a : peak;
  }
  s.peaks[thread] = peak;
}

// Slots and statistics; header and padding with the keys. The last phase.
template <int D, bool K>
KAKEYA_HD void seal_finish(const SealJob &job, SealState<D> &s, int thread) {
  const int n = int(s.layout.num_slots);
  uint8_t *slots = job.page + s.layout.slots_offset;
  for (int e = thread; e < n * (D / 4); e += kSealThreads) {
    const int slot = e / (D / 4), byte = e % (D / 4) * 4;
    float peak = 0.0f;
    for (int i = 0; i < 16; ++i) {
      const float a = s.peaks[16 * slot + i];
      peak = a > peak ? a : peak;
    }
    float want = peak / 127.0f;
    want = want > 65504.0f ? 65504.0f : want;
    const uint16_t bits = half_bits(want);
    const float scale = half_value(bits);
    uint32_t word = 0;
    for (int i = 0; i < 4; ++i) {
      const int at = byte + i, unit = at / Unit<D>::channels * Unit<D>::channels;
      float q = 0.0f;
      if (scale > 0.0f) {
        q = round_even(s.part[slot * D + unit + slot_channel<D, K>(at - unit)] / scale);
        q = q < -127.0f ? -127.0f : q > 127.0f ? 127.0f : q;
      }
      word |= uint32_t(uint8_t(int8_t(q))) << 8 * i;
    }
    store_u32(slots + ((K ? 0 : n) + slot) * D + byte, word);
    if (byte == 0) store_u16(slots + 2 * n * D + 4 * slot + (K ? 0 : 2), bits);
  }
  // Statistics, pair by pair.
  uint8_t *side = job.page + s.layout.side_offset, *rest = side + 2 * D;
  const auto channel = [&](int f, int i) { return K ? pair_channel(f, i, int(s.pairs)) : 2 * f + i; };
  for (int f = thread; f < D / 2; f += kSealThreads) {
    for (int i = 0; i < 2; ++i) {
      const int c = channel(f, i), at = 4 * f + (K ? 0 : 2) + i;
      if (s.calibrated) {
        side[at] = uint8_t(s.scales[c] | s.means[c] << 4);
      } else {
        side[at] = s.scales[c];
        store_u16(rest + 2 * at, s.means[c]);
      }
    }
  }
  if (s.calibrated) {
    for (int i = thread; i < D / 4; i += kSealThreads) {
      uint32_t b = 0;
      for (int k = 0; k < 4; ++k) b |= uint32_t(s.means[channel(2 * i + k / 2, k % 2)] >> 4) << 2 * k;
      rest[(K ? 0 : D / 4) + i] = uint8_t(b);
    }
  }
  if (!K) return;
  const uint32_t end = s.layout.slots_offset + uint32_t(n * (4 + 2 * D)), size = s.page_bytes;
  for (uint32_t i = end + uint32_t(thread); i < size; i += kSealThreads) job.page[i] = 0;
  if (thread == 0) {
    job.page[0] = 'K';
    job.page[1] = kFormatVersion;
    job.page[2] = 0;
    job.page[3] = uint8_t(n);
    store_u32(job.page + 4, uint32_t(job.block_index));
  }
  if (thread < kMaxSlots) job.page[8 + thread] = thread < n ? s.tokens[thread] : kNoSlot;
}

// The phases in order, in two parts. `run(phase)` calls phase(thread) for every thread and then waits for all of them.
// Between the parts the keys' `tokens` go to the values' state. Nothing is written into the page before the second.
template <int D, bool K, typename Load, typename Run>
KAKEYA_HD void seal_begin(const SealJob &job, SealState<D> &s, const Load &load, Run run) {
  run([&](int t) { seal_load<D, K>(job, s, t, load); });
  if (!K) {
    run([&](int t) { seal_hadamard(s, t); });
    return;
  }
  run([&](int t) { seal_centre(s, t); });
  if (!s.calibrated) {
    for (int square = 0; square < 2; ++square) {
      run([&](int t) { seal_moment_sums(s, t, square); });
      run([&](int t) { seal_moments(s, t, square); });
    }
  }
  run([&](int t) { seal_score_sums(s, t); });
  run([&](int t) { seal_scores(s, t); });
  run([&](int t) { seal_choose(s, t); });
  run([&](int t) { seal_pick(s, t); });
}

template <int D, bool K, typename Run>
KAKEYA_HD void seal_end(const SealJob &job, SealState<D> &s, Run run) {
  run([&](int t) { seal_mark<D, K>(job, s, t); });
  run([&](int t) { seal_mean_sums<D, K>(s, t); });
  run([&](int t) { seal_means(s, t); });
  run([&](int t) { seal_residual<D, K>(s, t); });
  run([&](int t) { seal_scales(s, t, s.widths[K ? 0 : 1]); });
  run([&](int t) { seal_scale_sums<D, K, 0, 3>(s, t); });
  run([&](int t) { seal_scale_of_three(s, t); });
  run([&](int t) { seal_scale_sums<D, K, 3, 1>(s, t); });
  run([&](int t) { seal_scale_stands(s, t); });
  run([&](int t) { seal_exact<D, K>(s, t); });
  run([&](int t) { seal_codes<D, K>(job, s, t); });
  run([&](int t) { seal_peaks(s, t); });
  run([&](int t) { seal_finish<D, K>(job, s, t); });
}

// Calls f<head_dim>(); false where no kernel knows the head dimension.
template <typename F>
KAKEYA_HD bool with_head_dim(uint32_t head_dim, F f) {
  switch (head_dim) {
    case 64:
      f(Unit<64>{});
      return true;
    case 96:
      f(Unit<96>{});
      return true;
    case 128:
      f(Unit<128>{});
      return true;
    case 256:
      f(Unit<256>{});
      return true;
    default:
      return false;
  }
}

// Dynamic shared memory of kakeya_seal.
constexpr size_t seal_shared_bytes(int head_dim) {
  return head_dim == 64    ? sizeof(SealState<64>)
         : head_dim == 96  ? sizeof(SealState<96>)
         : head_dim == 128 ? sizeof(SealState<128>)
                           : sizeof(SealState<256>);
}

}  // namespace kakeya
