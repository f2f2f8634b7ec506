// The attention kernels: head_dim x quantiser x query rows a pass. Grid: x any number of blocks (as many as fit on the
// device at once), y passes of kRows rows over the largest number of rows of a sequence. Dynamic shared memory:
// AttendShared::kFixed + stages * page_bytes, with 3 to 8 stages. Scores with a soft cap: attend_capped.cu.
#include "attend.cuh"

namespace kakeya {

#define KAKEYA_ATTEND(D, Q, NAME, ROWS)                                                                 \
  extern "C" __global__ void __launch_bounds__(AttendShape<D>::kThreads, (blocks_per_sm<D, Q, ROWS>())) \
      kakeya_attend_d##D##_##NAME##_r##ROWS(const __grid_constant__ AttendParams p, uint32_t stages) {  \
    extern __shared__ __align__(128) uint8_t memory[];                                                  \
    Attend<D, Q, ROWS, false>(p, memory, stages, ROWS, lane_index()).run();                             \
  }
#define KAKEYA_ATTEND_ROWS(D, Q, NAME) \
  KAKEYA_ATTEND(D, Q, NAME, 4)         \
  KAKEYA_ATTEND(D, Q, NAME, 8)         \
  KAKEYA_ATTEND(D, Q, NAME, 16)
#define KAKEYA_ATTEND_ALL(D)               \
  KAKEYA_ATTEND_ROWS(D, kUniform, uniform) \
  KAKEYA_ATTEND_ROWS(D, kCubic, cubic)     \
  KAKEYA_ATTEND_ROWS(D, kTrellis, trellis)

// One head_dim a translation unit, so that they compile at the same time.
#if !defined(KAKEYA_HEAD_DIM) || KAKEYA_HEAD_DIM == 64
KAKEYA_ATTEND_ALL(64)
#endif
#if !defined(KAKEYA_HEAD_DIM) || KAKEYA_HEAD_DIM == 96
KAKEYA_ATTEND_ALL(96)
#endif
#if !defined(KAKEYA_HEAD_DIM) || KAKEYA_HEAD_DIM == 128
KAKEYA_ATTEND_ALL(128)
#endif
#if !defined(KAKEYA_HEAD_DIM) || KAKEYA_HEAD_DIM == 256
KAKEYA_ATTEND_ALL(256)
#endif

// What a launcher has to know of each (head_dim, quantiser, rows), for it to read from the module.
//   blocks of the grid's x    blocks_per_sm x multiprocessors
//   stages                    as many as fit (at least min_stages, at most 8 are of use) into the multiprocessor's
//                             shared memory / blocks_per_sm - 1 KiB, each page_bytes, after fixed_shared
//   workspace, floats         passes x (blocks + sequences x KV heads) x rows x (head_dim + 2)
//   counters, int32           passes x sequences x KV heads, zero before the first launch
struct AttendInfo {
  int32_t head_dim, quantizer, rows, threads, fixed_shared, blocks_per_sm, min_stages;
};

template <int D, int Q, int ROWS>
constexpr AttendInfo attend_info() {
  return {D, Q, ROWS, AttendShape<D>::kThreads, AttendShared<D, ROWS>::kFixed, blocks_per_sm<D, Q, ROWS>(), 3};
}

#define KAKEYA_INFO_ROWS(D, Q) attend_info<D, Q, 4>(), attend_info<D, Q, 8>(), attend_info<D, Q, 16>()
#define KAKEYA_INFO(D) KAKEYA_INFO_ROWS(D, kUniform), KAKEYA_INFO_ROWS(D, kCubic), KAKEYA_INFO_ROWS(D, kTrellis)

extern "C" __device__ const AttendInfo kakeya_attend_info[] = {
#if !defined(KAKEYA_HEAD_DIM) || KAKEYA_HEAD_DIM == 64
    KAKEYA_INFO(64),
#endif
#if !defined(KAKEYA_HEAD_DIM) || KAKEYA_HEAD_DIM == 96
    KAKEYA_INFO(96),
#endif
#if !defined(KAKEYA_HEAD_DIM) || KAKEYA_HEAD_DIM == 128
    KAKEYA_INFO(128),
#endif
#if !defined(KAKEYA_HEAD_DIM) || KAKEYA_HEAD_DIM == 256
    KAKEYA_INFO(256),
#endif
};

}  // namespace kakeya
