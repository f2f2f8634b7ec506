// What the attention kernels are compiled for: shapes, query rows, and where things lie in shared memory.
#pragma once

#include "params.cuh"

namespace kakeya {

enum Quantizer : int { kUniform = 0, kCubic = 1, kTrellis = 2 };

// Factor of the table of in-block offsets, as crates/codec/src/fragments.rs makes it. Uniform scores come out 2^-20 too
// small (Attend::kScoreUnit): 2^-13 keeps the table's values exact, the coefficients take the other 2^-7. Others come
// out 32 times too large.
KAKEYA_HD constexpr float table_scale(Quantizer quantizer) {
  return quantizer == kUniform ? 1.0f / 8192.0f : 32.0f;
}

// Scores are in units of log2; a probability may exceed the shared maximum by this before all warps agree on a new one:
// 2^8 and its sums stay far inside fp16.
constexpr float kSlack = 8.0f;
constexpr float kNoScore = -1e30f;
// fp16 range with a margin; larger queries would need scores beyond any softmax.
constexpr float kHalfMax = 60000.0f;

template <int D>
struct AttendShape {
  static constexpr int kUnits = D == 256 ? 8 : D == 96 ? 3 : 4;
  static constexpr int kUnitChannels = D / kUnits;
  static constexpr int kUnitTokens = 512 / kUnitChannels;
  // A warp for each unit. Three cannot share eight tiles evenly: at head_dim 96 a fourth has tiles, but no unit.
  static constexpr int kWarps = D == 96 ? 4 : kUnits, kThreads = 32 * kWarps;
  static constexpr int kGroups = kBlock / kUnitTokens;  // token groups of a block
  static constexpr int kTiles = kUnitChannels / 16;     // 16-channel tiles of a unit
  static constexpr int kPairs = D / 2;
  static constexpr int kPairSteps = kPairs / 16;  // products of 16 channel pairs that the mean takes, twice
  static constexpr int kWarpTiles = 8 / kWarps;   // tiles of 16 tokens whose softmax a warp owns
  // Threads that prepare a channel pair; a warp without a unit has none.
  static constexpr int kPairThreads = 32 * kUnits / kPairs;
  static constexpr int kStats = 4 / kPairThreads;  // statistics of a thread: of two K and two V channels a pair
};

template <int ROWS>
struct AttendRows {
  static constexpr bool kSplit = ROWS == 4;                   // odd columns carry low parts
  static constexpr int kColumns = kSplit ? 1 : 2;             // rows of a thread's two columns
  static constexpr int kTiles = ROWS == 16 ? 2 : 1;           // 8-column tiles of the products with codes
  static constexpr int kMeanTiles = kSplit ? 1 : 2 * kTiles;  // high parts, then low parts
};

// Registers and shared memory of a multiprocessor: 16 warps of 128 registers at most, fewer where more rows need more.
// Uniform codes at head_dim 128 gain more by 12 warps with more registers, and all at 256 by 8 of them: none spills.
template <int D, int Q, int ROWS>
constexpr int blocks_per_sm() {
  if (D == 256) return 1;
  if (ROWS == 4) return Q == kUniform && D == 128 ? 3 : 4;
  return ROWS == 8 ? 3 : 2;
}

// Shared memory, bytes from its start.
template <int D, int ROWS>
struct AttendShared {
  using S = AttendShape<D>;
  using R = AttendRows<ROWS>;
  // Partial scores, f32 [owner][kWarps - 1][lane][kLaneScores]: an owner keeps its own unit's in registers.
  static constexpr int kLaneScores = S::kWarpTiles * 2 * R::kColumns * R::kTiles;
  static constexpr int kPart = 0, kPartBytes = 128 * kLaneScores, kOwnerBytes = (S::kWarps - 1) * kPartBytes;
  static constexpr int kProb = kPart + S::kWarps * kOwnerBytes;  // f16 [tile of rows][token][8]
  static constexpr int kProbTile = kBlock * 16;
  static constexpr int kSlotScores = kProb + R::kMeanTiles * kProbTile;  // f32 [slot][unit][row]
  // f16 registers of the query [tile][unit][lane][..]; with split columns of the even columns' lanes only.
  static constexpr int kQuery = kSlotScores + kMaxSlots * S::kUnits * ROWS * 4;
  static constexpr int kQueryBytes = R::kSplit ? D * 4 * 2 : R::kTiles * D * 8 * 2;
  static constexpr int kMean = kQuery + kQueryBytes;  // f16 [tile][unit][lane][..]
  static constexpr int kMeanBytes = R::kMeanTiles * D * 8 * 2;
  static constexpr int kValue = kMean + kMeanBytes;     // 2 x {scale, offset} f32 [unit][row of lanes][class]
  static constexpr int kFactors = kValue + 2 * D * 8;   // f32 [16]
  static constexpr int kMax = kSlotScores;              // f32 [warp][ROWS]: slots' scores have been gathered by then
  static constexpr int kConstants = kFactors + 16 * 4;  // u32 [warp][12]: AttendWarp::constants
  static constexpr int kZero = kConstants + S::kWarps * 48;  // 16 bytes: the odd columns of a split query
  static constexpr int kOrder = kZero + 16;                  // u8 [warp][kUnitChannels]: V's channels in code order
  static constexpr int kBarriers = kOrder + S::kWarps * 32;  // u64 [8]
  static constexpr int kFlag = kBarriers + 64;
  static constexpr int kHidden = kFlag + 4;  // rows, from the item's first on, that do not read its last page
  static constexpr int kFetch = kFlag + 16;  // AttendFetch
  static constexpr int kStages = (kFetch + 64 + 127) / 128 * 128;  // pages
  static constexpr int kFixed = kStages + D;  // beside the pages; behind the last, what a clamped slot may reach
  // Open blocks come after a segment's pages: element [tile][unit][lane][..] over the query's and the mean's registers.
  static constexpr int kRawQuery = kQuery;
  static_assert(R::kTiles * D * 8 * 2 <= kQueryBytes + kMeanBytes, "the raw query fits");
  // A segment's result over the partial scores: sums in Hadamard space, raw sums, maximum and total.
  static constexpr int kCoded = kPart, kPlain = kCoded + ROWS * D * 4, kTotals = kPlain + ROWS * D * 4;
  static_assert(kTotals + ROWS * 8 <= kSlotScores, "results fit");
};

// Token of row r of a block's tile `tile` in the order of K's codes.
KAKEYA_HD constexpr int tile_token(int tile, int row) {
  return tile & 1 ? 63 - 8 * (tile - 1) - row : 64 + 8 * tile + row;
}

}  // namespace kakeya
