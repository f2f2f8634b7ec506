// What tests of the attention kernels share, on a GPU (attend.cu) and without (tests/emulated/attend.cpp): files of
// csrc/bridge/examples/attend_vectors.rs, launches, the fp64 reference, and the batches to check.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../../kernels/attend.cu"
#include "../../kernels/attend_capped.cu"

#define CUDA(call)                                                                          \
  do {                                                                                      \
    const cudaError_t e = (call);                                                           \
    if (e != cudaSuccess) {                                                                 \
      fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(e)); \
      exit(2);                                                                              \
    }                                                                                       \
  } while (0)

using namespace kakeya;

template <typename T>
struct Device {
  T *p = nullptr;
  size_t n;
  explicit Device(size_t n, int fill = -1) : n(n) {
    CUDA(cudaMalloc(&p, std::max<size_t>(n * sizeof(T), 16)));
    if (fill >= 0) CUDA(cudaMemset(p, fill, n * sizeof(T)));
  }
  explicit Device(const std::vector<T> &x) : Device(x.size()) {
    CUDA(cudaMemcpy(p, x.data(), n * sizeof(T), cudaMemcpyHostToDevice));
  }
  std::vector<T> get() const {
    std::vector<T> x(n);
    CUDA(cudaMemcpy(x.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost));
    return x;
  }
  Device(const Device &) = delete;
  ~Device() { cudaFree(p); }
};

struct File {
  std::string name;
  Tables t;
  std::vector<uint8_t> tables, pages;
  std::vector<double> freq;
  std::vector<float> rows;  // [block][head][K, V][128][d]
  size_t blocks, heads, layer;

  explicit File(const char *path) : name(path) {
    name = name.substr(name.rfind('/') + 1);
    FILE *f = fopen(path, "rb");
    uint64_t h[6];
    if (!f || fread(h, sizeof h, 1, f) != 1 || h[0] != 0x314e5454414b414bull) {
      fprintf(stderr, "%s: not a vector file\n", path);
      exit(1);
    }
    blocks = h[2], heads = h[3], layer = h[4];
    tables.resize(h[1]);
    freq.resize(h[5]);
    auto read = [&](void *p, size_t n) {
      if (fread(p, 1, n, f) != n) {
        fprintf(stderr, "%s: too short\n", path);
        exit(1);
      }
    };
    read(tables.data(), tables.size());
    memcpy(&t, tables.data(), sizeof t);
    read(freq.data(), 8 * freq.size());
    pages.resize(blocks * heads * t.page_bytes);
    read(pages.data(), pages.size());
    rows.resize(blocks * heads * 2 * kBlock * t.head_dim);
    read(rows.data(), 4 * rows.size());
    fclose(f);
  }
  int quantizer() const {
    if (t.trellis) return kTrellis;
    const uint32_t *g = reinterpret_cast<const uint32_t *>(tables.data() + t.grids);
    return g[4 * 3 + 1] ? kCubic : kUniform;  // beta of width 3
  }
};

// A kernel for scores with a soft cap takes one number more.
using Entry = void (*)(AttendParams, uint32_t stages);
using CappedEntry = void (*)(AttendParams, uint32_t stages, uint32_t record_rows);

struct Kernel {
  Entry entry;
  CappedEntry capped;  // one of the two is null
  int threads, fixed_shared, blocks_per_sm, rows;
};

template <int D, int Q, int ROWS>
static Kernel shape_of(Entry entry, CappedEntry capped = nullptr) {
  return {entry, capped, AttendShape<D>::kThreads, AttendShared<D, ROWS>::kFixed, blocks_per_sm<D, Q, ROWS>(), ROWS};
}

// `capped`: for a soft cap of scores, of which there are two.
static Kernel kernel_of(int d, int q, int rows, bool capped) {
#define PICK(D, QQ, NAME)                                                                             \
  if (d == D && q == QQ)                                                                              \
  return capped && rows <= 4 ? shape_of<D, QQ, 4>(nullptr, kakeya_attend_d##D##_##NAME##_r4_capped)   \
         : capped            ? shape_of<D, QQ, 16>(nullptr, kakeya_attend_d##D##_##NAME##_r16_capped) \
         : rows <= 4         ? shape_of<D, QQ, 4>(kakeya_attend_d##D##_##NAME##_r4)                   \
         : rows <= 8         ? shape_of<D, QQ, 8>(kakeya_attend_d##D##_##NAME##_r8)                   \
                             : shape_of<D, QQ, 16>(kakeya_attend_d##D##_##NAME##_r16)
#define PICK_ALL(D)           \
  PICK(D, kUniform, uniform); \
  PICK(D, kCubic, cubic);     \
  PICK(D, kTrellis, trellis)
#if !defined(KAKEYA_HEAD_DIM) || KAKEYA_HEAD_DIM == 64
  PICK_ALL(64);
#endif
#if !defined(KAKEYA_HEAD_DIM) || KAKEYA_HEAD_DIM == 96
  PICK_ALL(96);
#endif
#if !defined(KAKEYA_HEAD_DIM) || KAKEYA_HEAD_DIM == 128
  PICK_ALL(128);
#endif
#if !defined(KAKEYA_HEAD_DIM) || KAKEYA_HEAD_DIM == 256
  PICK_ALL(256);
#endif
  fprintf(stderr, "no kernel for head_dim %d\n", d);
  exit(1);
}

static int num_sms() {
  int n;
  CUDA(cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, 0));
  return n;
}

// Shared memory of an SM that blocks may use, less what the driver keeps of each.
static int stages_of(const Kernel &k, int stage_bytes) {
  int total;
  CUDA(cudaDeviceGetAttribute(&total, cudaDevAttrMaxSharedMemoryPerMultiprocessor, 0));
  const int each = std::min(total / k.blocks_per_sm - 1024, 227 * 1024);
  return std::min((each - k.fixed_shared) / stage_bytes, 8);
}

struct Launch {
  Kernel k;
  int stages, shared, blocks, chunks, record_rows;
  // `kernel_rows`: rows a pass of the kernel to take, at least; `rows`: of a sequence, at most. `capped`: the kernel
  // for a soft cap instead, in the workspace of the one without.
  Launch(const File &f, int kernel_rows, int rows, bool capped = false) {
    const int d = int(f.t.head_dim), stage_bytes = int(f.t.page_bytes);
    k = kernel_of(d, f.quantizer(), kernel_rows, capped);
    record_rows = kernel_of(d, f.quantizer(), kernel_rows, false).rows;
    // As the library does: as many blocks as the kernel was compiled for, else fewer.
    for (stages = stages_of(k, stage_bytes); stages < 3 && k.blocks_per_sm > 1; stages = stages_of(k, stage_bytes))
      --k.blocks_per_sm;
    if (stages < 3) {
      fprintf(stderr, "%s, %d rows: only %d stages fit\n", f.name.c_str(), rows, stages);
      exit(1);
    }
    shared = k.fixed_shared + stages * stage_bytes;
    if (k.capped)
      CUDA(cudaFuncSetAttribute(k.capped, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    else
      CUDA(cudaFuncSetAttribute(k.entry, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    blocks = num_sms() * k.blocks_per_sm;
    chunks = (rows + k.rows - 1) / k.rows;
  }
  size_t workspace(int d, int items) const { return size_t(chunks) * (blocks + items) * record_rows * (d + 2); }
  void run(AttendParams &p, cudaStream_t s) const {
    uint32_t n = stages, room = record_rows;
    void *args[] = {&p, &n, &room};
    if (k.capped)
      CUDA(cudaLaunchKernel(k.capped, dim3(blocks, chunks), dim3(k.threads), args, shared, s));
    else
      CUDA(cudaLaunchKernel(k.entry, dim3(blocks, chunks), dim3(k.threads), args, shared, s));
  }
};

static uint16_t to_bf16(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
static float from_bf16(uint16_t h) {
  const uint32_t u = uint32_t(h) << 16;
  float x;
  memcpy(&x, &u, 4);
  return x;
}

static void parallel(size_t n, const std::function<void(size_t)> &f) {
  const size_t workers = std::max(1u, std::thread::hardware_concurrency());
  std::vector<std::thread> pool;
  for (size_t w = 0; w < workers; ++w)
    pool.emplace_back([=] {
      for (size_t i = w; i < n; i += workers) f(i);
    });
  for (auto &t : pool) t.join();
}

struct Sequence {
  int len, tokens;
};

struct Batch {
  std::vector<Sequence> sequences;
  int group;  // query heads a KV head
  uint64_t seed;
  bool invariant, sinks;
  float cap = 0;  // of scores, 0: none

  int tokens() const {  // of a sequence, at most
    int most = 0;
    for (const Sequence &s : sequences) most = std::max(most, s.tokens);
    return most;
  }
  // Query rows that a pass of the kernel takes, at least.
  int kernel_rows() const { return invariant ? 16 : tokens() * group; }
};

// Relative L2 error of one batch. Negative if something else is wrong: -1 counters are left, -2 a second launch gives
// other bytes.
static double check(const File &f, const Batch &batch) {
  const std::vector<Sequence> &seqs = batch.sequences;
  const int group = batch.group;
  const float cap = batch.cap;
  const int d = int(f.t.head_dim), heads = int(f.heads);
  std::mt19937_64 random(batch.seed);
  std::normal_distribution<float> normal;
  const int n = int(seqs.size());
  int longest = 0;
  std::vector<int> start{0}, lens, cumulative{0};
  for (const Sequence &s : seqs) {
    start.push_back(start.back() + s.tokens);
    lens.push_back(s.len);
    longest = std::max(longest, s.len);
    cumulative.push_back(cumulative.back() + (s.tokens ? sequence_blocks(s.tokens, s.len).units : 0));
  }
  const int tokens = start.back(), stride = (longest + kBlock - 1) / kBlock + 1;
  // Physical blocks: the file's, then one for each open block, all in another order. Where a step's tokens reach over
  // the end of a block, it is open and a page as well: a copy of one of the file's.
  std::vector<int> table(size_t(n) * stride, -1), place(f.blocks);
  int num_open = 0;
  for (const Sequence &s : seqs)
    if (s.tokens) num_open += sequence_blocks(s.tokens, s.len).units - sequence_blocks(s.tokens, s.len).pages;
  const int total_blocks = int(f.blocks) + num_open;
  std::vector<int> shuffled(total_blocks), open_slot(total_blocks, -1);
  for (int i = 0; i < total_blocks; ++i) shuffled[i] = i;
  std::shuffle(shuffled.begin(), shuffled.end(), random);
  int open = 0;
  for (int s = 0; s < n; ++s) {
    if (!seqs[s].tokens) continue;
    const int first_open = sequence_blocks(seqs[s].tokens, seqs[s].len).first_open,
              all = (seqs[s].len - 1) / kBlock + 1;
    for (int b = 0; b < all; ++b) {
      const int which = b < first_open ? int(random() % f.blocks) : int(f.blocks) + open;
      table[size_t(s) * stride + b] = shuffled[which];
      if (b >= first_open) open_slot[shuffled[which]] = num_open - 1 - open++;
    }
  }
  std::vector<int> source(total_blocks);  // physical -> the file's block that its page is
  for (int i = 0; i < total_blocks; ++i) source[shuffled[i]] = i < int(f.blocks) ? i : int(random() % f.blocks);
  std::vector<uint8_t> pages(size_t(total_blocks) * heads * f.t.page_bytes, 0xa5);
  for (int b = 0; b < total_blocks; ++b)
    memcpy(&pages[size_t(b) * heads * f.t.page_bytes], &f.pages[size_t(source[b]) * heads * f.t.page_bytes],
           heads * f.t.page_bytes);
  std::vector<uint16_t> pool(size_t(num_open) * 2 * heads * kBlock * d), q(size_t(tokens) * heads * group * d);
  for (auto &x : pool) x = to_bf16(normal(random));
  for (auto &x : q) x = to_bf16(1.5f * normal(random));
  // What lies behind a sequence's end in its open block is not a number.
  for (int s = 0; s < n; ++s)
    if (seqs[s].tokens && seqs[s].len % kBlock) {
      const int slot = open_slot[table[size_t(s) * stride + seqs[s].len / kBlock]];
      for (int i = 0; i < 2 * heads; ++i)
        for (int j = seqs[s].len % kBlock; j < kBlock; ++j)
          for (int c = 0; c < d; ++c) pool[((size_t(slot) * 2 * heads + i) * kBlock + j) * d + c] = 0x7fc0;
    }

  const Launch launch(f, batch.kernel_rows(), batch.tokens() * group, cap > 0);
  std::vector<int> plan(plan_size(n, 0), 0);
  plan[1] = cumulative.back();
  std::copy(cumulative.begin(), cumulative.end(), plan.begin() + plan_cumulative(0));
  Device<uint8_t> d_tables(f.tables), d_pages(pages);
  Device<uint16_t> d_q(q), d_pool(pool), d_out(q.size(), 0xff);
  Device<int> d_table(table), d_slot(open_slot), d_start(start), d_lens(lens), d_plan(plan);
  Device<float> d_work(launch.workspace(d, n * heads), 0xff);
  Device<int> d_count(size_t(launch.chunks) * n * heads, 0);
  std::vector<float> sinks(size_t(heads) * group, -INFINITY);
  if (batch.sinks)
    for (auto &x : sinks) x = 3 + 3 * normal(random);
  Device<float> d_sinks(sinks);
  AttendParams p = {};
  p.soft_cap = cap;
  p.sinks = batch.sinks ? d_sinks.p : nullptr;
  p.tables = reinterpret_cast<const Tables *>(d_tables.p);
  p.pages = d_pages.p;
  p.page_head_stride = f.t.page_bytes;
  p.page_block_stride = int64_t(heads) * f.t.page_bytes;
  p.q = d_q.p, p.out = d_out.p;
  p.q_token_stride = p.out_token_stride = int64_t(heads) * group * d;
  p.q_head_stride = p.out_head_stride = d;
  p.open_blocks = d_pool.p, p.open_slot = d_slot.p, p.block_table = d_table.p, p.block_table_stride = stride;
  p.query_start = d_start.p, p.seq_lens = d_lens.p, p.plan = d_plan.p;
  p.workspace = d_work.p, p.counters = d_count.p;
  p.num_seqs = n, p.max_tasks = 0, p.num_kv_heads = heads, p.group = group, p.layer = int(f.layer), p.first_head = 0;
  p.element = kBf16;
  p.batch_invariant = batch.invariant;
  p.scale = float(1.0 / std::sqrt(double(d)));
  launch.run(p, 0);
  CUDA(cudaDeviceSynchronize());
  const std::vector<uint16_t> out = d_out.get();
  CUDA(cudaMemset(d_out.p, 0xff, out.size() * sizeof out[0]));
  launch.run(p, 0);  // counters are zero again after each launch, whose parts are merged in the order of their blocks
  CUDA(cudaDeviceSynchronize());
  for (int x : d_count.get())
    if (x) return -1;
  if (d_out.get() != out) return -2;

  const int per = int(f.freq.size());
  std::vector<double> error(size_t(n) * heads, 0), norm(size_t(n) * heads, 0);
  parallel(size_t(n) * heads, [&](size_t item) {
    const int s = int(item) / heads, h = int(item) % heads, len = seqs[s].len, history = len - seqs[s].tokens;
    if (!seqs[s].tokens) return;
    // A token reads the blocks before its own from their pages, its own block raw.
    for (int own = history / kBlock; own <= (len - 1) / kBlock; ++own) {
      const int from_token = std::max(history, own * kBlock), end_token = std::min(len, (own + 1) * kBlock);
      std::vector<double> k(size_t(end_token) * d), v(size_t(end_token) * d);
      for (int j = 0; j < end_token; ++j) {
        const int physical = table[size_t(s) * stride + j / kBlock], from = source[physical];
        for (int c = 0; c < d; ++c) {
          if (j / kBlock < own) {
            const float *r = &f.rows[((size_t(from) * heads + h) * 2 * kBlock + j % kBlock) * d];
            k[size_t(j) * d + c] = r[c];
            v[size_t(j) * d + c] = r[size_t(kBlock) * d + c];
          } else {
            const size_t at = ((size_t(open_slot[physical]) * 2 * heads + h) * kBlock + j % kBlock) * d + c;
            k[size_t(j) * d + c] = from_bf16(pool[at]);
            v[size_t(j) * d + c] = from_bf16(pool[at + size_t(heads) * kBlock * d]);
          }
        }
        // The page was sealed at another block of its sequence: turn its keys on to where they stand now.
        if (j / kBlock < own)
          for (int i = 0; i < per; ++i) {
            const double a = double(j / kBlock - from) * kBlock * f.freq[i], c = std::cos(a), sn = std::sin(a);
            double &x = k[size_t(j) * d + i], &y = k[size_t(j) * d + i + per];
            const double x0 = x, y0 = y;
            x = x0 * c - y0 * sn, y = y0 * c + x0 * sn;
          }
      }
      std::vector<double> w(end_token), o(d);
      for (int token = from_token; token < end_token; ++token)
        for (int g = 0; g < group; ++g) {
          const size_t at = (size_t(start[s] + token - history) * heads * group + size_t(h) * group + g) * d;
          const double sink = sinks[h * group + g];
          double top = std::max(sink, -1e300);
          for (int j = 0; j <= token; ++j) {
            double x = 0;
            for (int c = 0; c < d; ++c) x += double(from_bf16(q[at + c])) * k[size_t(j) * d + c];
            w[j] = x / std::sqrt(double(d));
            if (cap > 0) w[j] = double(cap) * std::tanh(w[j] / double(cap));
            top = std::max(top, w[j]);
          }
          double total = std::exp(sink - top);
          std::fill(o.begin(), o.end(), 0.0);
          for (int j = 0; j <= token; ++j) {
            const double e = std::exp(w[j] - top);
            total += e;
            for (int c = 0; c < d; ++c) o[c] += e * v[size_t(j) * d + c];
          }
          for (int c = 0; c < d; ++c) {
            const double want = o[c] / total, got = from_bf16(out[at + c]);
            // The output's own rounding to bf16 is not the kernel's error: count what is beyond half a step.
            const double step = std::ldexp(1.0, std::ilogb(std::max(std::fabs(want), 1e-30)) - 8);
            const double e = std::max(0.0, std::fabs(got - want) - step);
            error[item] += std::isfinite(got) ? e * e : 1e300;
            norm[item] += want * want;
          }
        }
    }
  });
  double e = 0, m = 0;
  for (size_t i = 0; i < error.size(); ++i) e += error[i], m += norm[i];
  return std::sqrt(e / m);
}

// Which batches to check.
enum Extent {
  kEverything,
  kShort,  // of every kind, without contexts of 1,000 tokens and more
  kFew     // a few short ones, for tools that take long
};

// Scores with a soft cap: every number of tokens, caps that flatten scores, that bend them and that leave them as they
// are, with sinks and without, with items divided and whole.
static std::vector<Batch> capped_batches(Extent extent) {
  std::vector<Batch> batches;
  const float caps[] = {2.5f, 50.0f, 0.5f, 30.0f, 1e20f, 8.0f, 1e-20f};
  const bool few = extent == kFew;
  int turn = 0;
  for (int group : few ? std::vector<int>{4} : std::vector<int>{1, 2, 3, 8, 16})
    for (int tokens = 1; tokens <= 8; tokens += few ? 7 : 1, ++turn) {
      std::vector<Sequence> s;
      for (int len : {1, 127, 128, 129, 257, 300, 2047, 4096})
        if (extent == kEverything || len < 400) s.push_back({std::max(len, tokens), tokens});
      s.insert(s.begin() + 3, Sequence{0, 0});                                         // padding
      s.push_back({700 + tokens, std::max(1, tokens - 1)});                            // mixed numbers of tokens
      for (int over = 1; over < tokens; over += 3) s.push_back({384 + over, tokens});  // over the end of a block
      batches.push_back(
          {s, group, uint64_t(7000 + 100 * group + tokens), turn % 3 == 2, turn % 2 != 0, caps[turn % 7]});
    }
  return batches;
}

// Scores as they are.
static std::vector<Batch> plain_batches(Extent extent) {
  std::vector<Batch> batches;
  const bool few = extent == kFew;
  for (int group : few ? std::vector<int>{4} : std::vector<int>{1, 2, 3, 4, 6, 8, 16})
    for (int tokens = 1; tokens <= 8; tokens = few ? tokens + 7 : tokens < 4 ? tokens + 1 : 2 * tokens) {
      std::vector<Sequence> s;
      for (int len : {1, 2, 127, 128, 129, 255, 256, 257, 300, 1000, 2047, 4096, 4097})
        if (extent == kEverything || len < 400) s.push_back({std::max(len, tokens), tokens});
      s.insert(s.begin() + 3, Sequence{0, 0});                                         // padding
      s.push_back({700 + tokens, std::max(1, tokens - 1)});                            // mixed numbers of tokens
      for (int over = 1; over < tokens; over += 3) s.push_back({384 + over, tokens});  // over the end of a block
      // Some shapes again with sinks.
      for (int sinks = 0; sinks < (group % 4 && group != 6 ? 1 : 2); ++sinks)
        batches.push_back({s, group, uint64_t(1000 * group + tokens), group == 3, sinks != 0});
    }
  if (extent == kEverything)
    for (int len : {16384, 131072}) batches.push_back({{{len, 1}, {40, 1}, {5000, 1}}, 4, uint64_t(len), false, false});
  return batches;
}

static std::vector<Batch> all_batches(Extent extent) {
  std::vector<Batch> batches = capped_batches(extent);
  for (Batch &b : plain_batches(extent)) batches.push_back(std::move(b));
  return batches;
}

// Checks and prints a batch; whether it is within the bound.
constexpr double kBound = 2e-3;
static bool check_and_print(const File &f, const Batch &b, double &worst) {
  const double e = check(f, b);
  worst = std::max(worst, e);
  const bool ok = e >= 0 && e < kBound;
  int longest = 0;
  for (const Sequence &s : b.sequences) longest = std::max(longest, s.len);
  printf("%s %-32s group %2d tokens %d length %d", ok ? "ok  " : "FAIL", f.name.c_str(), b.group, b.tokens(), longest);
  if (b.cap > 0) printf(", soft cap %g", double(b.cap));
  printf("%s%s: ", b.sinks ? ", sinks" : "", b.invariant ? ", batch invariant" : "");
  if (e >= 0)
    printf("%.2e\n", e);
  else
    printf("%s\n", e == -1 ? "counters are not zero" : e == -2 ? "two launches differ" : "not a number");
  fflush(stdout);
  return ok;
}
