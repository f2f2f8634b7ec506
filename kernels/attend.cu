// The attention kernels: head_dim x quantiser x query rows a pass. Grid: x any number of blocks (as many as fit on the
// device at once), y passes of kRows rows over the largest number of rows of a sequence. Dynamic shared memory:
// AttendShared::kStages + stages * (page_bytes + 8 * pairs), with 5 to 8 stages.
#include "attend.cuh"

namespace kakeya {

template <int D, int Q, int ROWS>
constexpr int blocks_per_sm() {
  return D == 256 || ROWS == 16 ? 1 : 2;
}

#define KAKEYA_ATTEND(D, Q, NAME, ROWS)                                                                      \
  extern "C" __global__ void __launch_bounds__(AttendShape<D>::kThreads, (blocks_per_sm<D, Q, ROWS>()))      \
      kakeya_attend_d##D##_##NAME##_r##ROWS(const __grid_constant__ AttendParams p, uint32_t stages) {       \
    extern __shared__ __align__(128) uint8_t memory[];                                                       \
    Attend<D, Q, ROWS>(p, memory, stages, lane_index()).run();                                                             \
  }
#define KAKEYA_ATTEND_ROWS(D, Q, NAME) \
  KAKEYA_ATTEND(D, Q, NAME, 4)         \
  KAKEYA_ATTEND(D, Q, NAME, 8)         \
  KAKEYA_ATTEND(D, Q, NAME, 16)
#define KAKEYA_ATTEND_ALL(D)              \
  KAKEYA_ATTEND_ROWS(D, kUniform, uniform) \
  KAKEYA_ATTEND_ROWS(D, kCubic, cubic)     \
  KAKEYA_ATTEND_ROWS(D, kTrellis, trellis)

// One head_dim a translation unit, so that they compile at the same time.
#if !defined(KAKEYA_HEAD_DIM) || KAKEYA_HEAD_DIM == 64
KAKEYA_ATTEND_ALL(64)
#endif
#if !defined(KAKEYA_HEAD_DIM) || KAKEYA_HEAD_DIM == 128
KAKEYA_ATTEND_ALL(128)
#endif
#if !defined(KAKEYA_HEAD_DIM) || KAKEYA_HEAD_DIM == 256
KAKEYA_ATTEND_ALL(256)
#endif

}  // namespace kakeya
