// Pages sealed on the GPU against the codec's, byte for byte. Input: files of csrc/bridge/examples/seal_vectors.rs.
//
//   cargo run --release -p kakeya-bridge --example seal_vectors -- DIR
//   nvcc -O3 -std=c++17 -fmad=false -arch=sm_90 -I kernels -o seal_gpu tests/gpu/seal.cu && ./seal_gpu DIR/*.bin
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../../kernels/seal.cu"

#define CUDA(call)                                                                          \
  do {                                                                                      \
    const cudaError_t e = (call);                                                           \
    if (e != cudaSuccess) {                                                                 \
      fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(e)); \
      exit(2);                                                                              \
    }                                                                                       \
  } while (0)

template <typename T>
static T *upload(const T *data, size_t n) {
  T *p;
  CUDA(cudaMalloc(&p, n * sizeof(T)));
  CUDA(cudaMemcpy(p, data, n * sizeof(T), cudaMemcpyHostToDevice));
  return p;
}

// Header of a vector file: magic, bytes of the tables, blocks, heads, layer, first block index.
struct FileHeader {
  uint64_t magic, table_bytes, blocks, heads, layer, first_block;
};

static int check(const char *path) {
  FILE *f = fopen(path, "rb");
  FileHeader h;
  if (!f || fread(&h, sizeof h, 1, f) != 1 || h.magic != 0x314c4145534b414bull) {
    fprintf(stderr, "%s: not a vector file\n", path);
    return 1;
  }
  auto read = [&](size_t n) {
    std::vector<uint8_t> x(n);
    if (fread(x.data(), 1, n, f) != n) {
      fprintf(stderr, "%s: too short\n", path);
      exit(1);
    }
    return x;
  };
  const std::vector<uint8_t> tables = read(h.table_bytes);
  kakeya::Tables t;
  memcpy(&t, tables.data(), sizeof t);
  const size_t d = t.head_dim, elements = h.blocks * kakeya::kBlock * h.heads * d;
  const std::vector<uint8_t> k = read(2 * elements), v = read(2 * elements);
  const size_t page_bytes = h.blocks * h.heads * t.page_bytes;
  const std::vector<uint8_t> want = read(page_bytes);
  fclose(f);

  uint8_t *pages;
  CUDA(cudaMalloc(&pages, page_bytes));
  CUDA(cudaMemset(pages, 0xa5, page_bytes));
  std::vector<kakeya::SealBlock> blocks(h.blocks);
  for (size_t b = 0; b < h.blocks; ++b)
    blocks[b] = {int64_t(b * kakeya::kBlock), int32_t(h.first_block + b), 0, pages + b * h.heads * t.page_bytes};
  const uint32_t zero = 0;
  kakeya::SealParams p = {};
  p.tables = reinterpret_cast<const kakeya::Tables *>(upload(tables.data(), tables.size()));
  p.k = reinterpret_cast<const __nv_bfloat16 *>(upload(k.data(), k.size()));
  p.v = reinterpret_cast<const __nv_bfloat16 *>(upload(v.data(), v.size()));
  p.token_stride = int64_t(h.heads * d);
  p.head_stride = int64_t(d);
  p.page_head_stride = t.page_bytes;
  p.layer = int32_t(h.layer);
  p.blocks = upload(blocks.data(), blocks.size());
  p.status = upload(&zero, 1);
  const int shared = int(kakeya::kBlock * d * sizeof(float));
  CUDA(cudaFuncSetAttribute(kakeya::kakeya_seal_bf16, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  const dim3 grid(unsigned(h.blocks), unsigned(h.heads));
  kakeya::kakeya_seal_bf16<<<grid, kakeya::kSealThreads, shared>>>(p);
  CUDA(cudaDeviceSynchronize());
  std::vector<uint8_t> got(page_bytes);
  uint32_t status;
  CUDA(cudaMemcpy(got.data(), pages, page_bytes, cudaMemcpyDeviceToHost));
  CUDA(cudaMemcpy(&status, p.status, 4, cudaMemcpyDeviceToHost));
  size_t different = 0, first = page_bytes;
  for (size_t i = 0; i < page_bytes; ++i)
    if (got[i] != want[i]) {
      if (!different) first = i;
      ++different;
    }

  cudaEvent_t a, b;
  CUDA(cudaEventCreate(&a));
  CUDA(cudaEventCreate(&b));
  float best = 1e30f;
  for (int r = 0; r < 10; ++r) {
    CUDA(cudaEventRecord(a));
    kakeya::kakeya_seal_bf16<<<grid, kakeya::kSealThreads, shared>>>(p);
    CUDA(cudaEventRecord(b));
    CUDA(cudaEventSynchronize(b));
    float ms;
    CUDA(cudaEventElapsedTime(&ms, a, b));
    best = ms < best ? ms : best;
  }
  printf("%s: D=%zu, %zu pages, status %u, %zu bytes differ", path, d, size_t(h.blocks * h.heads), status, different);
  if (different) printf(" (first: page %zu byte %zu)", first / t.page_bytes, first % t.page_bytes);
  printf("; %.1f us, %.1f GB/s of bf16 input\n", best * 1e3, 4.0 * double(elements) / (best * 1e-3) / 1e9);
  return different != 0 || status != 0;
}

int main(int argc, char **argv) {
  int failed = argc < 2;
  for (int i = 1; i < argc; ++i) failed |= check(argv[i]);
  puts(failed ? "FAILED" : "all pages equal the codec's");
  return failed;
}
