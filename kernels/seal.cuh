// Sealing one block of one KV head, in phases. A phase is what all threads of a block do between two barriers; each is
// a function of (thread, shared state), so that the host can run the threads of a phase one after the other and compare
// the page with the codec's, byte for byte, and a kernel runs them at once with __syncthreads in between.
//
// Arithmetic follows docs/page-format.md exactly: f32, fixed order, no contraction. Compile with -fmad=false (nvcc) or
// -ffp-contract=off (host).
//
// Shared memory: one stream's rows, 128 x head_dim f32, and 15 kB of statistics at head_dim 128. Keys before rotary
// embedding are recomputed from the rows where they are needed: two products cost less than a second copy of the rows.
#pragma once

#include "tables.cuh"

namespace kakeya {

constexpr int kSealThreads = 256;
// Largest magnitude that a page accepts.
constexpr float kMaxAbs = 16777216.0f;
// Bits of a refinement index in a step's history: 2^5 points a subset at width 6.
constexpr int kIndexBits = 5;
// Steps of the longest chain: 8 units of 16 codes.
constexpr int kMaxSteps = 128;

enum SealStatus : uint32_t { kSealOk = 0, kSealNonFinite = 1 };

// State shared by the threads that seal a block. `rows` has 128 * head_dim floats.
struct SealState {
  float *rows;
  float score[kBlock];
  float base[256], inverse[256];
  float mean[256], weight[256];
  uint8_t scales[2][256];
  uint16_t means[2][256];
  uint8_t tokens[kMaxSlots];
  uint8_t exact[kBlock];
  // Set by any thread that met a value that is not finite.
  uint32_t status;
};

struct SealJob {
  const Tables *tables;
  int layer, head, block_index;
  uint8_t *page;
};

// f32 -> f16 bits, round to nearest even, overflow to infinity.
KAKEYA_HD uint32_t float_bits(float x) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(x);
#else
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
#endif
}

KAKEYA_HD float bits_float(uint32_t u) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(u);
#else
  float x;
  memcpy(&x, &u, 4);
  return x;
#endif
}

KAKEYA_HD uint16_t half_bits(float x) {
  const uint32_t u = float_bits(x), sign = u >> 16 & 0x8000u, a = u & 0x7fffffffu;
  if (a >= 0x47800000u) return uint16_t(sign | (a > 0x7f800000u ? 0x7e00u : 0x7c00u));  // 2^16 and above, NaN
  if (a < 0x38800000u) {  // subnormal halves: multiples of 2^-24
    if (a < 0x33000000u) return uint16_t(sign);
    const uint32_t shift = 126u - (a >> 23), m = (a & 0x7fffffu) | 0x800000u;
    const uint32_t q = m >> shift, rest = m & ((1u << shift) - 1u), half = 1u << (shift - 1u);
    return uint16_t(sign | (q + (rest > half || (rest == half && (q & 1u)))));
  }
  const uint32_t r = a - 0x38000000u;
  return uint16_t(sign | ((r + 0xfffu + (r >> 13 & 1u)) >> 13));
}

KAKEYA_HD float half_value(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16, e = h >> 10 & 31u, m = h & 1023u;
  if (e == 31u) return bits_float(sign | 0x7f800000u | m << 13);
  // Subnormals are m * 2^-24, exact in f32.
  if (e == 0u) return bits_float(sign | float_bits(float(m) * 5.9604644775390625e-8f));
  return bits_float(sign | (e + 112u) << 23 | m << 13);
}

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

// Sum over the tokens of a block: sixteen neighbours in sequence, then a tree of the eight partial sums.
template <typename F>
KAKEYA_HD float block_sum(F of) {
  float p[8];
  KAKEYA_UNROLL
  for (int w = 0; w < 8; ++w) {
    p[w] = 0.0f;
    for (int i = 0; i < 16; ++i) p[w] += of(16 * w + i);
  }
  return ((p[0] + p[1]) + (p[2] + p[3])) + ((p[4] + p[5]) + (p[6] + p[7]));
}

// Channel i of key row j before rotary embedding, up to the centre's turn.
KAKEYA_HD float before(const Tables &t, const float *rows, int j, int i) {
  const int d = int(t.head_dim), h = int(t.pairs);
  const float *row = rows + j * d;
  if (i >= 2 * h) return row[i];
  const int p = i < h ? i : i - h;
  const float c = t.at<float>(t.offset_cos)[j * h + p], s = t.at<float>(t.offset_sin)[j * h + p];
  const float a = row[p], b = row[p + h];
  return i < h ? a * c + b * s : b * c - a * s;
}

// ---- phases --------------------------------------------------------------------------------------------------------

// Rows of one stream into shared memory as f32, canonical channels. `load(j, i)` gives natural channel i of token j.
template <typename Load>
KAKEYA_HD void seal_load(const SealJob &job, SealState &s, int thread, bool is_k, Load load) {
  const Tables &t = *job.tables;
  const int d = int(t.head_dim);
  const uint16_t *natural = t.at<uint16_t>(t.natural);
  bool bad = false;
  for (int e = thread; e < kBlock * d; e += kSealThreads) {
    const int j = e / d, i = e % d;
    const float x = load(j, is_k ? int(natural[i]) : i);
    bad |= !((x < 0 ? -x : x) <= kMaxAbs);
    s.rows[e] = x;
  }
  if (bad) s.status = kSealNonFinite;  // every thread that writes, writes the same
}

// Keys into the frame of the block's centre.
KAKEYA_HD void seal_centre(const SealJob &job, SealState &s, int thread) {
  const Tables &t = *job.tables;
  const int d = int(t.head_dim), h = int(t.pairs);
  const float *cos = t.at<float>(t.centre_cos) + size_t(job.block_index) * h;
  const float *sin = t.at<float>(t.centre_sin) + size_t(job.block_index) * h;
  for (int e = thread; e < kBlock * h; e += kSealThreads) {
    const int j = e / h, p = e % h;
    float *row = s.rows + j * d;
    const float a = row[p], b = row[p + h];
    row[p] = a * cos[p] + b * sin[p];
    row[p + h] = b * cos[p] - a * sin[p];
  }
}

// Values into Hadamard space: one thread a row part, butterflies in place.
KAKEYA_HD void seal_hadamard(const SealJob &job, SealState &s, int thread) {
  const int d = int(job.tables->head_dim), n = d & -d;
  // 1 / sqrt(n) rounded to f32: n is 32, 64, 128 or 256.
  const float scale = n == 32 ? 0.17677669f : n == 64 ? 0.125f : n == 128 ? 0.088388346f : 0.0625f;
  for (int part = thread; part < kBlock * (d / n); part += kSealThreads) {
    float *x = s.rows + part * n;
    for (int len = 1; len < n; len *= 2) {
      for (int i = 0; i < n; i += 2 * len) {
        for (int k = i; k < i + len; ++k) {
          const float a = x[k], b = x[k + len];
          x[k] = a + b;
          x[k + len] = a - b;
        }
      }
    }
    for (int i = 0; i < n; ++i) x[i] *= scale;
  }
}

// Without calibration: each channel's mean and weight (slow channels: 1 / variance) for the distance score.
KAKEYA_HD void seal_free_moments(const SealJob &job, SealState &s, int thread) {
  const Tables &t = *job.tables;
  const HeadView h = head_view(t, job.layer, job.head);
  for (int i = thread; i < int(t.head_dim); i += kSealThreads) {
    const float mean = block_sum([&](int j) { return before(t, s.rows, j, i); }) / float(kBlock);
    const float square = block_sum([&](int j) {
      const float x = before(t, s.rows, j, i) - mean;
      return x * x;
    });
    s.mean[i] = mean;
    s.weight[i] = h.sink_query[i] / (square / float(kBlock) + 1e-12f);
  }
}

// How much each token wants an exact slot.
KAKEYA_HD void seal_scores(const SealJob &job, SealState &s, int thread) {
  const Tables &t = *job.tables;
  const HeadView h = head_view(t, job.layer, job.head);
  const int d = int(t.head_dim);
  for (int j = thread; j < kBlock; j += kSealThreads) {
    float p[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    for (int i = 0; i < d; i += 8) {
      KAKEYA_UNROLL
      for (int r = 0; r < 8; ++r) {
        const float x = before(t, s.rows, j, i + r);
        if (t.calibrated) {
          p[r] += h.sink_query[i + r] * x;
        } else {
          const float y = x - s.mean[i + r];
          p[r] += y * y * s.weight[i + r];
        }
      }
    }
    s.score[j] = ((p[0] + p[1]) + (p[2] + p[3])) + ((p[4] + p[5]) + (p[6] + p[7]));
  }
}

// The tokens with the best scores; of equal ones the earlier. One thread: 128 scores, at most eight slots.
KAKEYA_HD void seal_choose(const SealJob &job, SealState &s, int thread) {
  if (thread != 0) return;
  const LayerLayout l = job.tables->at<LayerLayout>(job.tables->layers)[job.layer];
  for (int j = 0; j < kBlock; ++j) s.exact[j] = 0;
  for (uint32_t n = 0; n < l.num_slots; ++n) {
    int best = -1;
    for (int j = 0; j < kBlock; ++j)
      if (!s.exact[j] && (best < 0 || total_order(s.score[j]) > total_order(s.score[best]))) best = j;
    s.exact[best] = 1;
    s.tokens[n] = uint8_t(best);
  }
}

// Block means over the ordinary tokens: codes, and the base that is taken off.
KAKEYA_HD void seal_means(const SealJob &job, SealState &s, int thread, bool is_k) {
  const Tables &t = *job.tables;
  const HeadView h = head_view(t, job.layer, job.head);
  const StreamView &v = is_k ? h.k : h.v;
  const int d = int(t.head_dim);
  const LayerLayout l = t.at<LayerLayout>(t.layers)[job.layer];
  const float ordinary = float(kBlock - int(l.num_slots));
  for (int i = thread; i < d; i += kSealThreads) {
    const float sum = block_sum([&](int j) {
      if (s.exact[j]) return 0.0f;
      return (is_k ? before(t, s.rows, j, i) : s.rows[j * d + i]) - v.mean[i];
    });
    const float mean = sum / ordinary;
    float value;
    if (t.calibrated) {
      float q = round_even(mean / v.step[i]);
      q = q < -32.0f ? -32.0f : q > 31.0f ? 31.0f : q;
      s.means[!is_k][i] = uint16_t(int(q) + 32);
      value = q * v.step[i];
    } else {
      const float m = mean < -65504.0f ? -65504.0f : mean > 65504.0f ? 65504.0f : mean;
      s.means[!is_k][i] = half_bits(m);
      value = half_value(s.means[!is_k][i]);
    }
    s.base[i] = v.mean[i] + value;
  }
}

// Takes the base off, turned by the token's offset for keys.
KAKEYA_HD void seal_residual(const SealJob &job, SealState &s, int thread, bool is_k) {
  const Tables &t = *job.tables;
  const int d = int(t.head_dim), h = is_k ? int(t.pairs) : 0;
  for (int e = thread; e < kBlock * d; e += kSealThreads) {
    const int j = e / d, i = e % d;
    float base = s.base[i];
    if (i < 2 * h) {
      const int p = i < h ? i : i - h;
      const float c = t.at<float>(t.offset_cos)[j * h + p], sn = t.at<float>(t.offset_sin)[j * h + p];
      const float a = s.base[p], b = s.base[p + h];
      base = i < h ? a * c - b * sn : b * c + a * sn;
    }
    s.rows[e] -= base;
  }
}

KAKEYA_HD float scale_of(const Tables &t, uint32_t code, float sigma) {
  return t.at<float>(t.factors)[code] * sigma;
}

// Block scales of each channel.
KAKEYA_HD void seal_scales(const SealJob &job, SealState &s, int thread, bool is_k) {
  const Tables &t = *job.tables;
  const HeadView h = head_view(t, job.layer, job.head);
  const StreamView &v = is_k ? h.k : h.v;
  const int d = int(t.head_dim);
  const LayerLayout l = t.at<LayerLayout>(t.layers)[job.layer];
  const float ordinary = float(kBlock - int(l.num_slots));
  const float *threshold = t.at<float>(t.scale_thresholds);
  for (int i = thread; i < d; i += kSealThreads) {
    const float sum = block_sum([&](int j) { return s.exact[j] ? 0.0f : s.rows[j * d + i] * s.rows[j * d + i]; });
    const float ratio = sum / ordinary / (v.sigma[i] * v.sigma[i]);
    uint32_t lo = 0, hi = t.scale_codes - 1;  // number of thresholds below the ratio
    while (lo < hi) {
      const uint32_t mid = (lo + hi) / 2;
      if (ratio > threshold[mid])
        lo = mid + 1;
      else
        hi = mid;
    }
    s.scales[!is_k][i] = uint8_t(lo);
    s.inverse[i] = 1.0f / scale_of(t, lo, v.sigma[i]);
  }
}

KAKEYA_HD void seal_normalise(const SealJob &job, SealState &s, int thread) {
  const int d = int(job.tables->head_dim);
  for (int e = thread; e < kBlock * d; e += kSealThreads) s.rows[e] *= s.inverse[e % d];
}

// Byte of a slot, inside its unit, that holds a channel: a lane's bytes lie together, in the order of its codes.
KAKEYA_HD int slot_byte(bool is_k, int channels, int channel) {
  const int c = channel / 8, classes = channels / 8;
  return is_k ? 2 * classes * (channel % 8 / 2) + 2 * c + channel % 2 : classes * (channel % 8) + c;
}

// Exact slots of one stream, after its codes: one thread a slot.
KAKEYA_HD void seal_slots(const SealJob &job, SealState &s, int thread, bool is_k) {
  const Tables &t = *job.tables;
  const HeadView h = head_view(t, job.layer, job.head);
  const StreamView &v = is_k ? h.k : h.v;
  const int d = int(t.head_dim);
  const LayerLayout l = t.at<LayerLayout>(t.layers)[job.layer];
  if (thread >= int(l.num_slots)) return;
  const float *row = s.rows + s.tokens[thread] * d;
  float peak = 0.0f;
  for (int i = 0; i < d; ++i) {
    const float a = row[i] < 0 ? -row[i] : row[i];
    peak = a > peak ? a : peak;
  }
  float want = peak / 127.0f;
  want = want > 65504.0f ? 65504.0f : want;
  const uint16_t bits = half_bits(want);
  const float scale = half_value(bits);
  const int n = int(l.num_slots), channels = int(t.unit_channels);
  store_u16(job.page + l.slots_offset + 2 * n * d + 4 * thread + (is_k ? 0 : 2), bits);
  uint8_t *codes = job.page + l.slots_offset + ((is_k ? 0 : n) + thread) * d;
  for (int p = 0; p < d; ++p) {
    float q = 0.0f;
    if (scale > 0.0f) {
      q = round_even(row[v.order[p]] / scale);
      q = q < -127.0f ? -127.0f : q > 127.0f ? 127.0f : q;
    }
    codes[p / channels * channels + slot_byte(is_k, channels, p % channels)] = uint8_t(int8_t(q));
  }
}

// (channel, token) inside a unit of code n of a lane.
KAKEYA_HD void place(bool is_k, int channels, int lane, int n, int &channel, int &token) {
  const int g = lane / 4, t = lane % 4, h = n / 8, m = n / 4 % 2, c = n % 4;
  if (channels == 32) {
    channel = is_k ? 16 * (c / 2) + 8 * (c % 2) + 2 * t + h : g + 8 * c;
    token = is_k ? g + 8 * m : 2 * t + 8 * m + h;
  } else {
    channel = is_k ? 8 * (c % 2) + 2 * t + h : g + 8 * (c % 2);
    token = 16 * (c / 2) + (is_k ? g + 8 * m : 2 * t + 8 * m + h);
  }
}

KAKEYA_HD uint32_t below(const float *threshold, uint32_t n, float z) {
  uint32_t q = 0;
  for (uint32_t i = 0; i < n; ++i) q += z > threshold[i];
  return q;
}

KAKEYA_HD float grid_point(const GridParams &g, uint32_t m) {
  const float y = (float(m) + 0.5f) * (2.0f / float(1u << g.symbol_bits)) - 1.0f;
  return y * (g.alpha + g.beta * (y * y));
}

KAKEYA_HD int trellis_subset(int state, int u) {
  return 2 * ((u ^ state ^ (state >> 2)) & 1) + ((state >> 1) & 1);
}

// Writes the 16 codes of a lane's unit, `value(n)` each.
template <int W, typename F>
KAKEYA_HD void store_codes(uint8_t *unit, int lane, F value) {
  LaneWords w = {0, 0, 0};
#define KAKEYA_PUT(M, C) put<W, M, C>(w, value(4 * M + C) | value(8 + 4 * M + C) << 16)
  KAKEYA_PUT(0, 0);
  KAKEYA_PUT(0, 1);
  KAKEYA_PUT(0, 2);
  KAKEYA_PUT(0, 3);
  KAKEYA_PUT(1, 0);
  KAKEYA_PUT(1, 1);
  KAKEYA_PUT(1, 2);
  KAKEYA_PUT(1, 3);
#undef KAKEYA_PUT
  store_lane<W>(unit, lane, w);
}

template <typename F>
KAKEYA_HD void store_codes(int width, uint8_t *unit, int lane, F value) {
  switch (width) {
    case 1:
      return store_codes<1>(unit, lane, value);
    case 2:
      return store_codes<2>(unit, lane, value);
    case 3:
      return store_codes<3>(unit, lane, value);
    case 4:
      return store_codes<4>(unit, lane, value);
    case 5:
      return store_codes<5>(unit, lane, value);
    default:
      return store_codes<6>(unit, lane, value);
  }
}

// Codes of one stream: one thread a chain (token group, lane). Exact tokens are coded as zeros; the points of these
// codes come off their rows, so that slots can be added to the codes.
KAKEYA_HD void seal_codes(const SealJob &job, SealState &s, int thread, bool is_k) {
  const Tables &t = *job.tables;
  const HeadView hv = head_view(t, job.layer, job.head);
  const StreamView &v = is_k ? hv.k : hv.v;
  const int d = int(t.head_dim), channels = int(t.unit_channels), tokens = int(t.unit_tokens);
  const int units = d / channels, groups = kBlock / tokens;
  int k_bits = 0, bits = 0;
  for (int u = 0; u < units; ++u) k_bits += hv.k.widths[u], bits += v.widths[u];
  const int start = kHeader + (is_k ? 0 : 64 * groups * k_bits);
  const GridParams *grids = t.at<GridParams>(t.grids);
  const float *thresholds = t.at<float>(t.thresholds);
  for (int chain = thread; chain < groups * kLanes; chain += kSealThreads) {
    const int group = chain / kLanes, lane = chain % kLanes;
    uint8_t *out = job.page + start + 64 * group * bits;
    auto where = [&](int u, int n, int &j) {
      int channel, token;
      place(is_k, channels, lane, n, channel, token);
      j = group * tokens + token;
      return s.rows + j * d + v.order[u * channels + channel];
    };
    auto input = [&](int u, int n) {
      int j;
      const float *x = where(u, n, j);
      return s.exact[j] ? 0.0f : *x;
    };
    auto coded = [&](int u, int n, const GridParams &g, uint32_t symbol) {
      int j;
      float *x = where(u, n, j);
      if (s.exact[j]) *x -= grid_point(g, symbol);
    };
    if (!t.trellis) {
      for (int u = 0; u < units; ++u) {
        const int w = v.widths[u];
        if (w == 0) continue;
        store_codes(w, out, lane, [&](int n) {
          const uint32_t m = below(thresholds + w * kMaxThresholds, grids[w].per_subset, input(u, n));
          coded(u, n, grids[w], m);
          return m;
        });
        out += unit_bytes(w);
      }
      continue;
    }
    // Viterbi search. History of a step: bit s = state s came from its high predecessor; refinement indices above.
    uint32_t history[kMaxSteps];
    float cost[8];
    for (int i = 0; i < 8; ++i) cost[i] = i == 0 ? 0.0f : bits_float(0x7f800000u);
    int steps = 0;
    for (int u = 0; u < units; ++u) {
      const int w = v.widths[u];
      if (w == 0) continue;
      const GridParams g = grids[w];
      for (int n = 0; n < kCodes; ++n) {
        const float z = input(u, n);
        uint32_t h = 0;
        float dist[4];
        KAKEYA_UNROLL
        for (int j = 0; j < 4; ++j) {
          const uint32_t q = below(thresholds + w * kMaxThresholds + j * g.per_subset, g.per_subset, z);
          const float e = z - grid_point(g, 4 * q + j);
          dist[j] = e * e;
          h |= q << (8 + kIndexBits * j);
        }
        float next[8];
        KAKEYA_UNROLL
        for (int st = 0; st < 8; ++st) {
          const int low = st >> 1, high = low | 4, b = st & 1;
          const float a = cost[low] + dist[trellis_subset(low, b)];
          const float c = cost[high] + dist[trellis_subset(high, b)];
          const bool better = c < a;
          next[st] = better ? c : a;
          h |= uint32_t(better) << st;
        }
        KAKEYA_UNROLL
        for (int st = 0; st < 8; ++st) cost[st] = next[st];
        history[steps++] = h;
      }
    }
    int state = 0;
    float best = cost[0];
    for (int st = 1; st < 8; ++st)
      if (cost[st] < best) best = cost[st], state = st;
    // Back through the chain: a step's history becomes its (path bit, refinement << 1, subset << 6).
    for (int i = steps - 1; i >= 0; --i) {
      const uint32_t h = history[i];
      const int u = state & 1, from = (state >> 1) | int(h >> state & 1u) << 2;
      const int subset = trellis_subset(from, u);
      history[i] = uint32_t(u) | (h >> (8 + kIndexBits * subset) & 31u) << 1 | uint32_t(subset) << 6;
      state = from;
    }
    const uint32_t *step = history;
    for (int u = 0; u < units; ++u) {
      const int w = v.widths[u];
      if (w == 0) continue;
      for (int n = 0; n < kCodes; ++n) coded(u, n, grids[w], (step[n] >> 1 & 31u) << 2 | step[n] >> 6);
      store_codes<1>(out, lane, [&](int n) { return step[n] & 1u; });
      if (w > 1) store_codes(w - 1, out + unit_bytes(1), lane, [&](int n) { return step[n] >> 1 & 31u; });
      out += unit_bytes(w);
      step += kCodes;
    }
  }
}

// Header, statistics and padding; the last phase.
KAKEYA_HD void seal_finish(const SealJob &job, SealState &s, int thread) {
  const Tables &t = *job.tables;
  const int d = int(t.head_dim), n = 2 * d;
  const LayerLayout l = t.at<LayerLayout>(t.layers)[job.layer];
  auto scale = [&](int i) { return uint32_t(s.scales[i >= d][i >= d ? i - d : i]); };
  auto mean = [&](int i) { return uint32_t(s.means[i >= d][i >= d ? i - d : i]); };
  uint8_t *side = job.page + l.side_offset;
  if (t.calibrated) {
    for (int i = thread; i < n / 2; i += kSealThreads) {
      side[i] = uint8_t(scale(2 * i) | scale(2 * i + 1) << 4);
      side[n / 2 + i] = uint8_t((mean(2 * i) & 15u) | (mean(2 * i + 1) & 15u) << 4);
    }
    for (int i = thread; i < n / 4; i += kSealThreads) {
      uint32_t b = 0;
      for (int k = 0; k < 4; ++k) b |= (mean(4 * i + k) >> 4) << 2 * k;
      side[n + i] = uint8_t(b);
    }
  } else {
    for (int i = thread; i < n; i += kSealThreads) {
      side[i] = uint8_t(scale(i));
      store_u16(side + n + 2 * i, mean(i));
    }
  }
  const uint32_t end = l.slots_offset + l.num_slots * uint32_t(4 + 2 * d);
  for (uint32_t i = end + uint32_t(thread); i < t.page_bytes; i += kSealThreads) job.page[i] = 0;
  if (thread == 0) {
    job.page[0] = 'K';
    job.page[1] = 1;
    job.page[2] = 0;
    job.page[3] = uint8_t(l.num_slots);
    store_u32(job.page + 4, uint32_t(job.block_index));
    for (uint32_t i = 0; i < uint32_t(kMaxSlots); ++i) job.page[8 + i] = i < l.num_slots ? s.tokens[i] : 0xff;
  }
}

// All phases in order. `run(phase)` calls phase(thread) for every thread of the block and then waits for all of them.
// Returns whether the page was sealed; after a value that is not finite nothing is written.
template <typename LoadK, typename LoadV, typename Run>
KAKEYA_HD bool seal_block(const SealJob &job, SealState &s, LoadK load_k, LoadV load_v, Run run) {
  run([&](int t) {
    if (t == 0) s.status = kSealOk;
  });
  // Values are only looked at here, and loaded again after the keys are done: a page is written whole or not at all.
  run([&](int t) { seal_load(job, s, t, false, load_v); });
  run([&](int t) { seal_load(job, s, t, true, load_k); });
  if (s.status != kSealOk) return false;
  run([&](int t) { seal_centre(job, s, t); });
  if (!job.tables->calibrated) run([&](int t) { seal_free_moments(job, s, t); });
  run([&](int t) { seal_scores(job, s, t); });
  run([&](int t) { seal_choose(job, s, t); });
  for (int stream = 0; stream < 2; ++stream) {
    const bool is_k = stream == 0;
    if (!is_k) {
      run([&](int t) { seal_load(job, s, t, false, load_v); });
      run([&](int t) { seal_hadamard(job, s, t); });
    }
    run([&](int t) { seal_means(job, s, t, is_k); });
    run([&](int t) { seal_residual(job, s, t, is_k); });
    run([&](int t) { seal_scales(job, s, t, is_k); });
    run([&](int t) { seal_normalise(job, s, t); });
    run([&](int t) { seal_codes(job, s, t, is_k); });
    run([&](int t) { seal_slots(job, s, t, is_k); });
  }
  run([&](int t) { seal_finish(job, s, t); });
  return true;
}

}  // namespace kakeya
