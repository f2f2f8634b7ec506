// Decode attention over sealed pages and open blocks: up to 16 query rows of a KV head in one pass.
//
// A thread block walks a range of (sequence, KV head, block) units, all ranges equally long. It has one warp for each
// unit of channels. A page goes through three phases between two barriers:
//
//   scores   warp u: codes of K unit u for all 128 tokens. A warp owns 32 tokens (two tiles; one at head_dim 256): it
//            keeps its own partial scores of these and leaves those of other tokens where their owners find them. The
//            mean's product with the table of in-block offsets is the owner's
//   softmax  owners add up the units' partial scores and take exponentials against a maximum that all warps share; a
//            score that exceeds it by more than kSlack is rare and makes all of them start again with a new maximum.
//            Meanwhile the next page's query is prepared: turned to its block's centre, multiplied by its block scales,
//            and its products with the block means
//   values   warp u: V unit kUnits - 1 - u for all 128 tokens
//
// A warp's unit has one width for as long as the head stays, so the loop over codes branches once a page and no list of
// widths has to be known at compile time; what is paid once a warp and page (query registers, statistics, branches) is
// paid for 128 tokens. Long loops over codes are rolled: warps of different widths run different code at a time, and
// unrolled it does not fit into the instruction caches. Codes are never rotated or scaled: block scales ride in the
// query and in the page's own accumulators.
//
// Tokens of K lie in tiles that mirror each other around the block's centre (docs/page-format.md): the tile of offsets
// +o and the tile of offsets -o share a table of cosines and sines and the products with both, whose sum is the first
// one's score and whose difference the second's. That halves the table, which stays in registers.
//
// Columns of a matrix product are query rows. Products with the means are split in two, what fp16 holds and what it
// left over, because means reach 358. With up to four rows columns 2r and 2r + 1 hold the two, and one thread both
// sums.
//
// CAPPED: scores have a soft cap, AttendParams::soft_cap. Such kernels are others than those of models without one,
// which it would cost registers that they do not have.
#pragma once

#include "dequant.cuh"
#include "overlap.cuh"
#include "soft_cap.cuh"

namespace kakeya {

// A place in the list of work units: sequence by sequence, head by head, sealed pages and then open blocks.
struct AttendCursor {
  int sequence, head, unit, units, pages;
  int tokens, length;  // of this step, and in all
};

// State of the transfers: the next sealed page, and where it goes.
struct alignas(16) AttendFetch {
  const int32_t *next;  // its place in the block table
  int left;             // pages of the cursor's item in this block's range, the next one included; 0: nothing is left
  int stage;
  const uint8_t *pages;  // of the cursor's head
  int at;                // where the item after the cursor's begins
  AttendCursor cursor;   // the item's first page in this block's range
};

// Rows that a partial result has room for: what the launcher says, or without a cap a constant.
template <int ROWS, bool CAPPED>
struct AttendRecord {
  KAKEYA_D explicit AttendRecord(uint32_t) {}
  static KAKEYA_D constexpr int record_rows() { return ROWS; }
};
template <int ROWS>
struct AttendRecord<ROWS, true> {
  const int rows;
  KAKEYA_D explicit AttendRecord(uint32_t record_rows) : rows(int(record_rows)) {}
  KAKEYA_D int record_rows() const { return rows; }
};

template <int D, int Q, int ROWS, bool CAPPED>
struct Attend : AttendRecord<ROWS, CAPPED> {
  using AttendRecord<ROWS, CAPPED>::record_rows;
  using S = AttendShape<D>;
  using R = AttendRows<ROWS>;
  using M = AttendShared<D, ROWS>;
  static constexpr bool kNarrow = S::kUnitChannels == 16;
  static constexpr int NB = R::kTiles, NC = R::kColumns;
  static constexpr int kRegs = 2 * S::kTiles;     // query registers of a lane, unit and tile
  static constexpr int kScores = M::kLaneScores;  // scores of a lane, by (tile, half of it, tile of rows, column)
  static constexpr int kPerThread = ROWS / S::kPairThreads;  // rows that a thread prepares
  static_assert(kPerThread >= 1, "a row a thread");
  // Uniform scores come out 2^-20 too small: codes are subnormals c 2^(bit - 24), queries carry 2^(4 - bit). Others
  // come out 32 times too large, so that queries of small channels keep their bits in fp16.
  static constexpr float kScoreUnit = Q == kUniform ? 1048576.0f : 1.0f / 32.0f;
  // The mean's products must come out so too: the table of offsets is scaled, and coefficients take what is left.
  static constexpr float kTableScale = table_scale(Quantizer(Q));
  static constexpr float kMeanScale = 1.0f / (kScoreUnit * kTableScale);
  // Loops over codes: long bodies stay rolled (to the compiler's eyes too), or they would not fit into the instruction
  // caches, where warps of different widths meet.
  static constexpr int kUnroll = Q == kTrellis ? 1 : 4;
  static constexpr uint32_t kTileBytes = D * 8 * 2;

  const AttendParams &p;
  const Tables &t;
  const int thread, lane, warp, g, t4;
  const uint32_t shared;
  const int *cumulative;
  int begin, end;
  const int chunk_row;
  const uint32_t page_bytes;
  const int stages, pairs;
  const bool calibrated;
  const uint32_t my_query;  // shared address of this lane's registers of the query
  // Shared address of this lane's partial scores, from the first owner's on.
  const uint32_t my_part;
#if KAKEYA_BULK
  AttendFetch &fetch;  // thread 0 alone reads and writes it: shared memory costs the others no registers
#else
  AttendFetch fetch;
#endif

  int fetch_block;  // of the next sealed page

  // Values of a segment: one head of one sequence.
  int k_width, v_width;
  uint32_t k_unit, v_unit, k_stride, v_stride;  // offsets in a page, bytes from group to group
  UnitPast k_past, v_past;
  uint32_t k_gamma, v_gamma, magic;  // see Dequant::run; of uniform codes -(2^width - 1) / 2 twice as fp16
  float k_undo;                      // from a slot's deviations to the scale of scores
  uint32_t side, slots, num_slots;
  float stat_mean[S::kStats], stat_step[S::kStats], stat_scale[S::kStats], stat_zero[S::kStats];
  uint32_t value_at;                     // of two statistics
  uint32_t query_at, mean_at;            // (a, b): two places
  float qa[kPerThread], qb[kPerThread];  // the query at the centre of the next page to prepare
  float turn_cos, turn_sin;              // by a block
  // Offsets in a page: this lane's bytes of a K slot, of two V slots; << 16: of their scales. The launcher knows that
  // pages are no larger.
  uint32_t k_slot, v_slot;

  // Cosines and sines of all channel pairs at the offsets of the upper tile of this warp's pair of tiles.
  uint32_t table[S::kPairSteps][2][4];

  float out[NB][S::kTiles][2][NC];
  float raw[NB][S::kTiles][4];
  float sum[NB][NC];   // of probabilities, this thread's rows
  float peak[NB][NC];  // shared maximum of this thread's rows, in units of log2

  KAKEYA_D Attend(const AttendParams &p, uint8_t *memory, uint32_t stages, uint32_t record_rows, int lane)
      : AttendRecord<ROWS, CAPPED>(record_rows),
        p(p),
        t(*p.tables),
        thread(int(threadIdx.x)),
        lane(lane),
        warp(__shfl_sync(~0u, thread >> 5, 0)),  // the same for all lanes, and the compiler may know
        g(lane >> 2),
        t4(lane & 3),
        shared(shared_address(memory)),
        cumulative(p.plan + plan_cumulative(p.max_tasks)),
        chunk_row(int(blockIdx.y) * ROWS),
        page_bytes(t.page_bytes),
        stages(int(stages)),
        pairs(int(t.pairs)),
        calibrated(t.calibrated != 0),
        my_query(opaque(!R::kSplit   ? shared + M::kQuery + my_regs()
                        : g % 2 == 0 ? shared + M::kQuery + (warp * 16 + 4 * (g / 2) + t4) * kRegs * 4
                                     : shared + M::kZero)),
        my_part(opaque(shared + M::kPart + lane * kScores * 4))
#if KAKEYA_BULK
        ,
        fetch(*reinterpret_cast<AttendFetch *>(memory + M::kFetch))
#endif
  {
  }

  // Byte of this lane's registers of its warp's unit, 8 columns.
  KAKEYA_D uint32_t my_regs() const { return (warp * 32 + lane) * kRegs * 4; }
  // Rows of a thread's column, tokens of its scores.
  KAKEYA_D int row_of(int n, int c) const { return R::kSplit ? t4 : 8 * n + 2 * t4 + c; }
  KAKEYA_D int my_token(int tile, int m) const { return tile_token(warp * S::kWarpTiles + tile, g + 8 * m); }

  // Short functions are defined here, the others in the header that stands above them.

  // ---- the list of work units, and transfers: attend_work.cuh ------------------------------------------------------

  KAKEYA_D int rows_of(const AttendCursor &c) const { return c.tokens * p.group; }
  KAKEYA_D int total_units() const { return cumulative[p.num_seqs] * p.num_kv_heads; }
  // What is divided evenly among thread blocks: units, or whole items, so that no result depends on where others end.
  KAKEYA_D int total_shares() const { return p.batch_invariant ? p.num_seqs * p.num_kv_heads : total_units(); }
  // Thread blocks that have shares: all, or one a share. None between two of an item's is idle, so merge() can count.
  KAKEYA_D int64_t working_blocks() const { return min(int64_t(gridDim.x), int64_t(total_shares())); }
  // Place of an item's first unit: sequence by sequence, head by head.
  KAKEYA_D int item_begin(int item) const {
    const int sequence = item / p.num_kv_heads, head = item % p.num_kv_heads, at = cumulative[sequence];
    return at * p.num_kv_heads + (head ? head * (cumulative[sequence + 1] - at) : 0);
  }
  KAKEYA_D uint32_t stage_at(int stage) const { return shared + M::kStages + stage * page_bytes; }

  KAKEYA_D void enter_sequence(AttendCursor &c) const;
  KAKEYA_D AttendCursor seek(int at) const;
  KAKEYA_D AttendCursor following(AttendCursor c) const;
  KAKEYA_D void fetch_item(AttendCursor c, int at);
  KAKEYA_D void fetch_page();
#if !KAKEYA_BULK
  KAKEYA_D void copy_async(uint32_t dst, const void *src, uint32_t bytes) const;
#endif
  KAKEYA_D void await_page(int stage, uint32_t parity) const;

  // ---- a segment's own values: attend_segment.cuh ------------------------------------------------------------------

  // Whether this warp has units; one without has tiles only. Where streams list widths, one more has none.
  KAKEYA_D bool has_unit() const { return S::kWarps == S::kUnits || warp < S::kUnits; }
  // A wide K unit goes with a narrow V unit: channels are in falling order of width.
  KAKEYA_D int value_unit() const { return has_unit() ? S::kUnits - 1 - warp : S::kUnits; }

  static KAKEYA_D UnitPast unit_past(uint32_t before) { return {64 * before, before ? ~0u : 0u, before == 1}; }

  KAKEYA_D bool is_f16() const { return p.element == kF16; }
  KAKEYA_D float load_element(const void *base, int64_t at) const {
    return is_f16() ? __half2float(static_cast<const __half *>(base)[at])
                    : __bfloat162float(static_cast<const __nv_bfloat16 *>(base)[at]);
  }

  KAKEYA_D void begin_segment(const AttendCursor &c);

  // ---- the query of the next page, or of open blocks: attend_prepare.cuh -------------------------------------------

  // Byte of (code position, column of 8) in query registers; of (code position, row of 4) where columns are split.
  static KAKEYA_D uint32_t query_place(int position, int column, int columns) {
    const int u = position / S::kUnitChannels, i = position % S::kUnitChannels;
    return uint32_t(((u * columns + column) * 4 + (i & 7) / 2) * kRegs * 4 + (i >> 3) * 4 + (i & 1) * 2);
  }
  // Byte of a channel pair's cosine coefficient in the mean's registers, [16 pairs][column][4][cosines 2, sines 2]; the
  // sine's lies 8 bytes behind.
  static KAKEYA_D uint32_t mean_place(int f, int column) {
    return uint32_t(((f / 16 * 8 + column) * 4 + f % 8 / 2) * 16 + f % 16 / 8 * 4 + f % 2 * 2);
  }
  // From row 0's place to that of row kPairThreads * e.
  static KAKEYA_D constexpr uint32_t query_row(int e) {
    const int row = S::kPairThreads * e;
    return row / 8 * kTileBytes + row % 8 * 4 * kRegs * 4;
  }
  static KAKEYA_D constexpr uint32_t mean_row(int e) {
    const int row = S::kPairThreads * e;
    return R::kSplit ? row * 2 * 64 : row / 8 * kTileBytes + row % 8 * 64;
  }

  // Value `which` (0, 1: of the pair's two K channels) of the threads that share this thread's pair.
  KAKEYA_D float of_k(const float (&x)[S::kStats], int which) const {
    const int first = lane & ~(S::kPairThreads - 1);
    return __shfl_sync(~0u, x[which % S::kStats], first + which / S::kStats);
  }

  // Two values as fp16; returns what fp16 left over.
  static KAKEYA_D float2 store_two(uint32_t a, uint32_t b, float x, float y) {
    const uint32_t h = pack_half(x, y);
    sts_u16(a, h);
    sts_u16(b, h >> 16);
    return make_float2(x - half_low(h), y - half_high(h));
  }

  template <bool CALIBRATED>
  KAKEYA_D void prepare(uint32_t page, uint32_t value);
  KAKEYA_D void prepare_raw(const AttendCursor &c);

  // ---- scores: attend_scores.cuh -----------------------------------------------------------------------------------

  // This lane's registers of a unit.
  KAKEYA_D void load_regs(uint32_t (&r)[kRegs], uint32_t a) const {
    if constexpr (kRegs == 4) {
      const uint4 x = lds_u128(a);
      r[0] = x.x, r[1] = x.y, r[2] = x.z, r[3] = x.w;
    } else {
      const uint2 x = lds_u64(a);
      r[0] = x.x, r[1] = x.y;
    }
  }

  // Where the first owner finds this warp's partial scores: part (warp - owner - 1) % kWarps (not yet taken modulo).
  KAKEYA_D uint32_t first_part() const { return uint32_t(warp - 1) * M::kPartBytes; }
  KAKEYA_D uint32_t slot_score_at(int slot, int unit, int row) const {
    return shared + M::kSlotScores + ((slot * S::kUnits + unit) * ROWS + row) * 4;
  }

  template <bool LOW>
  static KAKEYA_D void fold(const float (&acc)[2][NB][4], float (&x)[2][2 * NB * NC]);
  KAKEYA_D void hand_over(int pair, const float (&acc)[2][NB][4], uint32_t &part, float (&own)[kScores]) const;
  template <bool SLOTS>
  KAKEYA_D void first_scores(uint32_t page, const uint32_t (&q)[NB][kRegs], float (&own)[kScores],
                             float (&zero)[NB][NC]) const;
  template <int W>
  KAKEYA_D void score_unit(uint32_t page, const uint32_t (&q)[NB][kRegs], const float (&zero)[NB][NC],
                           float (&own)[kScores]) const;
  KAKEYA_D void no_scores(float (&own)[kScores]) const;
  template <bool SLOTS>
  KAKEYA_D float load_slots(uint32_t page, uint32_t (&e)[kRegs], uint32_t (&z)[kRegs]) const;
  KAKEYA_D void scores(uint32_t page, float (&own)[kScores]) const;

  // ---- softmax: attend_softmax.cuh ---------------------------------------------------------------------------------

  // Shared address of a token's probabilities, tile n of rows.
  KAKEYA_D uint32_t prob_at(int n, uint32_t token) const { return shared + M::kProb + n * M::kProbTile + token * 16; }
  // Probabilities of tokens 32 x ... as B operands: registers 2 m and 2 m + 1 are 16 tokens.
  KAKEYA_D void load_probs(uint32_t (&b)[4], int n, int x) const { load_transposed(b, prob_at(n, 32 * x + lane)); }

  KAKEYA_D void gather(float (&s)[kScores]) const;
  KAKEYA_D void place_slots(uint32_t page) const;
  KAKEYA_D void cap_scores(float (&s)[kScores], float unit) const;
  KAKEYA_D void hide_rows(float (&s)[kScores]) const;
  template <bool RAW>
  KAKEYA_D void store_probs(const float (&s)[kScores]) const;
  template <bool RAW>
  KAKEYA_D void raise_peak(const float (&top)[NB][NC]);
  template <bool RAW>
  KAKEYA_D void softmax(const float (&s)[kScores]);

  // ---- values: attend_values.cuh -----------------------------------------------------------------------------------

  template <int W>
  KAKEYA_D void value_unit_sums(uint32_t page, float (&acc)[NB][S::kTiles][4], float (&total)[NB][4]) const;
  KAKEYA_D void value_totals(float (&total)[NB][4]) const;
  KAKEYA_D void value_slots(float (&acc)[NB][S::kTiles][4], uint32_t page) const;
  KAKEYA_D void values(uint32_t page, uint32_t buffer);

  // ---- open blocks: attend_open.cuh --------------------------------------------------------------------------------

  // Rows of one stream of an open block, for one head.
  KAKEYA_D const uint16_t *open_rows(int slot, int stream, int head) const {
    return static_cast<const uint16_t *>(p.open_blocks) +
           ((int64_t(slot) * 2 + stream) * p.num_kv_heads + head) * (kBlock * D);
  }
  KAKEYA_D void open_block(const AttendCursor &c, int index);

  // ---- results: attend_results.cuh ---------------------------------------------------------------------------------

  static constexpr int kLane = D / 32;  // channels of a lane
  // A lane's first channel, by lanes, and from each to the next: neighbours, or where there are three one of each block
  // of the Hadamard transform.
  static constexpr int kLaneFirst = kLane == 3 ? 1 : kLane, kLaneNext = kLane == 3 ? 32 : 1;

  // Floats of a partial result: sums of all rows, then a maximum and a total of each.
  KAKEYA_D int record_floats() const { return record_rows() * (D + 2); }

  // Past L1, which knows nothing of other blocks' results.
  static KAKEYA_D float2 load_two(const float *at) { return __ldcg(reinterpret_cast<const float2 *>(at)); }
  static KAKEYA_D void load_lane_sums(float (&y)[kLane], const float *at) {
    if constexpr (kLane == 2) {
      const float2 v = load_two(at);
      y[0] = v.x, y[1] = v.y;
    } else if constexpr (kLane == 3) {
#pragma unroll
      for (int i = 0; i < 3; ++i) y[i] = __ldcg(at + kLaneNext * i);
    } else {
#pragma unroll
      for (int i = 0; i < kLane; i += 4) {
        const float4 v = __ldcg(reinterpret_cast<const float4 *>(at + i));
        y[i] = v.x, y[i + 1] = v.y, y[i + 2] = v.z, y[i + 3] = v.w;
      }
    }
  }

  KAKEYA_D void flush(const AttendCursor &c, bool whole, int item_begin, int item_end);
  KAKEYA_D void write_row(const AttendCursor &c, int row, const float (&x)[kLane], float maximum, float total) const;
  KAKEYA_D void merge(const AttendCursor &c, int item, int rows, int64_t records, int item_begin, int item_end);

  // ---- all of it: attend_run.cuh -----------------------------------------------------------------------------------

  KAKEYA_D void load_table();
  KAKEYA_D void run();
  template <bool CALIBRATED>
  KAKEYA_D uint32_t next_page(int &stage, uint32_t &parity, uint32_t buffer);
  template <bool CALIBRATED>
  KAKEYA_D void segment(const AttendCursor &c, int count, int at, int &stage, uint32_t &parity);
};

}  // namespace kakeya

#include "attend_open.cuh"
#include "attend_prepare.cuh"
#include "attend_results.cuh"
#include "attend_run.cuh"
#include "attend_scores.cuh"
#include "attend_segment.cuh"
#include "attend_softmax.cuh"
#include "attend_values.cuh"
#include "attend_work.cuh"
