// Attention kernels without a GPU: the checks of tests/gpu/attend.cu, threads emulated (emulation.h).
//
//   attend_emulated some DIR/*.bin    of each file a share of the short batches, for each kernel that reads it
//   attend_emulated all DIR/*.bin     all short batches
#include "emulation.h"

#include <map>
#include <set>

#include "../gpu/attend_check.cuh"

namespace kakeya {
extern "C" {
alignas(128) thread_local uint8_t memory[emulated::kSharedBytes];
}
}  // namespace kakeya

// Of a kernel's batches a file gets one in so many, rounded up, in steps of so many from where the file before ended:
// no divisor of their numbers, nor of the periods in which they have tokens, sinks and caps.
constexpr size_t kShare = 13;

// The kernel of a batch: 4, 8 or 16 rows a pass, or one of the two for a soft cap.
static std::string kind_of(const Batch &b) {
  const int rows = b.kernel_rows();
  if (b.cap > 0) return rows <= 4 ? "4, cap" : "16, cap";
  return rows <= 4 ? "4 rows" : rows <= 8 ? "8 rows" : "16 rows";
}

int main(int argc, char **argv) {
  const std::string mode = argc > 2 ? argv[1] : "";
  if (mode != "some" && mode != "all") {
    fprintf(stderr, "usage: attend_emulated some|all FILE...\n");
    return 1;
  }
  emulated::dynamic_shared = memory;
  struct List {
    std::vector<Batch> list;
    size_t next = 0;
  };
  std::map<std::string, List> batches;
  for (const Batch &b : all_batches(kShort)) batches[kind_of(b)].list.push_back(b);
  std::set<int> tokens;
  int bad = 0, checked = 0, sinks = 0, invariant = 0;
  double worst = 0;
  for (int i = 2; i < argc; ++i) {
    const File f(argv[i]);
    for (auto &[kernel, all] : batches) {
      const size_t size = all.list.size(), count = mode == "all" ? size : (size + kShare - 1) / kShare;
      for (size_t n = 0; n < count; ++n, all.next = (all.next + kShare) % size) {
        const Batch &b = all.list[all.next];
        // Few blocks, so that each has much to do, and many, so that items are divided.
        emulated::multiprocessors = checked % 2 ? 1 : 5;
        printf("%-7s ", kernel.c_str());
        bad += !check_and_print(f, b, worst);
        ++checked;
        for (const Sequence &s : b.sequences) tokens.insert(s.tokens);
        sinks += b.sinks, invariant += b.invariant;
      }
    }
  }
  printf("%d batches, %d failures, worst relative L2 %.2e (bound %g)\n", checked, bad, worst, kBound);
  // A share that leaves something out is no test of it.
  const auto require = [&](bool ok, const char *what) {
    if (!ok) printf("FAIL no batch had %s\n", what);
    bad += !ok;
  };
  require(batches.size() == 5, "one of the kernels");
  for (const auto &[kernel, all] : batches) require(all.list.size() % kShare != 0, "all of a kernel's shapes in turn");
  require(tokens.size() == 9, "0 to 8 tokens a sequence");
  require(sinks && sinks < checked, "sinks, or all had");
  require(invariant && invariant < checked, "whole items, or all had");
  require(emulated::atomics > 0, "a divided item");
  return bad != 0;
}
