// kakeya_seal: a cluster of two thread blocks seals a (block, KV head) after the other, one its keys, one its values.
// seal.cuh has the arithmetic, phase by phase; here the threads of a phase run at once. Compile with -fmad=false: page
// bytes equal the codec's.
#include <cooperative_groups.h>

#include "elements.cuh"
#include "overlap.cuh"
#include "params.cuh"
#include "seal.cuh"

// Clusters came with compute capability 9.0; there are none where threads are emulated (tests/emulated).
#if !defined(KAKEYA_EMULATED) && (!defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900)
#define KAKEYA_CLUSTERS 1
#define KAKEYA_PAIRED __cluster_dims__(2, 1, 1)
#else
#define KAKEYA_CLUSTERS 0
#define KAKEYA_PAIRED
#endif

namespace kakeya {
namespace {

#ifdef KAKEYA_SEAL_CLOCKS
// Cycles of the first pair, keys and values: at its start, after setup, after each phase, and after the exchange.
__device__ long long seal_clocks[2][32];
#endif

// What the two thread blocks of a cluster tell each other about a task.
struct Message {
  uint64_t tokens;
  uint32_t bad;
};

template <typename T>
struct Rows {
  const T *first;
  int64_t stride;
  bool aligned;

  __device__ __forceinline__ Eight<T> operator()(int j, int i) const { return load8(first + j * stride + i, true); }
  __device__ __forceinline__ Eight<T> scattered(int j, int i) const { return load8(first + j * stride + i, false); }
  __device__ __forceinline__ void widen(const Eight<T> &raw, float *x) const {
    KAKEYA_UNROLL
    for (int k = 0; k < 8; ++k) x[k] = kakeya::widen(raw.x[k]);
  }
  __device__ __forceinline__ bool refused(const Eight<T> &raw) const { return refused8(raw); }
};

// One stream of a (task, head): where it comes from.
template <typename T>
struct Source {
  SealTask task;
  int head;
  Rows<T> rows;
};

__device__ __forceinline__ SealTask task_of(const SealParams &p, int index) {
  return reinterpret_cast<const SealTask *>(p.plan + 4)[index / p.num_kv_heads];
}

template <typename T, int D, bool K>
__device__ __forceinline__ Source<T> source(const SealParams &p, int index, const SealTask &task) {
  Source<T> s;
  s.head = index % p.num_kv_heads;
  s.task = task;
  const T *rows = static_cast<const T *>(K ? p.k : p.v), *open = static_cast<const T *>(p.open_blocks);
  const int64_t token_stride = K ? p.k_token_stride : p.v_token_stride;
  const int64_t head_stride = K ? p.k_head_stride : p.v_head_stride;
  if (s.task.first_row >= 0) {
    s.rows = {rows + s.task.first_row * token_stride + s.head * head_stride, token_stride,
              aligned_rows(rows, token_stride, head_stride)};
  } else {
    const int64_t at = (int64_t(s.task.slot) * 2 + (K ? 0 : 1)) * p.num_kv_heads + s.head;
    s.rows = {s.task.slot >= 0 ? open + at * kBlock * D : nullptr, D, true};
  }
  return s;
}

__device__ __forceinline__ void prefetch_line([[maybe_unused]] const void *p) {
#ifdef __CUDA_ARCH__
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#endif
}

// Brings rows near while something else is done.
template <typename T, int D>
__device__ __forceinline__ void prefetch(const Rows<T> &rows) {
  constexpr int lines = (D * int(sizeof(T)) + 127) / 128;
  if (!rows.first) return;
  KAKEYA_ROLLED
  for (int e = int(threadIdx.x); e < kBlock * lines; e += kSealThreads)
    prefetch_line(rows.first + e / lines * rows.stride + e % lines * 64);
}

// Two thread blocks that seal the same (task, head): keys and values. In a cluster they tell each other what they
// found; where there are no clusters, each finds it out by itself.
template <typename T, int D, bool K>
struct Pair {
#if KAKEYA_CLUSTERS
  Message *inbox, *outbox;

  __device__ __forceinline__ explicit Pair(Message *own) : inbox(own) {
    outbox = cooperative_groups::this_cluster().map_shared_rank(own, K ? 1 : 0);
  }
  // No message may arrive before its reader runs: `arrive` says that this one does, `begin` waits for the other.
  __device__ __forceinline__ void arrive() const { cooperative_groups::this_cluster().barrier_arrive(); }
  __device__ __forceinline__ void begin() const {
    cooperative_groups::this_cluster().barrier_wait();
    __syncthreads();
  }

  // Before the first part of sealing.
  template <typename Run>
  __device__ __forceinline__ void before(const SealParams &, int, const SealJob &, SealState<D> &, Run) const {}

  // After it: true where either met a value that is refused; else the values' state has the tokens.
  __device__ __forceinline__ bool refused(const SealJob &job, SealState<D> &s) const {
    if (threadIdx.x == 0) {
      uint64_t tokens;
      memcpy(&tokens, s.tokens, sizeof tokens);
      outbox[job.parity] = {tokens, s.bad[job.parity]};
    }
    // The other side reads this message before it arrives here for the next task, and its turn after that uses the
    // same place again.
    cooperative_groups::this_cluster().sync();
    const Message m = inbox[job.parity];
    if (m.bad | s.bad[job.parity]) return true;
    if (!K && threadIdx.x == 0) memcpy(s.tokens, &m.tokens, sizeof m.tokens);
    __syncthreads();
    return false;
  }
#else
  __device__ __forceinline__ explicit Pair(Message *) {}
  __device__ __forceinline__ void arrive() const {}
  __device__ __forceinline__ void begin() const { __syncthreads(); }

  template <typename Run>
  __device__ __forceinline__ void before(const SealParams &p, int index, const SealJob &job, SealState<D> &s,
                                         Run run) const {
    const Rows<T> other = source<T, D, !K>(p, index, task_of(p, index)).rows;
    if constexpr (K) {
      bool bad = false;
      for (int e = int(threadIdx.x); e < kBlock * D / 8; e += kSealThreads)
        bad |= refused8(load8(other.first + e / (D / 8) * other.stride + e % (D / 8) * 8, other.aligned));
      if (bad) s.bad[job.parity] = 1;
    } else {
      seal_begin<D, true>(job, s, other, run);
    }
  }

  __device__ __forceinline__ bool refused(const SealJob &job, SealState<D> &s) const { return s.bad[job.parity]; }
#endif
};

template <typename T, int D, bool K>
__device__ __forceinline__ void seal_stream(const SealParams &p, int tasks, SealState<D> &s, Message *inbox) {
#ifdef KAKEYA_SEAL_CLOCKS
  int stamps = 0;
  const auto stamp = [&] {
    if (threadIdx.x == 0 && blockIdx.x < 2 && stamps < 32) seal_clocks[K ? 0 : 1][stamps++] = clock64();
  };
#else
  const auto stamp = [] {};
#endif
  stamp();
  const auto run = [&](auto phase) {
    phase(int(threadIdx.x));
    __syncthreads();
    stamp();
  };
  const int pairs = int(gridDim.x) / 2, all = tasks * p.num_kv_heads;
  // Few tasks go to thread blocks far from each other.
  const int step = all < pairs ? pairs / all : 1, first = int(blockIdx.x) / 2 / step;
  if (first >= all || int(blockIdx.x) / 2 % step != 0) return;  // both thread blocks of a pair
  const Pair<T, D, K> pair(inbox);
  pair.arrive();
  const SealTask task = task_of(p, first);  // on its way while the tables' copies begin
  seal_setup<D, K || !KAKEYA_CLUSTERS>(*p.tables, s, int(threadIdx.x));
  Source<T> next = source<T, D, K>(p, first, task);
  prefetch<T, D>(next.rows);
  pair.begin();
  stamp();
  int parity = 0;
  for (int e = first; e < all; e += pairs) {
    const Source<T> now = next;
    if (e + pairs < all) next = source<T, D, K>(p, e + pairs, task_of(p, e + pairs));
    if (!now.rows.first) {  // both thread blocks see it
      if (K && threadIdx.x == 0) atomicOr(p.status, uint32_t(kSealNoOpenBlock));
      continue;
    }
    uint8_t *page = p.pages + now.task.block * p.page_block_stride + now.head * p.page_head_stride;
    const SealJob job = {p.tables, p.layer, p.first_head + now.head, now.task.block_index, parity, page};
    pair.before(p, e, job, s, run);
    seal_begin<D, K>(job, s, now.rows, run);
    if (e + pairs < all) prefetch<T, D>(next.rows);
    parity ^= 1;
    if (pair.refused(job, s)) {
      if (K && threadIdx.x == 0) atomicOr(p.status, uint32_t(kSealNonFinite));
      __syncthreads();
      if (threadIdx.x == 0) s.bad[parity] = 0;
      __syncthreads();
      continue;
    }
    stamp();
    seal_end<D, K>(job, s, run);
  }
}

template <typename T>
__device__ __forceinline__ void seal(const SealParams &p) {
  extern __shared__ __align__(16) uint8_t shared[];
  [[maybe_unused]] __shared__ Message inbox[2];
  let_next_begin();
  await_previous();  // open blocks
  const int tasks = p.plan[0];
  const uint32_t head_dim = p.tables->head_dim;
  if (tasks == 0) return;
  with_head_dim(head_dim, [&](auto unit) {
    constexpr int D = decltype(unit)::head_dim;
    SealState<D> &s = *reinterpret_cast<SealState<D> *>(shared);
    if (blockIdx.x % 2 == 0)
      seal_stream<T, D, true>(p, tasks, s, inbox);
    else
      seal_stream<T, D, false>(p, tasks, s, inbox);
  });
}

}  // namespace

// An even number of thread blocks of kSealThreads; dynamic shared memory seal_shared_bytes(head_dim). A grid as large
// as the device holds at once suits any number of tasks.
extern "C" __global__ void KAKEYA_PAIRED __launch_bounds__(kSealThreads, 2) kakeya_seal_bf16(SealParams p) {
  seal<__nv_bfloat16>(p);
}
extern "C" __global__ void KAKEYA_PAIRED __launch_bounds__(kSealThreads, 2) kakeya_seal_f16(SealParams p) {
  seal<__half>(p);
}

}  // namespace kakeya
