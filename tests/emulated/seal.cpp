// kakeya_plan, kakeya_append, kakeya_seal and kakeya_open without a GPU: tests/gpu/seal.cu, threads emulated
// (emulation.h). Sealing as before compute capability 9.0: two thread blocks a page that do not talk.
#include "emulation.h"

namespace kakeya {
namespace {
alignas(128) thread_local uint8_t shared[emulated::kSharedBytes];
const bool shared_is_set = (emulated::dynamic_shared = shared, true);
}  // namespace
}  // namespace kakeya

#include "../gpu/seal.cu"
