// Plan, append, seal and open on the GPU. Pages, byte for byte, against the codec's; opened rows against the codec's,
// rounded to the engine's type. Input: files of csrc/bridge/examples/seal_vectors.rs.
//
//   cargo run --release -p kakeya-bridge --example seal_vectors -- DIR
//   nvcc -O3 -std=c++17 -fmad=false -arch=sm_90 -o seal_gpu tests/gpu/seal.cu && ./seal_gpu DIR/*.bin
#include <algorithm>
#include <set>

#include "vectors.cuh"

using namespace kakeya;

static int failures = 0;

static void expect(bool ok, const char *file, const char *what, size_t at = 0) {
  if (ok) return;
  ++failures;
  printf("%s: %s (at %zu)\n", file, what, at);
}

template <typename T>
static void expect_equal(const T *got, const T *want, size_t n, const char *file, const char *what) {
  const size_t at = size_t(std::mismatch(got, got + n, want).first - got);
  expect(at == n, file, what, at);
}

constexpr int kSpare = 3;  // blocks that no test seals

// A cache with the blocks of a file at scattered places.
struct Cache {
  const Vectors &x;
  size_t blocks;
  std::vector<int32_t> place;  // physical block of a logical one
  Buffer<uint8_t> pages, tables;
  Buffer<uint32_t> status;

  explicit Cache(const Vectors &vectors)
      : x(vectors),
        blocks(x.h.blocks + kSpare),
        pages(blocks * x.h.heads * x.t.page_bytes),
        tables(x.tables),
        status(1, 0) {
    for (size_t b = 0; b < x.h.blocks; ++b) place.push_back(int32_t((b * 3 + 1) % blocks));
    std::vector<int32_t> sorted = place;
    std::sort(sorted.begin(), sorted.end());
    if (std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end()) exit(3);
  }

  const Tables *device_tables() const { return reinterpret_cast<const Tables *>(tables.p); }
  int64_t head_stride() const { return x.t.page_bytes; }
  int64_t block_stride() const { return int64_t(x.h.heads) * x.t.page_bytes; }

  // Compares all pages; `missing` (block * heads + head): must not have been written.
  void check(const char *file, const char *what, int missing = -1) const {
    const std::vector<uint8_t> got = pages.host();
    const size_t bytes = x.t.page_bytes, heads = x.h.heads;
    std::vector<uint8_t> want(got.size(), 0xa5);
    for (size_t b = 0; b < x.h.blocks; ++b) {
      for (size_t h = 0; h < heads; ++h) {
        if (missing == int(b * heads + h)) continue;
        std::copy_n(&x.pages[(b * heads + h) * bytes], bytes, &want[(size_t(place[b]) * heads + h) * bytes]);
      }
    }
    expect_equal(got.data(), want.data(), got.size(), file, what);
  }
};

static SealParams seal_params(const Cache &c, const void *k, const void *v, int64_t token_stride, const void *open,
                              const int32_t *plan) {
  SealParams p = {};
  p.tables = c.device_tables();
  p.k = k;
  p.v = v;
  p.k_token_stride = p.v_token_stride = token_stride;
  p.k_head_stride = p.v_head_stride = int64_t(c.x.d);
  p.open_blocks = open;
  p.plan = plan;
  p.pages = c.pages.p;
  p.page_block_stride = c.block_stride();
  p.page_head_stride = c.head_stride();
  p.status = c.status.p;
  p.layer = int32_t(c.x.h.layer);
  p.num_kv_heads = int32_t(c.x.h.heads);
  p.element = int32_t(c.x.h.element);
  return p;
}

// The file's blocks as one prompt, read from k and v. `pad` elements between tokens and before the first.
static void from_rows(const char *file, const Vectors &x, size_t pad, int bad_block) {
  Cache c(x);
  const size_t row = x.h.heads * x.d, tokens = x.h.blocks * kBlock;
  std::vector<uint16_t> k(tokens * (row + pad) + pad, 0x7fff), v = k;
  for (size_t t = 0; t < tokens; ++t) {
    std::copy_n(&x.k[t * row], row, &k[t * (row + pad) + pad]);
    std::copy_n(&x.v[t * row], row, &v[t * (row + pad) + pad]);
  }
  int missing = -1;
  if (bad_block >= 0) {  // a NaN among the last head's values or first head's keys
    const size_t head = bad_block % 2 ? 0 : x.h.heads - 1, at = size_t(bad_block) * kBlock + 77;
    (bad_block % 2 ? k : v)[at * (row + pad) + pad + head * x.d + 5] = 0x7fff;
    missing = bad_block * int(x.h.heads) + int(head);
  }
  Buffer<uint16_t> dk(k), dv(v);
  const int32_t length = int32_t(tokens);
  Buffer<int32_t> starts(std::vector<int32_t>{0, length}), lengths(std::vector<int32_t>{length}), table(c.place),
      slots(std::vector<int32_t>(c.blocks, -1));
  const int max_tasks = int(x.h.blocks) + 2;
  Buffer<int32_t> plan(size_t(plan_size(4, max_tasks)));
  launch_plan({starts.p, lengths.p, table.p, slots.p, int64_t(x.h.blocks), plan.p, 1, 4, max_tasks, 8});
  launch_seal(seal_params(c, dk.p + pad, dv.p + pad, int64_t(row + pad), nullptr, plan.p), int(x.d), 6);
  CUDA(cudaDeviceSynchronize());
  expect(c.status.host()[0] == (missing < 0 ? kSealOk : kSealNonFinite), file, "status");
  c.check(file,
          bad_block >= 0 ? "pages around a refused one"
          : pad          ? "pages from padded rows"
                         : "pages from rows",
          missing);
}

// Every block a sequence of its own that its last token completes: appended, then sealed from the open blocks.
static void from_open_blocks(const char *file, const Vectors &x) {
  Cache c(x);
  const size_t row = x.h.heads * x.d, tokens = x.h.blocks * kBlock, n = x.h.blocks, open_size = 2 * row * kBlock;
  std::vector<int64_t> mapping;
  std::vector<int32_t> slots(c.blocks, -1), starts = {0}, lengths, table;
  const size_t width = n + 1;
  for (size_t b = 0; b < n; ++b) {
    slots[size_t(c.place[b])] = int32_t((b + 2) % n);
    starts.push_back(int32_t(b + 1));
    lengths.push_back(int32_t((b + 1) * kBlock));
    for (size_t i = 0; i < width; ++i) table.push_back(i == b ? c.place[b] : -1);
    for (int j = 0; j < kBlock; ++j) mapping.push_back(int64_t(c.place[b]) * kBlock + j);
  }
  mapping.push_back(-1);                              // padding
  mapping.push_back(int64_t(c.blocks - 1) * kBlock);  // a block without an open one
  if (slots[c.blocks - 1] >= 0) mapping.back() = -1;
  std::vector<uint16_t> k = x.k, v = x.v;
  k.resize(k.size() + 2 * row, 0x1234);
  v.resize(v.size() + 2 * row, 0x1234);
  Buffer<uint16_t> dk(k), dv(v), open((n + 1) * open_size);
  Buffer<int64_t> dm(mapping);
  Buffer<int32_t> ds(slots), dq(starts), dl(lengths), dt(table);
  AppendParams a = {};
  a.k = dk.p;
  a.v = dv.p;
  a.k_token_stride = a.v_token_stride = int64_t(row);
  a.k_head_stride = a.v_head_stride = int64_t(x.d);
  a.slot_mapping = dm.p;
  a.open_slot = ds.p;
  a.open_blocks = open.p;
  a.num_tokens = int32_t(mapping.size());
  a.num_kv_heads = int32_t(x.h.heads);
  a.head_dim = int32_t(x.d);
  launch_append(a, x.h.element == kF16);
  Buffer<int32_t> plan(size_t(plan_size(int64_t(n) + 3, int64_t(n))));
  launch_plan({dq.p, dl.p, dt.p, ds.p, int64_t(width), plan.p, int32_t(n), int32_t(n) + 3, int32_t(n), 8});
  launch_seal(seal_params(c, nullptr, nullptr, int64_t(row), open.p, plan.p), int(x.d), 4);
  CUDA(cudaDeviceSynchronize());
  std::vector<uint16_t> want((n + 1) * open_size, 0xa5a5);
  for (size_t t = 0; t < tokens; ++t)
    for (size_t h = 0; h < x.h.heads; ++h)
      for (size_t s = 0; s < 2; ++s) {
        const size_t slot = (t / kBlock + 2) % n;
        std::copy_n(&(s ? x.v : x.k)[t * row + h * x.d], x.d,
                    &want[(((slot * 2 + s) * x.h.heads + h) * kBlock + t % kBlock) * x.d]);
      }
  const std::vector<uint16_t> got = open.host();
  expect_equal(got.data(), want.data(), got.size(), file, "open blocks");
  expect(c.status.host()[0] == kSealOk, file, "status of sealing from open blocks");
  c.check(file, "pages from open blocks");
}

static void opened(const char *file, const Vectors &x, size_t pad) {
  Cache c(x);
  const size_t row = x.h.heads * x.d + pad, tokens = x.h.blocks * kBlock;
  std::vector<uint8_t> all = c.pages.host();
  for (size_t b = 0; b < x.h.blocks; ++b)
    std::copy_n(&x.pages[b * size_t(c.block_stride())], c.block_stride(), &all[size_t(c.place[b] * c.block_stride())]);
  CUDA(cudaMemcpy(c.pages.p, all.data(), all.size(), cudaMemcpyHostToDevice));
  std::vector<int32_t> blocks = c.place;
  blocks.push_back(-1);
  for (int32_t b = 0; b < int32_t(c.blocks); ++b)
    if (std::find(c.place.begin(), c.place.end(), b) == c.place.end()) blocks.back() = b;  // holds no page
  Buffer<int32_t> db(blocks);
  Buffer<uint16_t> k((tokens + kBlock) * row), v((tokens + kBlock) * row);
  OpenParams p = {};
  p.tables = c.device_tables();
  p.pages = c.pages.p;
  p.page_block_stride = c.block_stride();
  p.page_head_stride = c.head_stride();
  p.blocks = db.p;
  p.k = k.p;
  p.v = v.p;
  p.k_token_stride = p.v_token_stride = int64_t(row);
  p.k_head_stride = p.v_head_stride = int64_t(x.d);
  p.num_blocks = int32_t(blocks.size());
  p.layer = int32_t(x.h.layer);
  p.num_kv_heads = int32_t(x.h.heads);
  p.element = int32_t(x.h.element);
  launch_open(p, int(x.d));
  CUDA(cudaDeviceSynchronize());
  const uint16_t infinity = x.h.element == kF16 ? 0x7c00 : 0x7f80;
  for (int s = 0; s < 2; ++s) {
    const std::vector<uint16_t> got = (s ? v : k).host(), &want = s ? x.v_opened : x.k_opened;
    const size_t dense = row - pad;
    for (size_t t = 0; t < tokens; ++t)
      expect_equal(&got[t * row], &want[t * dense], dense, file, s ? "opened values" : "opened keys");
    for (size_t t = tokens; t < tokens + kBlock; ++t)
      for (size_t i = 0; i < dense; ++i)
        expect((got[t * row + i] & 0x7fff) > infinity, file, "what is no page is no number", t);
  }
}

// Plans of random steps against a simulation, token by token.
static void plans() {
  uint64_t noise = 12345;
  const auto random = [&](int n) {
    noise = noise * 6364136223846793005ull + 1442695040888963407ull;
    return int32_t((noise >> 33) % uint64_t(n));
  };
  for (const int num_seqs : {0, 1, 2, 31, 257, 1024, 2500}) {
    const int max_seqs = num_seqs + 5, max_query = 8, width = 40;
    std::vector<int32_t> starts = {0}, lengths, table, slots(size_t(num_seqs) * width + 1);
    for (size_t b = 0; b < slots.size(); ++b) slots[b] = random(5) ? int32_t(b * 7 + 3) : -1;
    std::vector<int32_t> want_tasks, want_units = {0};
    for (int s = 0; s < num_seqs; ++s) {
      const int n = random(4) == 0 ? 0 : random(3) == 0 ? 1 + random(2000) : 1 + random(9);
      const int history = random(3) ? random(2500) : 128 * random(20) - (random(2) ? 1 : 0);
      const int from = history < 0 ? 0 : history;
      for (int b = 0; b < width; ++b) table.push_back(s * width + (b * 11 + 5) % width);
      const int32_t first = starts.back();
      for (int t = 0; t < n; ++t) {
        if ((from + t) % kBlock != kBlock - 1) continue;
        const int logical = (from + t) / kBlock, block = table[size_t(s) * width + logical];
        const int row = first + t - (kBlock - 1);
        want_tasks.insert(want_tasks.end(),
                          {block, logical, row >= first ? row : -1, row >= first ? -1 : slots[size_t(block)]});
      }
      int units = 0;
      if (n > 0 && n <= max_query) {
        // Every token reads the blocks before its own as pages and its own as it stands: one unit each, for all tokens.
        std::set<int> pages, open;
        for (int t = from; t < from + n; ++t) {
          for (int b = 0; b < t / kBlock; ++b) pages.insert(b);
          open.insert(t / kBlock);
        }
        units = int(pages.size() + open.size());
      }
      want_units.push_back(want_units.back() + units);
      starts.push_back(first + n);
      lengths.push_back(from + n);
    }
    while (int(want_units.size()) < max_seqs + 1) want_units.push_back(want_units.back());
    const int all = int(want_tasks.size() / 4);
    lengths.push_back(0);
    table.push_back(0);
    for (const int max_tasks : {all, all + 3, all / 2}) {
      Buffer<int32_t> dq(starts), dl(lengths), dt(table), ds(slots);
      const size_t size = size_t(plan_size(max_seqs, max_tasks));
      Buffer<int32_t> plan(size + 8);
      launch_plan({dq.p, dl.p, dt.p, ds.p, width, plan.p, num_seqs, max_seqs, max_tasks, max_query});
      CUDA(cudaDeviceSynchronize());
      const std::vector<int32_t> got = plan.host();
      const int tasks = std::min(all, max_tasks);
      const int32_t head[4] = {tasks, want_units.back(), 0, 0},
                    poison[8] = {-1515870811, -1515870811, -1515870811, -1515870811,
                                 -1515870811, -1515870811, -1515870811, -1515870811};
      expect_equal(got.data(), head, 4, "plan", "head");
      expect_equal(got.data() + 4, want_tasks.data(), size_t(tasks) * 4, "plan", "tasks");
      expect_equal(got.data() + plan_cumulative(max_tasks), want_units.data(), want_units.size(), "plan", "units");
      expect_equal(got.data() + size, poison, 8, "plan", "what lies behind");
    }
  }
}

int main(int argc, char **argv) {
  plans();
  for (int i = 1; i < argc; ++i) {
    const Vectors x(argv[i]);
    from_rows(argv[i], x, 0, -1);
    from_rows(argv[i], x, 5, -1);
    from_rows(argv[i], x, 8, 1);
    from_rows(argv[i], x, 0, 2);
    from_open_blocks(argv[i], x);
    opened(argv[i], x, 0);
    opened(argv[i], x, 3);
  }
  printf("%d files, %d failures\n", argc - 1, failures);
  return failures != 0 || argc < 2;
}
