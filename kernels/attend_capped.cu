// The attention kernels for scores with a soft cap (AttendParams::soft_cap): 16 rows a pass, which has registers to
// spare. In a file of their own, so that nothing of them reaches the code of the others. Launched as the kernels of
// attend.cu for 16 rows, whose kakeya_attend_info is theirs too, with a third parameter: `record_rows`, the rows that a
// partial result has room for, a multiple of 4. That is 16, or as many as the one pass has rows at most: the workspace
// is then no larger than that of the kernel for so few rows without a cap.
#include "attend.cuh"

namespace kakeya {

#define KAKEYA_ATTEND_CAPPED(D, Q, NAME)                                                                \
  extern "C" __global__ void __launch_bounds__(AttendShape<D>::kThreads, (blocks_per_sm<D, Q, 16>()))   \
      kakeya_attend_d##D##_##NAME##_r16_capped(const __grid_constant__ AttendParams p, uint32_t stages, \
                                               uint32_t record_rows) {                                  \
    extern __shared__ __align__(128) uint8_t memory[];                                                  \
    Attend<D, Q, 16, true>(p, memory, stages, record_rows, lane_index()).run();                         \
  }
#define KAKEYA_ATTEND_CAPPED_ALL(D)          \
  KAKEYA_ATTEND_CAPPED(D, kUniform, uniform) \
  KAKEYA_ATTEND_CAPPED(D, kCubic, cubic)     \
  KAKEYA_ATTEND_CAPPED(D, kTrellis, trellis)

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
