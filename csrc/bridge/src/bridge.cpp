#include "bridge.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <utility>
#include <vector>

#include "dequant.cuh"
#include "open.cuh"
#include "soft_cap.cuh"

namespace kakeya {
namespace {

template <int W, int M, int C>
uint32_t code_pair(const LaneWords &w) {
  return field<W, M, C>(w) >> field_bit<W, M, C>();
}

// Calls f<M, C>() for the eight pairs of a lane.
template <typename F>
void for_pairs(F f) {
  [&]<int... I>(std::integer_sequence<int, I...>) {
    (f.template operator()<I / 4, I % 4>(), ...);
  }(std::make_integer_sequence<int, 8>());
}

template <int W>
void pack_width(const uint8_t *codes, uint8_t *unit) {
  for (int lane = 0; lane < kLanes; ++lane) {
    LaneWords w = {0, 0, 0};
    for_pairs([&]<int M, int C>() {
      const int n = 4 * M + C;
      put<W, M, C>(w, codes[n * kLanes + lane] | uint32_t(codes[(8 + n) * kLanes + lane]) << 16);
    });
    store_lane<W>(unit, lane, w);
  }
}

template <int W>
void unpack_width(const uint8_t *unit, uint8_t *codes) {
  for (int lane = 0; lane < kLanes; ++lane) {
    const LaneWords w = load_lane<W>(unit, lane);
    for_pairs([&]<int M, int C>() {
      const uint32_t pair = code_pair<W, M, C>(w);
      const int n = 4 * M + C;
      codes[n * kLanes + lane] = uint8_t(pair);
      codes[(8 + n) * kLanes + lane] = uint8_t(pair >> 16);
    });
  }
}

template <int W>
void symbols_width(const uint8_t *unit, uint32_t *before, uint8_t *symbols) {
  for (int lane = 0; lane < kLanes; ++lane) {
    const TrellisWords x = unpack_trellis<W>(unit, lane);
    const uint32_t pairs = trellis_pairs(x.word, before[lane]);
    before[lane] = W == 1 ? spread_path_end(load_u16(unit + 2 * lane)) : x.word;
    for_pairs([&]<int M, int C>() {
      const uint32_t pair = kakeya::trellis_symbols<W, M, C>(x, pairs);
      const int n = 4 * M + C;
      symbols[n * kLanes + lane] = uint8_t(pair);
      symbols[(8 + n) * kLanes + lane] = uint8_t(pair >> 16);
    });
  }
}

// What Dequant::load reads of a unit in shared memory.
template <int Q, int W>
UnitWords unit_words(const uint8_t *unit, uint32_t before, int lane) {
  UnitWords x = {{0, 0, 0}, 0, before};
  if constexpr (Q != kTrellis) {
    x.w = load_lane<W>(unit, lane);
  } else if constexpr (W == 1) {
    x.path = load_u16(unit + 2 * lane);
  } else {
    x.path = load_u32(unit + 4 * lane);
    if constexpr (W == 3) x.w.c = spread_bytes(load_u16(unit + unit_bytes(2) + 2 * lane)) * 0x0101u;
    if constexpr (W > 3) x.w = load_lane<W - 2>(unit + unit_bytes(2), lane);
  }
  return x;
}

template <int Q, int W, bool NARROW>
void dequantise_unit(const uint8_t *unit, const uint32_t *before, uint32_t gamma, float *points) {
  for (int lane = 0; lane < kLanes; ++lane) {
    uint32_t f[4][2];
    Dequant<Q, W, NARROW>::run(f, unit_words<Q, W>(unit, before[lane], lane), ~0u, gamma, 0x64006400u);
    for (int n = 0; n < kCodes; ++n) {
      const int c = n % 4, m = n / 4 % 2;
      const float x = half_value(uint16_t(f[c][m] >> 16 * (n / 8)));
      points[n * kLanes + lane] = Q == kUniform ? std::ldexp(x, 24 - code_bit(W, c, NARROW)) : x;
    }
  }
}

// Calls f<width>() for a width known at run time.
template <typename F>
void with_width(size_t width, F f) {
  switch (width) {
    case 1:
      return f.template operator()<1>();
    case 2:
      return f.template operator()<2>();
    case 3:
      return f.template operator()<3>();
    case 4:
      return f.template operator()<4>();
    case 5:
      return f.template operator()<5>();
    case 6:
      return f.template operator()<6>();
    default:
      throw std::out_of_range("width: valid 1..6");
  }
}

// Eight channels of a row, as the sealing phases load them.
struct HostRows {
  struct Raw {
    float x[8];
  };
  const float *rows;
  int d;
  static constexpr bool aligned = true;

  Raw scattered(int j, int i) const { return (*this)(j, i); }
  Raw operator()(int j, int i) const {
    Raw raw;
    std::copy_n(rows + j * d + i, 8, raw.x);
    return raw;
  }
  void widen(const Raw &raw, float *x) const { std::copy_n(raw.x, 8, x); }
  bool refused(const Raw &raw) const {
    return std::any_of(raw.x, raw.x + 8, [](float x) { return !(std::abs(x) <= kMaxAbs); });
  }
};

void require(bool ok, const char *what) {
  if (!ok) throw std::invalid_argument(what);
}

}  // namespace

void pack(size_t width, rust::Slice<const uint8_t> codes, rust::Slice<uint8_t> unit) {
  require(codes.size() == kCodes * kLanes && unit.size() == size_t(unit_bytes(int(width))), "pack: sizes");
  with_width(width, [&]<int W>() { pack_width<W>(codes.data(), unit.data()); });
}

void unpack(size_t width, rust::Slice<const uint8_t> unit, rust::Slice<uint8_t> codes) {
  require(codes.size() == kCodes * kLanes && unit.size() == size_t(unit_bytes(int(width))), "unpack: sizes");
  with_width(width, [&]<int W>() { unpack_width<W>(unit.data(), codes.data()); });
}

void pack_trellis(size_t width, rust::Slice<const uint8_t> path, rust::Slice<const uint8_t> refinement,
                  rust::Slice<uint8_t> unit) {
  require(path.size() == kCodes * kLanes && refinement.size() == kCodes * kLanes, "pack_trellis: sizes");
  require(width >= 1 && width <= 6 && unit.size() == size_t(unit_bytes(int(width))), "pack_trellis: unit");
  for (int lane = 0; lane < kLanes; ++lane) {
    uint32_t bits = 0;
    CodeBytes bytes = {{0, 0, 0, 0}};
    for (int n = 0; n < kCodes; ++n) {
      bits |= uint32_t(path[size_t(n * kLanes + lane)]) << n;
      bytes.quarter[n / 4] |= uint32_t(refinement[size_t(n * kLanes + lane)]) << 8 * (n % 4);
    }
    kakeya::pack_trellis(int(width), unit.data(), lane, bits, bytes);
  }
}

void trellis_symbols(size_t width, rust::Slice<const uint8_t> unit, rust::Slice<uint32_t> before,
                     rust::Slice<uint8_t> symbols) {
  require(symbols.size() == kCodes * kLanes && before.size() == kLanes, "trellis_symbols: sizes");
  require(unit.size() == size_t(unit_bytes(int(width))), "trellis_symbols: unit");
  with_width(width, [&]<int W>() { symbols_width<W>(unit.data(), before.data(), symbols.data()); });
}

void dequantise(uint32_t quantizer, size_t width, bool narrow, rust::Slice<const uint8_t> unit,
                rust::Slice<const uint32_t> before, uint32_t gamma, rust::Slice<float> points) {
  require(quantizer <= kTrellis, "dequantise: quantizer");
  require(points.size() == kCodes * kLanes && before.size() == kLanes, "dequantise: sizes");
  require(unit.size() == size_t(unit_bytes(int(width))), "dequantise: unit");
  with_width(width, [&]<int W>() {
    const auto with_quantizer = [&]<bool NARROW>() {
      if (quantizer == kUniform) dequantise_unit<kUniform, W, NARROW>(unit.data(), before.data(), gamma, points.data());
      if (quantizer == kCubic) dequantise_unit<kCubic, W, NARROW>(unit.data(), before.data(), gamma, points.data());
      if (quantizer == kTrellis) dequantise_unit<kTrellis, W, NARROW>(unit.data(), before.data(), gamma, points.data());
    };
    narrow ? with_quantizer.template operator()<true>() : with_quantizer.template operator()<false>();
  });
}

float table_scale(uint32_t quantizer) {
  require(quantizer <= kTrellis, "table_scale: quantizer");
  return kakeya::table_scale(Quantizer(quantizer));
}

uint32_t uniform_code_bit(uint32_t width, uint32_t channel_class, bool narrow) {
  return uint32_t(code_bit(int(width), int(channel_class), narrow));
}

float tanh_of(float x) {
  return tanh_fast(x);
}

bool seal(rust::Slice<const uint64_t> tables, uint32_t layer, uint32_t head, uint32_t block_index,
          rust::Slice<const float> k, rust::Slice<const float> v, rust::Slice<uint8_t> page) {
  require(tables.size() * 8 >= sizeof(Tables), "seal: tables");
  const Tables &t = *reinterpret_cast<const Tables *>(tables.data());
  const size_t d = t.head_dim;
  require(t.total_bytes <= tables.size() * 8, "seal: tables are shorter than their header says");
  require(layer < t.num_layers && head < t.num_kv_heads && block_index < t.max_blocks, "seal: layer, head or block");
  require(k.size() == kBlock * d && v.size() == kBlock * d && page.size() == t.page_bytes, "seal: sizes");
  bool sealed = false;
  with_head_dim(t.head_dim, [&](auto unit) {
    constexpr int D = decltype(unit)::head_dim;
    std::vector<SealState<D>> states(2);
    const SealJob job = {&t, int(layer), int(head), int(block_index), 0, page.data()};
    const auto run = [](auto phase) {
      for (int thread = 0; thread < kSealThreads; ++thread) phase(thread);
    };
    run([&](int thread) { seal_setup<D, true>(t, states[0], thread); });
    run([&](int thread) { seal_setup<D, false>(t, states[1], thread); });
    seal_begin<D, true>(job, states[0], HostRows{k.data(), D}, run);
    seal_begin<D, false>(job, states[1], HostRows{v.data(), D}, run);
    sealed = !states[0].bad[0] && !states[1].bad[0];
    if (!sealed) return;
    std::copy_n(states[0].tokens, kMaxSlots, states[1].tokens);
    seal_end<D, true>(job, states[0], run);
    seal_end<D, false>(job, states[1], run);
  });
  return sealed;
}

void open(rust::Slice<const uint64_t> tables, uint32_t layer, uint32_t head, rust::Slice<const uint8_t> page,
          rust::Slice<float> k, rust::Slice<float> v) {
  require(tables.size() * 8 >= sizeof(Tables), "open: tables");
  const Tables &t = *reinterpret_cast<const Tables *>(tables.data());
  const size_t d = t.head_dim;
  require(t.total_bytes <= tables.size() * 8, "open: tables are shorter than their header says");
  require(layer < t.num_layers && head < t.num_kv_heads, "open: layer or head");
  require(k.size() == kBlock * d && v.size() == kBlock * d && page.size() == t.page_bytes, "open: sizes");
  with_head_dim(t.head_dim, [&](auto unit) {
    constexpr int D = decltype(unit)::head_dim;
    std::vector<OpenState<D>> state(1);
    const OpenJob job = {&t, int(layer), int(head), page.data()};
    const auto run = [](auto phase) {
      for (int thread = 0; thread < kSealThreads; ++thread) phase(thread);
    };
    const auto into = [](float *out) {
      return [out](int j, int i, const float *x) { std::copy_n(x, 8, out + j * D + i); };
    };
    open_stream<D, true>(job, state[0], into(k.data()), run);
    open_stream<D, false>(job, state[0], into(v.data()), run);
  });
}

}  // namespace kakeya
