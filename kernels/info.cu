// Sizes that the host side checks or needs: crates/ffi/src/kernels.rs reads them when it loads the kernels, as it does
// kakeya_attend_info.
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
    uint32_t(seal_shared_bytes(96)),
    uint32_t(seal_shared_bytes(128)),
    uint32_t(seal_shared_bytes(256)),
    uint32_t(open_shared_bytes(64)),
    uint32_t(open_shared_bytes(96)),
    uint32_t(open_shared_bytes(128)),
    uint32_t(open_shared_bytes(256)),
};

}  // namespace kakeya
