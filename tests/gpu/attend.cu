// Attention kernels against an fp64 reference over what the codec reads from the same pages, and their speed.
//
//   cargo run --release -p kakeya-bridge --example attend_vectors -- DIR
//   nvcc -O3 -std=c++17 -arch=sm_90a -I kernels -o attend_gpu tests/gpu/attend.cu
//   ./attend_gpu check DIR/*.bin      every shape; relative L2 bound 2e-3
//   ./attend_gpu small DIR/*.bin      a few shapes, for compute-sanitizer
//   ./attend_gpu bench DIR/*.bin      medians over CUDA-graph replays with cold L2
//   KAKEYA_BENCH_CAP=50 ./attend_gpu bench DIR/*.bin      the same with a soft cap of scores
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "attend_check.cuh"

static int check_all(const std::vector<File> &files, bool small) {
  int bad = 0;
  double worst = 0;
  for (const File &f : files)
    for (const Batch &b : all_batches(small ? kFew : kEverything)) bad += !check_and_print(f, b, worst);
  printf("%d failures, worst relative L2 %.2e (bound %g)\n", bad, worst, kBound);
  return bad != 0;
}

static double copy_bandwidth() {
  const size_t n = size_t(4) << 30;
  Device<uint8_t> a(n, 1), b(n, 2);
  cudaEvent_t e0, e1;
  CUDA(cudaEventCreate(&e0));
  CUDA(cudaEventCreate(&e1));
  std::vector<double> gb;
  for (int i = 0; i < 9; ++i) {
    CUDA(cudaEventRecord(e0));
    CUDA(cudaMemcpyAsync(b.p, a.p, n, cudaMemcpyDeviceToDevice));
    CUDA(cudaEventRecord(e1));
    CUDA(cudaEventSynchronize(e1));
    float ms;
    CUDA(cudaEventElapsedTime(&ms, e0, e1));
    if (i > 1) gb.push_back(2.0 * n / ms / 1e6);
  }
  std::sort(gb.begin(), gb.end());
  return gb[gb.size() / 2];
}

__global__ void spread(uint8_t *to, const uint8_t *from, size_t bytes, size_t total) {
  for (size_t i = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * 16; i < total;
       i += size_t(gridDim.x) * blockDim.x * 16)
    *reinterpret_cast<uint4 *>(to + i) = *reinterpret_cast<const uint4 *>(from + i % bytes);
}

static void bench(const File &f, int batch, int context, int group, double copy) {
  const int d = int(f.t.head_dim), heads = int(f.heads), per = context / kBlock, blocks = batch * per;
  const size_t layer = size_t(blocks) * heads * f.t.page_bytes;
  const int layers = int(std::min<size_t>(16, std::max<size_t>(2, (size_t(400) << 20) / layer + 1)));
  Device<uint8_t> tables(f.tables), sample(f.pages), pages(layer * layers);
  spread<<<4096, 256>>>(pages.p, sample.p, f.pages.size(), layer * layers);
  std::mt19937_64 random(7);
  std::vector<int> order(blocks), table(blocks), start(batch + 1), lens(batch, context + 1), plan(plan_size(batch, 0));
  for (int i = 0; i < blocks; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), random);
  const int stride = per + 1;
  table.assign(size_t(batch) * stride, 0);
  std::vector<int> slot(blocks + batch, -1);
  for (int s = 0; s < batch; ++s) {
    for (int b = 0; b < per; ++b) table[s * stride + b] = order[s * per + b];
    table[s * stride + per] = blocks + s;
    slot[blocks + s] = s;
    start[s + 1] = s + 1;
    plan[plan_cumulative(0) + s + 1] = (s + 1) * (per + 1);
  }
  std::normal_distribution<float> normal;
  std::vector<uint16_t> q(size_t(batch) * heads * group * d), pool(size_t(batch) * 2 * heads * kBlock * d);
  for (auto &x : q) x = to_bf16(normal(random));
  for (auto &x : pool) x = to_bf16(normal(random));
  const float cap = getenv("KAKEYA_BENCH_CAP") ? float(atof(getenv("KAKEYA_BENCH_CAP"))) : 0.0f;  // of scores, 0: none
  const Launch launch(f, group, group, cap > 0);
  Device<uint16_t> d_q(q), d_pool(pool), d_out(q.size());
  Device<int> d_table(table), d_slot(slot), d_start(start), d_lens(lens), d_plan(plan);
  Device<float> work(launch.workspace(d, batch * heads), 0);
  Device<int> count(size_t(launch.chunks) * batch * heads, 0);
  AttendParams p = {};
  p.tables = reinterpret_cast<const Tables *>(tables.p);
  p.page_head_stride = f.t.page_bytes;
  p.page_block_stride = int64_t(heads) * f.t.page_bytes;
  p.q = d_q.p, p.out = d_out.p;
  p.q_token_stride = p.out_token_stride = int64_t(heads) * group * d;
  p.q_head_stride = p.out_head_stride = d;
  p.open_blocks = d_pool.p, p.open_slot = d_slot.p, p.block_table = d_table.p, p.block_table_stride = stride;
  p.query_start = d_start.p, p.seq_lens = d_lens.p, p.plan = d_plan.p;
  p.workspace = work.p, p.counters = count.p;
  p.num_seqs = batch, p.num_kv_heads = heads, p.group = group, p.layer = int(f.layer);
  p.scale = float(1.0 / std::sqrt(double(d)));
  p.soft_cap = cap;
  cudaStream_t s;
  CUDA(cudaStreamCreate(&s));
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  CUDA(cudaStreamBeginCapture(s, cudaStreamCaptureModeGlobal));
  for (int l = 0; l < layers; ++l) {
    p.pages = pages.p + layer * l;
    launch.run(p, s);
  }
  CUDA(cudaStreamEndCapture(s, &graph));
  CUDA(cudaGraphInstantiate(&exec, graph, 0));
  cudaEvent_t e0, e1;
  CUDA(cudaEventCreate(&e0));
  CUDA(cudaEventCreate(&e1));
  std::vector<double> us;
  for (int i = 0; i < 24; ++i) {
    CUDA(cudaEventRecord(e0, s));
    CUDA(cudaGraphLaunch(exec, s));
    CUDA(cudaEventRecord(e1, s));
    CUDA(cudaEventSynchronize(e1));
    float ms;
    CUDA(cudaEventElapsedTime(&ms, e0, e1));
    if (i >= 4) us.push_back(ms * 1000 / layers);
  }
  std::sort(us.begin(), us.end());
  const double t = us[us.size() / 2], gb = layer / t / 1e3;
  const double bf16 = 4.0 * blocks * kBlock * heads * d / (copy * 1e3);
  printf(
      "%-30s batch %3d context %6d group %2d: %8.2f us (%.2f..%.2f)  %6.0f GB/s of pages, %.1f %% of copy, %.2fx bf16 "
      "at copy speed, %d stages\n",
      f.name.c_str(), batch, context, group, t, us[0], us.back(), gb, 100 * gb / copy, bf16 / t, launch.stages);
  fflush(stdout);
  CUDA(cudaGraphExecDestroy(exec));
  CUDA(cudaGraphDestroy(graph));
  CUDA(cudaStreamDestroy(s));
}

int main(int argc, char **argv) {
  const std::string mode = argc > 2 ? argv[1] : "";
  if (mode != "check" && mode != "small" && mode != "bench") {
    fprintf(stderr, "usage: attend_gpu check|small|bench FILE...\n");
    return 1;
  }
  std::vector<File> files;
  for (int i = 2; i < argc; ++i) files.emplace_back(argv[i]);
  if (mode != "bench") return check_all(files, mode == "small");
  const double copy = copy_bandwidth();
  printf("copy: %.0f GB/s\n", copy);
  for (File &f : files) {
    if (getenv("KAKEYA_BENCH_NO_SLOTS"))  // what the exact slots cost
      for (uint32_t l = 0; l < f.t.num_layers; ++l)
        reinterpret_cast<uint32_t *>(f.tables.data() + f.t.layers)[4 * l + 1] = 0;
    int batch = 64, context = 8192, group = 4;
    if (const char *shape = getenv("KAKEYA_BENCH_SHAPE")) {  // one shape only: batch,context,group
      if (sscanf(shape, "%d,%d,%d", &batch, &context, &group) != 3) {
        fprintf(stderr, "KAKEYA_BENCH_SHAPE is %s; valid: BATCH,CONTEXT,GROUP\n", shape);
        return 1;
      }
    }
    bench(f, batch, context, group, copy);
    if (getenv("KAKEYA_BENCH_ONE") || getenv("KAKEYA_BENCH_SHAPE")) continue;
    bench(f, 32, 32768, 4, copy);
    bench(f, 1, 131072, 4, copy);
    bench(f, 1, 8192, 4, copy);
    bench(f, 1, 1024, 4, copy);
    bench(f, 256, 1024, 4, copy);
    bench(f, 64, 8192, 8, copy);
  }
  return 0;
}
