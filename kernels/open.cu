// kakeya_open: pages into dense rows, a thread block for each (block, KV head, stream). Compile with -fmad=false: the
// codec's numbers.
#include "open.cuh"

#include "elements.cuh"
#include "params.cuh"

namespace kakeya {
namespace {

template <typename T, int D, bool K>
__device__ __forceinline__ void open_rows(const OpenParams &p, OpenState<D> &s) {
  const int index = int(blockIdx.x), head = int(blockIdx.y);
  const int64_t token_stride = K ? p.k_token_stride : p.v_token_stride;
  const int64_t head_stride = K ? p.k_head_stride : p.v_head_stride;
  T *out = static_cast<T *>(K ? p.k : p.v);
  const bool aligned = aligned_rows(out, token_stride, head_stride);
  out += int64_t(index) * kBlock * token_stride + head * head_stride;
  const uint8_t *page = p.pages + p.blocks[index] * p.page_block_stride + head * p.page_head_stride;
  open_stream<D, K>(
      {p.tables, p.layer, p.first_head + head, page}, s,
      [&](int j, int i, const float *x) {
        Eight<T> y;
        KAKEYA_UNROLL
        for (int k = 0; k < 8; ++k) y.x[k] = narrow<T>(x[k]);
        store8(out + j * token_stride + i, y, aligned);
      },
      [](auto phase) {
        phase(int(threadIdx.x));
        __syncthreads();
      });
}

template <typename T>
__device__ __forceinline__ void open(const OpenParams &p) {
  extern __shared__ __align__(16) uint8_t shared[];
  with_head_dim(p.tables->head_dim, [&](auto unit) {
    constexpr int D = decltype(unit)::head_dim;
    OpenState<D> &s = *reinterpret_cast<OpenState<D> *>(shared);
    if (blockIdx.z == 0)
      open_rows<T, D, true>(p, s);
    else
      open_rows<T, D, false>(p, s);
  });
}

}  // namespace

// Grid (num_blocks, num_kv_heads, 2) of kSealThreads; dynamic shared memory open_shared_bytes(head_dim).
extern "C" __global__ void __launch_bounds__(kSealThreads, 2) kakeya_open_bf16(OpenParams p) {
  open<__nv_bfloat16>(p);
}
extern "C" __global__ void __launch_bounds__(kSealThreads, 2) kakeya_open_f16(OpenParams p) {
  open<__half>(p);
}

}  // namespace kakeya
