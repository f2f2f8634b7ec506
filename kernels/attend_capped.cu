// The attention kernels for scores with a soft cap (AttendParams::soft_cap): 4 or 16 rows a pass. In a file of their
// own, so that nothing of them reaches the code of the others. Launched as the kernels of attend.cu for as many rows,
// whose kakeya_attend_info is theirs too, with a third parameter: `record_rows`, the rows that a partial result has
// room for, a multiple of 4. That is as many as the kernel has, or as its one pass has rows at most: the workspace is
// then no larger than that of the kernel for so few rows without a cap.
#include "attend.cuh"

namespace kakeya {

#define KAKEYA_ATTEND_CAPPED(D, Q, NAME, ROWS)                                                                \
  extern "C" __global__ void __launch_bounds__(AttendShape<D>::kThreads, (blocks_per_sm<D, Q, ROWS>()))       \
      kakeya_attend_d##D##_##NAME##_r##ROWS##_capped(const __grid_constant__ AttendParams p, uint32_t stages, \
                                                     uint32_t record_rows) {                                  \
    extern __shared__ __align__(128) uint8_t memory[];                                                        \
    Attend<D, Q, ROWS, true>(p, memory, stages, record_rows, lane_index()).run();                             \
  }
#define KAKEYA_ATTEND_CAPPED_ROWS(D, Q, NAME) \
  KAKEYA_ATTEND_CAPPED(D, Q, NAME, 4)         \
  KAKEYA_ATTEND_CAPPED(D, Q, NAME, 16)
#define KAKEYA_ATTEND_CAPPED_ALL(D)               \
  KAKEYA_ATTEND_CAPPED_ROWS(D, kUniform, uniform) \
  KAKEYA_ATTEND_CAPPED_ROWS(D, kCubic, cubic)     \
  KAKEYA_ATTEND_CAPPED_ROWS(D, kTrellis, trellis)

#if !defined(KAKEYA_HEAD_DIM) || KAKEYA_HEAD_DIM == 64
KAKEYA_ATTEND_CAPPED_ALL(64)
#endif
#if !defined(KAKEYA_HEAD_DIM) || KAKEYA_HEAD_DIM == 96
KAKEYA_ATTEND_CAPPED_ALL(96)
#endif
#if !defined(KAKEYA_HEAD_DIM) || KAKEYA_HEAD_DIM == 128
KAKEYA_ATTEND_CAPPED_ALL(128)
#endif
#if !defined(KAKEYA_HEAD_DIM) || KAKEYA_HEAD_DIM == 256
KAKEYA_ATTEND_CAPPED_ALL(256)
#endif

}  // namespace kakeya
