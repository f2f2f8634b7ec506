#!/usr/bin/env bash
# Engine figures on a GPU: time a token, capacity, prefill, for the stock cache, fp8 and KAKEYA. Arguments go to
# scripts/bench_gpu.py; without any, all that docs/benchmarks.md shows.
set -euo pipefail
source "$(dirname "$0")/common.sh"
cd "$ROOT"
nvidia-smi -L || die "no NVIDIA GPU"
"$PY" scripts/bench_gpu.py "$@"
