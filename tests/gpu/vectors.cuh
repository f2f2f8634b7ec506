// What the GPU tests of sealing share: files of csrc/bridge/examples/seal_vectors.rs, device buffers, launches.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../../kernels/open.cu"
#include "../../kernels/seal.cu"
#include "../../kernels/step.cu"

#define CUDA(call)                                                                          \
  do {                                                                                      \
    const cudaError_t e = (call);                                                           \
    if (e != cudaSuccess) {                                                                 \
      fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(e)); \
      exit(2);                                                                              \
    }                                                                                       \
  } while (0)

// Device memory of one test; poisoned, so that what no kernel wrote shows.
template <typename T>
struct Buffer {
  T *p = nullptr;
  size_t n = 0;

  explicit Buffer(size_t count, int poison = 0xa5) : n(count) {
    CUDA(cudaMalloc(&p, n * sizeof(T) + 16));
    CUDA(cudaMemset(p, poison, n * sizeof(T)));
  }
  explicit Buffer(const std::vector<T> &x) : n(x.size()) {
    CUDA(cudaMalloc(&p, n * sizeof(T) + 16));
    CUDA(cudaMemcpy(p, x.data(), n * sizeof(T), cudaMemcpyHostToDevice));
  }
  Buffer(const Buffer &) = delete;
  ~Buffer() { cudaFree(p); }

  std::vector<T> host() const {
    std::vector<T> x(n);
    CUDA(cudaMemcpy(x.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost));
    return x;
  }
};

// Header of a vector file; elements: 0 bf16, 1 f16.
struct FileHeader {
  uint64_t magic, table_bytes, blocks, heads, layer, element;
};

struct Vectors {
  FileHeader h;
  kakeya::Tables t;
  size_t d, elements;
  std::vector<uint8_t> tables, pages;
  std::vector<uint16_t> k, v, k_opened, v_opened;  // [128 blocks][heads][d]

  explicit Vectors(const char *path) {
    FILE *f = fopen(path, "rb");
    if (!f || fread(&h, sizeof h, 1, f) != 1 || h.magic != 0x324c4145534b414bull) {
      fprintf(stderr, "%s: not a vector file\n", path);
      exit(2);
    }
    const auto read = [&](auto &x, size_t n) {
      x.resize(n);
      if (fread(x.data(), sizeof x[0], n, f) != n) {
        fprintf(stderr, "%s: too short\n", path);
        exit(2);
      }
    };
    read(tables, h.table_bytes);
    memcpy(&t, tables.data(), sizeof t);
    d = t.head_dim;
    elements = h.blocks * kakeya::kBlock * h.heads * d;
    read(k, elements);
    read(v, elements);
    read(pages, h.blocks * h.heads * t.page_bytes);
    read(k_opened, elements);
    read(v_opened, elements);
    fclose(f);
  }
};

template <typename P>
void launch(void (*kernel)(P), const P &params, dim3 grid, int threads, size_t shared, cudaStream_t stream) {
  P p = params;
  void *args[] = {&p};
  if (shared) CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)));
  CUDA(cudaLaunchKernel(kernel, grid, dim3(threads), args, shared, stream));
}

inline void launch_plan(const kakeya::PlanParams &p, cudaStream_t stream = nullptr) {
  launch(kakeya::kakeya_plan, p, dim3(1), kakeya::kPlanThreads, 0, stream);
}

inline void launch_append(const kakeya::AppendParams &p, bool f16, cudaStream_t stream = nullptr) {
  launch(f16 ? kakeya::kakeya_append_f16 : kakeya::kakeya_append_bf16, p, dim3(132), kakeya::kAppendThreads, 0, stream);
}

// `blocks`: thread blocks of the grid, even.
inline void launch_seal(const kakeya::SealParams &p, int head_dim, int blocks, cudaStream_t stream = nullptr) {
  launch(p.element == kakeya::kF16 ? kakeya::kakeya_seal_f16 : kakeya::kakeya_seal_bf16, p, dim3(blocks),
         kakeya::kSealThreads, kakeya::seal_shared_bytes(head_dim), stream);
}

inline void launch_open(const kakeya::OpenParams &p, int head_dim, cudaStream_t stream = nullptr) {
  launch(p.element == kakeya::kF16 ? kakeya::kakeya_open_f16 : kakeya::kakeya_open_bf16, p,
         dim3(p.num_blocks, p.num_kv_heads, 2), kakeya::kSealThreads, kakeya::open_shared_bytes(head_dim), stream);
}
