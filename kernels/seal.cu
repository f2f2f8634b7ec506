// Sealing on the GPU: one thread block seals one (block, KV head) from bf16 keys and values. seal.cuh has the
// arithmetic, phase by phase; here the threads of a phase run at once. Compile with -fmad=false: page bytes equal the
// codec's.
#include <cuda_bf16.h>

#include "seal.cuh"

namespace kakeya {

// One block to seal: its first token in k and v, its index in the sequence, its pages (head h at page + h *
// head_stride).
struct SealBlock {
  int64_t first_token;
  int32_t block_index;
  int32_t reserved;
  uint8_t *page;
};

struct SealParams {
  const Tables *tables;
  const __nv_bfloat16 *k, *v;
  int64_t token_stride, head_stride;  // elements
  int64_t page_head_stride;           // bytes
  int32_t layer, first_head;
  const SealBlock *blocks;
  uint32_t *status;  // set to kSealNonFinite where a value was refused; may be shared by all launches
};

// Grid (blocks, heads); dynamic shared memory 128 * head_dim * 4 bytes.
extern "C" __global__ void __launch_bounds__(kSealThreads) kakeya_seal_bf16(SealParams p) {
  extern __shared__ float rows[];
  __shared__ SealState state;
  if (threadIdx.x == 0) state.rows = rows;
  __syncthreads();
  const SealBlock b = p.blocks[blockIdx.x];
  const int head = int(blockIdx.y);
  const SealJob job = {p.tables, p.layer, p.first_head + head, b.block_index, b.page + head * p.page_head_stride};
  const int64_t base = b.first_token * p.token_stride + head * p.head_stride;
  const bool ok = seal_block(
      job, state, [&](int j, int i) { return __bfloat162float(p.k[base + j * p.token_stride + i]); },
      [&](int j, int i) { return __bfloat162float(p.v[base + j * p.token_stride + i]); },
      [&](auto phase) {
        phase(int(threadIdx.x));
        __syncthreads();
      });
  if (!ok && threadIdx.x == 0) atomicExch(p.status, uint32_t(kSealNonFinite));
}

}  // namespace kakeya
