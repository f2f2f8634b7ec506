// The scheduler of emulation.h: fibers, the places where they meet, and asynchronous copies.
#include "emulation.h"

#include <stdarg.h>
#include <stdio.h>
#include <sys/mman.h>

#include <memory>
#include <vector>

#include "half.cuh"

#if !defined(__x86_64__) || defined(KAKEYA_EMULATED_UCONTEXT)
#define KAKEYA_SWITCH 0
#include <ucontext.h>
#else
#define KAKEYA_SWITCH 1
#endif

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulated {

int thread_index, block_threads;
dim3 block_index, block_dim, grid_dim;
uint8_t *dynamic_shared;
size_t dynamic_bytes;
bool late_copies = true;
int multiprocessors = 2;
long atomics;

void fail(const char *format, ...) {
  fprintf(stderr, "block (%u, %u, %u), thread %d: ", block_index.x, block_index.y, block_index.z, thread_index);
  va_list args;
  va_start(args, format);
  vfprintf(stderr, format, args);
  va_end(args);
  fputc('\n', stderr);
  fflush(stdout);
  abort();
}

// ---- fibers --------------------------------------------------------------------------------------------------------

namespace {

constexpr int kMaxThreads = 1024, kMaxWarps = kMaxThreads / 32;
constexpr size_t kStack = 1 << 18, kGuard = 4096;

// A stack and where its execution stands.
struct Fiber {
#if KAKEYA_SWITCH
  void *stack_pointer;
#else
  ucontext_t context;
#endif
  const void *bottom;
  size_t size;
};

Fiber fibers[kMaxThreads], main_fiber;
const std::function<void()> *body;
[[noreturn]] void run_thread();

#if KAKEYA_SWITCH
// Registers that a call keeps, on the one stack and from the other.
extern "C" void kakeya_emulated_switch(void **from, void *to);
asm(R"(
.text
.globl kakeya_emulated_switch
.type kakeya_emulated_switch, @function
kakeya_emulated_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");
#endif

// To another fiber; `last`: this one never runs again.
void switch_to(Fiber &from, Fiber &to, bool last = false) {
#ifdef __SANITIZE_ADDRESS__
  void *frames = nullptr;
  __sanitizer_start_switch_fiber(last ? nullptr : &frames, to.bottom, to.size);
#else
  (void)last;
#endif
#if KAKEYA_SWITCH
  kakeya_emulated_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(frames, nullptr, nullptr);
#endif
}

void start_of_fiber() {
#ifdef __SANITIZE_ADDRESS__
  const void *bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  // The first fiber of a block comes from the program's own stack.
  if (!main_fiber.bottom) main_fiber.bottom = bottom, main_fiber.size = size;
#endif
  run_thread();
}

void prepare(int thread) {
  static uint8_t *const stacks = [] {
    void *p =
        mmap(nullptr, kStack * kMaxThreads, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) fail("no memory for stacks");
    for (int i = 0; i < kMaxThreads; ++i) mprotect(static_cast<uint8_t *>(p) + kStack * i, kGuard, PROT_NONE);
    return static_cast<uint8_t *>(p);
  }();
  Fiber &f = fibers[thread];
  uint8_t *const bottom = stacks + kStack * thread + kGuard;
  f.bottom = bottom, f.size = kStack - kGuard;
#ifdef __SANITIZE_ADDRESS__
  ASAN_UNPOISON_MEMORY_REGION(bottom, f.size);
#endif
#if KAKEYA_SWITCH
  // Six registers and a return address; the stack pointer is then 8 modulo 16, as a function finds it.
  void **top = reinterpret_cast<void **>(bottom + f.size) - 2;
  *top = reinterpret_cast<void *>(start_of_fiber);
  f.stack_pointer = top - 6;
#else
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = bottom;
  f.context.uc_stack.ss_size = f.size;
  f.context.uc_link = nullptr;
  makecontext(&f.context, start_of_fiber, 0);
#endif
}

// ---- who runs ------------------------------------------------------------------------------------------------------

struct Warp {
  uint32_t ready;  // lanes that may run
  int arrived;
  unsigned turn;  // which of two sets of slots is next: lanes may read one while others bring values to the other
  const char *operation;
  WarpSlots slots[2];
};

Warp warps[kMaxWarps];
int num_warps, arrived, done;
bool backwards;  // order of warps and blocks
bool flags[2];
unsigned turn;
long idle;  // turns that threads gave up since one got on

[[noreturn]] void stuck() {
  for (int w = 0; w < num_warps; ++w)
    if (warps[w].arrived) fprintf(stderr, "warp %d: %d lanes wait in %s\n", w, warps[w].arrived, warps[w].operation);
  fail("nothing can run: %d of %d threads wait at a barrier, %d have ended", arrived, block_threads, done);
}

// Runs another thread, if one is ready: of the same warp first, so that warps drift apart as far as barriers let them;
// `away`: of other warps first. Comes back when this thread's turn is there again.
void next_thread(bool away = false, bool last = false) {
  const int me = thread_index, warp = me / 32;
  const uint32_t behind = ~1u << me % 32;
  for (int i = away ? 1 : 0; i <= num_warps; ++i) {
    const int w = (warp + i * (backwards ? num_warps - 1 : 1)) % num_warps;
    const uint32_t bits = w == warp && warps[w].ready & behind ? warps[w].ready & behind : warps[w].ready;
    if (!bits) continue;
    const int to = 32 * w + __builtin_ctz(bits);
    if (to == me) return;
    thread_index = to;
    switch_to(fibers[me], fibers[to], last);
    thread_index = me;
    return;
  }
  stuck();
}

void sleep() {
  warps[thread_index / 32].ready &= ~(1u << lane());
  next_thread();
}

// A thread's copies that are not there yet, and of which group they are.
struct Copy {
  uint32_t to;
  const void *from;
  uint32_t bytes;
  long group;
};
std::vector<Copy> copies[kMaxThreads];
long groups[kMaxThreads];

// Bulk copies likewise, of the whole block.
struct BulkCopy {
  uint32_t to;
  const void *from;
  uint32_t bytes, barrier;
};
std::vector<BulkCopy> bulk_copies;

void run_thread() {
  (*body)();
  const int warp = thread_index / 32;
  warps[warp].ready &= ~(1u << lane());
  if (++done == block_threads)
    switch_to(fibers[thread_index], main_fiber, true);
  else
    next_thread(false, true);
  abort();
}

void run_block() {
  if (dynamic_shared) {
#ifdef __SANITIZE_ADDRESS__
    ASAN_UNPOISON_MEMORY_REGION(dynamic_shared, kSharedBytes);
#endif
    memset(dynamic_shared, 0xff, kSharedBytes);
#ifdef __SANITIZE_ADDRESS__
    ASAN_POISON_MEMORY_REGION(dynamic_shared + dynamic_bytes, kSharedBytes - dynamic_bytes);
#endif
  }
  arrived = done = 0;
  flags[0] = flags[1] = false;
  idle = 0;
  for (int w = 0; w < num_warps; ++w) warps[w].ready = ~0u, warps[w].arrived = 0;
  for (int t = 0; t < block_threads; ++t) {
    prepare(t);
    copies[t].clear();
    groups[t] = 0;
  }
  thread_index = backwards ? block_threads - 32 : 0;
  switch_to(main_fiber, fibers[thread_index]);
  if (!bulk_copies.empty()) fail("the block has ended, %zu bulk copies were not awaited", bulk_copies.size());
}

}  // namespace

const WarpSlots &meet(const char *operation, const void *value, size_t bytes, void (*compute)(WarpSlots &)) {
  Warp &w = warps[thread_index / 32];
  WarpSlots &slots = w.slots[w.turn & 1];
  if (w.arrived == 0)
    w.operation = operation;
  else if (w.operation != operation && strcmp(w.operation, operation) != 0)
    fail("lanes of a warp meet in %s and in %s", w.operation, operation);
  memcpy(slots.lane[lane()], value, bytes);
  if (++w.arrived == 32) {
    if (compute) compute(slots);
    w.arrived = 0;
    ++w.turn;
    w.ready = ~0u;
    idle = 0;
  } else {
    sleep();
  }
  return slots;
}

bool barrier(bool flag) {
  const unsigned mine = turn & 1;
  if (arrived == 0) flags[mine] = false;
  flags[mine] |= flag;
  if (++arrived == block_threads) {
    arrived = 0;
    ++turn;
    for (int w = 0; w < num_warps; ++w) warps[w].ready = ~0u;
    idle = 0;
  } else {
    sleep();
  }
  return flags[mine];
}

void yield() {
  if (++idle > 1000000) fail("it waits for what nobody does");
  next_thread(true);
}

void check_mask(uint32_t mask) {
  if (mask != ~0u) fail("a warp's operation with mask %08x: only full warps are emulated", mask);
}

void launch(dim3 grid, dim3 block, size_t shared, const std::function<void()> &thread) {
  block_threads = int(block.x * block.y * block.z);
  if (block.y != 1 || block.z != 1 || block_threads % 32 || block_threads > kMaxThreads)
    fail("blocks of (%u, %u, %u) threads are not emulated", block.x, block.y, block.z);
  if (shared > kSharedBytes) fail("%zu bytes of shared memory, a block has %zu at most", shared, kSharedBytes);
  if (shared && !dynamic_shared) fail("emulated::dynamic_shared is not set");
  body = &thread, grid_dim = grid, block_dim = block, dynamic_bytes = shared, num_warps = block_threads / 32;
  backwards = !backwards;
  late_copies = !late_copies;
  const unsigned blocks = grid.x * grid.y * grid.z;
  for (unsigned i = 0; i < blocks; ++i) {
    const unsigned b = backwards ? blocks - 1 - i : i;
    block_index = dim3(b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y);
    run_block();
  }
}

// ---- shared memory and asynchronous copies -------------------------------------------------------------------------

uint8_t *shared_at(uint32_t at, size_t bytes, size_t alignment) {
  if (at > dynamic_bytes || bytes > dynamic_bytes - at)
    fail("%zu bytes at %u of %zu bytes of shared memory", bytes, at, dynamic_bytes);
  if (at % alignment) fail("%zu bytes of shared memory at %u, which is no multiple of %zu", bytes, at, alignment);
  return dynamic_shared + at;
}

static void check_source(const void *from) {
  if (reinterpret_cast<uintptr_t>(from) % 16) fail("a copy from %p, which is no multiple of 16", from);
}

void copy_async(uint32_t to, const void *from, uint32_t bytes) {
  uint8_t *const at = shared_at(to, bytes, 16);
  check_source(from);
  if (late_copies)
    copies[thread_index].push_back({to, from, bytes, groups[thread_index]});
  else
    memcpy(at, from, bytes);
}

void end_copy_group() {
  ++groups[thread_index];
}

void await_copy_groups(int but) {
  std::vector<Copy> &mine = copies[thread_index];
  size_t n = 0;
  for (; n < mine.size() && mine[n].group < groups[thread_index] - but; ++n)
    memcpy(dynamic_shared + mine[n].to, mine[n].from, mine[n].bytes);
  mine.erase(mine.begin(), mine.begin() + long(n));
}

// A barrier object: bytes under way, arrivals of a phase and those that are still missing; parity of its phase.
struct BarrierObject {
  uint32_t pending;
  uint8_t arrivals, missing;
  uint16_t phase;
};

static BarrierObject &barrier_at(uint32_t at) {
  return *reinterpret_cast<BarrierObject *>(shared_at(at, 8, 8));
}

void barrier_init(uint32_t at, uint32_t arrivals) {
  if (arrivals < 1 || arrivals > kMaxWarps) fail("a barrier object of %u arrivals is not emulated", arrivals);
  barrier_at(at) = {0, uint8_t(arrivals), uint8_t(arrivals), 0};
}

static void end_phase(BarrierObject &b) {
  if (b.missing == 0 && b.pending == 0) b.missing = b.arrivals, b.phase ^= 1;
}

void barrier_expect(uint32_t at, uint32_t bytes) {
  BarrierObject &b = barrier_at(at);
  if (b.missing == 0) fail("one arrival too many in a phase of the barrier object at %u", at);
  --b.missing;
  b.pending += bytes;
  end_phase(b);
}

static void complete(uint32_t at, uint32_t bytes) {
  BarrierObject &b = barrier_at(at);
  if (b.pending < bytes) fail("the barrier object at %u does not expect %u bytes", at, bytes);
  b.pending -= bytes;
  end_phase(b);
}

void barrier_wait(uint32_t at, uint32_t parity) {
  while (barrier_at(at).phase == parity) {
    // What waits to be copied to this barrier object.
    bool copied = false;
    for (size_t i = 0; i < bulk_copies.size();) {
      const BulkCopy c = bulk_copies[i];
      if (c.barrier != at) {
        ++i;
        continue;
      }
      bulk_copies.erase(bulk_copies.begin() + long(i));
      memcpy(dynamic_shared + c.to, c.from, c.bytes);
      complete(at, c.bytes);
      copied = true;
    }
    if (!copied) yield();
  }
}

void bulk_copy(uint32_t to, const void *from, uint32_t bytes, uint32_t barrier) {
  uint8_t *const at = shared_at(to, bytes, 16);
  check_source(from);
  if (bytes % 16) fail("a bulk copy of %u bytes, which is no multiple of 16", bytes);
  barrier_at(barrier);
  if (late_copies) {
    bulk_copies.push_back({to, from, bytes, barrier});
  } else {
    memcpy(at, from, bytes);
    complete(barrier, bytes);
  }
}

// ---- halves --------------------------------------------------------------------------------------------------------

float half_value(uint16_t bits) {
  static const std::unique_ptr<float[]> table = [] {
    std::unique_ptr<float[]> t(new float[65536]);
    for (int i = 0; i < 65536; ++i) t[size_t(i)] = kakeya::half_value(uint16_t(i));
    return t;
  }();
  return table[bits];
}

uint16_t half_bits(float x) {
  return kakeya::half_bits(x);
}

}  // namespace emulated
