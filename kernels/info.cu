// Sizes that the host side checks or needs: crates/ffi/src/kernels.rs reads them when it loads the kernels.
#include "attend.cuh"
#include "open.cuh"
#include "params.cuh"
#include "seal.cuh"

namespace kakeya {

extern "C" __device__ uint32_t kakeya_info[] = {
    sizeof(PlanParams),
    sizeof(AppendParams),
    sizeof(SealParams),
    sizeof(OpenParams),
    sizeof(AttendParams),
    sizeof(Tables),
    // Dynamic shared memory of sealing and opening, by head_dim.
    uint32_t(seal_shared_bytes(64)),
    uint32_t(seal_shared_bytes(128)),
    uint32_t(seal_shared_bytes(256)),
    uint32_t(open_shared_bytes(64)),
    uint32_t(open_shared_bytes(128)),
    uint32_t(open_shared_bytes(256)),
    // Shared memory of attention before its stages, by head_dim and rows a pass.
    AttendShared<64, 4>::kStages,
    AttendShared<64, 8>::kStages,
    AttendShared<64, 16>::kStages,
    AttendShared<128, 4>::kStages,
    AttendShared<128, 8>::kStages,
    AttendShared<128, 16>::kStages,
    AttendShared<256, 4>::kStages,
    AttendShared<256, 8>::kStages,
    AttendShared<256, 16>::kStages,
};

}  // namespace kakeya
