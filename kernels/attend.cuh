// Decode attention over sealed pages and open blocks: up to kMaxRows query rows of a KV head in one pass.
//
// A thread block walks a range of (sequence, KV head, block) units, all ranges equally long; warps split a page by unit
// of channels and half of its tokens. A page goes through three phases between two barriers:
//
//   scores   warp (u, h): the codes of K unit u for tokens 64h .. 64h + 63, 4 matrix products of 16 tokens each, plus
//            its share of the mean's product with the table of in-block offsets; partial scores to shared memory
//   softmax  every warp sums the units' partial scores of its own tokens and takes exponentials against a maximum that
//            all warps share; a score that exceeds it by more than kSlack is rare and makes all of them start again
//            with a new maximum. Meanwhile the next page's query is prepared: turned to its block's centre, multiplied
//            by its block scales, and its products with the block means
//   values   warp (u, h): V unit kUnits - 1 - u for the same half of tokens
//
// The unit of a warp has one width for as long as the head stays, so the loop over codes branches once a page and no
// list of widths has to be known at compile time. Codes are never rotated or scaled: block scales ride in the query and
// in the page's own accumulators.
//
// Columns of a matrix product are query rows. With up to four rows (kRows = 4) columns 0..3 hold the query's values in
// fp16 and columns 4..7 what fp16 left over, so the query is good to 22 bits at no cost. The products with the means are
// always split that way: means reach 358.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "params.cuh"

namespace kakeya {

enum Quantizer : int { kUniform = 0, kCubic = 1, kTrellis = 2 };

// Scores are in units of log2; a probability may exceed the shared maximum by this before all warps agree on a new one:
// 2^8 and its sums stay far inside fp16.
constexpr float kSlack = 8.0f;
constexpr float kNoScore = -1e30f;
// fp16 range with a margin; larger queries would need scores beyond any softmax.
constexpr float kHalfMax = 60000.0f;

template <int D>
struct AttendShape {
  static constexpr int kUnits = D == 256 ? 8 : 4;
  static constexpr int kUnitChannels = D / kUnits;
  static constexpr int kUnitTokens = 512 / kUnitChannels;
  static constexpr int kWarps = 2 * kUnits, kThreads = 32 * kWarps;
  static constexpr int kGroups = 64 / kUnitTokens;   // token groups of a half
  static constexpr int kTiles = kUnitChannels / 16;  // 16-channel tiles of a unit
  static constexpr int kPairs = D / 2;
  static constexpr int kUnitPairs = kPairs / kUnits;  // channel pairs whose mean a unit's warps handle
};

template <int ROWS>
struct AttendRows {
  static constexpr bool kSplit = ROWS == 4;               // columns 4..7 carry low parts
  static constexpr int kTiles = ROWS == 16 ? 2 : 1;       // 8-column tiles of the products with codes
  static constexpr int kMeanTiles = kSplit ? 1 : 2 * kTiles;  // high parts, then low parts
  static constexpr int kPerThread = ROWS / 4;             // rows that a thread prepares
};

// Shared memory, bytes from its start.
template <int D, int ROWS>
struct AttendShared {
  using S = AttendShape<D>;
  using R = AttendRows<ROWS>;
  static constexpr int kScores = 0;  // f32 [tile][unit][128][8]
  static constexpr int kQuery = kScores + R::kTiles * S::kUnits * kBlock * 8 * 4;  // 2 x f16 [tile][unit][lane][..]
  static constexpr int kQueryBytes = R::kTiles * D * 8 * 2;
  static constexpr int kMean = kQuery + 2 * kQueryBytes;  // 2 x f16 [tile][unit][lane][..]
  static constexpr int kMeanBytes = R::kMeanTiles * D * 8 * 2;
  static constexpr int kProb = kMean + 2 * kMeanBytes;  // f16 [tile][128][8]
  static constexpr int kProbBytes = kBlock * 8 * 2;
  static constexpr int kValue = kProb + R::kMeanTiles * kProbBytes;  // 2 x {scale, offset} f32 [D], code order
  static constexpr int kFactors = kValue + 2 * D * 8;                // f32 [256]
  static constexpr int kRawQuery = kFactors + 256 * 4;               // element [tile][unit][lane][..]
  static constexpr int kMax = kRawQuery + kQueryBytes;               // f32 [warp][16]
  static constexpr int kBarriers = kMax + S::kWarps * 16 * 4;        // u64 [16]
  static constexpr int kFlag = kBarriers + 128;
  static constexpr int kStages = kFlag + 128;
};

// ---- instructions --------------------------------------------------------------------------------------------------

#ifdef __CUDACC__

#define KAKEYA_D __device__ __forceinline__

KAKEYA_D uint32_t shared_address(const void *p) {
  return uint32_t(__cvta_generic_to_shared(p));
}
KAKEYA_D uint32_t lds_u8(uint32_t a) {
  uint32_t v;
  asm volatile("ld.shared.u8 %0, [%1];" : "=r"(v) : "r"(a));
  return v;
}
KAKEYA_D uint32_t lds_u16(uint32_t a) {
  uint16_t v;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(a));
  return v;
}
KAKEYA_D uint32_t lds_u32(uint32_t a) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(a));
  return v;
}
KAKEYA_D uint2 lds_u64(uint32_t a) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(a));
  return v;
}
KAKEYA_D uint4 lds_u128(uint32_t a) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(a));
  return v;
}
KAKEYA_D float lds_f32(uint32_t a) {
  return __uint_as_float(lds_u32(a));
}
KAKEYA_D void sts_u16(uint32_t a, uint32_t x) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(a), "h"(uint16_t(x)) : "memory");
}
KAKEYA_D void sts_u32(uint32_t a, uint32_t x) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(a), "r"(x) : "memory");
}
KAKEYA_D void sts_f32(uint32_t a, float x) {
  sts_u32(a, __float_as_uint(x));
}
KAKEYA_D void sts_f32x2(uint32_t a, float x, float y) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(a), "f"(x), "f"(y) : "memory");
}

KAKEYA_D void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
KAKEYA_D void mma_k8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a0), "r"(a1), "r"(b0));
}
// Product in the elements' own type.
KAKEYA_D void mma_element(bool f16, float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                          uint32_t b1) {
  if (f16) return mma(c, a0, a1, a2, a3, b0, b1);
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// Four 8x8 matrices of 16-bit elements, transposed: rows at the addresses that lanes 0..31 give.
KAKEYA_D void load_transposed(uint32_t (&r)[4], uint32_t a) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(a));
}
KAKEYA_D float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
KAKEYA_D uint32_t pack_half(float lo, float hi) {
  const __half2 h = __floats2half2_rn(lo, hi);
  return *reinterpret_cast<const uint32_t *>(&h);
}
KAKEYA_D uint32_t pack_bf16(float lo, float hi) {
  const __nv_bfloat162 h = __floats2bfloat162_rn(lo, hi);
  return *reinterpret_cast<const uint32_t *>(&h);
}
KAKEYA_D float half_low(uint32_t x) {
  return __half2float(__ushort_as_half(uint16_t(x)));
}
KAKEYA_D float half_high(uint32_t x) {
  return __half2float(__ushort_as_half(uint16_t(x >> 16)));
}
KAKEYA_D uint32_t half_add(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
KAKEYA_D uint32_t half_mul(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
KAKEYA_D uint32_t half_fma(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
KAKEYA_D float clamp_half(float x) {
  return fminf(fmaxf(x, -kHalfMax), kHalfMax);
}
KAKEYA_D float power2(int e) {
  return __int_as_float((127 + e) << 23);
}

// Transfers of a page to shared memory. From sm_90 on one instruction of one thread, completed by a barrier object;
// before that 16 bytes a thread and instruction.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define KAKEYA_BULK 1
#else
#define KAKEYA_BULK 0
#endif

KAKEYA_D void barrier_init(uint32_t bar, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count));
}
#if KAKEYA_BULK
KAKEYA_D void barrier_wait(uint32_t bar, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred p;\nAGAIN:\n"
      "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%0], %1;\n"
      "@p bra DONE;\nbra AGAIN;\nDONE:\n}" ::"r"(bar),
      "r"(parity)
      : "memory");
}
KAKEYA_D void bulk_load(uint32_t dst, const uint8_t *src, uint32_t bytes, uint32_t bar) {
  uint64_t policy;  // pages are read once: they should not push other data out of L2
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
          dst),
      "l"(src), "r"(bytes), "r"(bar), "l"(policy)
      : "memory");
}
#endif

// ---- codes to matrix operands --------------------------------------------------------------------------------------

// Bit at which a unit's codes of class c stand in uniform mode. With 16-channel units classes c and c + 2 are the same
// channels, so they must agree.
KAKEYA_HD constexpr int code_bit(int width, int c, bool narrow) {
  if (narrow) c %= 2;
  if (width == 1) return c;
  if (width == 2) return 2 * c;
  if (width == 3) return c == 2 ? 6 : c == 3 ? 0 : 3 * c;
  if (width == 4) return 4 * (c % 2);
  if (width == 5) return c == 1 ? 5 : 0;
  return 0;
}

// fp16 bits of m * 2^e, exact for what is asked here: m below 2^11, the result normal.
KAKEYA_HD constexpr uint32_t half_constant(int m, int e) {
  if (m == 0) return 0;
  const bool negative = m < 0;
  if (negative) m = -m;
  while (m >= 2048) m /= 2, ++e;
  while (m < 1024) m *= 2, --e;
  return uint32_t(negative ? 0x8000 : 0) | uint32_t(e + 25) << 10 | uint32_t(m - 1024);
}
KAKEYA_HD constexpr uint32_t both(uint32_t h) {
  return h | h << 16;
}

// A lane's words of a unit in shared memory.
template <int W>
KAKEYA_D LaneWords lane_words(uint32_t unit, int lane) {
  LaneWords w = {0, 0, 0};
  constexpr int first = first_words<W>();
  if constexpr (first == 1) w.a = lds_u32(unit + 4 * lane);
  if constexpr (first == 2) {
    const uint2 x = lds_u64(unit + 8 * lane);
    w.a = x.x;
    w.b = x.y;
  }
  if constexpr (W % 2 == 1) w.c = spread_bytes(lds_u16(unit + 128 * first + 2 * lane));
  if constexpr (W == 6) w.c = lds_u32(unit + 256 + 4 * lane);
  return w;
}

// Code pair (M, C) at bit code_bit(W, C, NARROW) of both halves.
template <int W, int M, int C, bool NARROW>
KAKEYA_D uint32_t code_field(const LaneWords &w) {
  constexpr uint32_t mask = ((1u << W) - 1u) * 0x00010001u;
  constexpr int bit = code_bit(W, C, NARROW);
  if constexpr (W == 1) return w.c >> (4 * M + C - bit) & mask << bit;
  if constexpr (NARROW && W == 2 && C >= 2) return w.a >> (8 * M + 4) & mask << bit;
  if constexpr (NARROW && W == 3 && C == 2) {
    if constexpr (M == 0) return w.a >> 6 & mask;
    return (w.a >> 13 & 0x00040004u) | (w.c >> 6 & 0x00030003u);
  }
  if constexpr (NARROW && W == 3 && C == 3) return (M == 0 ? w.c << 3 : w.c) & mask << bit;
  if constexpr (NARROW && W == 5 && C == 3) {
    const uint32_t x = M ? w.b : w.a;
    return (x >> 6 & 0x02000200u) | (M == 0 ? w.c << 5 : w.c << 1) & 0x01e001e0u;
  }
  if constexpr (NARROW && W == 5 && C == 2) return (M ? w.b : w.a) >> 10 & mask;
  return field<W, M, C>(w);
}

// The codes of a lane's unit as half2 registers f[class][m]. Uniform: fp16 subnormals code * 2^(bit - 24). Others:
// points of the alphabet, unit variance.
template <int Q, int W, bool NARROW>
struct Dequant {
  // `previous`: shared address of the path plane of the chain's unit before, or 0. `alpha`, `beta`: half2 constants.
  static KAKEYA_D void run(uint32_t (&f)[4][2], uint32_t unit, uint32_t previous, int lane, uint32_t alpha,
                           uint32_t beta) {
    if constexpr (Q == kUniform) {
      const LaneWords w = lane_words<W>(unit, lane);
      f[0][0] = code_field<W, 0, 0, NARROW>(w);
      f[0][1] = code_field<W, 1, 0, NARROW>(w);
      f[1][0] = code_field<W, 0, 1, NARROW>(w);
      f[1][1] = code_field<W, 1, 1, NARROW>(w);
      f[2][0] = code_field<W, 0, 2, NARROW>(w);
      f[2][1] = code_field<W, 1, 2, NARROW>(w);
      f[3][0] = code_field<W, 0, 3, NARROW>(w);
      f[3][1] = code_field<W, 1, 3, NARROW>(w);
    } else if constexpr (Q == kCubic) {
      const LaneWords w = lane_words<W>(unit, lane);
      cubic<0, 0>(f, w, alpha, beta);
      cubic<0, 1>(f, w, alpha, beta);
      cubic<1, 0>(f, w, alpha, beta);
      cubic<1, 1>(f, w, alpha, beta);
      cubic<2, 0>(f, w, alpha, beta);
      cubic<2, 1>(f, w, alpha, beta);
      cubic<3, 0>(f, w, alpha, beta);
      cubic<3, 1>(f, w, alpha, beta);
    } else {
      const uint32_t past = previous ? lds_u16(previous + 2 * lane) >> 13 : 0u;
      const uint32_t window = trellis_window(lds_u16(unit + 2 * lane), past);
      const uint32_t z1 = spread_bytes(trellis_z1(window)), z0 = spread_bytes(trellis_z0(window));
      LaneWords w = {0, 0, 0};
      if constexpr (W > 1) w = lane_words<(W > 1 ? W - 1 : 1)>(unit + 64, lane);
      trellis<0, 0>(f, w, z1, z0, alpha, beta);
      trellis<0, 1>(f, w, z1, z0, alpha, beta);
      trellis<1, 0>(f, w, z1, z0, alpha, beta);
      trellis<1, 1>(f, w, z1, z0, alpha, beta);
      trellis<2, 0>(f, w, z1, z0, alpha, beta);
      trellis<2, 1>(f, w, z1, z0, alpha, beta);
      trellis<3, 0>(f, w, z1, z0, alpha, beta);
      trellis<3, 1>(f, w, z1, z0, alpha, beta);
    }
  }

  // y (alpha + beta y^2) of y in [-1, 1], which is exact in fp16.
  static KAKEYA_D uint32_t compand(uint32_t y, uint32_t alpha, uint32_t beta) {
    return half_mul(y, half_fma(half_mul(y, y), beta, alpha));
  }
  template <int C, int M>
  static KAKEYA_D void cubic(uint32_t (&f)[4][2], const LaneWords &w, uint32_t alpha, uint32_t beta) {
    constexpr int bit = field_bit<W, M, C>();
    // 1024 + code * 2^bit as a half, 1024 off, then y = code 2^(1-W) + 2^-W - 1.
    const uint32_t c = half_add(field<W, M, C>(w) | 0x64006400u, both(half_constant(-1024, 0)));
    const uint32_t y = half_fma(c, both(half_constant(1, 1 - W - bit)), both(half_constant(1 - (1 << W), -W)));
    f[C][M] = compand(y, alpha, beta);
  }
  template <int C, int M>
  static KAKEYA_D void trellis(uint32_t (&f)[4][2], const LaneWords &w, uint32_t z1, uint32_t z0, uint32_t alpha,
                               uint32_t beta) {
    uint32_t refinement = 0;
    if constexpr (W > 1) {
      constexpr int V = W > 1 ? W - 1 : 1;
      refinement = field<V, M, C>(w) >> field_bit<V, M, C>();
    }
    const uint32_t symbol = trellis_symbols<M, C>(refinement, z1, z0);
    const uint32_t c = half_add(symbol | 0x64006400u, both(half_constant(-1024, 0)));
    constexpr int S = W + 1;
    const uint32_t y = half_fma(c, both(half_constant(1, 1 - S)), both(half_constant(1 - (1 << S), -S)));
    f[C][M] = compand(y, alpha, beta);
  }
};

// Four int8 of a word to two half2 registers of whole numbers: bytes (0, 1) and (2, 3).
KAKEYA_D void bytes_to_halves(uint32_t word, uint32_t &low, uint32_t &high) {
  const uint32_t x = word ^ 0x80808080u;  // 128 + value
  low = half_add(__byte_perm(x, 0x64646464u, 0x4140), both(half_constant(-1152, 0)));
  high = half_add(__byte_perm(x, 0x64646464u, 0x4342), both(half_constant(-1152, 0)));
}

// ---- the kernel ----------------------------------------------------------------------------------------------------

// A place in the list of work units: sequence by sequence, head by head, sealed pages and then open blocks.
struct AttendCursor {
  int sequence, head, unit, units, pages;
};

template <int D, int Q, int ROWS>
struct Attend {
  using S = AttendShape<D>;
  using R = AttendRows<ROWS>;
  using M = AttendShared<D, ROWS>;
  static constexpr bool kNarrow = S::kUnitChannels == 16;
  static constexpr int NB = R::kTiles;
  static constexpr int kRegs = 2 * S::kTiles;  // query registers of a lane, unit and tile
  static constexpr int kSums = 1024 / S::kThreads;  // partial scores of a thread and tile
  static constexpr int kScores = R::kSplit ? kSums / 2 : kSums * NB;  // probabilities of a thread
  // Uniform scores come out 2^-20 too small: codes are subnormals c 2^(bit - 24), queries carry 2^(4 - bit).
  static constexpr float kScoreUnit = Q == kUniform ? 1048576.0f : 1.0f;
  // The table of offsets is scaled to that: 2^-13 keeps its values exact, the coefficients take the other 2^-7.
  static constexpr float kTableScale = Q == kUniform ? 1.0f / 8192.0f : 1.0f;
  static constexpr float kMeanScale = Q == kUniform ? 1.0f / 128.0f : 1.0f;

  const AttendParams &p;
  const Tables &t;
  const int thread, lane, warp, g, t4, unit, half;
  const uint32_t shared;
  const int *cumulative;
  int64_t begin, end;
  const int chunk_row;
  const uint32_t stage_bytes, stages;
  const int pairs;
  const bool calibrated;
  const float *turn_cos, *turn_sin;  // of this thread's pair

  // Values of a segment: one head of one sequence.
  int k_width, v_width;
  uint32_t k_unit, v_unit, k_stride, v_stride;      // offsets in a page, bytes from group to group
  uint32_t k_previous, v_previous;                  // trellis: path of the unit before, relative; 0: none
  uint32_t k_alpha, k_beta, v_alpha, v_beta;
  uint32_t side, slots, num_slots;
  float stat_mean, stat_step, stat_scale, stat_zero;
  int stat_index, value_at;
  uint32_t query_a, query_b, mean_at;
  float qa[R::kPerThread], qb[R::kPerThread];
  float next_cos, next_sin;

  uint32_t table[4][S::kUnitPairs / 8][4];

  float out[NB][S::kTiles][4];
  float raw[NB][S::kTiles][4];
  float sum[NB][2];        // of probabilities, this thread's columns
  float peak[kScores];     // shared maximum of each of this thread's probabilities' rows
  float column_peak[NB][2];

  KAKEYA_D Attend(const AttendParams &p, uint8_t *memory, uint32_t stages)
      : p(p),
        t(*p.tables),
        thread(int(threadIdx.x)),
        lane(thread & 31),
        warp(thread >> 5),
        g(lane >> 2),
        t4(lane & 3),
        unit(warp % S::kUnits),
        half(warp / S::kUnits),
        shared(shared_address(memory)),
        cumulative(p.plan + plan_cumulative(p.max_tasks)),
        chunk_row(int(blockIdx.y) * ROWS),
        stage_bytes(t.page_bytes),
        stages(stages),
        pairs(int(t.pairs)),
        calibrated(t.calibrated != 0),
        turn_cos(t.at<float>(t.centre_cos) + (thread >> 2)),
        turn_sin(t.at<float>(t.centre_sin) + (thread >> 2)) {}

  // ---- work list -----------------------------------------------------------------------------------------------------

  KAKEYA_D int rows_of(int sequence) const {
    return (p.query_start[sequence + 1] - p.query_start[sequence]) * p.group;
  }
  KAKEYA_D int pages_of(int sequence) const {
    return (p.seq_lens[sequence] - (p.query_start[sequence + 1] - p.query_start[sequence])) / kBlock;
  }

  // The unit at place `at` of the list.
  KAKEYA_D AttendCursor seek(int64_t at) const {
    int lo = 0, hi = p.num_seqs - 1;  // last sequence that begins at or before `at` and is not empty
    while (lo < hi) {
      const int mid = (lo + hi + 1) / 2;
      if (int64_t(cumulative[mid]) * p.num_kv_heads <= at)
        lo = mid;
      else
        hi = mid - 1;
    }
    AttendCursor c;
    c.sequence = lo;
    c.units = cumulative[lo + 1] - cumulative[lo];
    const int local = int(at - int64_t(cumulative[lo]) * p.num_kv_heads);
    c.head = c.units ? local / c.units : 0;
    c.unit = local - c.head * c.units;
    c.pages = pages_of(lo);
    return c;
  }

  // ---- transfers -----------------------------------------------------------------------------------------------------
  // Thread 0 keeps a cursor of its own, ahead of the others: only sealed pages take a stage.

  int64_t fetch_at;
  AttendCursor fetch;
  const uint8_t *fetch_page;
  uint32_t fetched;

  KAKEYA_D void fetch_seek(int64_t at) {
    fetch_at = at;
    if (at < end) {
      fetch = seek(at);
      fetch_resolve();
    } else {
      fetch_page = nullptr;
    }
  }
  // Goes on to the next sealed page from the cursor's own place, and looks up where it is.
  KAKEYA_D void fetch_resolve() {
    while (fetch.unit >= fetch.pages || rows_of(fetch.sequence) <= chunk_row) {
      fetch_at += fetch.units - fetch.unit;
      if (fetch_at >= end) {
        fetch_page = nullptr;
        return;
      }
      fetch = seek(fetch_at);
    }
    const int block = __ldg(p.block_table + fetch.sequence * p.block_table_stride + fetch.unit);
    fetch_page = p.pages + block * p.page_block_stride + fetch.head * p.page_head_stride;
  }
  KAKEYA_D void fetch_next() {
    ++fetch_at;
    ++fetch.unit;
    if (fetch_at >= end) {
      fetch_page = nullptr;
      return;
    }
    if (fetch.unit == fetch.units) fetch = seek(fetch_at);
    fetch_resolve();
  }
  KAKEYA_D uint32_t stage_at(uint32_t stage) const {
    return shared + M::kStages + stage * stage_bytes;
  }
  // Starts the transfer of the next sealed page, if there is one. On sm_90 thread 0 alone calls this.
  KAKEYA_D void fetch_page_now() {
#if KAKEYA_BULK
    if (fetch_page) {
      const uint32_t stage = fetched % stages;
      bulk_load(stage_at(stage), fetch_page, stage_bytes, shared + M::kBarriers + 8 * stage);
      ++fetched;
      fetch_next();
    }
#else
    if (fetch_page) {
      const uint32_t dst = stage_at(fetched % stages);
      for (uint32_t i = 16 * thread; i < stage_bytes; i += 16 * S::kThreads)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(dst + i), "l"(fetch_page + i) : "memory");
      ++fetched;
      fetch_next();
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
  }
  // Waits until page `page` (counted from this block's first) is there. Before sm_90 a barrier must follow.
  KAKEYA_D void await_page(uint32_t page) const {
#if KAKEYA_BULK
    barrier_wait(shared + M::kBarriers + 8 * (page % stages), page / stages & 1);
#else
    // Groups complete in order; the pages ahead of this one may still be under way.
    asm volatile("cp.async.wait_group 1;" ::: "memory");
#endif
  }

  // ---- a segment's own values ------------------------------------------------------------------------------------------

  KAKEYA_D float grid_alpha(int width) const {
    return __uint_as_float(t.at<uint32_t>(t.grids)[4 * width]);
  }
  KAKEYA_D float grid_beta(int width) const {
    return __uint_as_float(t.at<uint32_t>(t.grids)[4 * width + 1]);
  }

  // Offset from a stream's start, and the last path before it, of unit u.
  KAKEYA_D void find_unit(const uint8_t *widths, int u, uint32_t &offset, uint32_t &total, uint32_t &previous) const {
    offset = total = 0;
    previous = 0;
    for (int i = 0; i < S::kUnits; ++i) {
      if (i == u) offset = 64 * total;
      if (i < u && widths[i]) previous = 64 * total + 1;  // + 1: none is 0
      total += widths[i];
    }
    // Relative to the unit's own offset: how far back.
    previous = previous ? offset - (previous - 1) : 0;
  }

  KAKEYA_D float load_element(const void *base, int64_t at) const {
    return p.element == kF16 ? __half2float(static_cast<const __half *>(base)[at])
                      : __bfloat162float(static_cast<const __nv_bfloat16 *>(base)[at]);
  }
  KAKEYA_D bool is_f16() const {
    return p.element == kF16;
  }

  // Canonical channels of pair f: the pair's own if it rotates, else two that do not.
  KAKEYA_D int2 pair_channels(int f) const {
    const int h = pairs;
    return f < h ? make_int2(f, f + h) : make_int2(2 * f, 2 * f + 1);
  }
  // Place of (channel position, column) in query registers: bytes from their start.
  static KAKEYA_D uint32_t query_place(int position, int column) {
    const int u = position / S::kUnitChannels, i = position % S::kUnitChannels;
    return uint32_t((u * 32 + column * 4 + (i & 7) / 2) * kRegs * 4 + (i >> 3) * 4 + (i & 1) * 2);
  }
  static constexpr uint32_t kTileBytes = D * 8 * 2;

  KAKEYA_D void begin_segment(const AttendCursor &c) {
    const int head = p.first_head + c.head;
    const HeadView h = head_view(t, p.layer, head);
    const LayerLayout layout = t.at<LayerLayout>(t.layers)[p.layer];
    side = layout.side_offset;
    slots = layout.slots_offset;
    num_slots = layout.num_slots;
    constexpr uint32_t groups = kBlock / S::kUnitTokens;
    uint32_t total;
    const int vu = S::kUnits - 1 - unit;  // a wide K unit goes with a narrow V unit
    find_unit(h.k.widths, unit, k_unit, total, k_previous);
    k_width = h.k.widths[unit];
    k_stride = 64 * total;
    k_unit += kHeader + half * S::kGroups * k_stride;
    const uint32_t v_start = kHeader + groups * k_stride;
    find_unit(h.v.widths, vu, v_unit, total, v_previous);
    v_width = h.v.widths[vu];
    v_stride = 64 * total;
    v_unit += v_start + half * S::kGroups * v_stride;
    if constexpr (Q != kUniform) {
      k_alpha = pack_half(grid_alpha(k_width), grid_alpha(k_width));
      k_beta = pack_half(grid_beta(k_width), grid_beta(k_width));
      v_alpha = pack_half(grid_alpha(v_width), grid_alpha(v_width));
      v_beta = pack_half(grid_beta(v_width), grid_beta(v_width));
    }

    if (thread < 2 * D) {
      const int f = thread >> 2, role = thread & 3;
      const int2 pair = pair_channels(f);
      const bool is_k = role < 2;
      const StreamView &s = is_k ? h.k : h.v;
      const int channel = role == 0 ? pair.x : role == 1 ? pair.y : 2 * f + role - 2;
      stat_index = (is_k ? 0 : D) + channel;
      stat_mean = s.mean[channel];
      stat_step = s.step[channel];
      stat_scale = s.sigma[channel];
      stat_zero = 0.0f;
      const int position = s.position[channel];
      if constexpr (Q == kUniform) {
        const int w = s.widths[position / S::kUnitChannels];
        const int bit = w ? code_bit(w, position % S::kUnitChannels / 8, kNarrow) : 0;
        const float step = w ? grid_alpha(w) * power2(1 - w) : 1.0f;
        // Keys: their score misses 2^20 (kScoreUnit). Values: the sum's scale makes up for the subnormal.
        if (is_k) {
          stat_scale *= step * power2(4 - bit);
        } else if (w) {
          stat_scale *= step * power2(24 - bit);
          stat_zero = -0.5f * float((1 << w) - 1) * power2(bit - 24);
        }
      }
      value_at = position * 8;
      query_a = query_place(h.k.position[pair.x], role);
      query_b = query_place(h.k.position[pair.y], role);
      const int u = f / S::kUnitPairs, i = f % S::kUnitPairs;
      mean_at = uint32_t((u * 32 + role * 4 + (i & 7) / 2) * kRegs * 4 + (i & 1) * 2 + (S::kTiles == 2 ? (i >> 3) * 4 : 0));
      // The query, natural channels, in units of log2.
      const uint16_t *natural = t.at<uint16_t>(t.natural);
      const int rows = rows_of(c.sequence);
      const float scale = p.scale * 1.4426950408889634f;
      KAKEYA_UNROLL
      for (int e = 0; e < R::kPerThread; ++e) {
        const int row = chunk_row + role + 4 * e;
        qa[e] = qb[e] = 0.0f;
        if (row < rows) {
          const int64_t at = int64_t(p.query_start[c.sequence] + row / p.group) * p.q_token_stride +
                             int64_t(c.head * p.group + row % p.group) * p.q_head_stride;
          qa[e] = scale * load_element(p.q, at + natural[pair.x]);
          qb[e] = scale * load_element(p.q, at + natural[pair.y]);
        }
      }
    }
    KAKEYA_UNROLL
    for (int n = 0; n < NB; ++n) {
      sum[n][0] = sum[n][1] = 0.0f;
      column_peak[n][0] = column_peak[n][1] = kNoScore;
      KAKEYA_UNROLL
      for (int i = 0; i < S::kTiles; ++i)
        KAKEYA_UNROLL
        for (int e = 0; e < 4; ++e) out[n][i][e] = 0.0f;
    }
    KAKEYA_UNROLL
    for (int e = 0; e < kScores; ++e) peak[e] = kNoScore;
    // Columns that no page writes must be zero; an open block of the segment before has written them.
    for (int i = thread; i < R::kMeanTiles * M::kProbBytes / 4; i += S::kThreads) sts_u32(shared + M::kProb + 4 * i, 0);
  }

  // cos and sin of the turn to block n's centre, for the pair of this thread.
  KAKEYA_D void load_turn(int n) {
    next_cos = 1.0f;
    next_sin = 0.0f;
    if (thread < 2 * D && thread >> 2 < pairs) {
      next_cos = __ldg(turn_cos + n * pairs);
      next_sin = __ldg(turn_sin + n * pairs);
    }
  }

  // Query registers of a row: high part at column role, and the low part where columns are free for it.
  static KAKEYA_D void store_split(uint32_t a, uint32_t low_offset, float x) {
    const float c = clamp_half(x);
    const __half high = __float2half_rn(c);
    sts_u16(a, __half_as_ushort(high));
    sts_u16(a + low_offset, __half_as_ushort(__float2half_rn(c - __half2float(high))));
  }

  // Prepares page `page` at shared address `at`: reads its statistics, writes query, mean and value registers of buffer
  // `buffer`. Threads in fours share a channel pair of K and two channels of V; each of the four also has its rows.
  KAKEYA_D void prepare(uint32_t at, uint32_t buffer) {
    if (thread >= 2 * D) return;
    const uint32_t s = at + side;
    const int i = stat_index;
    float scale, mean;
    if (calibrated) {
      const uint32_t code = lds_u8(s + (i >> 1)) >> 4 * (i & 1) & 15u;
      const uint32_t low = lds_u8(s + D + (i >> 1)) >> 4 * (i & 1) & 15u;
      const uint32_t high = lds_u8(s + 2 * D + (i >> 2)) >> 2 * (i & 3) & 3u;
      scale = lds_f32(shared + M::kFactors + 4 * code);
      mean = float(int(low | high << 4) - 32) * stat_step;
    } else {
      scale = lds_f32(shared + M::kFactors + 4 * lds_u8(s + i));
      mean = half_low(lds_u16(s + 2 * D + 2 * i));
    }
    scale *= stat_scale;
    const float base = stat_mean + mean;
    const int role = thread & 3;
    if (role >= 2) {
      const uint32_t a = shared + M::kValue + buffer * (D * 8) + value_at;
      sts_f32x2(a, scale, base + scale * stat_zero);
    }
    const int first = lane & ~3;
    const float scale_a = __shfl_sync(~0u, scale, first), scale_b = __shfl_sync(~0u, scale, first + 1);
    const float base_a = __shfl_sync(~0u, base, first), base_b = __shfl_sync(~0u, base, first + 1);
    const uint32_t query = shared + M::kQuery + buffer * M::kQueryBytes;
    const uint32_t means = shared + M::kMean + buffer * M::kMeanBytes + mean_at;
    KAKEYA_UNROLL
    for (int e = 0; e < R::kPerThread; ++e) {
      const float a = qa[e] * next_cos + qb[e] * next_sin, b = qb[e] * next_cos - qa[e] * next_sin;
      // Row role + 4 e stands in column (role + 4 e) % 8 of tile e / 2: 64 lanes' registers are 16 columns further.
      const uint32_t column = (e % 2) * (16 * kRegs * 4) + (e / 2) * kTileBytes;
      const uint32_t low = R::kSplit ? 16 * kRegs * 4 : NB * kTileBytes;
      if constexpr (R::kSplit) {
        store_split(query + query_a, low, a * scale_a);
        store_split(query + query_b, low, b * scale_b);
      } else {
        sts_u16(query + query_a + column, __half_as_ushort(__float2half_rn(clamp_half(a * scale_a))));
        sts_u16(query + query_b + column, __half_as_ushort(__float2half_rn(clamp_half(b * scale_b))));
      }
      // The mean turned by offset o, times the query: cos o (a m_a + b m_b) + sin o (b m_a - a m_b).
      const float cosine = (a * base_a + b * base_b) * kMeanScale, sine = (b * base_a - a * base_b) * kMeanScale;
      constexpr uint32_t sine_at = S::kTiles == 2 ? 8 : 4;
      store_split(means + column, low, cosine);
      store_split(means + column + sine_at, low, sine);
    }
  }

  // The raw query of a segment, element type, for open blocks.
  KAKEYA_D void prepare_raw(const AttendCursor &c) {
    const int rows = rows_of(c.sequence);
    for (int i = thread; i < NB * 8 * D; i += S::kThreads) {
      const int row = i / D, channel = i % D;
      uint32_t x = 0;
      if (row < ROWS && chunk_row + row < rows) {
        const int r = chunk_row + row;
        const int64_t at = int64_t(p.query_start[c.sequence] + r / p.group) * p.q_token_stride +
                           int64_t(c.head * p.group + r % p.group) * p.q_head_stride + channel;
        x = static_cast<const uint16_t *>(p.q)[at];
      }
      sts_u16(shared + M::kRawQuery + (row / 8) * kTileBytes + query_place(channel, row % 8), x);
    }
  }

  // ---- scores ----------------------------------------------------------------------------------------------------------

  static KAKEYA_D void load_regs(uint32_t (&r)[kRegs], uint32_t base, int unit, int lane) {
    const uint32_t a = base + (unit * 32 + lane) * kRegs * 4;
    if constexpr (kRegs == 4) {
      const uint4 x = lds_u128(a);
      r[0] = x.x, r[1] = x.y, r[2] = x.z, r[3] = x.w;
    } else {
      const uint2 x = lds_u64(a);
      r[0] = x.x, r[1] = x.y;
    }
  }

  template <int W>
  KAKEYA_D void score_codes(float (&acc)[NB][4][4], const uint32_t (&q)[NB][kRegs], uint32_t page) const {
    if constexpr (Q == kUniform) {
      // The codes' zero point, (2^W - 1) / 2 of each: the same for all tokens.
      float zero[NB][4];
      KAKEYA_UNROLL
      for (int n = 0; n < NB; ++n) {
        zero[n][0] = zero[n][1] = zero[n][2] = zero[n][3] = 0.0f;
        KAKEYA_UNROLL
        for (int i = 0; i < S::kTiles; ++i) {
          const uint32_t z0 = both(half_constant((1 << W) - 1, code_bit(W, 2 * i, kNarrow) - 5));
          const uint32_t z1 = both(half_constant((1 << W) - 1, code_bit(W, 2 * i + 1, kNarrow) - 5));
          mma(zero[n], z0, z0, z1, z1, q[n][2 * i], q[n][2 * i + 1]);
        }
        KAKEYA_UNROLL
        for (int m = 0; m < 4; ++m) {
          acc[n][m][0] = acc[n][m][2] = -zero[n][0] * (1.0f / kScoreUnit);
          acc[n][m][1] = acc[n][m][3] = -zero[n][1] * (1.0f / kScoreUnit);
        }
      }
    }
    KAKEYA_UNROLL
    for (int i = 0; i < S::kGroups; ++i) {
      const uint32_t at = page + k_unit + i * k_stride;
      uint32_t f[4][2];
      Dequant<Q, W, kNarrow>::run(f, at, k_previous ? at - k_previous : 0, lane, k_alpha, k_beta);
      KAKEYA_UNROLL
      for (int n = 0; n < NB; ++n) {
        if constexpr (kNarrow) {
          mma(acc[n][2 * i], f[0][0], f[0][1], f[1][0], f[1][1], q[n][0], q[n][1]);
          mma(acc[n][2 * i + 1], f[2][0], f[2][1], f[3][0], f[3][1], q[n][0], q[n][1]);
        } else {
          mma(acc[n][i], f[0][0], f[0][1], f[1][0], f[1][1], q[n][0], q[n][1]);
          mma(acc[n][i], f[2][0], f[2][1], f[3][0], f[3][1], q[n][2], q[n][3]);
        }
      }
    }
  }

  KAKEYA_D uint32_t score_at(int n, int u, int token) const {
    return shared + M::kScores + ((n * S::kUnits + u) * kBlock + token) * 32;
  }

  KAKEYA_D void store_scores(const float (&acc)[NB][4][4]) const {
    KAKEYA_UNROLL
    for (int n = 0; n < NB; ++n)
      KAKEYA_UNROLL
      for (int m = 0; m < 4; ++m) {
        const uint32_t a = score_at(n, unit, 64 * half + 16 * m + g) + 8 * t4;
        sts_f32x2(a, acc[n][m][0], acc[n][m][1]);
        sts_f32x2(a + 8 * 32, acc[n][m][2], acc[n][m][3]);
      }
  }

  KAKEYA_D void scores(uint32_t page, uint32_t buffer) const {
    uint32_t q[NB][kRegs];
    KAKEYA_UNROLL
    for (int n = 0; n < NB; ++n)
      load_regs(q[n], shared + M::kQuery + buffer * M::kQueryBytes + n * kTileBytes, unit, lane);
    float acc[NB][4][4];
    KAKEYA_UNROLL
    for (int n = 0; n < NB; ++n)
      KAKEYA_UNROLL
      for (int m = 0; m < 4; ++m) acc[n][m][0] = acc[n][m][1] = acc[n][m][2] = acc[n][m][3] = 0.0f;
    switch (k_width) {  // the same for the whole warp and for as long as the head stays
      case 1: score_codes<1>(acc, q, page); break;
      case 2: score_codes<2>(acc, q, page); break;
      case 3: score_codes<3>(acc, q, page); break;
      case 4: score_codes<4>(acc, q, page); break;
      case 5: score_codes<5>(acc, q, page); break;
      case 6: score_codes<6>(acc, q, page); break;
      default: break;
    }
    KAKEYA_UNROLL
    for (int n = 0; n < R::kMeanTiles; ++n) {
      uint32_t b[kRegs];
      load_regs(b, shared + M::kMean + buffer * M::kMeanBytes + n * kTileBytes, unit, lane);
      KAKEYA_UNROLL
      for (int m = 0; m < 4; ++m)
        KAKEYA_UNROLL
        for (int i = 0; i < S::kTiles; ++i)
          mma(acc[n % NB][m], table[m][i][0], table[m][i][1], table[m][i][2], table[m][i][3], b[2 * i], b[2 * i + 1]);
    }
    store_scores(acc);
    const uint32_t used = lds_u8(page + 3);
    if (used) score_slots(page, q, used);
  }

  // Adds the exact slots' part to their tokens' partial scores.
  KAKEYA_D void score_slots(uint32_t page, const uint32_t (&q)[NB][kRegs], uint32_t used) const {
    const bool mine = uint32_t(g) < used;
    const uint32_t a = page + slots + (mine ? g : 0) * D + unit * S::kUnitChannels;
    uint32_t e[kRegs];
    if constexpr (kNarrow) {
      bytes_to_halves(lds_u32(a + 4 * t4), e[0], e[1]);
    } else {
      const uint2 w = lds_u64(a + 8 * t4);
      bytes_to_halves(w.x, e[0], e[1]);
      bytes_to_halves(w.y, e[2], e[3]);
    }
    // Undo what uniform queries carry of their codes: 2^(4 - bit) and the step.
    float undo = 1.0f;
    if constexpr (Q == kUniform) {
      const int w = k_width;
      if (w) {
        KAKEYA_UNROLL
        for (int c = 0; c < kRegs; ++c) e[c] = half_mul(e[c], both(half_constant(1, 0)) + (uint32_t(code_bit(w, c, kNarrow)) * 0x04000400u));
      }
      undo = (w ? power2(w - 1) / grid_alpha(w) : 1.0f) * power2(-24);
    }
    const float scale = half_low(lds_u16(page + slots + 2 * num_slots * D + 4 * (mine ? g : 0))) * undo;
    const uint32_t token = lds_u8(page + 8 + (mine ? g : 0));
    __syncwarp();  // other lanes have stored this token's partial scores
    KAKEYA_UNROLL
    for (int n = 0; n < NB; ++n) {
      float acc[4] = {0, 0, 0, 0};
      KAKEYA_UNROLL
      for (int i = 0; i < S::kTiles; ++i) mma(acc, e[2 * i], 0, e[2 * i + 1], 0, q[n][2 * i], q[n][2 * i + 1]);
      if (mine && int(token >> 6) == half) {
        const uint32_t s = score_at(n, unit, int(token & 127u)) + 8 * t4;
        const uint2 old = lds_u64(s);
        sts_f32x2(s, __uint_as_float(old.x) + acc[0] * scale, __uint_as_float(old.y) + acc[1] * scale);
      }
    }
  }

  // ---- softmax -----------------------------------------------------------------------------------------------------------

  // Token of this thread, and the row of its i-th probability.
  KAKEYA_D int my_token() const {
    return warp * (kBlock / S::kWarps) + lane / (32 / (kBlock / S::kWarps));
  }
  KAKEYA_D int my_row(int i) const {
    constexpr int lanes = 8 / kSums;  // lanes of a token
    const int part = lane % lanes;
    if constexpr (R::kSplit) {
      if constexpr (kSums == 4) return 2 * part + i;
      return 2 * (part & 1) + (part >> 1);
    }
    return i / kSums * 8 + part * kSums + i % kSums;
  }

  // This thread's scores in units of log2: the sum over units, and over high and low columns.
  KAKEYA_D void gather_scores(float (&s)[kScores], float unit_scale) const {
    constexpr int lanes = 8 / kSums;
    const int part = lane % lanes;
    KAKEYA_UNROLL
    for (int n = 0; n < NB; ++n) {
      float x[kSums];
      KAKEYA_UNROLL
      for (int i = 0; i < kSums; ++i) x[i] = 0.0f;
      KAKEYA_UNROLL
      for (int u = 0; u < S::kUnits; ++u) {
        const uint32_t a = score_at(n, u, my_token()) + part * kSums * 4;
        if constexpr (kSums == 4) {
          const uint4 v = lds_u128(a);
          x[0] += __uint_as_float(v.x), x[1] += __uint_as_float(v.y);
          x[2] += __uint_as_float(v.z), x[3] += __uint_as_float(v.w);
        } else {
          const uint2 v = lds_u64(a);
          x[0] += __uint_as_float(v.x), x[1] += __uint_as_float(v.y);
        }
      }
      if constexpr (!R::kSplit) {
        KAKEYA_UNROLL
        for (int i = 0; i < kSums; ++i) s[n * kSums + i] = x[i] * unit_scale;
      } else if constexpr (kSums == 4) {
        // Even lanes hold the high columns of rows 0..3, odd lanes the low ones: swap halves.
        const bool odd = part;
        const float r0 = __shfl_xor_sync(~0u, odd ? x[0] : x[2], 1), r1 = __shfl_xor_sync(~0u, odd ? x[1] : x[3], 1);
        s[0] = ((odd ? x[2] : x[0]) + r0) * unit_scale;
        s[1] = ((odd ? x[3] : x[1]) + r1) * unit_scale;
      } else {
        const bool low = part >= 2;
        const float r = __shfl_xor_sync(~0u, low ? x[0] : x[1], 2);
        s[0] = ((low ? x[1] : x[0]) + r) * unit_scale;
      }
    }
  }

  KAKEYA_D uint32_t prob_at(int tile, int token) const {
    return shared + M::kProb + tile * M::kProbBytes + token * 16;
  }

  // Probabilities of a page: fp16.
  KAKEYA_D void store_probs(const float (&s)[kScores]) const {
    float e[kScores];
    KAKEYA_UNROLL
    for (int i = 0; i < kScores; ++i) e[i] = exp2_fast(s[i] - peak[i]);
    const uint32_t a = prob_at(0, my_token());
    if constexpr (kScores == 1) {
      sts_u16(a + 2 * my_row(0), __half_as_ushort(__float2half_rn(e[0])));
    } else {
      KAKEYA_UNROLL
      for (int i = 0; i < kScores; i += 2)
        sts_u32(a + my_row(i) / 8 * M::kProbBytes + my_row(i) % 8 * 2, pack_half(e[i], e[i + 1]));
    }
  }

  // Probabilities of an open block: element type, high part and what is left, beside it or in tiles of its own.
  KAKEYA_D void store_raw_probs(const float (&s)[kScores]) const {
    const uint32_t a = prob_at(0, my_token());
    constexpr uint32_t low = R::kSplit ? 8 : NB * M::kProbBytes;
    KAKEYA_UNROLL
    for (int i = 0; i < kScores; ++i) {
      const float e = exp2_fast(s[i] - peak[i]);
      const uint32_t at = a + my_row(i) / 8 * M::kProbBytes + my_row(i) % 8 * 2;
      if (is_f16()) {
        const __half h = __float2half_rn(e);
        sts_u16(at, __half_as_ushort(h));
        sts_u16(at + low, __half_as_ushort(__float2half_rn(e - __half2float(h))));
      } else {
        const __nv_bfloat16 h = __float2bfloat16_rn(e);
        sts_u16(at, __bfloat16_as_ushort(h));
        sts_u16(at + low, __bfloat16_as_ushort(__float2bfloat16_rn(e - __bfloat162float(h))));
      }
    }
  }

  // Exponentials of the gathered scores; ends with the barrier after which probabilities may be read.
  template <bool RAW>
  KAKEYA_D void softmax(const float (&s)[kScores]) {
    bool above = false;
    KAKEYA_UNROLL
    for (int i = 0; i < kScores; ++i) above |= s[i] > peak[i] + kSlack;
    if constexpr (RAW)
      store_raw_probs(s);
    else
      store_probs(s);
    if (__syncthreads_or(above)) {
      raise_peak<RAW>(s);
      if constexpr (RAW)
        store_raw_probs(s);
      else
        store_probs(s);
      __syncthreads();
    }
  }

  // A new shared maximum for all rows; sums so far are scaled to it.
  template <bool RAW>
  KAKEYA_D void raise_peak(const float (&s)[kScores]) {
    constexpr int lanes = 8 / kSums;
    const uint32_t maxima = shared + M::kMax;
    KAKEYA_UNROLL
    for (int i = 0; i < kScores; ++i) {
      float x = s[i];
      for (int k = lanes; k < 32; k *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, k));
      if (lane < lanes) sts_f32(maxima + (warp * 16 + my_row(i)) * 4, x);
    }
    __syncthreads();
    KAKEYA_UNROLL
    for (int i = 0; i < kScores; ++i)
      for (int w = 0; w < S::kWarps; ++w) peak[i] = fmaxf(peak[i], lds_f32(maxima + (w * 16 + my_row(i)) * 4));
    KAKEYA_UNROLL
    for (int n = 0; n < NB; ++n)
      KAKEYA_UNROLL
      for (int e = 0; e < 2; ++e) {
        const int column = 2 * t4 + e, row = 8 * n + (R::kSplit ? column & 3 : column);
        float x = column_peak[n][e];
        for (int w = 0; w < S::kWarps; ++w) x = fmaxf(x, lds_f32(maxima + (w * 16 + row) * 4));
        const float fade = exp2_fast(column_peak[n][e] - x);
        column_peak[n][e] = x;
        sum[n][e] *= fade;
        KAKEYA_UNROLL
        for (int i = 0; i < S::kTiles; ++i) {
          out[n][i][e] *= fade, out[n][i][e + 2] *= fade;
          if constexpr (RAW) raw[n][i][e] *= fade, raw[n][i][e + 2] *= fade;
        }
      }
  }

  // ---- values ------------------------------------------------------------------------------------------------------------

  template <int W>
  KAKEYA_D void value_codes(float (&acc)[NB][S::kTiles][4], const uint32_t (&b)[NB][8], uint32_t page) const {
    KAKEYA_UNROLL
    for (int i = 0; i < S::kGroups; ++i) {
      const uint32_t at = page + v_unit + i * v_stride;
      uint32_t f[4][2];
      Dequant<Q, W, kNarrow>::run(f, at, v_previous ? at - v_previous : 0, lane, v_alpha, v_beta);
      KAKEYA_UNROLL
      for (int n = 0; n < NB; ++n) {
        if constexpr (kNarrow) {
          mma(acc[n][0], f[0][0], f[1][0], f[0][1], f[1][1], b[n][4 * i], b[n][4 * i + 1]);
          mma(acc[n][0], f[2][0], f[3][0], f[2][1], f[3][1], b[n][4 * i + 2], b[n][4 * i + 3]);
        } else {
          mma(acc[n][0], f[0][0], f[1][0], f[0][1], f[1][1], b[n][2 * i], b[n][2 * i + 1]);
          mma(acc[n][S::kTiles - 1], f[2][0], f[3][0], f[2][1], f[3][1], b[n][2 * i], b[n][2 * i + 1]);
        }
      }
    }
  }

  KAKEYA_D void load_probs(uint32_t (&b)[8], int tile) const {
    uint32_t x[4];
    load_transposed(x, prob_at(tile, 64 * half + lane));
    KAKEYA_UNROLL
    for (int i = 0; i < 4; ++i) b[i] = x[i];
    load_transposed(x, prob_at(tile, 64 * half + 32 + lane));
    KAKEYA_UNROLL
    for (int i = 0; i < 4; ++i) b[4 + i] = x[i];
  }

  KAKEYA_D void values(uint32_t page, uint32_t buffer) {
    uint32_t b[NB][8];
    float acc[NB][S::kTiles][4], total[NB][4];
    KAKEYA_UNROLL
    for (int n = 0; n < NB; ++n) {
      load_probs(b[n], n);
      KAKEYA_UNROLL
      for (int e = 0; e < 4; ++e) total[n][e] = 0.0f;
      KAKEYA_UNROLL
      for (int i = 0; i < S::kTiles; ++i)
        KAKEYA_UNROLL
        for (int e = 0; e < 4; ++e) acc[n][i][e] = 0.0f;
      constexpr uint32_t ones = 0x3c003c00u;
      KAKEYA_UNROLL
      for (int i = 0; i < 4; ++i) mma(total[n], ones, ones, ones, ones, b[n][2 * i], b[n][2 * i + 1]);
    }
    switch (v_width) {
      case 1: value_codes<1>(acc, b, page); break;
      case 2: value_codes<2>(acc, b, page); break;
      case 3: value_codes<3>(acc, b, page); break;
      case 4: value_codes<4>(acc, b, page); break;
      case 5: value_codes<5>(acc, b, page); break;
      case 6: value_codes<6>(acc, b, page); break;
      default: break;
    }
    const uint32_t used = lds_u8(page + 3);
    if (half == 0 && used) value_slots(acc, page, used);
    const int vu = S::kUnits - 1 - unit;
    const uint32_t parameters = shared + M::kValue + buffer * (D * 8) + (vu * S::kUnitChannels + g) * 8;
    KAKEYA_UNROLL
    for (int i = 0; i < S::kTiles; ++i)
      KAKEYA_UNROLL
      for (int r = 0; r < 2; ++r) {
        const uint2 x = lds_u64(parameters + (16 * i + 8 * r) * 8);
        const float scale = __uint_as_float(x.x), offset = __uint_as_float(x.y);
        KAKEYA_UNROLL
        for (int n = 0; n < NB; ++n)
          KAKEYA_UNROLL
          for (int e = 0; e < 2; ++e) {
            float &o = out[n][i][2 * r + e];
            o = fmaf(scale, acc[n][i][2 * r + e], o);
            o = fmaf(offset, total[n][e], o);
          }
      }
    KAKEYA_UNROLL
    for (int n = 0; n < NB; ++n)
      KAKEYA_UNROLL
      for (int e = 0; e < 2; ++e) sum[n][e] += total[n][e];
  }

  // Adds the exact slots: 8 more tokens, whose probabilities are picked from the page's.
  KAKEYA_D void value_slots(float (&acc)[NB][S::kTiles][4], uint32_t page, uint32_t used) const {
    const int vu = S::kUnits - 1 - unit;
    uint32_t word[2], scale[2], token[2];
    KAKEYA_UNROLL
    for (int i = 0; i < 2; ++i) {
      const uint32_t s = 2 * t4 + i;
      const bool there = s < used;
      const uint32_t a = page + slots + (num_slots + (there ? s : 0)) * D + vu * S::kUnitChannels;
      word[i] = kNarrow ? lds_u16(a + 2 * g) : lds_u32(a + 4 * g);
      scale[i] = there ? lds_u16(page + slots + 2 * num_slots * D + 4 * s + 2) : 0u;
      token[i] = there ? lds_u8(page + 8 + s) & 127u : 0u;
      word[i] ^= 0x80808080u;
    }
    uint32_t e[4];
    KAKEYA_UNROLL
    for (int c = 0; c < 2 * S::kTiles; ++c) {
      const uint32_t x = __byte_perm(word[0], word[1], c | (4 + c) << 8) & 0x00ff00ffu;
      e[c] = half_add(x | 0x64006400u, both(half_constant(-1152, 0)));
    }
    // The page's scale turns sums of codes into values; slots are in units of the deviation.
    float undo[4];
    KAKEYA_UNROLL
    for (int c = 0; c < 2 * S::kTiles; ++c) {
      undo[c] = 1.0f;
      if constexpr (Q == kUniform)
        if (v_width) undo[c] = power2(v_width - 1 - 24 + code_bit(v_width, c, kNarrow)) / grid_alpha(v_width);
    }
    KAKEYA_UNROLL
    for (int n = 0; n < NB; ++n) {
      const uint32_t p0 = lds_u16(prob_at(n, int(token[0])) + 2 * g), p1 = lds_u16(prob_at(n, int(token[1])) + 2 * g);
      const uint32_t b = half_mul(p0 | p1 << 16, scale[0] | scale[1] << 16);
      KAKEYA_UNROLL
      for (int i = 0; i < S::kTiles; ++i) {
        float x[4] = {0, 0, 0, 0};
        mma_k8(x, e[2 * i], e[2 * i + 1], b);
        KAKEYA_UNROLL
        for (int k = 0; k < 4; ++k) acc[n][i][k] = fmaf(x[k], undo[2 * i + k / 2], acc[n][i][k]);
      }
    }
  }

  // ---- open blocks -------------------------------------------------------------------------------------------------------

  // Rows of one stream of an open block, for one head.
  KAKEYA_D const uint16_t *open_rows(int slot, int stream, int head) const {
    return static_cast<const uint16_t *>(p.open_blocks) +
           ((int64_t(slot) * 2 + stream) * p.num_kv_heads + head) * (kBlock * D);
  }

  // Attention over an open block's tokens below the sequence's end; row (i, head) sees tokens up to history + i.
  KAKEYA_D void open_block(const AttendCursor &c, int index) {
    const int len = p.seq_lens[c.sequence], tokens = min(len - index * kBlock, kBlock);
    const int history = len - (p.query_start[c.sequence + 1] - p.query_start[c.sequence]);
    const int block = p.block_table[c.sequence * p.block_table_stride + index];
    const int slot = p.open_slot[block];
    const uint16_t *k = open_rows(slot, 0, c.head), *v = open_rows(slot, 1, c.head);
    float acc[NB][4][4];
    KAKEYA_UNROLL
    for (int n = 0; n < NB; ++n)
      KAKEYA_UNROLL
      for (int m = 0; m < 4; ++m) acc[n][m][0] = acc[n][m][1] = acc[n][m][2] = acc[n][m][3] = 0.0f;
    uint32_t q[NB][kRegs];
    KAKEYA_UNROLL
    for (int n = 0; n < NB; ++n) load_regs(q[n], shared + M::kRawQuery + n * kTileBytes, unit, lane);
    KAKEYA_UNROLL
    for (int m = 0; m < 4; ++m) {
      const int token = 64 * half + 16 * m + g;
      uint32_t a[S::kTiles][4];
      KAKEYA_UNROLL
      for (int i = 0; i < S::kTiles; ++i)
        KAKEYA_UNROLL
        for (int r = 0; r < 4; ++r) {
          const int row = token + 8 * (r & 1), channel = unit * S::kUnitChannels + 16 * i + 8 * (r >> 1) + 2 * t4;
          a[i][r] = row < tokens ? *reinterpret_cast<const uint32_t *>(k + row * D + channel) : 0u;
        }
      KAKEYA_UNROLL
      for (int n = 0; n < NB; ++n)
        KAKEYA_UNROLL
        for (int i = 0; i < S::kTiles; ++i)
          mma_element(is_f16(), acc[n][m], a[i][0], a[i][1], a[i][2], a[i][3], q[n][2 * i], q[n][2 * i + 1]);
    }
    store_scores(acc);
    __syncthreads();
    float s[kScores];
    gather_scores(s, p.scale * 1.4426950408889634f);
    KAKEYA_UNROLL
    for (int i = 0; i < kScores; ++i)
      if (index * kBlock + my_token() > history + (chunk_row + my_row(i)) / p.group || my_token() >= tokens)
        s[i] = -INFINITY;
    softmax<true>(s);
    // Values: row g of a tile is channel 2g, row g + 8 channel 2g + 1, so that a lane loads pairs of channels.
    const int vu = S::kUnits - 1 - unit;
    KAKEYA_UNROLL
    for (int n = 0; n < R::kMeanTiles; ++n) {
      uint32_t b[8];
      load_probs(b, n);
      float total[4] = {0, 0, 0, 0};
      const uint32_t ones = is_f16() ? 0x3c003c00u : 0x3f803f80u;
      KAKEYA_UNROLL
      for (int m = 0; m < 4; ++m) mma_element(is_f16(), total, ones, ones, ones, ones, b[2 * m], b[2 * m + 1]);
      sum[n % NB][0] += total[0];
      sum[n % NB][1] += total[1];
      KAKEYA_UNROLL
      for (int m = 0; m < 4; ++m) {
        const int token = 64 * half + 16 * m + 2 * t4;
        KAKEYA_UNROLL
        for (int i = 0; i < S::kTiles; ++i) {
          const uint16_t *at = v + vu * S::kUnitChannels + 16 * i + 2 * g;
          uint32_t x[4];
          KAKEYA_UNROLL
          for (int r = 0; r < 4; ++r) {
            const int row = token + (r & 1) + 8 * (r >> 1);
            x[r] = row < tokens ? *reinterpret_cast<const uint32_t *>(at + row * D) : 0u;
          }
          mma_element(is_f16(), raw[n % NB][i], __byte_perm(x[0], x[1], 0x5410), __byte_perm(x[0], x[1], 0x7632),
                      __byte_perm(x[2], x[3], 0x5410), __byte_perm(x[2], x[3], 0x7632), b[2 * m], b[2 * m + 1]);
        }
      }
    }
    __syncthreads();  // the next block's scores and probabilities may be written
  }

  // ---- results -----------------------------------------------------------------------------------------------------------

  static constexpr int kRecord = ROWS * (D + 2);

  // Adds this warp's columns of `x` to shared rows f32 [ROWS][D]; channel(i, r) of tile i, row half r.
  template <typename F>
  KAKEYA_D void add_rows(uint32_t rows, const float (&x)[NB][S::kTiles][4], bool first, F channel) const {
    KAKEYA_UNROLL
    for (int n = 0; n < NB; ++n)
      KAKEYA_UNROLL
      for (int i = 0; i < S::kTiles; ++i)
        KAKEYA_UNROLL
        for (int k = 0; k < 4; ++k) {
          float y = x[n][i][k];
          int row = 8 * n + 2 * t4 + (k & 1);
          if constexpr (R::kSplit) {
            y += __shfl_xor_sync(~0u, y, 2);  // columns c and c + 4
            if (t4 >= 2) continue;
          }
          const uint32_t a = rows + (row * D + channel(i, k / 2)) * 4;
          sts_f32(a, first ? y : y + lds_f32(a));
        }
  }

  // Writes the segment's result: to `out` if it is all of the item, else to the workspace, where the last block to
  // arrive merges the parts.
  KAKEYA_D void flush(const AttendCursor &c, bool whole, int64_t item_begin, int64_t item_end) {
    const uint32_t coded = shared + M::kScores, plain = coded + ROWS * D * 4, stats = plain + ROWS * D * 4;
    const int vu = S::kUnits - 1 - unit;
    const uint16_t *order = head_view(t, p.layer, p.first_head + c.head).v.order;
    __syncthreads();
    for (int h = 0; h < 2; ++h) {
      if (half == h) {
        add_rows(coded, out, h == 0,
                 [&](int i, int r) { return int(order[vu * S::kUnitChannels + 16 * i + 8 * r + g]); });
        add_rows(plain, raw, h == 0, [&](int i, int r) { return vu * S::kUnitChannels + 16 * i + 2 * g + r; });
        if (unit == 0) {
          KAKEYA_UNROLL
          for (int n = 0; n < NB; ++n)
            KAKEYA_UNROLL
            for (int e = 0; e < 2; ++e) {
              float y = sum[n][e];
              if constexpr (R::kSplit) y += __shfl_xor_sync(~0u, y, 2);
              const int row = 8 * n + 2 * t4 + e;
              if (g == 0 && row < ROWS) {
                const uint32_t a = stats + row * 8;
                sts_f32(a, column_peak[n][e]);
                sts_f32(a + 4, h == 0 ? y : y + lds_f32(a + 4));
              }
            }
        }
      }
      __syncthreads();
    }
    const int rows = min(rows_of(c.sequence) - chunk_row, ROWS);
    const int item = c.sequence * p.num_kv_heads + c.head;
    const int64_t blocks = gridDim.x, records = blocks + int64_t(p.num_seqs) * p.num_kv_heads;
    float *record = p.workspace + (blockIdx.y * records + blockIdx.x + item) * kRecord;
    constexpr int kLane = D / 32;  // channels of a lane
    for (int row = warp; row < rows; row += S::kWarps) {
      // Back from Hadamard space: butterflies inside the lane, then across lanes.
      float x[kLane];
      KAKEYA_UNROLL
      for (int i = 0; i < kLane; ++i) x[i] = lds_f32(coded + (row * D + kLane * lane + i) * 4);
      KAKEYA_UNROLL
      for (int k = 1; k < kLane; k *= 2)
        KAKEYA_UNROLL
        for (int i = 0; i < kLane; ++i)
          if (!(i & k)) {
            const float a = x[i], b = x[i + k];
            x[i] = a + b;
            x[i + k] = a - b;
          }
      KAKEYA_UNROLL
      for (int k = 1; k < 32; k *= 2)
        KAKEYA_UNROLL
        for (int i = 0; i < kLane; ++i) {
          const float y = __shfl_xor_sync(~0u, x[i], k);
          x[i] = lane & k ? y - x[i] : x[i] + y;
        }
      constexpr float root = D == 64 ? 0.125f : D == 128 ? 0.088388347648f : 0.0625f;
      KAKEYA_UNROLL
      for (int i = 0; i < kLane; ++i) x[i] = x[i] * root + lds_f32(plain + (row * D + kLane * lane + i) * 4);
      const float maximum = lds_f32(stats + row * 8), total = lds_f32(stats + row * 8 + 4);
      if (whole) {
        write_row(c, row, x, 1.0f / total);
      } else {
        KAKEYA_UNROLL
        for (int i = 0; i < kLane; ++i) record[row * D + kLane * lane + i] = x[i];
        if (lane == 0) record[ROWS * D + 2 * row] = maximum, record[ROWS * D + 2 * row + 1] = total;
      }
    }
    if (!whole) merge(c, item, rows, records, item_begin, item_end);
    __syncthreads();
  }

  KAKEYA_D void write_row(const AttendCursor &c, int row, const float (&x)[D / 32], float factor) const {
    const int r = chunk_row + row;
    uint16_t *at = static_cast<uint16_t *>(p.out) +
                   int64_t(p.query_start[c.sequence] + r / p.group) * p.out_token_stride +
                   int64_t(c.head * p.group + r % p.group) * p.out_head_stride + (D / 32) * lane;
    KAKEYA_UNROLL
    for (int i = 0; i < D / 32; i += 2)
      *reinterpret_cast<uint32_t *>(at + i) = is_f16() ? pack_half(x[i] * factor, x[i + 1] * factor)
                                                       : pack_bf16(x[i] * factor, x[i + 1] * factor);
  }

  // Counts this block in; the last of an item's blocks adds up all parts.
  KAKEYA_D void merge(const AttendCursor &c, int item, int rows, int64_t records, int64_t item_begin, int64_t item_end) {
    const int64_t blocks = gridDim.x, total = total_units();
    // The blocks whose ranges hold the item's first and last unit.
    const int first = int(((item_begin + 1) * blocks - 1) / total), last = int((item_end * blocks - 1) / total);
    __threadfence();
    __syncthreads();
    const uint32_t flag = shared + M::kFlag;
    int *counter = p.counters + (int64_t(blockIdx.y) * p.num_seqs * p.num_kv_heads + item);
    if (thread == 0) {
      const int arrived = atomicAdd(counter, 1);
      const bool done = arrived == last - first;
      if (done) *counter = 0;
      sts_u32(flag, done);
    }
    __syncthreads();
    if (!lds_u32(flag)) return;
    __threadfence();
    const float *base = p.workspace + (blockIdx.y * records + item) * kRecord;
    constexpr int kLane = D / 32;
    for (int row = warp; row < rows; row += S::kWarps) {
      float maximum = kNoScore;
      for (int b = first + lane; b <= last; b += 32) maximum = fmaxf(maximum, __ldcg(base + int64_t(b) * kRecord + ROWS * D + 2 * row));
      KAKEYA_UNROLL
      for (int k = 1; k < 32; k *= 2) maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, k));
      float x[kLane], sum = 0.0f;
      KAKEYA_UNROLL
      for (int i = 0; i < kLane; ++i) x[i] = 0.0f;
#pragma unroll 4
      for (int b = first; b <= last; ++b) {
        const float *r = base + int64_t(b) * kRecord;
        const float w = exp2_fast(__ldcg(r + ROWS * D + 2 * row) - maximum);
        sum += w * __ldcg(r + ROWS * D + 2 * row + 1);
        KAKEYA_UNROLL
        for (int i = 0; i < kLane; ++i) x[i] += w * __ldcg(r + row * D + kLane * lane + i);
      }
      write_row(c, row, x, 1.0f / sum);
    }
  }

  KAKEYA_D int64_t total_units() const {
    return int64_t(cumulative[p.num_seqs]) * p.num_kv_heads;
  }

  // ---- all of it ---------------------------------------------------------------------------------------------------------

  KAKEYA_D void run() {
    const int64_t total = total_units();
    begin = total * blockIdx.x / gridDim.x;
    end = total * (blockIdx.x + 1) / gridDim.x;
    if (begin == end) return;
    for (int i = thread; i < int(t.scale_codes); i += S::kThreads)
      sts_f32(shared + M::kFactors + 4 * i, t.at<float>(t.factors)[i]);
#if KAKEYA_BULK
    if (thread == 0) {
      for (uint32_t i = 0; i < stages; ++i) barrier_init(shared + M::kBarriers + 8 * i, 1);
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    fetched = 0;
    if (thread == 0) {
      fetch_seek(begin);
      for (uint32_t i = 0; i + 1 < stages; ++i) fetch_page_now();
    }
#else
    fetched = 0;
    fetch_seek(begin);
    for (uint32_t i = 0; i + 1 < stages; ++i) fetch_page_now();
#endif
    load_table();
    uint32_t page = 0;  // sealed pages so far
    for (int64_t at = begin; at < end;) {
      const AttendCursor c = seek(at);
      const int count = int(min(end - at, int64_t(c.units - c.unit)));
      if (rows_of(c.sequence) > chunk_row) page = segment(c, count, page, at);
      at += count;
    }
  }

  KAKEYA_D void load_table() {
    KAKEYA_UNROLL
    for (int m = 0; m < 4; ++m)
      KAKEYA_UNROLL
      for (int i = 0; i < S::kUnitPairs / 8; ++i)
        KAKEYA_UNROLL
        for (int r = 0; r < 4; ++r) {
          const int token = 64 * half + 16 * m + g + 8 * (r & 1);
          // 16 pairs: tile 0 cosines, tile 1 sines. 8 pairs: one tile, cosines and then sines.
          const bool sine = S::kTiles == 2 ? i == 1 : r >= 2;
          const int f = unit * S::kUnitPairs + (S::kTiles == 2 ? 8 * (r >> 1) : 0) + 2 * t4;
          table[m][i][r] = pack_half(offset_turn(token, f, sine) * kTableScale, offset_turn(token, f + 1, sine) * kTableScale);
        }
  }
  KAKEYA_D float offset_turn(int token, int f, bool sine) const {
    if (f >= pairs) return sine ? 0.0f : 1.0f;
    return t.at<float>(sine ? t.offset_sin : t.offset_cos)[token * pairs + f];
  }

  // Units [c.unit, c.unit + count) of one item; returns the number of sealed pages so far.
  KAKEYA_D uint32_t segment(const AttendCursor &c, int count, uint32_t page, int64_t at) {
    begin_segment(c);
    const int pages = max(0, min(c.unit + count, c.pages) - c.unit);
    if (pages) {
      load_turn(c.unit);
      await_page(page);
#if !KAKEYA_BULK
      __syncthreads();
#endif
      prepare(stage_at(page % stages), 0);
    }
    if (c.unit + count > c.pages) prepare_raw(c);
    __syncthreads();
    for (int i = 0; i < pages; ++i, ++page) {
      const uint32_t here = stage_at(page % stages), buffer = i & 1;
      scores(here, buffer);
      const bool more = i + 1 < pages;
      if (more) load_turn(c.unit + i + 1);
#if !KAKEYA_BULK
      if (more) await_page(page + 1);
#endif
      __syncthreads();
      // All warps are done with the page before: its stage takes the next transfer.
#if KAKEYA_BULK
      if (thread == 0) fetch_page_now();
#else
      fetch_page_now();
#endif
      float s[kScores];
      gather_scores(s, kScoreUnit);
      if (more) {
#if KAKEYA_BULK
        await_page(page + 1);
#endif
        prepare(stage_at((page + 1) % stages), buffer ^ 1);
      }
      softmax<false>(s);
      values(here, buffer);
    }
    KAKEYA_UNROLL
    for (int n = 0; n < NB; ++n)
      KAKEYA_UNROLL
      for (int k = 0; k < S::kTiles; ++k)
        KAKEYA_UNROLL
        for (int e = 0; e < 4; ++e) raw[n][k][e] = 0.0f;
    for (int u = max(c.unit, c.pages); u < c.unit + count; ++u) {
      __syncthreads();
      open_block(c, u);
    }
    const int64_t item_begin = at - c.unit;
    flush(c, count == c.units, item_begin, item_begin + c.units);
    return page;
  }
};

#endif  // __CUDACC__

}  // namespace kakeya
