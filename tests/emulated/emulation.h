// CUDA kernels as ordinary C++ on a machine without a GPU: what kernels/ and tests/gpu use of CUDA, written out.
//
// Include this file first, compile with KAKEYA_EMULATED and with tests/emulated/cuda on the include path. Threads of a
// block are fibers of one thread of the system: one runs until it meets a barrier or an operation of its warp. Blocks
// run one after the other.
//
// What is as on a GPU:
//   blocks and grids       x and y (and z); two launches in a row take blocks and warps in opposite orders
//   __syncthreads          every thread of the block, or the program ends and says who waits for what
//   shuffles, ballots, mma, ldmatrix
//                          of a full warp, operands by lane as PTX documents them; lanes that meet in different
//                          operations end the program. Products are exact, their sum is rounded once to f32; a GPU
//                          rounds otherwise. ex2.approx is exp2, results below the normal numbers are zero
//   shared memory          no larger than the launch says, all NaN before a block begins; accesses through 32-bit
//                          addresses must be aligned and inside
//   asynchronous copies    cp.async and bulk copies with barrier objects; done at once in a launch, as late as their
//                          wait allows in the next
//   atomics                on global memory
// What is not: races within a phase (one order of threads a launch, of the many that a GPU may take), memory order
// between blocks, clusters, dependent launches, streams (a launch has ended when it returns), registers and speed.
// Arithmetic on halves is the host's form in kernels/half.cuh.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <functional>
#include <type_traits>
#include <utility>

#define __CUDACC__ 1
#define __device__
#define __global__
#define __host__
#define __grid_constant__
#define __forceinline__ inline
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
// A block's shared memory is that of the one thread of the system that runs it: a storage class that `extern` goes
// with.
#define __shared__ thread_local

struct alignas(8) int2 {
  int x, y;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline int2 make_int2(int x, int y) {
  return {x, y};
}
inline float2 make_float2(float x, float y) {
  return {x, y};
}

// ---- blocks, warps and threads -------------------------------------------------------------------------------------

namespace emulated {

constexpr size_t kSharedBytes = 227 * 1024;  // of a block at most, as of compute capability 9.0
constexpr int kSlotBytes = 64;

// What the lanes of a warp bring to an operation, and what they take from it.
struct WarpSlots {
  alignas(16) uint8_t lane[32][kSlotBytes];

  template <typename T>
  T get(int from) const {
    T x;
    memcpy(&x, lane[from], sizeof x);
    return x;
  }
};

extern int thread_index, block_threads;  // of the fiber that runs
extern dim3 block_index, block_dim, grid_dim;
extern uint8_t *dynamic_shared;  // set by the program: the array of kSharedBytes that its kernels declare
extern size_t dynamic_bytes;     // of it that the running launch has
extern bool late_copies;         // whether asynchronous copies wait in this launch
extern int multiprocessors;      // that the device claims to have
extern long atomics;             // atomic operations so far

inline int lane() {
  return thread_index % 32;
}

// Ends the program: a kernel did what the emulation or CUDA does not allow.
[[noreturn]] void fail(const char *format, ...) __attribute__((format(printf, 1, 2)));

// Lanes of a warp meet. `operation`: its name, the same for all; `compute`: called once, when all have come.
const WarpSlots &meet(const char *operation, const void *value, size_t bytes, void (*compute)(WarpSlots &) = nullptr);

template <typename T>
const WarpSlots &meet(const char *operation, const T &value, void (*compute)(WarpSlots &) = nullptr) {
  static_assert(sizeof(T) <= kSlotBytes && std::is_trivially_copyable_v<T>, "a slot of a warp's operation");
  return meet(operation, &value, sizeof value, compute);
}

// Threads of a block meet; whether one of them came with `flag`.
bool barrier(bool flag);
// Lets others run: for a thread that waits in a loop for what another does.
void yield();

void launch(dim3 grid, dim3 block, size_t shared, const std::function<void()> &thread);

// Asynchronous copies of the running thread to dynamic shared memory, in groups.
void copy_async(uint32_t to, const void *from, uint32_t bytes);
void end_copy_group();
void await_copy_groups(int but);

// Barrier objects (8 bytes of shared memory) and the copies that complete them.
void barrier_init(uint32_t at, uint32_t arrivals);
void barrier_expect(uint32_t at, uint32_t bytes);
void barrier_wait(uint32_t at, uint32_t parity);
void bulk_copy(uint32_t to, const void *from, uint32_t bytes, uint32_t barrier);

// Dynamic shared memory by its address, checked.
uint8_t *shared_at(uint32_t at, size_t bytes, size_t alignment);

struct ThreadIndex {
  struct X {
    operator unsigned() const { return unsigned(thread_index); }
  } x;
};

void check_mask(uint32_t mask);

template <typename T, typename... P, size_t... I>
void launch_with(T *kernel, void (*)(P...), std::index_sequence<I...>, dim3 grid, dim3 block, void **args,
                 size_t shared) {
  launch(grid, block, shared, [=] { kernel(*static_cast<std::remove_const_t<P> *>(args[I])...); });
}

float half_value(uint16_t bits);
uint16_t half_bits(float x);

inline uint16_t bf16_bits(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return x != x ? uint16_t(0x7fff) : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

}  // namespace emulated

static const emulated::ThreadIndex threadIdx = {};
#define blockIdx emulated::block_index
#define blockDim emulated::block_dim
#define gridDim emulated::grid_dim

inline void __syncthreads() {
  emulated::barrier(false);
}
inline int __syncthreads_or(int flag) {
  return emulated::barrier(flag != 0);
}
inline void __syncwarp() {
  emulated::meet("__syncwarp", 0);
}
template <typename T>
T __shfl_sync(uint32_t mask, T x, int from) {
  emulated::check_mask(mask);
  return emulated::meet("__shfl_sync", x).template get<T>(from & 31);
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T x, int bits) {
  emulated::check_mask(mask);
  const int lane = emulated::lane();
  return emulated::meet("__shfl_xor_sync", x).template get<T>(lane ^ bits);
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T x, int by) {
  emulated::check_mask(mask);
  const int lane = emulated::lane();
  return emulated::meet("__shfl_up_sync", x).template get<T>(lane < by ? lane : lane - by);
}
inline uint32_t __ballot_sync(uint32_t mask, bool flag) {
  emulated::check_mask(mask);
  const emulated::WarpSlots &slots = emulated::meet("__ballot_sync", flag);
  uint32_t all = 0;
  for (int i = 0; i < 32; ++i) all |= uint32_t(slots.get<bool>(i)) << i;
  return all;
}
inline uint32_t atomicOr(uint32_t *at, uint32_t x) {
  ++emulated::atomics;
  const uint32_t before = *at;
  *at |= x;
  return before;
}

// ---- numbers -------------------------------------------------------------------------------------------------------

template <typename T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
T max(T a, T b) {
  return a < b ? b : a;
}
template <typename T>
T __ldg(const T *p) {
  return *p;
}
template <typename T>
T __ldcg(const T *p) {
  return *p;
}
inline float __uint_as_float(uint32_t x) {
  float y;
  memcpy(&y, &x, 4);
  return y;
}
inline float __int_as_float(int x) {
  return __uint_as_float(uint32_t(x));
}
inline uint32_t __float_as_uint(float x) {
  uint32_t y;
  memcpy(&y, &x, 4);
  return y;
}
inline int __ffs(uint32_t x) {
  return __builtin_ffs(int(x));
}
inline float __fdividef(float a, float b) {
  return a / b;
}
inline int __popc(uint32_t x) {
  return __builtin_popcount(x);
}
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
  return uint32_t((uint64_t(high) << 32 | low) >> (shift & 31));
}
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t both = uint64_t(y) << 32 | x;
  uint32_t r = 0;
  for (int i = 0; i < 4; ++i) r |= uint32_t(both >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return r;
}
inline uint32_t __vmaxu2(uint32_t x, uint32_t y) {
  return max(x & 0xffffu, y & 0xffffu) | max(x & 0xffff0000u, y & 0xffff0000u);
}

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __half2float(__half x) {
  return emulated::half_value(x.bits);
}
inline __half __float2half_rn(float x) {
  return {emulated::half_bits(x)};
}
inline float __bfloat162float(__nv_bfloat16 x) {
  return __uint_as_float(uint32_t(x.bits) << 16);
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  return {emulated::bf16_bits(x)};
}

// ---- the runtime: device memory is the host's ----------------------------------------------------------------------

enum cudaError_t { cudaSuccess };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerMultiprocessor };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
using cudaStream_t = void *;

inline const char *cudaGetErrorString(cudaError_t) {
  return "no error";
}
inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
// Not a byte more than asked for: AddressSanitizer sees what reads behind it.
template <typename T>
cudaError_t cudaMalloc(T **p, size_t bytes) {
  void *memory;
  if (posix_memalign(&memory, 256, bytes)) emulated::fail("no %zu bytes", bytes);
  *p = static_cast<T *>(memory);
  return cudaSuccess;
}
inline cudaError_t cudaFree(void *p) {
  free(p);
  return cudaSuccess;
}
inline cudaError_t cudaMemset(void *p, int byte, size_t bytes) {
  memset(p, byte, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind) {
  if (bytes) memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? emulated::multiprocessors : 228 * 1024;
  return cudaSuccess;
}
template <typename T>
cudaError_t cudaFuncSetAttribute(T *, cudaFuncAttribute, int) {
  return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() {
  return cudaSuccess;
}
template <typename... P>
cudaError_t cudaLaunchKernel(void (*kernel)(P...), dim3 grid, dim3 block, void **args, size_t shared, cudaStream_t) {
  emulated::launch_with(kernel, kernel, std::index_sequence_for<P...>(), grid, block, args, shared);
  return cudaSuccess;
}
