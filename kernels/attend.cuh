// Decode attention over sealed pages and open blocks: up to 16 query rows of a KV head in one pass.
//
// A thread block walks a range of (sequence, KV head, block) units, all ranges equally long; warps split a page by unit
// of channels and half of its tokens. A round, two pages (one with more than four rows), goes through three phases
// between two barriers:
//
//   scores   warp (u, h): the codes of K unit u for tokens 64h .. 64h + 63, 4 matrix products of 16 tokens each, plus
//            its share of the mean's product with the table of in-block offsets; partial scores to shared memory
//   softmax  every warp sums the units' partial scores of its own tokens and takes exponentials against a maximum that
//            all warps share; a score that exceeds it by more than kSlack is rare and makes all of them start again
//            with a new maximum. Meanwhile the next round's queries are prepared: turned to its block's centre,
//            multiplied by its block scales, and its products with the block means
//   values   warp (u, h): V unit kUnits - 1 - u for the same half of tokens
//
// The unit of a warp has one width for as long as the head stays, so the loop over codes branches once a round and no
// list of widths has to be known at compile time. Codes are never rotated or scaled: block scales ride in the query and
// in the page's own accumulators.
//
// Columns of a matrix product are query rows. Products with the means are split in two, what fp16 holds and what it
// left over, because means reach 358. With up to four rows columns 2r and 2r + 1 hold the two, and one thread both
// sums.
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
  static constexpr bool kSplit = ROWS == 4;                   // odd columns carry low parts
  static constexpr int kColumns = kSplit ? 1 : 2;             // rows of a thread's two columns
  static constexpr int kScoreColumns = kSplit ? 4 : 8;        // rows of a token's scores in shared memory
  static constexpr int kTiles = ROWS == 16 ? 2 : 1;           // 8-column tiles of the products with codes
  static constexpr int kMeanTiles = kSplit ? 1 : 2 * kTiles;  // high parts, then low parts
  static constexpr int kPerThread = ROWS / 4;                 // rows that a thread prepares
  static constexpr int kRound = kSplit ? 2 : 1;               // pages between two barriers; more rows need more memory
};

// Shared memory, bytes from its start.
template <int D, int ROWS>
struct AttendShared {
  using S = AttendShape<D>;
  using R = AttendRows<ROWS>;
  static constexpr int kScores = 0;  // kRound x f32 [tile][unit][128][kScoreColumns]
  static constexpr int kScoreBytes = R::kTiles * S::kUnits * kBlock * R::kScoreColumns * 4;
  static constexpr int kQuery = kScores + R::kRound * kScoreBytes;  // kRound x f16 [tile][unit][lane][..]
  static constexpr int kQueryBytes = R::kTiles * D * 8 * 2;
  static constexpr int kMean = kQuery + R::kRound * kQueryBytes;  // kRound x f16 [tile][unit][lane][..]
  static constexpr int kMeanBytes = R::kMeanTiles * D * 8 * 2;
  static constexpr int kProb = kMean + R::kRound * kMeanBytes;  // kRound x f16 [tile][128][8]
  static constexpr int kTileProbBytes = kBlock * 8 * 2;
  static constexpr int kProbBytes = R::kMeanTiles * kTileProbBytes;
  static constexpr int kValue = kProb + R::kRound * kProbBytes;    // 2 kRound x {scale, offset} f32 [D], code order
  static constexpr int kFactors = kValue + 2 * R::kRound * D * 8;  // f32 [256]
  static constexpr int kMax = kFactors + 256 * 4;                  // f32 [warp][16]
  static constexpr int kRawQuery = kQuery;  // element [tile][unit][lane][..]: open blocks come after the pages
  static constexpr int kBarriers = kMax + S::kWarps * 16 * 4;  // u64 [16]
  static constexpr int kFlag = kBarriers + 128;
  static constexpr int kFetch = kFlag + 16;  // AttendFetch
  // Stages: a page, then the cosines and sines of the turn to its centre.
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
KAKEYA_D void sts_u64(uint32_t a, uint32_t x, uint32_t y) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(a), "r"(x), "r"(y) : "memory");
}
KAKEYA_D void sts_f32(uint32_t a, float x) {
  sts_u32(a, __float_as_uint(x));
}
KAKEYA_D void sts_f32x2(uint32_t a, float x, float y) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(a), "f"(x), "f"(y) : "memory");
}

KAKEYA_D void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
KAKEYA_D void mma_k8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(b0));
}
// Product in the elements' own type.
KAKEYA_D void mma_element(bool f16, float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                          uint32_t b1) {
  if (f16) return mma(c, a0, a1, a2, a3, b0, b1);
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
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
// The same value, of which the compiler knows nothing: it keeps it instead of computing it again and again.
KAKEYA_D uint32_t opaque(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}
// Lane of this thread; volatile, so that the compiler keeps it instead of computing it again and again.
KAKEYA_D int lane_index() {
  uint32_t x;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(x));
  return int(x);
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
KAKEYA_D void barrier_expect(uint32_t bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
// `once`: the source is read once and should not push other data out of L2.
KAKEYA_D void bulk_load(uint32_t dst, const void *src, uint32_t bytes, uint32_t bar, bool once) {
  if (!once) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(dst),
                 "l"(src), "r"(bytes), "r"(bar)
                 : "memory");
    return;
  }
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
          "r"(dst),
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

// What a lane reads of a unit. `path` is the trellis's path word and, above it, the one of the chain's unit before.
struct UnitWords {
  LaneWords w;
  uint32_t path;
};

// The codes of a lane's unit as half2 registers f[class][m]. Uniform: fp16 subnormals code * 2^(bit - 24). Others:
// points of the alphabet, unit variance.
template <int Q, int W, bool NARROW>
struct Dequant {
  // `unit`: shared address. `back`: how far before it the path of the chain's unit before lies; 0: the chain's start.
  static KAKEYA_D UnitWords load(uint32_t unit, uint32_t back, int lane) {
    UnitWords x;
    if constexpr (Q == kTrellis) {
      x.path = lds_u16(unit + 2 * lane);
      if (back) x.path |= lds_u16(unit - back + 2 * lane) << 16;
      x.w = {0, 0, 0};
      if constexpr (W > 1) x.w = lane_words<(W > 1 ? W - 1 : 1)>(unit + 64, lane);
    } else {
      x.path = 0;
      x.w = lane_words<W>(unit, lane);
    }
    return x;
  }

  // `alpha`, `beta`: half2 constants of the width's alphabet.
  static KAKEYA_D void run(uint32_t (&f)[4][2], const UnitWords &x, uint32_t alpha, uint32_t beta) {
    const LaneWords &w = x.w;
    if constexpr (Q == kUniform) {
      f[0][0] = code_field<W, 0, 0, NARROW>(w);
      f[0][1] = code_field<W, 1, 0, NARROW>(w);
      f[1][0] = code_field<W, 0, 1, NARROW>(w);
      f[1][1] = code_field<W, 1, 1, NARROW>(w);
      f[2][0] = code_field<W, 0, 2, NARROW>(w);
      f[2][1] = code_field<W, 1, 2, NARROW>(w);
      f[3][0] = code_field<W, 0, 3, NARROW>(w);
      f[3][1] = code_field<W, 1, 3, NARROW>(w);
    } else if constexpr (Q == kCubic) {
      cubic<0, 0>(f, w, alpha, beta);
      cubic<0, 1>(f, w, alpha, beta);
      cubic<1, 0>(f, w, alpha, beta);
      cubic<1, 1>(f, w, alpha, beta);
      cubic<2, 0>(f, w, alpha, beta);
      cubic<2, 1>(f, w, alpha, beta);
      cubic<3, 0>(f, w, alpha, beta);
      cubic<3, 1>(f, w, alpha, beta);
    } else {
      const uint32_t window = trellis_window(x.path & 0xffffu, x.path >> 29);
      const uint32_t z1 = spread_bytes(trellis_z1(window)), z0 = spread_bytes(trellis_z0(window));
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

  // Symbol m of S bits, standing at bit BIT of the mantissa of halves that begin at 1024, to its point: y (alpha + beta
  // y^2), y = (m + 1/2) 2^(1-S) - 1. y is exact in fp16. From bit 1 on one product gets there; at bit 0 the constant
  // would need 12 bits, so 1024 goes first.
  template <int S, int BIT>
  static KAKEYA_D uint32_t point(uint32_t h, uint32_t alpha, uint32_t beta) {
    uint32_t y;
    if constexpr (BIT > 0) {
      constexpr int offset = -((1 << (11 - BIT)) + (1 << S) - 1);
      y = half_fma(h, both(half_constant(1, 1 - S - BIT)), both(half_constant(offset, -S)));
    } else {
      const uint32_t m = half_add(h, both(half_constant(-1024, 0)));
      y = half_fma(m, both(half_constant(1, 1 - S)), both(half_constant(1 - (1 << S), -S)));
    }
    return half_mul(y, half_fma(half_mul(y, y), beta, alpha));
  }
  template <int C, int M>
  static KAKEYA_D void cubic(uint32_t (&f)[4][2], const LaneWords &w, uint32_t alpha, uint32_t beta) {
    f[C][M] = point<W, field_bit<W, M, C>()>(field<W, M, C>(w) | 0x64006400u, alpha, beta);
  }
  template <int SHIFT>
  static KAKEYA_D uint32_t shifted(uint32_t x) {
    if constexpr (SHIFT > 0) return x << SHIFT;
    if constexpr (SHIFT < 0) return x >> -SHIFT;
    return x;
  }
  // The symbol is put together where its refinement stands, or from bit 1 on: z0, z1, refinement.
  template <int C, int M>
  static KAKEYA_D void trellis(uint32_t (&f)[4][2], const LaneWords &w, uint32_t z1, uint32_t z0, uint32_t alpha,
                               uint32_t beta) {
    constexpr int V = W > 1 ? W - 1 : 1, n = 4 * M + C;
    constexpr int stands = W > 1 ? field_bit<V, M, C>() : 3;
    constexpr int bit = stands >= 3 ? stands - 2 : 1;
    uint32_t h = 0x64006400u;
    if constexpr (W > 1) h |= shifted<bit + 2 - stands>(field<V, M, C>(w));
    h |= shifted<bit - n>(z0) & both(1u << bit);
    h |= shifted<bit + 1 - n>(z1) & both(2u << bit);
    f[C][M] = point<W + 1, bit>(h, alpha, beta);
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

// State of the transfers: the next sealed page, and where it goes.
struct AttendFetch {
  AttendCursor cursor;
  int stage;
  int left;  // pages of the cursor's item in this block's range, the next one included
  int at;
  int more;                // 0: nothing is left
  const float *cos, *sin;  // of the turns to the blocks' centres
};

template <int D, int Q, int ROWS>
struct Attend {
  using S = AttendShape<D>;
  using R = AttendRows<ROWS>;
  using M = AttendShared<D, ROWS>;
  static constexpr bool kNarrow = S::kUnitChannels == 16;
  static constexpr int NB = R::kTiles, NC = R::kColumns;
  static constexpr int kRegs = 2 * S::kTiles;                            // query registers of a lane, unit and tile
  static constexpr int kSums = kBlock * R::kScoreColumns / S::kThreads;  // rows of a tile whose scores a thread sums
  static constexpr int kScores = kSums * NB;                             // probabilities of a thread
  static constexpr int kTokenLanes = R::kScoreColumns / kSums;           // lanes that share a token
  // Uniform scores come out 2^-20 too small: codes are subnormals c 2^(bit - 24), queries carry 2^(4 - bit).
  static constexpr float kScoreUnit = Q == kUniform ? 1048576.0f : 1.0f;
  // The table of offsets is scaled to that: 2^-13 keeps its values exact, the coefficients take the other 2^-7.
  static constexpr float kTableScale = Q == kUniform ? 1.0f / 8192.0f : 1.0f;
  static constexpr int kRound = R::kRound;
  static constexpr float kMeanScale = Q == kUniform ? 1.0f / 128.0f : 1.0f;
  static constexpr uint32_t kTileBytes = D * 8 * 2;
  // Registers of query and mean: from a row's high part to its low part, flip these bits of the address.
  static constexpr uint32_t kLowFlip = R::kSplit ? 4 * kRegs * 4 : 0;

  const AttendParams &p;
  const Tables &t;
  const int thread, lane, warp, g, t4, unit, half;
  const uint32_t shared;
  const int *cumulative;
  int begin, end;
  const int chunk_row;
  const uint32_t page_bytes;
  const int stages, pairs;
  const bool calibrated;
  const uint32_t stage_bytes, turn_bytes;
  const uint32_t my_regs;  // byte of this lane's registers of its warp's unit
#if KAKEYA_BULK
  AttendFetch &fetch;  // thread 0 alone reads and writes it: shared memory costs the others no registers
#else
  AttendFetch fetch;
#endif

  int fetch_block;  // of the next sealed page

  // Values of a segment: one head of one sequence.
  int k_width, v_width;
  uint32_t k_unit, v_unit, k_stride, v_stride;  // offsets in a page, bytes from group to group
  uint32_t k_back, v_back;                      // trellis: how far back the path of the unit before lies
  uint32_t k_alpha, k_beta, v_alpha, v_beta;
  float k_undo, v_undo;  // from units of codes to deviations
  uint32_t side, slots, num_slots;
  float stat_mean, stat_step, stat_scale, stat_zero;
  int stat_index;
  uint32_t query_at, other_at;  // (a, b), (mean, value): two places each
  float qa[R::kPerThread], qb[R::kPerThread];
  uint32_t k_slot, v_slot;  // this lane's slot bytes in a page; of two slots, 16 bits each

  uint32_t table[4][S::kTiles][4];

  float out[NB][S::kTiles][2][NC];
  float raw[NB][S::kTiles][4];
  float sum[NB][NC];    // of probabilities, this thread's rows
  float peak[kScores];  // shared maximum of each of this thread's probabilities' rows
  float column_peak[NB][NC];

  KAKEYA_D Attend(const AttendParams &p, uint8_t *memory, uint32_t stages, int lane)
      : p(p),
        t(*p.tables),
        thread(int(threadIdx.x)),
        lane(lane),
        warp(__shfl_sync(~0u, thread >> 5, 0)),  // the same for all lanes, and the compiler may know
        g(lane >> 2),
        t4(lane & 3),
        unit(warp % S::kUnits),
        half(warp / S::kUnits),
        shared(shared_address(memory)),
        cumulative(p.plan + plan_cumulative(p.max_tasks)),
        chunk_row(int(blockIdx.y) * ROWS),
        page_bytes(t.page_bytes),
        stages(int(stages)),
        pairs(int(t.pairs)),
        calibrated(t.calibrated != 0),
        stage_bytes(page_bytes + 8 * t.pairs),
        turn_bytes(4 * t.pairs),
        my_regs(opaque((unit * 32 + register_slot(g, t4)) * kRegs * 4))
#if KAKEYA_BULK
        ,
        fetch(*reinterpret_cast<AttendFetch *>(memory + M::kFetch))
#endif
  {
  }

  // ---- work list
  // -----------------------------------------------------------------------------------------------------

  KAKEYA_D int rows_of(int sequence) const { return (p.query_start[sequence + 1] - p.query_start[sequence]) * p.group; }
  KAKEYA_D int pages_of(int sequence) const {
    return (p.seq_lens[sequence] - (p.query_start[sequence + 1] - p.query_start[sequence])) / kBlock;
  }

  // The unit at place `at` of the list.
  KAKEYA_D AttendCursor seek(int at) const {
    int lo = 0, hi = p.num_seqs - 1;  // last sequence that begins at or before `at`
    while (lo < hi) {
      const int mid = (lo + hi + 1) / 2;
      if (cumulative[mid] * p.num_kv_heads <= at)
        lo = mid;
      else
        hi = mid - 1;
    }
    AttendCursor c;
    c.sequence = lo;
    c.units = cumulative[lo + 1] - cumulative[lo];
    const int local = at - cumulative[lo] * p.num_kv_heads;
    c.head = c.units ? local / c.units : 0;
    c.unit = local - c.head * c.units;
    c.pages = pages_of(lo);
    return c;
  }

  // The first unit of the item after c's; there must be one.
  KAKEYA_D AttendCursor following(AttendCursor c) const {
    c.unit = 0;
    if (++c.head == p.num_kv_heads) {
      c.head = 0;
      do {
        ++c.sequence;
        c.units = cumulative[c.sequence + 1] - cumulative[c.sequence];
      } while (c.units == 0);
      c.pages = pages_of(c.sequence);
    }
    return c;
  }

  // ---- transfers
  // -----------------------------------------------------------------------------------------------------

  KAKEYA_D void fetch_begin() {
    fetch.stage = 0;
    fetch.cos = t.at<float>(t.centre_cos);
    fetch.sin = t.at<float>(t.centre_sin);
    fetch.at = begin;
    fetch.cursor = seek(begin);
    fetch_item();
  }
  // Goes to the next sealed page of this block's range, from the cursor's own item on; fetch.at is the cursor's place.
  KAKEYA_D void fetch_item() {
    while (fetch.at < end) {
      const AttendCursor &c = fetch.cursor;
      fetch.left = min(end - fetch.at, c.pages - c.unit);
      if (fetch.left > 0 && rows_of(c.sequence) > chunk_row) {
        fetch.more = 1;
        return fetch_look_up();
      }
      fetch.at += c.units - c.unit;
      if (fetch.at < end) fetch.cursor = following(c);
    }
    fetch.more = 0;
  }
  // The block's place in the table is loaded one page ahead and met when its transfer starts: nobody waits for it.
  KAKEYA_D void fetch_look_up() {
    const AttendCursor &c = fetch.cursor;
    fetch_block = __ldg(p.block_table + c.sequence * p.block_table_stride + c.unit);
  }
  KAKEYA_D uint32_t stage_at(int stage) const { return shared + M::kStages + stage * stage_bytes; }
  // Starts the transfer of the next sealed page, if there is one. From sm_90 on thread 0 alone calls this.
  KAKEYA_D void fetch_page() {
    if (fetch.more) {
      const uint8_t *page = p.pages + fetch_block * p.page_block_stride + fetch.cursor.head * p.page_head_stride;
      const uint32_t dst = stage_at(fetch.stage);
      const float *cos = fetch.cos + fetch.cursor.unit * pairs, *sin = fetch.sin + fetch.cursor.unit * pairs;
#if KAKEYA_BULK
      const uint32_t bar = shared + M::kBarriers + 8 * fetch.stage;
      barrier_expect(bar, stage_bytes);
      bulk_load(dst, page, page_bytes, bar, true);
      if (pairs) {
        bulk_load(dst + page_bytes, cos, turn_bytes, bar, false);
        bulk_load(dst + page_bytes + turn_bytes, sin, turn_bytes, bar, false);
      }
#else
      copy_async(dst, page, page_bytes);
      copy_async(dst + page_bytes, cos, turn_bytes);
      copy_async(dst + page_bytes + turn_bytes, sin, turn_bytes);
#endif
      if (++fetch.stage == stages) fetch.stage = 0;
      ++fetch.at;
      if (--fetch.left > 0) {
        ++fetch.cursor.unit;
        fetch_look_up();
      } else {
        fetch.at += fetch.cursor.units - fetch.cursor.unit - 1;
        if (fetch.at < end) fetch.cursor = following(fetch.cursor);
        fetch_item();
      }
    }
#if !KAKEYA_BULK
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
  }
#if !KAKEYA_BULK
  KAKEYA_D void copy_async(uint32_t dst, const void *src, uint32_t bytes) const {
    for (uint32_t i = 16 * thread; i < bytes; i += 16 * S::kThreads)
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(dst + i),
                   "l"(static_cast<const uint8_t *>(src) + i)
                   : "memory");
  }
#endif
  // Waits until a page is there. Before sm_90 a barrier must follow.
  KAKEYA_D void await_page(int stage, uint32_t parity) const {
#if KAKEYA_BULK
    barrier_wait(shared + M::kBarriers + 8 * stage, parity);
#else
    // Groups complete in order; those ahead of the next round may still be under way.
    asm volatile("cp.async.wait_group 1;" ::: "memory");
#endif
  }

  // ---- a segment's own values
  // ------------------------------------------------------------------------------------------

  KAKEYA_D float grid_alpha(int width) const { return __uint_as_float(t.at<uint32_t>(t.grids)[4 * width]); }
  KAKEYA_D float grid_beta(int width) const { return __uint_as_float(t.at<uint32_t>(t.grids)[4 * width + 1]); }

  // Offset of unit u from its group's start, bytes of all of a group's units, and how far before u the last unit with
  // codes begins (0: there is none).
  KAKEYA_D void find_unit(const uint8_t *widths, int u, uint32_t &offset, uint32_t &total, uint32_t &back) const {
    offset = total = back = 0;
    for (int i = 0; i < S::kUnits; ++i) {
      if (i == u) offset = total;
      if (i < u && widths[i]) back = total + 1;
      total += 64 * widths[i];
    }
    back = back ? offset - (back - 1) : 0;
  }

  KAKEYA_D bool is_f16() const { return p.element == kF16; }
  KAKEYA_D float load_element(const void *base, int64_t at) const {
    return is_f16() ? __half2float(static_cast<const __half *>(base)[at])
                    : __bfloat162float(static_cast<const __nv_bfloat16 *>(base)[at]);
  }

  // Canonical channels of pair f: the pair's own if it rotates, else two that do not.
  KAKEYA_D int2 pair_channels(int f) const { return f < pairs ? make_int2(f, f + pairs) : make_int2(2 * f, 2 * f + 1); }

  // Where the registers of (column, t') lie among a unit's 32: plain order would put the four rows of a channel into
  // one bank when they are stored. Lanes still read 128 neighbouring bytes at a time.
  static KAKEYA_D int register_slot(int column, int t) {
    const int r = column >> 1;
    return 8 * r + 4 * ((column & 1) ^ (r >> 1 & 1)) + (t ^ (r & 3));
  }
  // Byte of (code position, column) in query registers.
  static KAKEYA_D uint32_t query_place(int position, int column) {
    const int u = position / S::kUnitChannels, i = position % S::kUnitChannels;
    return uint32_t((u * 32 + register_slot(column, (i & 7) / 2)) * kRegs * 4 + (i >> 3) * 4 + (i & 1) * 2);
  }
  // Byte of (channel pair, column) in the mean's registers: a register holds the pair's cosine and sine coefficients.
  static KAKEYA_D uint32_t mean_place(int f, int column) {
    const int u = f / S::kUnitPairs, i = f % S::kUnitPairs;
    return uint32_t((u * 32 + register_slot(column, i & 3)) * kRegs * 4 + (i >> 2) * 4);
  }
  // From row r's place to row r + 4's, where rows are columns.
  static KAKEYA_D uint32_t four_rows_on(uint32_t place) { return (place ^ 6 * kRegs * 4) + 16 * kRegs * 4; }

  KAKEYA_D void begin_segment(const AttendCursor &c) {
    const HeadView h = head_view(t, p.layer, p.first_head + c.head);
    const LayerLayout layout = t.at<LayerLayout>(t.layers)[p.layer];
    side = layout.side_offset;
    slots = layout.slots_offset;
    num_slots = layout.num_slots;
    constexpr uint32_t groups = kBlock / S::kUnitTokens;
    const int vu = value_unit();
    find_unit(h.k.widths, unit, k_unit, k_stride, k_back);
    k_width = h.k.widths[unit];
    k_unit += kHeader + half * S::kGroups * k_stride;
    const uint32_t v_start = kHeader + groups * k_stride;
    find_unit(h.v.widths, vu, v_unit, v_stride, v_back);
    v_width = h.v.widths[vu];
    v_unit += v_start + half * S::kGroups * v_stride;
    k_undo = v_undo = 1.0f;
    const uint32_t last_slot = num_slots ? num_slots - 1 : 0;
    k_slot = min(uint32_t(g), last_slot);
    v_slot = min(2u * t4, last_slot) | min(2u * t4 + 1, last_slot) << 16;
    if constexpr (Q == kUniform) {
      if (k_width) k_undo = power2(k_width - 1) / grid_alpha(k_width);
      if (v_width) v_undo = power2(v_width - 1) / grid_alpha(v_width);
    } else {
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
      // What a page's statistics can make of it: the largest factors and means there are.
      float largest_scale, largest_mean;
      if (calibrated) {
        largest_scale = fabsf(stat_scale) * t.at<float>(t.factors)[t.scale_codes - 1];
        largest_mean = fabsf(stat_mean) + 32.0f * fabsf(stat_step);
        stat_mean -= 32.0f * stat_step;
      } else {
        // A block's own statistics have no bound to speak of: 65504 would clamp ordinary queries. prepare() saturates.
        largest_scale = largest_mean = 0.0f;
      }
      const int first = lane & ~3;
      largest_scale = fmaxf(__shfl_sync(~0u, largest_scale, first), __shfl_sync(~0u, largest_scale, first + 1));
      largest_mean = fmaxf(__shfl_sync(~0u, largest_mean, first), __shfl_sync(~0u, largest_mean, first + 1));
      // |a|, |b| <= norm <= limit keeps every fp16 register finite. A query beyond it would need scores of thousands.
      const float limit = kHalfMax / fmaxf(largest_scale, 2.0f * kMeanScale * largest_mean);
      const int column = R::kSplit ? 2 * role : role;
      query_at = query_place(h.k.position[pair.x], column) | query_place(h.k.position[pair.y], column) << 16;
      other_at = mean_place(f, column) | uint32_t(position * 8) << 16;
      // The query, natural channels, in units of log2.
      const uint16_t *natural = t.at<uint16_t>(t.natural);
      const int rows = rows_of(c.sequence);
      const float scale = p.scale * 1.4426950408889634f;
#pragma unroll
      for (int e = 0; e < R::kPerThread; ++e) {
        const int row = chunk_row + role + 4 * e;
        qa[e] = qb[e] = 0.0f;
        if (row < rows) {
          const int64_t at = int64_t(p.query_start[c.sequence] + row / p.group) * p.q_token_stride +
                             int64_t(c.head * p.group + row % p.group) * p.q_head_stride;
          qa[e] = scale * load_element(p.q, at + natural[pair.x]);
          qb[e] = scale * load_element(p.q, at + natural[pair.y]);
          const float norm = fabsf(qa[e]) + fabsf(qb[e]);
          if (norm > limit) qa[e] *= limit / norm, qb[e] *= limit / norm;
        }
      }
    }
#pragma unroll
    for (int n = 0; n < NB; ++n)
#pragma unroll
      for (int e = 0; e < NC; ++e) {
        sum[n][e] = 0.0f;
        column_peak[n][e] = kNoScore;
#pragma unroll
        for (int i = 0; i < S::kTiles; ++i) out[n][i][0][e] = out[n][i][1][e] = 0.0f;
      }
#pragma unroll
    for (int e = 0; e < kScores; ++e) peak[e] = kNoScore;
    if constexpr (R::kSplit) {
      // Odd columns of the query stay zero; an open block of the segment before may have left something there.
      for (int i = thread; i < kRound * M::kQueryBytes / 4; i += S::kThreads) sts_u32(shared + M::kQuery + 4 * i, 0);
      __syncthreads();
    }
  }

  // A wide K unit goes with a narrow V unit: channels are in falling order of width.
  KAKEYA_D int value_unit() const { return S::kUnits - 1 - unit; }

  // Two values as fp16, in one register `a` or in halves of two, `a` and `b`. The first returns what fp16 left over.
  static KAKEYA_D float2 store_pair(uint32_t a, float x, float y) {
    const uint32_t h = pack_half(x, y);
    sts_u32(a, h);
    return make_float2(x - half_low(h), y - half_high(h));
  }
  static KAKEYA_D void store_two(uint32_t a, uint32_t b, float x, float y) {
    const uint32_t h = pack_half(x, y);
    sts_u16(a, h);
    sts_u16(b, h >> 16);
  }

  // Prepares the page at shared address `at`: reads its statistics, writes query and mean registers of buffer `j`, and
  // value registers of buffer `value`. Threads in fours share a channel pair of K and two channels of V; each of the
  // four also has its rows.
  template <bool CALIBRATED>
  KAKEYA_D void prepare(uint32_t at, int j, uint32_t value) {
    if (2 * D < S::kThreads && thread >= 2 * D) return;
    const uint32_t s = at + side;
    const int i = stat_index;
    float cos = 1.0f, sin = 0.0f;
    const int f = thread >> 2;
    if (2 * pairs == D || f < pairs) {
      cos = lds_f32(at + page_bytes + 4 * f);
      sin = lds_f32(at + page_bytes + turn_bytes + 4 * f);
    }
    float scale, mean;
    if constexpr (CALIBRATED) {
      const uint32_t code = lds_u8(s + (i >> 1)) >> 4 * (i & 1) & 15u;
      const uint32_t low = lds_u8(s + D + (i >> 1)) >> 4 * (i & 1) & 15u;
      const uint32_t high = lds_u8(s + 2 * D + (i >> 2)) >> 2 * (i & 3) & 3u;
      scale = lds_f32(shared + M::kFactors + 4 * code);
      mean = float(int(low | high << 4)) * stat_step;  // 32 steps less: in stat_mean
    } else {
      scale = lds_f32(shared + M::kFactors + 4 * lds_u8(s + i));
      mean = half_low(lds_u16(s + 2 * D + 2 * i));
    }
    scale *= stat_scale;
    const float base = stat_mean + mean;
    if (thread & 2) sts_f32x2(shared + M::kValue + value * (D * 8) + (other_at >> 16), scale, base + scale * stat_zero);
    const int first = lane & ~3;
    const float scale_a = __shfl_sync(~0u, scale, first), scale_b = __shfl_sync(~0u, scale, first + 1);
    const float base_a = __shfl_sync(~0u, base, first), base_b = __shfl_sync(~0u, base, first + 1);
    const uint32_t query = shared + M::kQuery + j * M::kQueryBytes;
    const uint32_t means = shared + M::kMean + j * M::kMeanBytes;
#pragma unroll
    for (int e = 0; e < R::kPerThread; ++e) {
      const float a = qa[e] * cos + qb[e] * sin, b = qb[e] * cos - qa[e] * sin;
      // Row role + 4 e stands in column (role + 4 e) % 8 of tile e / 2.
      uint32_t at_a = query_at & 0xffffu, at_b = query_at >> 16, at_m = other_at & 0xffffu;
      if (e % 2) at_a = four_rows_on(at_a), at_b = four_rows_on(at_b), at_m = four_rows_on(at_m);
      const uint32_t tile = (e / 2) * kTileBytes;
      const auto bounded = [](float x) { return CALIBRATED ? x : clamp_half(x); };
      store_two(query + tile + at_a, query + tile + at_b, bounded(a * scale_a), bounded(b * scale_b));
      // The mean turned by offset o, times the query: cos o (a m_a + b m_b) + sin o (b m_a - a m_b).
      const float2 rest = store_pair(means + tile + at_m, bounded((a * base_a + b * base_b) * kMeanScale),
                                     bounded((b * base_a - a * base_b) * kMeanScale));
      const uint32_t low = R::kSplit ? at_m ^ kLowFlip : at_m + tile + NB * kTileBytes;
      sts_u32(means + low, pack_half(rest.x, rest.y));
    }
  }

  // The raw query of a segment, element type, for open blocks.
  KAKEYA_D void prepare_raw(const AttendCursor &c) {
    const int rows = rows_of(c.sequence);
    for (int i = thread; i < NB * 8 * D; i += S::kThreads) {
      const int column = i / D, channel = i % D;
      const int row = R::kSplit ? column / 2 : column;
      uint32_t x = 0;
      if (!(R::kSplit && column % 2) && chunk_row + row < rows) {
        const int r = chunk_row + row;
        const int64_t at = int64_t(p.query_start[c.sequence] + r / p.group) * p.q_token_stride +
                           int64_t(c.head * p.group + r % p.group) * p.q_head_stride + channel;
        x = static_cast<const uint16_t *>(p.q)[at];
      }
      sts_u16(shared + M::kRawQuery + (column / 8) * kTileBytes + query_place(channel, column % 8), x);
    }
  }

  // ---- scores
  // ----------------------------------------------------------------------------------------------------------

  // This warp's unit of the registers at `base`.
  KAKEYA_D void load_regs(uint32_t (&r)[kRegs], uint32_t base) const {
    const uint32_t a = base + my_regs;
    if constexpr (kRegs == 4) {
      const uint4 x = lds_u128(a);
      r[0] = x.x, r[1] = x.y, r[2] = x.z, r[3] = x.w;
    } else {
      const uint2 x = lds_u64(a);
      r[0] = x.x, r[1] = x.y;
    }
  }

  KAKEYA_D uint32_t score_at(int j, int n, int u, int token) const {
    return shared + M::kScores + j * M::kScoreBytes + ((n * S::kUnits + u) * kBlock + token) * (R::kScoreColumns * 4);
  }

  KAKEYA_D void store_scores(int j, const float (&acc)[NB][4][4]) const {
#pragma unroll
    for (int n = 0; n < NB; ++n)
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const uint32_t a = score_at(j, n, unit, 64 * half + 16 * m + g) + (R::kSplit ? 4 : 8) * t4;
        if constexpr (R::kSplit) {
          sts_f32(a, acc[n][m][0] + acc[n][m][1]);
          sts_f32(a + 8 * 16, acc[n][m][2] + acc[n][m][3]);
        } else {
          sts_f32x2(a, acc[n][m][0], acc[n][m][1]);
          sts_f32x2(a + 8 * 32, acc[n][m][2], acc[n][m][3]);
        }
      }
  }

  // Partial scores of this warp's unit with width W.
  template <int W>
  KAKEYA_D void score_unit(int j, uint32_t page) const {
    const uint32_t used = lds_u8(page + 3);
    uint32_t q[NB][kRegs];
#pragma unroll
    for (int n = 0; n < NB; ++n) load_regs(q[n], shared + M::kQuery + j * M::kQueryBytes + n * kTileBytes);
    UnitWords words[S::kGroups];
    if constexpr (W > 0) {
#pragma unroll
      for (int i = 0; i < S::kGroups; ++i)
        words[i] = Dequant<Q, W, kNarrow>::load(page + k_unit + i * k_stride, k_back, lane);
    }
    float acc[NB][4][4];
#pragma unroll
    for (int n = 0; n < NB; ++n) {
      float zero[4] = {0, 0, 0, 0};
      if constexpr (Q == kUniform && W > 0) {
        // The codes' zero point, (2^W - 1) / 2 of each: the same for all tokens, and where all sums begin.
#pragma unroll
        for (int i = 0; i < S::kTiles; ++i) {
          constexpr int m = (1 << W) - 1;
          const uint32_t z0 = both(half_constant(m, code_bit(W, 2 * i, kNarrow) - 5));
          const uint32_t z1 = both(half_constant(m, code_bit(W, 2 * i + 1, kNarrow) - 5));
          mma(zero, z0, z0, z1, z1, q[n][2 * i], q[n][2 * i + 1]);
        }
#pragma unroll
        for (int k = 0; k < 4; ++k) zero[k] *= -1.0f / kScoreUnit;
      }
#pragma unroll
      for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int k = 0; k < 4; ++k) acc[n][m][k] = zero[k];
    }
#pragma unroll
    for (int n = 0; n < R::kMeanTiles; ++n) {
      uint32_t b[kRegs];
      load_regs(b, shared + M::kMean + j * M::kMeanBytes + n * kTileBytes);
#pragma unroll
      for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int i = 0; i < S::kTiles; ++i)
          mma(acc[n % NB][m], table[m][i][0], table[m][i][1], table[m][i][2], table[m][i][3], b[2 * i], b[2 * i + 1]);
    }
    if constexpr (W > 0) {
#pragma unroll
      for (int i = 0; i < S::kGroups; ++i) {
        uint32_t f[4][2];
        Dequant<Q, W, kNarrow>::run(f, words[i], k_alpha, k_beta);
#pragma unroll
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
    store_scores(j, acc);
    if (used) score_slots<W>(j, page, q);
  }

  template <int W>
  KAKEYA_D void score_round(const uint32_t (&page)[kRound], int count) const {
#pragma unroll 1
    for (int j = 0; j < count; ++j) score_unit<W>(j, j ? page[kRound - 1] : page[0]);
  }

  KAKEYA_D void scores(const uint32_t (&page)[kRound], int count) const {
    switch (k_width) {  // the same for the whole warp and for as long as the head stays
      case 0:
        return score_round<0>(page, count);
      case 1:
        return score_round<1>(page, count);
      case 2:
        return score_round<2>(page, count);
      case 3:
        return score_round<3>(page, count);
      case 4:
        return score_round<4>(page, count);
      case 5:
        return score_round<5>(page, count);
      default:
        return score_round<6>(page, count);
    }
  }

  // Adds the exact slots' part to their tokens' partial scores. Row g of the product is slot g; what rows beyond the
  // last slot hold does not matter, their token byte says none.
  template <int W>
  KAKEYA_D void score_slots(int j, uint32_t page, const uint32_t (&q)[NB][kRegs]) const {
    const uint32_t a = page + slots + k_slot * D + unit * S::kUnitChannels;
    const uint32_t token = lds_u8(page + 8 + g);
    const float scale = half_low(lds_u16(page + slots + 2 * num_slots * D + 4 * k_slot)) *
                        (Q == kUniform ? k_undo * (1.0f / 16777216.0f) : 1.0f);
    uint32_t e[kRegs];
    if constexpr (kNarrow) {
      bytes_to_halves(lds_u32(a + 4 * t4), e[0], e[1]);
    } else {
      const uint2 w = lds_u64(a + 8 * t4);
      bytes_to_halves(w.x, e[0], e[1]);
      bytes_to_halves(w.y, e[2], e[3]);
    }
    if constexpr (Q == kUniform && W > 0) {
      // Uniform queries carry 2^(4 - bit) of their codes.
#pragma unroll
      for (int c = 0; c < kRegs; ++c)
        if (code_bit(W, c, kNarrow)) e[c] = half_mul(e[c], both(half_constant(1, code_bit(W, c, kNarrow))));
    }
    __syncwarp();  // other lanes have stored this token's partial scores
#pragma unroll
    for (int n = 0; n < NB; ++n) {
      float acc[4] = {0, 0, 0, 0};
#pragma unroll
      for (int i = 0; i < S::kTiles; ++i) mma(acc, e[2 * i], 0, e[2 * i + 1], 0, q[n][2 * i], q[n][2 * i + 1]);
      if (int(token >> 6) == half) {
        const uint32_t s = score_at(j, n, unit, int(token)) + (R::kSplit ? 4 : 8) * t4;
        if constexpr (R::kSplit) {
          sts_f32(s, lds_f32(s) + (acc[0] + acc[1]) * scale);
        } else {
          const uint2 old = lds_u64(s);
          sts_f32x2(s, __uint_as_float(old.x) + acc[0] * scale, __uint_as_float(old.y) + acc[1] * scale);
        }
      }
    }
  }

  // ---- softmax
  // -----------------------------------------------------------------------------------------------------------

  // Token of this thread, and the row of its i-th probability.
  KAKEYA_D int my_token() const { return warp * (kBlock / S::kWarps) + lane / kTokenLanes; }
  KAKEYA_D int my_row(int i) const { return i / kSums * 8 + lane % kTokenLanes * kSums + i % kSums; }

  // This thread's scores in units of log2: the sum over units.
  KAKEYA_D void gather_scores(int j, float (&s)[kScores], float unit_scale) const {
#pragma unroll
    for (int n = 0; n < NB; ++n) {
      float x[kSums];
#pragma unroll
      for (int i = 0; i < kSums; ++i) x[i] = 0.0f;
#pragma unroll
      for (int u = 0; u < S::kUnits; ++u) {
        const uint32_t a = score_at(j, n, u, my_token()) + lane % kTokenLanes * kSums * 4;
        if constexpr (kSums == 4) {
          const uint4 v = lds_u128(a);
          x[0] += __uint_as_float(v.x), x[1] += __uint_as_float(v.y);
          x[2] += __uint_as_float(v.z), x[3] += __uint_as_float(v.w);
        } else if constexpr (kSums == 2) {
          const uint2 v = lds_u64(a);
          x[0] += __uint_as_float(v.x), x[1] += __uint_as_float(v.y);
        } else {
          x[0] += lds_f32(a);
        }
      }
#pragma unroll
      for (int i = 0; i < kSums; ++i) s[n * kSums + i] = x[i] * unit_scale;
    }
  }

  KAKEYA_D uint32_t prob_at(int j, int tile, int token) const {
    return shared + M::kProb + j * M::kProbBytes + tile * M::kTileProbBytes + token * 16;
  }

  // Probabilities of a page: fp16, and zeros in the columns of low parts.
  KAKEYA_D void store_probs(int j, const float (&s)[kScores]) const {
    float e[kScores];
#pragma unroll
    for (int i = 0; i < kScores; ++i) e[i] = exp2_fast(s[i] - peak[i]);
    const uint32_t a = prob_at(j, 0, my_token());
    if constexpr (R::kSplit) {
      if constexpr (kSums == 2)
        sts_u64(a + 4 * my_row(0), pack_half(e[0], 0.0f), pack_half(e[kScores - 1], 0.0f));
      else
        sts_u32(a + 4 * my_row(0), pack_half(e[0], 0.0f));
    } else {
#pragma unroll
      for (int i = 0; i < kScores; i += 2)
        sts_u32(a + my_row(i) / 8 * M::kTileProbBytes + my_row(i) % 8 * 2, pack_half(e[i], e[i + 1]));
    }
  }

  // Probabilities of an open block: element type, high part and what is left, beside it or in tiles of its own.
  KAKEYA_D void store_raw_probs(const float (&s)[kScores]) const {
    const uint32_t a = prob_at(0, 0, my_token());
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      const float e = exp2_fast(s[i] - peak[i]);
      const int row = my_row(i);
      const uint32_t at = R::kSplit ? a + 4 * row : a + row / 8 * M::kTileProbBytes + row % 8 * 2;
      const uint32_t low = R::kSplit ? 2 : NB * M::kTileProbBytes;
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

  template <bool RAW, int N>
  KAKEYA_D void store_all_probs(const float (&s)[N][kScores], int count) const {
    if constexpr (RAW) {
      store_raw_probs(s[0]);
    } else {
#pragma unroll
      for (int j = 0; j < N; ++j)
        if (j < count) store_probs(j, s[j]);
    }
  }

  // Exponentials of the gathered scores; ends with the barrier after which probabilities may be read.
  template <bool RAW, int N>
  KAKEYA_D void softmax(const float (&s)[N][kScores], int count) {
    float top[kScores];  // N > 1: a missing page's scores are no larger than the first one's
    bool above = false;
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      top[i] = N == 1 ? s[0][i] : fmaxf(s[0][i], s[N - 1][i]);
      above |= top[i] > peak[i] + kSlack;
    }
    store_all_probs<RAW>(s, count);
    if (__syncthreads_or(above)) {
      raise_peak<RAW>(top);
      store_all_probs<RAW>(s, count);
      __syncthreads();
    }
  }

  // A new shared maximum for all rows, from this thread's largest scores; sums so far are scaled to it.
  template <bool RAW>
  KAKEYA_D void raise_peak(const float (&s)[kScores]) {
    const uint32_t maxima = shared + M::kMax;
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      float x = s[i];
#pragma unroll
      for (int k = kTokenLanes; k < 32; k *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, k));
      if (lane < kTokenLanes) sts_f32(maxima + (warp * 16 + my_row(i)) * 4, x);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kScores; ++i)
      for (int w = 0; w < S::kWarps; ++w) peak[i] = fmaxf(peak[i], lds_f32(maxima + (w * 16 + my_row(i)) * 4));
#pragma unroll
    for (int n = 0; n < NB; ++n)
#pragma unroll
      for (int e = 0; e < NC; ++e) {
        const int row = R::kSplit ? t4 : 8 * n + 2 * t4 + e;
        float x = column_peak[n][e];
        for (int w = 0; w < S::kWarps; ++w) x = fmaxf(x, lds_f32(maxima + (w * 16 + row) * 4));
        const float fade = exp2_fast(column_peak[n][e] - x);
        column_peak[n][e] = x;
        sum[n][e] *= fade;
#pragma unroll
        for (int i = 0; i < S::kTiles; ++i) {
          out[n][i][0][e] *= fade, out[n][i][1][e] *= fade;
          if constexpr (RAW) {
            raw[n][i][e] *= fade, raw[n][i][e + 2] *= fade;
            if constexpr (R::kSplit) raw[n][i][1] *= fade, raw[n][i][3] *= fade;
          }
        }
      }
  }

  // ---- values
  // ------------------------------------------------------------------------------------------------------------

  KAKEYA_D void load_probs(int j, uint32_t (&b)[8], int tile) const {
    uint32_t x[4];
    load_transposed(x, prob_at(j, tile, 64 * half + lane));
#pragma unroll
    for (int i = 0; i < 4; ++i) b[i] = x[i];
    load_transposed(x, prob_at(j, tile, 64 * half + 32 + lane));
#pragma unroll
    for (int i = 0; i < 4; ++i) b[4 + i] = x[i];
  }

  template <int W>
  KAKEYA_D void value_page(int j, uint32_t page, uint32_t buffer) {
    const uint32_t used = half == 0 ? lds_u8(page + 3) : 0u;
    UnitWords words[S::kGroups];
    if constexpr (W > 0) {
#pragma unroll
      for (int i = 0; i < S::kGroups; ++i)
        words[i] = Dequant<Q, W, kNarrow>::load(page + v_unit + i * v_stride, v_back, lane);
    }
    uint32_t b[NB][8];
    float acc[NB][S::kTiles][4], total[NB][4];
#pragma unroll
    for (int n = 0; n < NB; ++n) {
      load_probs(j, b[n], n);
#pragma unroll
      for (int e = 0; e < 4; ++e) total[n][e] = 0.0f;
#pragma unroll
      for (int i = 0; i < S::kTiles; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[n][i][e] = 0.0f;
    }
    if (used) value_slots<W>(j, acc, page);
    constexpr uint32_t ones = 0x3c003c00u;
    if constexpr (W > 0) {
#pragma unroll
      for (int i = 0; i < S::kGroups; ++i) {
        uint32_t f[4][2];
        Dequant<Q, W, kNarrow>::run(f, words[i], v_alpha, v_beta);
#pragma unroll
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
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int n = 0; n < NB; ++n) mma(total[n], ones, ones, ones, ones, b[n][2 * i], b[n][2 * i + 1]);
    const uint32_t parameters = shared + M::kValue + buffer * (D * 8) + (value_unit() * S::kUnitChannels + g) * 8;
#pragma unroll
    for (int i = 0; i < S::kTiles; ++i)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint2 x = lds_u64(parameters + (16 * i + 8 * r) * 8);
        const float scale = __uint_as_float(x.x), offset = __uint_as_float(x.y);
#pragma unroll
        for (int n = 0; n < NB; ++n)
#pragma unroll
          for (int e = 0; e < NC; ++e) {
            float &o = out[n][i][r][e];
            o = fmaf(scale, acc[n][i][2 * r + e], o);
            o = fmaf(offset, total[n][e], o);
          }
      }
#pragma unroll
    for (int n = 0; n < NB; ++n)
#pragma unroll
      for (int e = 0; e < NC; ++e) sum[n][e] += total[n][e];
  }

  template <int W>
  KAKEYA_D void value_round(const uint32_t (&page)[kRound], uint32_t buffer, int count) {
#pragma unroll 1
    for (int j = 0; j < count; ++j) value_page<W>(j, j ? page[kRound - 1] : page[0], buffer + j);
  }

  KAKEYA_D void values(const uint32_t (&page)[kRound], uint32_t buffer, int count) {
    switch (v_width) {
      case 0:
        return value_round<0>(page, buffer, count);
      case 1:
        return value_round<1>(page, buffer, count);
      case 2:
        return value_round<2>(page, buffer, count);
      case 3:
        return value_round<3>(page, buffer, count);
      case 4:
        return value_round<4>(page, buffer, count);
      case 5:
        return value_round<5>(page, buffer, count);
      default:
        return value_round<6>(page, buffer, count);
    }
  }

  // Adds the exact slots: 8 more tokens, whose probabilities are picked from the page's.
  template <int W>
  KAKEYA_D void value_slots(int j, float (&acc)[NB][S::kTiles][4], uint32_t page) const {
    uint32_t word[2], scale[2], token[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t slot = i ? v_slot >> 16 : v_slot & 0xffffu;
      const uint32_t a = page + slots + (num_slots + slot) * D + value_unit() * S::kUnitChannels;
      word[i] = (kNarrow ? lds_u16(a + 2 * g) : lds_u32(a + 4 * g)) ^ 0x80808080u;
      scale[i] = lds_u16(page + slots + 2 * num_slots * D + 4 * slot + 2);
      token[i] = lds_u8(page + 8 + 2 * t4 + i);
      if (token[i] >= kBlock) scale[i] = token[i] = 0;  // no slot
    }
    uint32_t e[2 * S::kTiles];
#pragma unroll
    for (int c = 0; c < 2 * S::kTiles; ++c) {
      const uint32_t x = __byte_perm(word[0], word[1], c | (4 + c) << 8) & 0x00ff00ffu;
      e[c] = half_add(x | 0x64006400u, both(half_constant(-1152, 0)));
    }
#pragma unroll
    for (int n = 0; n < NB; ++n) {
      const uint32_t p0 = lds_u16(prob_at(j, n, int(token[0])) + 2 * g),
                     p1 = lds_u16(prob_at(j, n, int(token[1])) + 2 * g);
      const uint32_t b = half_mul(p0 | p1 << 16, scale[0] | scale[1] << 16);
#pragma unroll
      for (int i = 0; i < S::kTiles; ++i) {
        float x[4] = {0, 0, 0, 0};
        mma_k8(x, e[2 * i], e[2 * i + 1], b);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          // The page's scale turns sums of codes into values; slots are in units of the deviation.
          const float undo = Q == kUniform && W > 0 ? v_undo * power2(code_bit(W, 2 * i + k / 2, kNarrow) - 24) : 1.0f;
          acc[n][i][k] = fmaf(x[k], undo, acc[n][i][k]);
        }
      }
    }
  }

  // ---- open blocks
  // -------------------------------------------------------------------------------------------------------

  // Rows of one stream of an open block, for one head.
  KAKEYA_D const uint16_t *open_rows(int slot, int stream, int head) const {
    return static_cast<const uint16_t *>(p.open_blocks) +
           ((int64_t(slot) * 2 + stream) * p.num_kv_heads + head) * (kBlock * D);
  }

  // Attention over an open block's tokens below the sequence's end; a row of token i sees tokens up to history + i.
  KAKEYA_D void open_block(const AttendCursor &c, int index) {
    const int len = p.seq_lens[c.sequence];
    const int history = len - (p.query_start[c.sequence + 1] - p.query_start[c.sequence]);
    const int block = p.block_table[c.sequence * p.block_table_stride + index];
    const int slot = p.open_slot[block];
    // Without a slot there is nothing to read: no token counts, and a result of nothing is not a number.
    const int tokens = slot < 0 ? 0 : min(len - index * kBlock, kBlock);
    const uint16_t *k = open_rows(slot, 0, c.head), *v = open_rows(slot, 1, c.head);
    float acc[NB][4][4];
#pragma unroll
    for (int n = 0; n < NB; ++n)
#pragma unroll
      for (int m = 0; m < 4; ++m) acc[n][m][0] = acc[n][m][1] = acc[n][m][2] = acc[n][m][3] = 0.0f;
    uint32_t q[NB][kRegs];
#pragma unroll
    for (int n = 0; n < NB; ++n) load_regs(q[n], shared + M::kRawQuery + n * kTileBytes);
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const int token = 64 * half + 16 * m + g;
      uint32_t a[S::kTiles][4];
#pragma unroll
      for (int i = 0; i < S::kTiles; ++i)
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const int row = token + 8 * (r & 1), channel = unit * S::kUnitChannels + 16 * i + 8 * (r >> 1) + 2 * t4;
          a[i][r] = row < tokens ? *reinterpret_cast<const uint32_t *>(k + row * D + channel) : 0u;
        }
#pragma unroll
      for (int n = 0; n < NB; ++n)
#pragma unroll
        for (int i = 0; i < S::kTiles; ++i)
          mma_element(is_f16(), acc[n][m], a[i][0], a[i][1], a[i][2], a[i][3], q[n][2 * i], q[n][2 * i + 1]);
    }
    store_scores(0, acc);
    __syncthreads();
    float s[1][kScores];
    gather_scores(0, s[0], p.scale * 1.4426950408889634f);
#pragma unroll
    for (int i = 0; i < kScores; ++i)
      if (index * kBlock + my_token() > history + (chunk_row + my_row(i)) / p.group || my_token() >= tokens)
        s[0][i] = -INFINITY;
    softmax<true>(s, 1);
    // Row g of a tile is channel 2g, row g + 8 channel 2g + 1, so that a lane loads pairs of channels.
#pragma unroll
    for (int n = 0; n < R::kMeanTiles; ++n) {
      uint32_t b[8];
      load_probs(0, b, n);
      float total[4] = {0, 0, 0, 0};
      const uint32_t ones = is_f16() ? 0x3c003c00u : 0x3f803f80u;
#pragma unroll
      for (int m = 0; m < 4; ++m) mma_element(is_f16(), total, ones, ones, ones, ones, b[2 * m], b[2 * m + 1]);
      if constexpr (R::kSplit) {
        sum[0][0] += total[0] + total[1];
      } else {
        sum[n % NB][0] += total[0];
        sum[n % NB][NC - 1] += total[1];
      }
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const int token = 64 * half + 16 * m + 2 * t4;
#pragma unroll
        for (int i = 0; i < S::kTiles; ++i) {
          const uint16_t *at = v + value_unit() * S::kUnitChannels + 16 * i + 2 * g;
          uint32_t x[4];
#pragma unroll
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

  // ---- results
  // -----------------------------------------------------------------------------------------------------------

  static constexpr int kRecord = ROWS * (D + 2);
  static constexpr int kLane = D / 32;  // channels of a lane

  // Writes the segment's result: to `out` if it is all of the item, else to the workspace, where the last block to
  // arrive merges the parts.
  KAKEYA_D void flush(const AttendCursor &c, bool whole, int item_begin, int item_end) {
    const uint32_t coded = shared + M::kScores, plain = coded + ROWS * D * 4, stats = plain + ROWS * D * 4;
    const uint16_t *order = head_view(t, p.layer, p.first_head + c.head).v.order + value_unit() * S::kUnitChannels;
    __syncthreads();
    for (int h = 0; h < 2; ++h) {
      if (half == h) {
#pragma unroll
        for (int n = 0; n < NB; ++n)
#pragma unroll
          for (int e = 0; e < NC; ++e) {
            const int row = R::kSplit ? t4 : 8 * n + 2 * t4 + e;
#pragma unroll
            for (int i = 0; i < S::kTiles; ++i)
#pragma unroll
              for (int r = 0; r < 2; ++r) {
                const uint32_t a = coded + (row * D + order[16 * i + 8 * r + g]) * 4;
                const uint32_t b = plain + (row * D + value_unit() * S::kUnitChannels + 16 * i + 2 * g + r) * 4;
                const float x = out[n][i][r][e];
                const float y = R::kSplit ? raw[n][i][2 * r] + raw[n][i][2 * r + 1] : raw[n][i][2 * r + e];
                sts_f32(a, h ? x + lds_f32(a) : x);
                sts_f32(b, h ? y + lds_f32(b) : y);
              }
            if (unit == 0 && g == 0) {
              const uint32_t a = stats + row * 8;
              sts_f32(a, column_peak[n][e]);
              sts_f32(a + 4, h ? sum[n][e] + lds_f32(a + 4) : sum[n][e]);
            }
          }
      }
      __syncthreads();
    }
    const int rows = min(rows_of(c.sequence) - chunk_row, ROWS);
    const int item = c.sequence * p.num_kv_heads + c.head;
    const int64_t records = gridDim.x + int64_t(p.num_seqs) * p.num_kv_heads;
    float *record = p.workspace + (blockIdx.y * records + blockIdx.x + item) * kRecord;
    for (int row = warp; row < rows; row += S::kWarps) {
      // Back from Hadamard space: butterflies inside the lane, then across lanes.
      float x[kLane];
#pragma unroll
      for (int i = 0; i < kLane; ++i) x[i] = lds_f32(coded + (row * D + kLane * lane + i) * 4);
#pragma unroll
      for (int k = 1; k < kLane; k *= 2)
#pragma unroll
        for (int i = 0; i < kLane; ++i)
          if (!(i & k)) {
            const float a = x[i], b = x[i + k];
            x[i] = a + b;
            x[i + k] = a - b;
          }
#pragma unroll
      for (int k = 1; k < 32; k *= 2)
#pragma unroll
        for (int i = 0; i < kLane; ++i) {
          const float y = __shfl_xor_sync(~0u, x[i], k);
          x[i] = lane & k ? y - x[i] : x[i] + y;
        }
      constexpr float root = D == 64 ? 0.125f : D == 128 ? 0.088388347648f : 0.0625f;
#pragma unroll
      for (int i = 0; i < kLane; ++i) x[i] = x[i] * root + lds_f32(plain + (row * D + kLane * lane + i) * 4);
      const float maximum = lds_f32(stats + row * 8), total = lds_f32(stats + row * 8 + 4);
      if (whole) {
        write_row(c, row, x, 1.0f / total);
      } else {
#pragma unroll
        for (int i = 0; i < kLane; ++i) record[row * D + kLane * lane + i] = x[i];
        if (lane == 0) record[ROWS * D + 2 * row] = maximum, record[ROWS * D + 2 * row + 1] = total;
      }
    }
    if (!whole) merge(c, item, rows, records, item_begin, item_end);
    __syncthreads();
  }

  KAKEYA_D void write_row(const AttendCursor &c, int row, const float (&x)[kLane], float factor) const {
    const int r = chunk_row + row;
    uint16_t *at = static_cast<uint16_t *>(p.out) +
                   int64_t(p.query_start[c.sequence] + r / p.group) * p.out_token_stride +
                   int64_t(c.head * p.group + r % p.group) * p.out_head_stride + kLane * lane;
#pragma unroll
    for (int i = 0; i < kLane; i += 2)
      *reinterpret_cast<uint32_t *>(at + i) =
          is_f16() ? pack_half(x[i] * factor, x[i + 1] * factor) : pack_bf16(x[i] * factor, x[i + 1] * factor);
  }

  // Counts this block in; the last of an item's blocks adds up all parts.
  KAKEYA_D void merge(const AttendCursor &c, int item, int rows, int64_t records, int item_begin, int item_end) {
    const int64_t blocks = working_blocks(), total = total_units();
    // The blocks whose ranges hold the item's first and last unit.
    const int first = int(((item_begin + 1) * blocks - 1) / total), last = int((item_end * blocks - 1) / total);
    __threadfence();
    __syncthreads();
    const uint32_t flag = shared + M::kFlag;
    if (thread == 0) {
      int *counter = p.counters + (int64_t(blockIdx.y) * p.num_seqs * p.num_kv_heads + item);
      const bool done = atomicAdd(counter, 1) == last - first;
      if (done) *counter = 0;
      sts_u32(flag, done);
    }
    __syncthreads();
    if (!lds_u32(flag)) return;
    __threadfence();
    const float *base = p.workspace + (blockIdx.y * records + item) * kRecord;
    for (int row = warp; row < rows; row += S::kWarps) {
      float maximum = kNoScore;
      for (int b = first + lane; b <= last; b += 32)
        maximum = fmaxf(maximum, __ldcg(base + int64_t(b) * kRecord + ROWS * D + 2 * row));
#pragma unroll
      for (int k = 1; k < 32; k *= 2) maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, k));
      float x[kLane], total_weight = 0.0f;
#pragma unroll
      for (int i = 0; i < kLane; ++i) x[i] = 0.0f;
#pragma unroll 4
      for (int b = first; b <= last; ++b) {
        const float *r = base + int64_t(b) * kRecord;
        const float w = exp2_fast(__ldcg(r + ROWS * D + 2 * row) - maximum);
        total_weight += w * __ldcg(r + ROWS * D + 2 * row + 1);
#pragma unroll
        for (int i = 0; i < kLane; ++i) x[i] += w * __ldcg(r + row * D + kLane * lane + i);
      }
      write_row(c, row, x, 1.0f / total_weight);
    }
  }

  KAKEYA_D int total_units() const { return cumulative[p.num_seqs] * p.num_kv_heads; }
  // Thread blocks that have units: all, or one a unit. None between two of an item's is idle, so merge() can count.
  KAKEYA_D int64_t working_blocks() const { return min(int64_t(gridDim.x), int64_t(total_units())); }

  // ---- all of it
  // ---------------------------------------------------------------------------------------------------------

  KAKEYA_D void load_table() {
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
      for (int i = 0; i < S::kTiles; ++i)
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const int token = 64 * half + 16 * m + g + 8 * (r & 1), f = unit * S::kUnitPairs + 8 * i + 4 * (r >> 1) + t4;
          const bool turns = f < pairs;
          const float cos = turns ? t.at<float>(t.offset_cos)[token * pairs + f] : 1.0f;
          const float sin = turns ? t.at<float>(t.offset_sin)[token * pairs + f] : 0.0f;
          table[m][i][r] = pack_half(cos * kTableScale, sin * kTableScale);
        }
  }

  KAKEYA_D void run() {
    const int64_t total = total_units(), blocks = working_blocks();
    if (blockIdx.x >= blocks) return;
    begin = int(total * blockIdx.x / blocks);
    end = int(total * (blockIdx.x + 1) / blocks);
    for (int i = thread; i < int(t.scale_codes); i += S::kThreads)
      sts_f32(shared + M::kFactors + 4 * i, t.at<float>(t.factors)[i]);
#if KAKEYA_BULK
    if (thread == 0) {
      for (int i = 0; i < stages; ++i) barrier_init(shared + M::kBarriers + 8 * i, 1);
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
      fetch_begin();
      for (int i = 0; i + kRound < stages; ++i) fetch_page();
    }
    __syncthreads();
#else
    fetch_begin();
    for (int i = 0; i + kRound < stages; ++i) fetch_page();
#endif
    load_table();
    int stage = 0;
    uint32_t parity = 0;
    AttendCursor c = seek(begin);
    for (int at = begin; at < end;) {
      const int count = min(end - at, c.units - c.unit);
      if (rows_of(c.sequence) > chunk_row) {
        if (calibrated)
          segment<true>(c, count, at, stage, parity);
        else
          segment<false>(c, count, at, stage, parity);
      }
      at += count;
      if (at < end) c = following(c);
    }
  }

  // Waits for up to kRound pages and prepares them; leaves where they are and how many in `page` and `count`.
  template <bool CALIBRATED>
  KAKEYA_D void next_round(int left, int &stage, uint32_t &parity, uint32_t buffer, uint32_t (&page)[kRound],
                           int &count) {
    count = min(left, kRound);
#pragma unroll
    for (int j = 0; j < kRound; ++j) {
      if (j >= count) break;
      await_page(stage, parity);
#if !KAKEYA_BULK
      if (j == 0) __syncthreads();
#endif
      page[j] = stage_at(stage);
      prepare<CALIBRATED>(page[j], j, buffer + j);
      if (++stage == stages) stage = 0, parity ^= 1;
    }
  }

  // Units [c.unit, c.unit + count) of one item. `stage` and `parity` tell where its first sealed page is, and are moved
  // on.
  template <bool CALIBRATED>
  KAKEYA_D void segment(const AttendCursor &c, int count, int at, int &stage, uint32_t &parity) {
    begin_segment(c);
    int left = max(0, int(opaque(min(c.unit + count, c.pages) - c.unit)));
    uint32_t buffer = 0, page[kRound] = {};
    int pages = 0;
    if (left) next_round<CALIBRATED>(left, stage, parity, buffer, page, pages);
    __syncthreads();
    while (pages) {
      scores(page, pages);
      __syncthreads();
      // All warps are done with the round before: its stages take the next transfers.
#if KAKEYA_BULK
      if (thread == 0)
        for (int j = 0; j < pages; ++j) fetch_page();
#else
      for (int j = 0; j < pages; ++j) fetch_page();
#endif
      float s[kRound][kScores];
      gather_scores(0, s[0], kScoreUnit);
      if constexpr (kRound == 2) {
        if (pages == 2) {
          gather_scores(1, s[1], kScoreUnit);
        } else {
#pragma unroll
          for (int i = 0; i < kScores; ++i) s[1][i] = s[0][i];
        }
      }
      uint32_t now[kRound];
#pragma unroll
      for (int j = 0; j < kRound; ++j) now[j] = page[j];
      const int count_now = pages;
      left -= pages;
      next_round<CALIBRATED>(left, stage, parity, buffer ^ kRound, page, pages);
      softmax<false>(s, count_now);
      values(now, buffer, count_now);
      buffer ^= kRound;
    }
#pragma unroll
    for (int n = 0; n < NB; ++n)
#pragma unroll
      for (int i = 0; i < S::kTiles; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) raw[n][i][e] = 0.0f;
    if (c.unit + count > c.pages) prepare_raw(c);
    for (int u = max(c.unit, c.pages); u < c.unit + count; ++u) {
      __syncthreads();
      open_block(c, u);
    }
    const int item_begin = at - c.unit;
    flush(c, count == c.units, item_begin, item_begin + c.units);
  }
};

#endif  // __CUDACC__

}  // namespace kakeya
