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
#pragma once

#include "dequant.cuh"

namespace kakeya {

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
  int more;  // 0: nothing is left
};

template <int D, int Q, int ROWS>
struct Attend {
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
  // The table of offsets is scaled to that (crates/codec/src/fragments.rs): 2^-13 keeps its values exact, the
  // coefficients take the other 2^-7.
  static constexpr float kTableScale = Q == kUniform ? 1.0f / 8192.0f : 32.0f;
  static constexpr float kMeanScale = Q == kUniform ? 1.0f / 128.0f : 1.0f;
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
  const uint32_t my_regs;   // byte of this lane's registers of its warp's unit, 8 columns
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
  uint32_t k_gamma, v_gamma, magic;  // see Dequant::run
  float k_undo;                      // from a slot's deviations to the scale of scores
  uint32_t side, slots, num_slots;
  float stat_mean[S::kStats], stat_step[S::kStats], stat_scale[S::kStats], stat_zero[S::kStats];
  int stat_index[S::kStats];
  uint32_t value_at[S::kStats];
  uint32_t query_at, mean_at;            // (a, b): two places
  float qa[kPerThread], qb[kPerThread];  // the query at the centre of the next page to prepare
  float turn_cos, turn_sin;              // by a block
  // Offsets in a page: this lane's bytes of a K slot, of two V slots, and these slots' scales.
  uint32_t k_slot, k_slot_scale, v_slot, v_slot_scale;

  // Cosines and sines of all channel pairs at the offsets of the upper tile of this warp's pair of tiles.
  uint32_t table[S::kPairSteps][2][4];

  float out[NB][S::kTiles][2][NC];
  float raw[NB][S::kTiles][4];
  float sum[NB][NC];   // of probabilities, this thread's rows
  float peak[NB][NC];  // shared maximum of this thread's rows, in units of log2

  KAKEYA_D Attend(const AttendParams &p, uint8_t *memory, uint32_t stages, int lane)
      : p(p),
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
        my_regs(opaque((warp * 32 + lane) * kRegs * 4)),
        my_query(opaque(!R::kSplit   ? shared + M::kQuery + my_regs
                        : g % 2 == 0 ? shared + M::kQuery + (warp * 16 + 4 * (g / 2) + t4) * kRegs * 4
                                     : shared + M::kZero)),
        my_part(opaque(shared + M::kPart + lane * kScores * 4))
#if KAKEYA_BULK
        ,
        fetch(*reinterpret_cast<AttendFetch *>(memory + M::kFetch))
#endif
  {
  }

  // Rows of a thread's column, tokens of its scores.
  KAKEYA_D int row_of(int n, int c) const { return R::kSplit ? t4 : 8 * n + 2 * t4 + c; }
  KAKEYA_D int my_token(int tile, int m) const { return tile_token(warp * S::kWarpTiles + tile, g + 8 * m); }

  // ---- work list ---------------------------------------------------------------------------------------------------

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

  // ---- transfers ---------------------------------------------------------------------------------------------------

  KAKEYA_D void fetch_begin() {
    fetch.stage = 0;
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
  KAKEYA_D uint32_t stage_at(int stage) const { return shared + M::kStages + stage * page_bytes; }
  // Starts the transfer of the next sealed page, if there is one. From sm_90 on thread 0 alone calls this.
  KAKEYA_D void fetch_page() {
    if (fetch.more) {
      const uint8_t *page = p.pages + fetch_block * p.page_block_stride + fetch.cursor.head * p.page_head_stride;
      const uint32_t dst = stage_at(fetch.stage);
#if KAKEYA_BULK
      const uint32_t bar = shared + M::kBarriers + 8 * fetch.stage;
      barrier_expect(bar, page_bytes);
      bulk_load(dst, page, page_bytes, bar);
#else
      copy_async(dst, page, page_bytes);
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
    // Groups complete in order; those after the next page's may still be under way. There are three stages at least.
    asm volatile("cp.async.wait_group 1;" ::: "memory");
#endif
  }

  // ---- a segment's own values --------------------------------------------------------------------------------------

  KAKEYA_D float grid_alpha(int width) const { return __uint_as_float(t.at<uint32_t>(t.grids)[4 * width]); }

  // A width's alphabet as factor * U (U^2 + gamma), U = 4 y, gamma twice as fp16.
  struct Alphabet {
    uint32_t gamma;
    float factor;
  };
  KAKEYA_D Alphabet alphabet(int width) const {
    const uint2 x = __ldg(t.at<uint2>(t.alphabets) + width);
    return {x.x, __uint_as_float(x.y)};
  }

  // Offset of unit u from its group's start, bytes of all of a group's units, and where the chain's unit before is.
  KAKEYA_D void find_unit(const uint8_t *widths, int u, uint32_t &offset, uint32_t &total, UnitPast &past) const {
    offset = total = 0;
    past = {0, 0, false};
    uint32_t at = 0;
    for (int i = 0; i < S::kUnits; ++i) {
      if (i == u) offset = total;
      if (i < u && widths[i]) at = total, past.mask = ~0u, past.one = widths[i] == 1;
      total += 64 * widths[i];
    }
    if (past.mask) past.back = offset - at;
  }

  KAKEYA_D bool is_f16() const { return p.element == kF16; }
  KAKEYA_D float load_element(const void *base, int64_t at) const {
    return is_f16() ? __half2float(static_cast<const __half *>(base)[at])
                    : __bfloat162float(static_cast<const __nv_bfloat16 *>(base)[at]);
  }

  // Canonical channels of pair f: the pair's own if it rotates, else two that do not.
  KAKEYA_D int2 pair_channels(int f) const { return f < pairs ? make_int2(f, f + pairs) : make_int2(2 * f, 2 * f + 1); }

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

  // What brings a slot's deviations to the scale of this warp's codes. Keys, as sixteenths 2^-4 (128 + 1024 + value):
  // by class of channels, factors and addends that take off 1152; uniform queries carry 2^(4 - bit) of the codes, 2^bit
  // makes up for it. Values: by class, the sum's factor.
  KAKEYA_D void slot_constants() {
    k_undo = 16.0f;
    float undo = 1.0f;
    if (Q == kUniform) {
      if (k_width) k_undo *= power2(k_width - 1) / grid_alpha(k_width);
      k_undo *= 1.0f / 16777216.0f;
      if (v_width) undo = power2(v_width - 1) / grid_alpha(v_width);
    } else {
      k_undo /= alphabet(k_width).factor;
      undo = 1.0f / alphabet(v_width).factor;
    }
    if (lane < 4) {
      const float up = power2((Q == kUniform && k_width ? code_bit(k_width, lane, kNarrow) : 0) - 4);
      if (Q == kUniform && v_width) undo *= power2(code_bit(v_width, lane, kNarrow) - 24);
      sts_u32(shared + M::kSlotUp + warp * 32 + 4 * lane, pack_half(up, up));
      sts_u32(shared + M::kSlotUp + warp * 32 + 16 + 4 * lane, pack_half(-1152.0f * up, -1152.0f * up));
      sts_f32(shared + M::kSlotUndo + warp * 16 + 4 * lane, undo);
    }
    __syncwarp();
  }

  KAKEYA_D void begin_segment(const AttendCursor &c) {
    const HeadView h = head_view(t, p.layer, p.first_head + c.head);
    const LayerLayout layout = t.at<LayerLayout>(t.layers)[p.layer];
    side = layout.side_offset;
    slots = layout.slots_offset;
    num_slots = layout.num_slots;
    const int vu = value_unit();
    find_unit(h.k.widths, warp, k_unit, k_stride, k_past);
    k_width = h.k.widths[warp];
    k_unit += kHeader;
    const uint32_t v_start = kHeader + S::kGroups * k_stride;
    find_unit(h.v.widths, vu, v_unit, v_stride, v_past);
    v_width = h.v.widths[vu];
    v_unit += v_start;
    const uint32_t last = num_slots ? num_slots - 1 : 0, slot = min(uint32_t(g), last), two = min(2u * t4, last & ~1u);
    const uint32_t scales = slots + 2 * num_slots * D;
    k_slot = opaque(slots + slot * D + warp * S::kUnitChannels + 4 * S::kTiles * t4);
    k_slot_scale = opaque(scales + 4 * slot);
    v_slot = opaque(slots + (num_slots + two) * D + vu * S::kUnitChannels + 2 * S::kTiles * g);
    v_slot_scale = opaque(scales + 4 * two);
    slot_constants();
    if constexpr (Q != kUniform) {
      k_gamma = alphabet(k_width).gamma;
      v_gamma = alphabet(v_width).gamma;
    }

    const int f = thread / S::kPairThreads, role = thread % S::kPairThreads;
    const int2 pair = pair_channels(f);
#pragma unroll
    for (int e = 0; e < S::kStats; ++e) {
      const int which = role * S::kStats + e;
      const bool is_k = which < 2;
      const StreamView &s = is_k ? h.k : h.v;
      const int channel = which == 0 ? pair.x : which == 1 ? pair.y : 2 * f + which - 2;
      stat_index[e] = (is_k ? 0 : D) + channel;
      stat_mean[e] = s.mean[channel];
      stat_step[e] = s.step[channel];
      stat_scale[e] = s.sigma[channel];
      stat_zero[e] = 0.0f;
      const int position = s.position[channel], w = s.widths[position / S::kUnitChannels];
      const int in_unit = position % S::kUnitChannels;
      value_at[e] =
          uint32_t(((position / S::kUnitChannels * 8 + in_unit % 8) * (S::kUnitChannels / 8) + in_unit / 8) * 8);
      if constexpr (Q == kUniform) {
        const int bit = w ? code_bit(w, in_unit / 8, kNarrow) : 0;
        const float step = w ? grid_alpha(w) * power2(1 - w) : 1.0f;
        // Keys: their score misses 2^20 (kScoreUnit). Values: the sum's scale makes up for the subnormal.
        if (is_k) {
          stat_scale[e] *= step * power2(4 - bit);
        } else if (w) {
          stat_scale[e] *= step * power2(24 - bit);
          stat_zero[e] = -0.5f * float((1 << w) - 1) * power2(bit - 24);
        }
      } else {
        stat_scale[e] *= alphabet(w).factor;
        if (is_k) stat_scale[e] *= kTableScale;
      }
    }
    // What a page's statistics can make of it: the largest factors and means there are.
    float largest_scale = 0.0f, largest_mean = 0.0f;
    if (calibrated) {
      const float factor = t.at<float>(t.factors)[t.scale_codes - 1];
      float mean[S::kStats];
#pragma unroll
      for (int e = 0; e < S::kStats; ++e) {
        mean[e] = fabsf(stat_mean[e]) + 32.0f * fabsf(stat_step[e]);
        stat_mean[e] -= 32.0f * stat_step[e];
      }
      largest_scale = factor * fmaxf(fabsf(of_k(stat_scale, 0)), fabsf(of_k(stat_scale, 1)));
      largest_mean = fmaxf(of_k(mean, 0), of_k(mean, 1));
    }  // A block's own statistics have no bound to speak of: 65504 would clamp ordinary queries. prepare() saturates.
    // |a|, |b| <= norm <= limit keeps every fp16 register finite. A query beyond it would need scores of thousands.
    const float limit = kHalfMax / fmaxf(largest_scale, 2.0f * kMeanScale * largest_mean);
    constexpr int columns = R::kSplit ? 4 : 8;
    query_at = query_place(h.k.position[pair.x], role, columns) | query_place(h.k.position[pair.y], role, columns)
                                                                      << 16;
    mean_at = mean_place(f, R::kSplit ? 2 * role : role);
    // By how much a block turns, and the query at the first block's centre; natural channels, in units of log2.
    float cos = 1.0f, sin = 0.0f;
    turn_cos = 1.0f;
    turn_sin = 0.0f;
    if (f < pairs) {
      const float *cosines = t.at<float>(t.centre_cos) + f, *sines = t.at<float>(t.centre_sin) + f;
      cos = cosines[c.unit * pairs];
      sin = sines[c.unit * pairs];
      if (t.max_blocks > 1) {
        turn_cos = cosines[pairs] * cosines[0] + sines[pairs] * sines[0];
        turn_sin = sines[pairs] * cosines[0] - cosines[pairs] * sines[0];
      }
    }
    const uint16_t *natural = t.at<uint16_t>(t.natural);
    const int rows = rows_of(c.sequence);
    const float scale = p.scale * 1.4426950408889634f;
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) {
      const int row = chunk_row + role + S::kPairThreads * e;
      float a = 0.0f, b = 0.0f;
      if (row < rows) {
        const int64_t at = int64_t(p.query_start[c.sequence] + row / p.group) * p.q_token_stride +
                           int64_t(c.head * p.group + row % p.group) * p.q_head_stride;
        a = scale * load_element(p.q, at + natural[pair.x]);
        b = scale * load_element(p.q, at + natural[pair.y]);
        const float norm = fabsf(a) + fabsf(b);
        if (norm > limit) a *= limit / norm, b *= limit / norm;
      }
      qa[e] = a * cos + b * sin;
      qb[e] = b * cos - a * sin;
    }
#pragma unroll
    for (int n = 0; n < NB; ++n)
#pragma unroll
      for (int e = 0; e < NC; ++e) {
        sum[n][e] = 0.0f;
        peak[n][e] = kNoScore;
#pragma unroll
        for (int i = 0; i < S::kTiles; ++i) out[n][i][0][e] = out[n][i][1][e] = 0.0f;
      }
  }

  // A wide K unit goes with a narrow V unit: channels are in falling order of width.
  KAKEYA_D int value_unit() const { return S::kUnits - 1 - warp; }

  // Two values as fp16; returns what fp16 left over.
  static KAKEYA_D float2 store_two(uint32_t a, uint32_t b, float x, float y) {
    const uint32_t h = pack_half(x, y);
    sts_u16(a, h);
    sts_u16(b, h >> 16);
    return make_float2(x - half_low(h), y - half_high(h));
  }

  // Prepares the page at shared address `page`: reads its statistics, writes query and mean registers, and value
  // registers of buffer `value`; turns the query on to the next block's centre. kPairThreads threads share a channel
  // pair of K and two channels of V; each also has its rows.
  template <bool CALIBRATED>
  KAKEYA_D void prepare(uint32_t page, uint32_t value) {
    const uint32_t s = page + side;
    float scale[S::kStats], base[S::kStats];
#pragma unroll
    for (int e = 0; e < S::kStats; ++e) {
      const int i = stat_index[e];
      float mean;
      if constexpr (CALIBRATED) {
        const uint32_t code = lds_u8(s + (i >> 1)) >> 4 * (i & 1) & 15u;
        const uint32_t low = lds_u8(s + D + (i >> 1)) >> 4 * (i & 1) & 15u;
        const uint32_t high = lds_u8(s + 2 * D + (i >> 2)) >> 2 * (i & 3) & 3u;
        scale[e] = lds_f32(shared + M::kFactors + 4 * code);
        mean = float(int(low | high << 4)) * stat_step[e];  // 32 steps less: in stat_mean
      } else {
        // One of 256 deviations 2^((code - 128) / 8).
        scale[e] = exp2_fast(0.125f * float(int(lds_u8(s + i)) - 128));
        mean = half_low(lds_u16(s + 2 * D + 2 * i));
      }
      scale[e] *= stat_scale[e];
      base[e] = stat_mean[e] + mean;
    }
    if (thread % S::kPairThreads * S::kStats >= 2)
#pragma unroll
      for (int e = 0; e < S::kStats; ++e)
        sts_f32x2(shared + M::kValue + value * (D * 8) + value_at[e], scale[e], base[e] + scale[e] * stat_zero[e]);
    const float scale_a = of_k(scale, 0), scale_b = of_k(scale, 1), base_a = of_k(base, 0), base_b = of_k(base, 1);
    const uint32_t query = shared + M::kQuery, means = shared + M::kMean + mean_at;
    const uint32_t at_a = query + (query_at & 0xffffu), at_b = query + (query_at >> 16);
    const auto bounded = [](float x) { return CALIBRATED ? x : clamp_half(x); };
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) {
      const float a = qa[e], b = qb[e];
      qa[e] = a * turn_cos + b * turn_sin;
      qb[e] = b * turn_cos - a * turn_sin;
      store_two(at_a + query_row(e), at_b + query_row(e), bounded(a * scale_a), bounded(b * scale_b));
      // The mean turned by offset o, times the query: cos o (a m_a + b m_b) + sin o (b m_a - a m_b).
      const uint32_t at = means + mean_row(e);
      const float2 rest = store_two(at, at + 8, bounded((a * base_a + b * base_b) * kMeanScale),
                                    bounded((b * base_a - a * base_b) * kMeanScale));
      const uint32_t low = at + (R::kSplit ? 64 : NB * kTileBytes);
      store_two(low, low + 8, rest.x, rest.y);
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
      sts_u16(shared + M::kRawQuery + (column / 8) * kTileBytes + query_place(channel, column % 8, 8), x);
    }
  }

  // ---- scores ------------------------------------------------------------------------------------------------------

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

  // A lane's N scores in shared memory.
  template <int N>
  static KAKEYA_D void store_floats(uint32_t a, const float *x) {
    if constexpr (N == 2) {
      sts_f32x2(a, x[0], x[1]);
    } else {
#pragma unroll
      for (int i = 0; i < N; i += 4)
        asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(a + 4 * i), "f"(x[i]), "f"(x[i + 1]),
                     "f"(x[i + 2]), "f"(x[i + 3])
                     : "memory");
    }
  }
  template <int N>
  static KAKEYA_D void add_floats(uint32_t a, float *x) {
    if constexpr (N == 2) {
      const uint2 v = lds_u64(a);
      x[0] += __uint_as_float(v.x), x[1] += __uint_as_float(v.y);
    } else {
#pragma unroll
      for (int i = 0; i < N; i += 4) {
        const uint4 v = lds_u128(a + 4 * i);
        x[i] += __uint_as_float(v.x), x[i + 1] += __uint_as_float(v.y);
        x[i + 2] += __uint_as_float(v.z), x[i + 3] += __uint_as_float(v.w);
      }
    }
  }

  // Where the first owner finds this warp's partial scores: part (warp - owner - 1) % kWarps (not yet taken modulo).
  KAKEYA_D uint32_t first_part() const { return uint32_t(warp - 1) * M::kPartBytes; }
  // The scores of a pair of tiles as their owners want them, [tile][m][n][c]: both columns of a row added up.
  static KAKEYA_D void fold(const float (&acc)[2][NB][4], float (&x)[2][2 * NB * NC]) {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile)
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int n = 0; n < NB; ++n)
#pragma unroll
          for (int c = 0; c < NC; ++c)
            x[tile][(m * NB + n) * NC + c] =
                R::kSplit ? acc[tile][n][2 * m] + acc[tile][n][2 * m + 1] : acc[tile][n][2 * m + c];
  }
  // Leaves the partial scores of a pair of tiles with their owners, or adds them to `own`. Pairs come one after the
  // other, `part` is the next owner's.
  KAKEYA_D void hand_over(int pair, const float (&acc)[2][NB][4], uint32_t &part, float (&own)[kScores]) const {
    constexpr int N = 2 * NB * NC, owners = 2 / S::kWarpTiles;
    float x[2][N];
    fold(acc, x);
#pragma unroll
    for (int i = 0; i < owners; ++i) {
      if (owners * pair + i == warp) {
#pragma unroll
        for (int k = 0; k < kScores; ++k) own[k] += x[i + k / N][k % N];
        part += S::kWarps * M::kPartBytes;  // part numbers go down, and begin anew behind this warp
      } else {
        store_floats<kScores>(part, x[i]);
      }
      part += M::kOwnerBytes - M::kPartBytes;
    }
  }

  // The mean's part of this warp's tokens.
  KAKEYA_D void mean_scores(float (&own)[kScores]) const {
    float acc[2][NB][4];  // cosines, sines
#pragma unroll
    for (int n = 0; n < NB; ++n)
#pragma unroll
      for (int k = 0; k < 4; ++k) acc[0][n][k] = acc[1][n][k] = 0.0f;
#pragma unroll
    for (int n = 0; n < R::kMeanTiles; ++n)
#pragma unroll
      for (int s = 0; s < S::kPairSteps; ++s) {
        const uint4 b = lds_u128(shared + M::kMean + n * kTileBytes + s * 512 + lane * 16);
        const uint32_t (&c)[4] = table[s][0], (&d)[4] = table[s][1];
        mma(acc[0][n % NB], c[0], c[1], c[2], c[3], b.x, b.y);
        mma(acc[1][n % NB], d[0], d[1], d[2], d[3], b.z, b.w);
      }
    constexpr int N = 2 * NB * NC;
    float x[2][N];
    fold(acc, x);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      if constexpr (S::kWarpTiles == 2)
        own[k] = x[0][k] + x[1][k], own[N + k] = x[0][k] - x[1][k];
      else
        own[k] = warp % 2 ? x[0][k] - x[1][k] : x[0][k] + x[1][k];
    }
  }

  // Partial scores of this warp's unit with width W; its own tokens' are added to `own`.
  template <int W>
  KAKEYA_D void score_unit(uint32_t page, const uint32_t (&q)[NB][kRegs], float (&own)[kScores]) const {
    float zero[NB][4];
#pragma unroll
    for (int n = 0; n < NB; ++n) {
      zero[n][0] = zero[n][1] = zero[n][2] = zero[n][3] = 0.0f;
      if constexpr (Q == kUniform) {
        // The codes' zero point, (2^W - 1) / 2 of each: the same for all tokens, and where all sums begin.
#pragma unroll
        for (int i = 0; i < S::kTiles; ++i) {
          constexpr int m = (1 << W) - 1;
          // Minus half of what stands for a code of ones, 2^20 times: -m / 2 * 2^(bit - 24) would be no normal number.
          const uint32_t z0 = both(half_constant(-m, code_bit(W, 2 * i, kNarrow) - 5));
          const uint32_t z1 = both(half_constant(-m, code_bit(W, 2 * i + 1, kNarrow) - 5));
          mma(zero[n], z0, z0, z1, z1, q[n][2 * i], q[n][2 * i + 1]);
        }
#pragma unroll
        for (int k = 0; k < 4; ++k) zero[n][k] *= 1.0f / kScoreUnit;
      }
    }
    constexpr int kEach = kNarrow ? 1 : 2;  // groups of a pair of tiles
    uint32_t at = page + k_unit, part = my_part + first_part();
    const auto load = [&](UnitWords(&words)[kEach]) {
#pragma unroll
      for (int e = 0; e < kEach; ++e) words[e] = Dequant<Q, W, kNarrow>::load(at + e * k_stride, k_past, lane);
    };
    const auto products = [&](const UnitWords(&words)[kEach], float (&acc)[2][NB][4]) {
#pragma unroll
      for (int n = 0; n < NB; ++n)
#pragma unroll
        for (int k = 0; k < 4; ++k) acc[0][n][k] = acc[1][n][k] = zero[n][k];
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        uint32_t f[4][2];
        Dequant<Q, W, kNarrow>::run(f, words[e], k_past.mask, k_gamma, magic);
#pragma unroll
        for (int n = 0; n < NB; ++n) {
          if constexpr (kNarrow) {
            mma(acc[0][n], f[0][0], f[0][1], f[1][0], f[1][1], q[n][0], q[n][1]);
            mma(acc[1][n], f[2][0], f[2][1], f[3][0], f[3][1], q[n][0], q[n][1]);
          } else {
            mma(acc[e][n], f[0][0], f[0][1], f[1][0], f[1][1], q[n][0], q[n][1]);
            mma(acc[e][n], f[2][0], f[2][1], f[3][0], f[3][1], q[n][2], q[n][3]);
          }
        }
      }
    };
    float acc[2][NB][4];
    if constexpr (kUnroll > 1 && S::kWarpTiles == 2) {
      // From the own pair of tiles on: which is the own is then known when the kernel is compiled.
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int pair = (warp + i) & 3;
        at = page + k_unit + pair * kEach * k_stride;
        UnitWords words[kEach];
        load(words);
        products(words, acc);
        constexpr int N = 2 * NB * NC;
        float x[2][N];
        fold(acc, x);
        if (i == 0) {
#pragma unroll
          for (int k = 0; k < kScores; ++k) own[k] += x[k / N][k % N];
        } else {
          store_floats<kScores>(my_part + pair * M::kOwnerBytes + (3 - i) * M::kPartBytes, x[0]);
        }
      }
    } else {
      UnitWords next[kEach];
      load(next);
#pragma unroll 1
      for (int pair = 0, end = int(opaque(4)); pair < end; ++pair) {  // a loop to the compiler's eyes
        UnitWords words[kEach];
#pragma unroll
        for (int e = 0; e < kEach; ++e) words[e] = next[e];
        at += kEach * k_stride;
        load(next);  // the last time in vain, of what lies behind: the launcher knows that it is still the page's
        products(words, acc);
        hand_over(pair, acc, part, own);
      }
    }
  }

  KAKEYA_D void scores(uint32_t page, float (&own)[kScores]) const {
    uint32_t q[NB][kRegs];
#pragma unroll
    for (int n = 0; n < NB; ++n) load_regs(q[n], my_query + n * kTileBytes);
    if (num_slots) slot_scores(page, q);
    mean_scores(own);
    switch (k_width) {  // the same for the whole warp and for as long as the head stays
      case 0:
        return no_scores(own);
      case 1:
        return score_unit<1>(page, q, own);
      case 2:
        return score_unit<2>(page, q, own);
      case 3:
        return score_unit<3>(page, q, own);
      case 4:
        return score_unit<4>(page, q, own);
      case 5:
        return score_unit<5>(page, q, own);
      default:
        return score_unit<6>(page, q, own);
    }
  }
  // Nothing, of a unit without codes.
  KAKEYA_D void no_scores(float (&own)[kScores]) const {
    float acc[2][NB][4];
#pragma unroll
    for (int n = 0; n < NB; ++n)
#pragma unroll
      for (int k = 0; k < 4; ++k) acc[0][n][k] = acc[1][n][k] = 0.0f;
    uint32_t part = my_part + first_part();
#pragma unroll 1
    for (int pair = 0; pair < 4; ++pair) hand_over(pair, acc, part, own);
  }

  KAKEYA_D uint32_t slot_score_at(int slot, int unit, int row) const {
    return shared + M::kSlotScores + ((slot * S::kWarps + unit) * ROWS + row) * 4;
  }

  // The exact slots' part of this warp's unit. Row g of the product is slot g; what rows beyond the last slot hold does
  // not matter, their token byte says none.
  KAKEYA_D void slot_scores(uint32_t page, const uint32_t (&q)[NB][kRegs]) const {
    const uint32_t a = page + k_slot;
    const float scale = half_low(lds_u16(page + k_slot_scale)) * k_undo;
    const uint4 up = lds_u128(shared + M::kSlotUp + warp * 32), add = lds_u128(shared + M::kSlotUp + warp * 32 + 16);
    uint32_t e[kRegs];
    const auto halves = [](uint32_t word, int pair, uint32_t up, uint32_t add) {
      return half_fma(__byte_perm(word ^ 0x80808080u, 0x64646464u, pair ? 0x4342 : 0x4140), up, add);
    };
    if constexpr (kNarrow) {
      const uint32_t w = lds_u32(a);
      e[0] = halves(w, 0, up.x, add.x), e[1] = halves(w, 1, up.y, add.y);
    } else {
      const uint2 w = lds_u64(a);
      e[0] = halves(w.x, 0, up.x, add.x), e[1] = halves(w.x, 1, up.y, add.y);
      e[2] = halves(w.y, 0, up.z, add.z), e[3] = halves(w.y, 1, up.w, add.w);
    }
#pragma unroll
    for (int n = 0; n < NB; ++n) {
      float acc[4] = {0, 0, 0, 0};
#pragma unroll
      for (int i = 0; i < S::kTiles; ++i) mma(acc, e[2 * i], 0, e[2 * i + 1], 0, q[n][2 * i], q[n][2 * i + 1]);
      const uint32_t s = slot_score_at(g, warp, row_of(n, 0));
      if constexpr (R::kSplit)
        sts_f32(s, (acc[0] + acc[1]) * scale);
      else
        sts_f32x2(s, acc[0] * scale, acc[1] * scale);
    }
  }

  // ---- softmax -----------------------------------------------------------------------------------------------------

  // Adds the other units' partial scores to this warp's own.
  KAKEYA_D void gather(float (&s)[kScores]) const {
    const uint32_t a = my_part + warp * M::kOwnerBytes;
#pragma unroll
    for (int i = 0; i < S::kWarps - 1; ++i) add_floats<kScores>(a + i * M::kPartBytes, s);
  }
  // And those of the page's exact slots whose tokens this warp owns.
  KAKEYA_D void gather_slots(uint32_t page, float (&s)[kScores]) const {
    // A slot's token in steps from the centre, ~ of them below it; without a token far from all.
    const int from = int(lds_u8(page + 8 + lane % kMaxSlots)) - kBlock / 2, steps = from ^ from >> 31;
    const int pair = S::kWarpTiles == 2 ? warp : warp / 2;
    const bool mine = (steps >> 4) == pair && (S::kWarpTiles == 2 || (from < 0) == bool(warp % 2));
    for (uint32_t rest = __ballot_sync(~0u, mine) & ((1u << kMaxSlots) - 1); rest; rest &= rest - 1) {
      const int slot = __ffs(rest) - 1, at = __shfl_sync(~0u, from, slot), row = (at ^ at >> 31) & 15;
      const bool here = (row & 7) == g;
      const int half = row / 8 + (S::kWarpTiles == 2 && at < 0 ? 2 : 0);
#pragma unroll
      for (int n = 0; n < NB; ++n)
#pragma unroll
        for (int c = 0; c < NC; ++c) {
          float x = 0.0f;
#pragma unroll
          for (int u = 0; u < S::kWarps; ++u) x += lds_f32(slot_score_at(slot, u, row_of(n, c)));
#pragma unroll
          for (int h = 0; h < 2 * S::kWarpTiles; ++h) s[(h * NB + n) * NC + c] += here && half == h ? x : 0.0f;
        }
    }
  }

  // Shared address of a token's probabilities, tile n of rows.
  KAKEYA_D uint32_t prob_at(int n, uint32_t token) const { return shared + M::kProb + n * M::kProbTile + token * 16; }

  // Probabilities of this warp's tokens: fp16, and zeros in the columns of low parts. Of an open block (RAW): element
  // type, high parts and what is left, beside them or in tiles of its own.
  template <bool RAW>
  KAKEYA_D void store_probs(const float (&s)[kScores]) const {
    constexpr float unit = RAW ? 1.0f : kScoreUnit;
#pragma unroll
    for (int h = 0; h < 2 * S::kWarpTiles; ++h)
#pragma unroll
      for (int n = 0; n < NB; ++n) {
        float e[2] = {0, 0};
#pragma unroll
        for (int c = 0; c < NC; ++c) e[c] = exp2_fast(fmaf(s[(h * NB + n) * NC + c], unit, -peak[n][c]));
        const uint32_t at = prob_at(n, my_token(h / 2, h % 2)) + t4 * 4;
        if constexpr (!RAW) {
          sts_u32(at, pack_half(e[0], e[1]));
        } else {
          const uint32_t high = is_f16() ? pack_half(e[0], e[1]) : pack_bf16(e[0], e[1]);
          float rest[2];
          rest[0] = e[0] - (is_f16() ? half_low(high) : __uint_as_float(high << 16));
          rest[1] = e[1] - (is_f16() ? half_high(high) : __uint_as_float(high & 0xffff0000u));
          const uint32_t low = is_f16() ? pack_half(rest[0], rest[1]) : pack_bf16(rest[0], rest[1]);
          if constexpr (R::kSplit) {
            sts_u32(at, __byte_perm(high, low, 0x5410));
          } else {
            sts_u32(at, high);
            sts_u32(at + NB * M::kProbTile, low);
          }
        }
      }
  }

  // Exponentials of the gathered scores, which are 1 / kScoreUnit too large where they are not RAW; ends with the
  // barrier after which probabilities may be read.
  template <bool RAW>
  KAKEYA_D void softmax(const float (&s)[kScores]) {
    constexpr float unit = RAW ? 1.0f : kScoreUnit;
    float top[NB][NC];
    bool above = false;
#pragma unroll
    for (int n = 0; n < NB; ++n)
#pragma unroll
      for (int c = 0; c < NC; ++c) {
        top[n][c] = s[n * NC + c];
#pragma unroll
        for (int h = 1; h < 2 * S::kWarpTiles; ++h) top[n][c] = fmaxf(top[n][c], s[(h * NB + n) * NC + c]);
        top[n][c] *= unit;
        above |= top[n][c] > peak[n][c] + kSlack;
      }
    store_probs<RAW>(s);
    if (__syncthreads_or(above)) {
      raise_peak<RAW>(top);
      store_probs<RAW>(s);
      __syncthreads();
    }
  }

  // A new shared maximum for all rows, from this thread's largest scores; sums so far are scaled to it.
  template <bool RAW>
  KAKEYA_D void raise_peak(const float (&top)[NB][NC]) {
    const uint32_t maxima = shared + M::kMax;
#pragma unroll
    for (int n = 0; n < NB; ++n)
#pragma unroll
      for (int c = 0; c < NC; ++c) {
        float x = top[n][c];
#pragma unroll
        for (int k = 4; k < 32; k *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, k));
        if (g == 0) sts_f32(maxima + (warp * ROWS + row_of(n, c)) * 4, x);
      }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < NB; ++n)
#pragma unroll
      for (int c = 0; c < NC; ++c) {
        float x = peak[n][c];
        for (int w = 0; w < S::kWarps; ++w) x = fmaxf(x, lds_f32(maxima + (w * ROWS + row_of(n, c)) * 4));
        const float fade = exp2_fast(peak[n][c] - x);
        peak[n][c] = x;
        sum[n][c] *= fade;
#pragma unroll
        for (int i = 0; i < S::kTiles; ++i) {
          out[n][i][0][c] *= fade, out[n][i][1][c] *= fade;
          if constexpr (RAW) {
            raw[n][i][c] *= fade, raw[n][i][c + 2] *= fade;
            if constexpr (R::kSplit) raw[n][i][1] *= fade, raw[n][i][3] *= fade;
          }
        }
      }
  }

  // ---- values ------------------------------------------------------------------------------------------------------

  // Probabilities of tokens 32 x ... as B operands: registers 2 m and 2 m + 1 are 16 tokens.
  KAKEYA_D void load_probs(uint32_t (&b)[4], int n, int x) const { load_transposed(b, prob_at(n, 32 * x + lane)); }

  // Sums over the block's tokens: of codes, and of probabilities alone.
  template <int W>
  KAKEYA_D void value_unit_sums(uint32_t page, float (&acc)[NB][S::kTiles][4], float (&total)[NB][4]) const {
    constexpr uint32_t ones = 0x3c003c00u;
    constexpr int kEach = kNarrow ? 1 : 2;  // groups of 32 tokens
    uint32_t at = page + v_unit, prob = prob_at(0, lane);
    const auto load = [&](UnitWords(&words)[kEach]) {
#pragma unroll
      for (int e = 0; e < kEach; ++e) words[e] = Dequant<Q, W, kNarrow>::load(at + e * v_stride, v_past, lane);
    };
    UnitWords next[kEach];
    load(next);
#pragma unroll kUnroll
    for (int x = 0, end = kUnroll > 1 ? 4 : int(opaque(4)); x < end; ++x) {  // rolled: a loop to the compiler's eyes
      UnitWords words[kEach];
#pragma unroll
      for (int e = 0; e < kEach; ++e) words[e] = next[e];
      uint32_t b[NB][4];
#pragma unroll
      for (int n = 0; n < NB; ++n) load_transposed(b[n], prob + n * M::kProbTile);
      prob += 32 * 16;
      if (x < 3) at += kEach * v_stride;
      load(next);  // the last time in vain
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        uint32_t f[4][2];
        Dequant<Q, W, kNarrow>::run(f, words[e], v_past.mask, v_gamma, magic);
#pragma unroll
        for (int n = 0; n < NB; ++n) {
          if constexpr (kNarrow) {
            mma(acc[n][0], f[0][0], f[1][0], f[0][1], f[1][1], b[n][0], b[n][1]);
            mma(acc[n][0], f[2][0], f[3][0], f[2][1], f[3][1], b[n][2], b[n][3]);
          } else {
            mma(acc[n][0], f[0][0], f[1][0], f[0][1], f[1][1], b[n][2 * e], b[n][2 * e + 1]);
            mma(acc[n][S::kTiles - 1], f[2][0], f[3][0], f[2][1], f[3][1], b[n][2 * e], b[n][2 * e + 1]);
          }
        }
      }
#pragma unroll
      for (int n = 0; n < NB; ++n) {
        mma(total[n], ones, ones, ones, ones, b[n][0], b[n][1]);
        mma(total[n], ones, ones, ones, ones, b[n][2], b[n][3]);
      }
    }
  }
  // Of a unit without codes.
  KAKEYA_D void value_totals(float (&total)[NB][4]) const {
    constexpr uint32_t ones = 0x3c003c00u;
#pragma unroll 1
    for (int x = 0; x < 4; ++x)
#pragma unroll
      for (int n = 0; n < NB; ++n) {
        uint32_t b[4];
        load_probs(b, n, x);
        mma(total[n], ones, ones, ones, ones, b[0], b[1]);
        mma(total[n], ones, ones, ones, ones, b[2], b[3]);
      }
  }

  KAKEYA_D void values(uint32_t page, uint32_t buffer) {
    float acc[NB][S::kTiles][4], total[NB][4];
#pragma unroll
    for (int n = 0; n < NB; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        total[n][e] = 0.0f;
#pragma unroll
        for (int i = 0; i < S::kTiles; ++i) acc[n][i][e] = 0.0f;
      }
    if (num_slots) value_slots(acc, page);
    switch (v_width) {
      case 0:
        value_totals(total);
        break;
      case 1:
        value_unit_sums<1>(page, acc, total);
        break;
      case 2:
        value_unit_sums<2>(page, acc, total);
        break;
      case 3:
        value_unit_sums<3>(page, acc, total);
        break;
      case 4:
        value_unit_sums<4>(page, acc, total);
        break;
      case 5:
        value_unit_sums<5>(page, acc, total);
        break;
      default:
        value_unit_sums<6>(page, acc, total);
    }
    constexpr int classes = 2 * S::kTiles;
    const uint32_t parameters = shared + M::kValue + buffer * (D * 8) + (value_unit() * 8 + g) * classes * 8;
#pragma unroll
    for (int i = 0; i < S::kTiles; ++i) {
      const uint4 x = lds_u128(parameters + i * 16);
      const float scale[2] = {__uint_as_float(x.x), __uint_as_float(x.z)};
      const float offset[2] = {__uint_as_float(x.y), __uint_as_float(x.w)};
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int n = 0; n < NB; ++n)
#pragma unroll
          for (int e = 0; e < NC; ++e) {
            float &o = out[n][i][r][e];
            o = fmaf(scale[r], acc[n][i][2 * r + e], o);
            o = fmaf(offset[r], total[n][e], o);
          }
    }
#pragma unroll
    for (int n = 0; n < NB; ++n)
#pragma unroll
      for (int e = 0; e < NC; ++e) sum[n][e] += total[n][e];
  }

  // The exact slots: 8 more tokens, whose probabilities are picked from the page's. They are where sums of codes begin.
  KAKEYA_D void value_slots(float (&acc)[NB][S::kTiles][4], uint32_t page) const {
    // Two slots of this lane: where there are fewer, their tokens are none, and any finite numbers will do.
    const uint32_t tokens = lds_u16(page + 8 + 2 * t4), first = tokens & 0xffu, second = tokens >> 8;
    const uint2 scales = lds_u64(page + v_slot_scale);
    uint32_t word[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t a = page + v_slot + i * D;
      word[i] = (kNarrow ? lds_u16(a) : lds_u32(a)) ^ 0x80808080u;
    }
    uint32_t scale = __byte_perm(scales.x, scales.y, 0x7632);
    if (first >= kBlock) scale = 0;
    if (second >= kBlock) scale &= 0xffffu;
    const uint32_t prob[2] = {prob_at(0, first & (kBlock - 1)) + 2 * g, prob_at(0, second & (kBlock - 1)) + 2 * g};
    // Channels' classes in turn, both slots of each; then 1024 + 128 + value, then the value.
    uint32_t e[2 * S::kTiles];
#pragma unroll
    for (int c = 0; c < S::kTiles; ++c) {
      const uint32_t x = __byte_perm(word[0], word[1], c ? 0x7362 : 0x5140);
      e[2 * c] = half_add(__byte_perm(x, 0x64646464u, 0x4140), both(half_constant(-1152, 0)));
      e[2 * c + 1] = half_add(__byte_perm(x, 0x64646464u, 0x4342), both(half_constant(-1152, 0)));
    }
    const uint4 u = lds_u128(shared + M::kSlotUndo + warp * 16);
    const float undo[4] = {__uint_as_float(u.x), __uint_as_float(u.y), __uint_as_float(u.z), __uint_as_float(u.w)};
#pragma unroll
    for (int n = 0; n < NB; ++n) {
      const uint32_t p0 = lds_u16(prob[0] + n * M::kProbTile), p1 = lds_u16(prob[1] + n * M::kProbTile);
      const uint32_t b = half_mul(p0 | p1 << 16, scale);
#pragma unroll
      for (int i = 0; i < S::kTiles; ++i) {
        float x[4] = {0, 0, 0, 0};
        mma_k8(x, e[2 * i], e[2 * i + 1], b);
        // The page's scale turns sums of codes into values; slots are in units of the deviation.
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
          for (int k = 0; k < NC; ++k) acc[n][i][2 * r + k] = x[2 * r + k] * undo[2 * i + r];
      }
    }
  }

  // ---- open blocks -------------------------------------------------------------------------------------------------

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
    float s[kScores];
#pragma unroll
    for (int i = 0; i < kScores; ++i) s[i] = 0.0f;
    {
      uint32_t q[NB][kRegs];
#pragma unroll
      for (int n = 0; n < NB; ++n) load_regs(q[n], shared + M::kRawQuery + my_regs + n * kTileBytes);
      uint32_t part = my_part + first_part();
#pragma unroll 1
      for (int pair = 0; pair < 4; ++pair) {
        float acc[2][NB][4];
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
          for (int n = 0; n < NB; ++n) acc[tile][n][0] = acc[tile][n][1] = acc[tile][n][2] = acc[tile][n][3] = 0.0f;
          uint32_t a[S::kTiles][4];
#pragma unroll
          for (int j = 0; j < S::kTiles; ++j)
#pragma unroll
            for (int r = 0; r < 4; ++r) {
              const int row = tile_token(2 * pair + tile, g + 8 * (r & 1));
              const int channel = warp * S::kUnitChannels + 16 * j + 8 * (r >> 1) + 2 * t4;
              a[j][r] = row < tokens ? *reinterpret_cast<const uint32_t *>(k + row * D + channel) : 0u;
            }
#pragma unroll
          for (int n = 0; n < NB; ++n)
#pragma unroll
            for (int j = 0; j < S::kTiles; ++j)
              mma_element(is_f16(), acc[tile][n], a[j][0], a[j][1], a[j][2], a[j][3], q[n][2 * j], q[n][2 * j + 1]);
        }
        hand_over(pair, acc, part, s);
      }
    }
    __syncthreads();
    gather(s);
    const float unit = p.scale * 1.4426950408889634f;
#pragma unroll
    for (int h = 0; h < 2 * S::kWarpTiles; ++h) {
      const int token = my_token(h / 2, h % 2);
#pragma unroll
      for (int n = 0; n < NB; ++n)
#pragma unroll
        for (int e = 0; e < NC; ++e) {
          float &x = s[(h * NB + n) * NC + e];
          x *= unit;
          if (index * kBlock + token > history + (chunk_row + row_of(n, e)) / p.group || token >= tokens) x = -INFINITY;
        }
    }
    softmax<true>(s);
    // Row g of a tile is channel 2g, row g + 8 channel 2g + 1, so that a lane loads pairs of channels.
#pragma unroll
    for (int n = 0; n < R::kMeanTiles; ++n) {
      float total[4] = {0, 0, 0, 0};
      const uint32_t ones = is_f16() ? 0x3c003c00u : 0x3f803f80u;
#pragma unroll 1
      for (int m = 0; m < 8; ++m) {
        uint32_t x4[4];
        load_probs(x4, n, m / 2);
        const uint32_t b[2] = {m % 2 ? x4[2] : x4[0], m % 2 ? x4[3] : x4[1]};
        mma_element(is_f16(), total, ones, ones, ones, ones, b[0], b[1]);
        const int token = 16 * m + 2 * t4;
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
                      __byte_perm(x[2], x[3], 0x5410), __byte_perm(x[2], x[3], 0x7632), b[0], b[1]);
        }
      }
      if constexpr (R::kSplit) {
        sum[0][0] += total[0] + total[1];
      } else {
        sum[n % NB][0] += total[0];
        sum[n % NB][NC - 1] += total[1];
      }
    }
    __syncthreads();  // the next block's scores and probabilities may be written
  }

  // ---- results -----------------------------------------------------------------------------------------------------

  static constexpr int kRecord = ROWS * (D + 2);
  static constexpr int kLane = D / 32;  // channels of a lane

  // Writes the segment's result: to `out` if it is all of the item, else to the workspace, where the last block to
  // arrive merges the parts.
  KAKEYA_D void flush(const AttendCursor &c, bool whole, int item_begin, int item_end) {
    const uint32_t coded = shared + M::kCoded, plain = shared + M::kPlain, totals = shared + M::kTotals;
    const uint16_t *order = head_view(t, p.layer, p.first_head + c.head).v.order + value_unit() * S::kUnitChannels;
    __syncthreads();
#pragma unroll
    for (int n = 0; n < NB; ++n)
#pragma unroll
      for (int e = 0; e < NC; ++e) {
        const int row = row_of(n, e);
#pragma unroll
        for (int i = 0; i < S::kTiles; ++i)
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            sts_f32(coded + (row * D + order[16 * i + 8 * r + g]) * 4, out[n][i][r][e]);
            sts_f32(plain + (row * D + value_unit() * S::kUnitChannels + 16 * i + 2 * g + r) * 4,
                    R::kSplit ? raw[n][i][2 * r] + raw[n][i][2 * r + 1] : raw[n][i][2 * r + e]);
          }
        if (warp == 0 && g == 0) sts_f32x2(totals + row * 8, peak[n][e], sum[n][e]);
      }
    __syncthreads();
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
      const float maximum = lds_f32(totals + row * 8), total = lds_f32(totals + row * 8 + 4);
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
    // The barrier and one thread's release make all of the block's results visible to whom its count reaches.
    __syncthreads();
    const uint32_t flag = shared + M::kFlag;
    if (thread == 0) {
      int *counter = p.counters + (int64_t(blockIdx.y) * p.num_seqs * p.num_kv_heads + item);
      int before;
      asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
      const bool done = before == last - first;
      if (done) *counter = 0;
      sts_u32(flag, done);
    }
    __syncthreads();
    if (!lds_u32(flag)) return;
    const float *base = p.workspace + (blockIdx.y * records + item) * kRecord;
    for (int row = warp; row < rows; row += S::kWarps) {
      const float *totals = base + ROWS * D + 2 * row, *sums = base + row * D + kLane * lane;
      float maximum = kNoScore;
      for (int b = first + lane; b <= last; b += 32) maximum = fmaxf(maximum, __ldcg(totals + int64_t(b) * kRecord));
#pragma unroll
      for (int k = 1; k < 32; k *= 2) maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, k));
      float x[kLane], total_weight = 0.0f;
#pragma unroll
      for (int i = 0; i < kLane; ++i) x[i] = 0.0f;
      for (int b = first; b <= last; b += 32) {
        // A part a lane; then all lanes walk over the parts, many loads at a time.
        const bool mine = b + lane <= last;
        const float2 part = mine ? load_two(totals + int64_t(b + lane) * kRecord) : make_float2(kNoScore, 0.0f);
        const float weight = mine ? exp2_fast(part.x - maximum) : 0.0f;
        total_weight += weight * part.y;
        const int count = min(32, last - b + 1);
#pragma unroll 8
        for (int i = 0; i < count; ++i) {
          float y[kLane];
          load_lane_sums(y, sums + int64_t(b + i) * kRecord);
          const float w = __shfl_sync(~0u, weight, i);
#pragma unroll
          for (int k = 0; k < kLane; ++k) x[k] = fmaf(w, y[k], x[k]);
        }
      }
#pragma unroll
      for (int k = 1; k < 32; k *= 2) total_weight += __shfl_xor_sync(~0u, total_weight, k);
      write_row(c, row, x, 1.0f / total_weight);
    }
  }
  // Past L1, which knows nothing of other blocks' results.
  static KAKEYA_D float2 load_two(const float *at) { return __ldcg(reinterpret_cast<const float2 *>(at)); }
  static KAKEYA_D void load_lane_sums(float (&y)[kLane], const float *at) {
    if constexpr (kLane == 2) {
      const float2 v = load_two(at);
      y[0] = v.x, y[1] = v.y;
    } else {
#pragma unroll
      for (int i = 0; i < kLane; i += 4) {
        const float4 v = __ldcg(reinterpret_cast<const float4 *>(at + i));
        y[i] = v.x, y[i + 1] = v.y, y[i + 2] = v.z, y[i + 3] = v.w;
      }
    }
  }

  KAKEYA_D int total_units() const { return cumulative[p.num_seqs] * p.num_kv_heads; }
  // Thread blocks that have units: all, or one a unit. None between two of an item's is idle, so merge() can count.
  KAKEYA_D int64_t working_blocks() const { return min(int64_t(gridDim.x), int64_t(total_units())); }

  // ---- all of it ---------------------------------------------------------------------------------------------------

  KAKEYA_D void load_table() {
    const uint4 *at = t.at<uint4>(t.offsets) + (warp * S::kWarpTiles / 2 * S::kPairSteps * 32 + lane) * 2;
#pragma unroll
    for (int s = 0; s < S::kPairSteps; ++s)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint4 x = __ldg(at + s * 64 + i);
        table[s][i][0] = x.x, table[s][i][1] = x.y, table[s][i][2] = x.z, table[s][i][3] = x.w;
      }
  }

  KAKEYA_D void run() {
    const int64_t total = total_units(), blocks = working_blocks();
    if (blockIdx.x >= blocks) return;
    begin = int(total * blockIdx.x / blocks);
    end = int(total * (blockIdx.x + 1) / blocks);
    if (calibrated && thread < 16) sts_f32(shared + M::kFactors + 4 * thread, t.at<float>(t.factors)[thread]);
    if (thread < 4) sts_u32(shared + M::kZero + 4 * thread, 0);
#if KAKEYA_BULK
    if (thread == 0) {
      for (int i = 0; i < stages; ++i) barrier_init(shared + M::kBarriers + 8 * i, 1);
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
      fetch_begin();
      for (int i = 0; i + 1 < stages; ++i) fetch_page();
    }
#else
    fetch_begin();
    for (int i = 0; i + 1 < stages; ++i) fetch_page();
#endif
    // Nobody waits here for the first transfers to be under way: segment() does, with its own loads on their way.
    load_table();
    magic = opaque(0x64006400u);
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

  // Waits for the next page and prepares it; tells where it is.
  template <bool CALIBRATED>
  KAKEYA_D uint32_t next_page(int &stage, uint32_t &parity, uint32_t buffer) {
    await_page(stage, parity);
#if !KAKEYA_BULK
    __syncthreads();
#endif
    const uint32_t page = stage_at(stage);
    prepare<CALIBRATED>(page, buffer);
    if (++stage == stages) stage = 0, parity ^= 1;
    return page;
  }

  // Units [c.unit, c.unit + count) of one item. `stage` and `parity` tell where its first sealed page is, and are moved
  // on.
  template <bool CALIBRATED>
  KAKEYA_D void segment(const AttendCursor &c, int count, int at, int &stage, uint32_t &parity) {
    begin_segment(c);
    __syncthreads();  // barriers and constants of run() are there
    int left = max(0, int(opaque(min(c.unit + count, c.pages) - c.unit)));
    uint32_t buffer = 0, page = 0;
    if (left) page = next_page<CALIBRATED>(stage, parity, 0);
    __syncthreads();
    while (left) {
      float s[kScores];
      scores(page, s);
      __syncthreads();
      // All warps are done with the page before: its stage takes the next transfer.
#if KAKEYA_BULK
      if (thread == 0) fetch_page();
#else
      fetch_page();
#endif
      gather(s);
      gather_slots(page, s);
      const uint32_t now = page;
      if (--left) page = next_page<CALIBRATED>(stage, parity, buffer ^ 1);
      softmax<false>(s);
      values(now, buffer);
      buffer ^= 1;
    }
#pragma unroll
    for (int n = 0; n < NB; ++n)
#pragma unroll
      for (int i = 0; i < S::kTiles; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) raw[n][i][e] = 0.0f;
    if (c.unit + count > c.pages) {
      __syncthreads();  // other warps may still read the last page's probabilities, whose memory partial scores share
      prepare_raw(c);
    }
    for (int u = max(c.unit, c.pages); u < c.unit + count; ++u) {
      __syncthreads();
      open_block(c, u);
    }
    const int item_begin = at - c.unit;
    flush(c, count == c.units, item_begin, item_begin + c.units);
  }
};

}  // namespace kakeya
