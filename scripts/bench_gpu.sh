#!/usr/bin/env bash
# Figures on a GPU, as docs/benchmarks.md shows them: kernels beside FlashAttention, then engines with the stock cache, fp8
# and KAKEYA.
#
#   scripts/bench_gpu.sh                      # both
#   scripts/bench_gpu.sh kernels ARGUMENTS    # scripts/bench_kernels.py
#   scripts/bench_gpu.sh engines ARGUMENTS    # scripts/bench_gpu.py
set -euo pipefail
source "$(dirname "$0")/common.sh"
cd "$ROOT"
nvidia-smi -L || die "no NVIDIA GPU"
case ${1:-both} in
    both)
        (($# < 2)) || die "arguments need the part that takes them: kernels or engines"
        "$PY" scripts/bench_kernels.py
        "$PY" scripts/bench_gpu.py
        ;;
    kernels) "$PY" scripts/bench_kernels.py "${@:2}" ;;
    engines) "$PY" scripts/bench_gpu.py "${@:2}" ;;
    *) die "$1: valid are kernels and engines" ;;
esac
