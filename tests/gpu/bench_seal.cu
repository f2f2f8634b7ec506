// Times of sealing: a long prompt, steady decode and a burst; and of plan, append and open. Input: files of
// csrc/bridge/examples/seal_vectors.rs with 8 heads, whose blocks are repeated.
//
//   cargo run --release -p kakeya-bridge --example seal_vectors -- DIR 2 8 128
//   nvcc -O3 -std=c++17 -fmad=false -arch=sm_90 -o bench_seal tests/gpu/bench_seal.cu && ./bench_seal DIR/*.bin
//
// -DKAKEYA_SEAL_CLOCKS: also the cycles of each phase of a block sealed alone.
#include <algorithm>
#include <functional>

#include "vectors.cuh"

using namespace kakeya;

// Median microseconds of one launch among `launches` of a graph that is replayed; launch i gets i.
static double time_graph(int launches, int replays, const std::function<void(int, cudaStream_t)> &launch) {
  cudaStream_t stream;
  CUDA(cudaStreamCreate(&stream));
  launch(0, stream);
  CUDA(cudaStreamSynchronize(stream));
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < launches; ++i) launch(i, stream);
  CUDA(cudaStreamEndCapture(stream, &graph));
  CUDA(cudaGraphInstantiate(&exec, graph, 0));
  cudaEvent_t a, b;
  CUDA(cudaEventCreate(&a));
  CUDA(cudaEventCreate(&b));
  std::vector<float> times;
  for (int r = 0; r < replays + 2; ++r) {
    CUDA(cudaEventRecord(a, stream));
    CUDA(cudaGraphLaunch(exec, stream));
    CUDA(cudaEventRecord(b, stream));
    CUDA(cudaEventSynchronize(b));
    float ms;
    CUDA(cudaEventElapsedTime(&ms, a, b));
    if (r >= 2) times.push_back(ms);
  }
  CUDA(cudaGraphExecDestroy(exec));
  CUDA(cudaGraphDestroy(graph));
  CUDA(cudaStreamDestroy(stream));
  std::sort(times.begin(), times.end());
  return 1e3 * times[times.size() / 2] / launches;
}

int main(int argc, char **argv) {
  cudaDeviceProp device;
  CUDA(cudaGetDeviceProperties(&device, 0));
  for (int i = 1; i < argc; ++i) {
    const Vectors x(argv[i]);
    const size_t row = x.h.heads * x.d, per_block = row * kBlock;
    const auto kernel = x.h.element == kF16 ? kakeya_seal_f16 : kakeya_seal_bf16;
    const size_t shared = seal_shared_bytes(int(x.d));
    CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)));
    int resident = 0;
    CUDA(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kSealThreads, shared));
    const int grid = device.multiProcessorCount * resident / 2 * 2;
    printf("%s: D=%zu, %zu heads, %d thread blocks an SM\n", argv[i], x.d, x.h.heads, resident);
    // Four sets of 64 blocks of input: more than L2 holds.
    constexpr size_t kSets = 4, kBlocks = 64;
    Buffer<uint16_t> k(kSets * kBlocks * per_block), v(kSets * kBlocks * per_block);
    for (size_t b = 0; b < kSets * kBlocks; ++b) {
      const size_t from = b % x.h.blocks * per_block;
      CUDA(cudaMemcpy(k.p + b * per_block, &x.k[from], 2 * per_block, cudaMemcpyHostToDevice));
      CUDA(cudaMemcpy(v.p + b * per_block, &x.v[from], 2 * per_block, cudaMemcpyHostToDevice));
    }
    // The same bytes as open blocks [slot][K, V][head][128][d]: for times it does not matter whose they are.
    Buffer<uint8_t> tables(x.tables), pages(256 * x.h.heads * x.t.page_bytes);
    Buffer<uint32_t> status(1, 0);
    SealParams p = {};
    p.tables = reinterpret_cast<const Tables *>(tables.p);
    p.k_token_stride = p.v_token_stride = int64_t(row);
    p.k_head_stride = p.v_head_stride = int64_t(x.d);
    p.open_blocks = k.p;
    p.pages = pages.p;
    p.page_head_stride = x.t.page_bytes;
    p.page_block_stride = int64_t(x.h.heads) * x.t.page_bytes;
    p.status = status.p;
    p.layer = int32_t(x.h.layer);
    p.num_kv_heads = int32_t(x.h.heads);
    p.element = int32_t(x.h.element);
    const auto plan_of = [&](int tasks, bool open) {
      std::vector<int32_t> plan = {tasks, 0, 0, 0};
      for (int t = 0; t < tasks; ++t)
        plan.insert(plan.end(), {t % 256, t % 32, open ? -1 : t * kBlock, open ? t % 120 : -1});
      return plan;
    };
    const auto seal = [&](const char *what, int tasks, bool open, int launches) {
      Buffer<int32_t> plan(plan_of(tasks, open));
      const double us = time_graph(launches, 15, [&](int n, cudaStream_t stream) {
        SealParams q = p;
        q.plan = plan.p;
        q.k = k.p + size_t(n) % kSets * kBlocks * per_block;
        q.v = v.p + size_t(n) % kSets * kBlocks * per_block;
        if (tasks <= 2) q.open_blocks = k.p + size_t(n) * 4 * per_block;  // each launch from memory
        kernel<<<grid, kSealThreads, shared, stream>>>(q);
        CUDA(cudaGetLastError());
      });
      printf("  %-34s %8.1f us  %7.1f GB/s of input\n", what, us, 4.0 * double(per_block) * tasks / us / 1e3);
    };
    seal("prompt, 64 blocks", 64, false, 8);
    seal("steady decode, 2 blocks", 2, true, 32);
    seal("one block", 1, true, 32);
#ifdef KAKEYA_SEAL_CLOCKS
    // After "one block": of its first head, in the last launch.
    long long clocks[2][32];
    CUDA(cudaMemcpyFromSymbol(clocks, seal_clocks, sizeof clocks));
    const char *begin[] = {"setup", "load", "centre", "score sums", "scores", "choose", "pick"};
    const char *end[] = {"exchange", "mark",         "mean sums", "means", "residual",
                         "scales",   "exact tokens", "codes",     "peaks", "finish"};
    for (int stream = 0; stream < 2; ++stream) {
      std::vector<const char *> names(begin, begin + 2);
      if (stream == 0) {
        names.push_back("centre");
        if (!x.t.calibrated) names.insert(names.end(), {"sums", "means", "squares", "variances"});
        names.insert(names.end(), begin + 3, begin + 7);
      } else {
        names.push_back("hadamard");
      }
      names.insert(names.end(), end, end + 10);
      printf("  cycles of %s:", stream == 0 ? "keys" : "values");
      for (size_t n = 0; n < names.size(); ++n)
        printf(" %s %lld,", names[n], clocks[stream][n + 1] - clocks[stream][n]);
      printf(" in all %lld\n", clocks[stream][names.size()] - clocks[stream][0]);
    }
#endif
    seal("burst, 256 blocks", 256, true, 4);
    seal("nothing to seal", 0, true, 32);
    if (i == 1) {
      std::vector<int32_t> starts, lengths, blocks;
      for (int s = 0; s <= 256; ++s) starts.push_back(s);
      for (int s = 0; s < 256; ++s) lengths.push_back(4096 + s);
      for (int b = 0; b < 256 * 40; ++b) blocks.push_back(b % 256);
      std::vector<int64_t> mapping;
      for (int s = 0; s < 256; ++s) mapping.push_back(s * 128 + s % 128);
      std::vector<int32_t> slots;
      for (int b = 0; b < 256; ++b) slots.push_back(b % 120);
      Buffer<int32_t> dq(starts), dl(lengths), dt(blocks), ds(slots), plan(size_t(plan_size(256, 256)));
      Buffer<int64_t> dm(mapping);
      const double plan_us = time_graph(32, 15, [&](int, cudaStream_t stream) {
        launch_plan({dq.p, dl.p, dt.p, ds.p, 40, plan.p, 256, 256, 256, 8}, stream);
      });
      AppendParams a = {};
      a.k = v.p;
      a.v = v.p + 8 * per_block;
      a.k_token_stride = a.v_token_stride = int64_t(row);
      a.k_head_stride = a.v_head_stride = int64_t(x.d);
      a.slot_mapping = dm.p;
      a.open_slot = ds.p;
      a.open_blocks = k.p;
      a.num_tokens = 256;
      a.num_kv_heads = int32_t(x.h.heads);
      a.head_dim = int32_t(x.d);
      const double append_us =
          time_graph(32, 15, [&](int, cudaStream_t stream) { launch_append(a, x.h.element == kF16, stream); });
      printf("  plan, 256 sequences %.1f us; append, 256 tokens %.1f us\n", plan_us, append_us);
    }
    std::vector<int32_t> ids;
    for (int b = 0; b < 64; ++b) ids.push_back(b);
    std::vector<uint8_t> good;
    for (int b = 0; b < 64; ++b) {
      const size_t size = x.h.heads * x.t.page_bytes, from = size_t(b) % x.h.blocks * size;
      good.insert(good.end(), x.pages.begin() + long(from), x.pages.begin() + long(from + size));
    }
    CUDA(cudaMemcpy(pages.p, good.data(), good.size(), cudaMemcpyHostToDevice));
    Buffer<int32_t> db(ids);
    OpenParams o = {};
    o.tables = p.tables;
    o.pages = pages.p;
    o.page_block_stride = p.page_block_stride;
    o.page_head_stride = p.page_head_stride;
    o.blocks = db.p;
    o.k_token_stride = o.v_token_stride = int64_t(row);
    o.k_head_stride = o.v_head_stride = int64_t(x.d);
    o.num_blocks = 64;
    o.layer = p.layer;
    o.num_kv_heads = p.num_kv_heads;
    o.element = p.element;
    const double us = time_graph(8, 15, [&](int n, cudaStream_t stream) {
      OpenParams q = o;
      q.k = k.p + size_t(n) % kSets * kBlocks * per_block;
      q.v = v.p + size_t(n) % kSets * kBlocks * per_block;
      launch_open(q, int(x.d), stream);
    });
    printf("  %-34s %8.1f us  %7.1f GB/s of output\n", "open, 64 blocks", us, 4.0 * 64 * double(per_block) / us / 1e3);
    if (status.host()[0] != kSealOk) puts("  status is not ok");
  }
  return 0;
}
