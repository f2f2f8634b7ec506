// kakeya_plan and kakeya_append; params.cuh has their arguments.
#include "overlap.cuh"
#include "step.cuh"

namespace kakeya {
namespace {

// Sum of `x` over the threads before this one, and over all; one barrier pair. `shared`: 33 values.
__device__ int2 scan(int2 x, int2 *shared, int2 &total) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  int2 sum = x;
  for (int d = 1; d < 32; d *= 2) {
    const int a = __shfl_up_sync(~0u, sum.x, d), b = __shfl_up_sync(~0u, sum.y, d);
    if (lane >= d) sum.x += a, sum.y += b;
  }
  if (lane == 31) shared[warp] = sum;
  __syncthreads();
  if (warp == 0) {
    int2 w = shared[lane];
    for (int d = 1; d < 32; d *= 2) {
      const int a = __shfl_up_sync(~0u, w.x, d), b = __shfl_up_sync(~0u, w.y, d);
      if (lane >= d) w.x += a, w.y += b;
    }
    shared[lane] = w;
  }
  __syncthreads();
  total = shared[31];
  const int2 before = warp ? shared[warp - 1] : make_int2(0, 0);
  __syncthreads();
  return make_int2(before.x + sum.x - x.x, before.y + sum.y - x.y);
}

}  // namespace

// One thread block of kPlanThreads.
extern "C" __global__ void __launch_bounds__(kPlanThreads) kakeya_plan(PlanParams p) {
  __shared__ int2 shared[32];
  __shared__ int first_task[kPlanThreads];
  const int thread = int(threadIdx.x);
  int32_t *cumulative = p.plan + plan_cumulative(p.max_tasks);
  SealTask *tasks = reinterpret_cast<SealTask *>(p.plan + 4);
  int2 base = make_int2(0, 0);
  for (int first = 0; first < p.num_seqs; first += kPlanThreads) {
    const int s = first + thread;
    SequenceWork w = {0, 0, 0, 0, 0};
    if (s < p.num_seqs) w = sequence_work(p.query_start[s + 1] - p.query_start[s], p.seq_lens[s], p.max_query);
    int2 total;
    const int2 at = scan(make_int2(w.tasks, w.units), shared, total);
    if (s < p.num_seqs) cumulative[s] = base.y + at.y;
    first_task[thread] = base.x + at.x;
    __syncthreads();
    // A warp writes a sequence's tasks: a long prompt has hundreds.
    const int here = p.num_seqs - first < kPlanThreads ? p.num_seqs - first : kPlanThreads;
    for (int i = thread / 32; i < here; i += kPlanThreads / 32) {
      const int q = first + i;
      const SequenceWork x = sequence_work(p.query_start[q + 1] - p.query_start[q], p.seq_lens[q], p.max_query);
      for (int k = thread % 32; k < x.tasks; k += 32)
        if (first_task[i] + k < p.max_tasks) tasks[first_task[i] + k] = seal_task(p, q, x, k);
    }
    base.x += total.x;
    base.y += total.y;
    __syncthreads();
  }
  for (int s = p.num_seqs + thread; s <= p.max_seqs; s += kPlanThreads) cumulative[s] = base.y;
  if (thread == 0) {
    p.plan[0] = base.x < p.max_tasks ? base.x : p.max_tasks;
    p.plan[1] = base.y;
    p.plan[2] = p.plan[3] = 0;
  }
}

namespace {

// Eight elements a thread and turn; both element types have two bytes.
__device__ __forceinline__ void append(const AppendParams &p) {
  let_next_begin();
  const int chunks = p.head_dim / 8, row = p.num_kv_heads * chunks;
  const int64_t all = int64_t(p.num_tokens) * 2 * row;
  const uint16_t *sources[2] = {static_cast<const uint16_t *>(p.k), static_cast<const uint16_t *>(p.v)};
  const int64_t token_strides[2] = {p.k_token_stride, p.v_token_stride};
  const int64_t head_strides[2] = {p.k_head_stride, p.v_head_stride};
  for (int64_t e = int64_t(blockIdx.x) * kAppendThreads + threadIdx.x; e < all;
       e += int64_t(gridDim.x) * kAppendThreads) {
    const int64_t token = e / (2 * row);
    const int rest = int(e - token * 2 * row), stream = rest / row, head = rest % row / chunks, i = rest % chunks * 8;
    const int64_t place = p.slot_mapping[token];
    if (place < 0) continue;
    const int slot = p.open_slot[place / kBlock];
    if (slot < 0) continue;  // a block that this step fills from its first token on needs no open block
    const uint16_t *from = sources[stream] + token * token_strides[stream] + head * head_strides[stream] + i;
    uint16_t *to = static_cast<uint16_t *>(p.open_blocks) +
                   (((int64_t(slot) * 2 + stream) * p.num_kv_heads + head) * kBlock + place % kBlock) * p.head_dim + i;
    if (reinterpret_cast<uintptr_t>(from) % 16 == 0) {
      *reinterpret_cast<uint4 *>(to) = *reinterpret_cast<const uint4 *>(from);
    } else {
      for (int k = 0; k < 8; ++k) to[k] = from[k];
    }
  }
}

}  // namespace

// Any grid of kAppendThreads. The names differ so that a caller names the type it has.
extern "C" __global__ void __launch_bounds__(kAppendThreads) kakeya_append_bf16(AppendParams p) {
  append(p);
}
extern "C" __global__ void __launch_bounds__(kAppendThreads) kakeya_append_f16(AppendParams p) {
  append(p);
}

}  // namespace kakeya
