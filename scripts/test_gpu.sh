#!/usr/bin/env bash
# What needs an NVIDIA GPU: the kernels by themselves, under compute-sanitizer where that is installed, then the plugin's
# tests, whose engines run on the GPU. `make test` has everything else.
set -euo pipefail
source "$(dirname "$0")/common.sh"
cd "$ROOT"

nvidia-smi -L || die "no NVIDIA GPU"
scripts/kernels.sh here
nvcc=${KAKEYA_NVCC:-}
[[ -n $nvcc ]] || nvcc=$CACHE/nvcc/nvidia/cu13/bin/nvcc
[[ -x $nvcc ]] || nvcc=$(command -v nvcc) || die "no nvcc: remove target/kernels and try again"
arch=sm_$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .)
work=$CACHE/gpu
mkdir -p "$work"

# vectors NAME: inputs, and the codec's answers, for tests/gpu/NAME.cu.
vectors() {
    mkdir -p "$work/$1"
    cargo run --release --locked --quiet -p kakeya-bridge --example "$1_vectors" -- "$work/$1"
}

# program NAME FLAGS...: tests/gpu/NAME.cu as $work/NAME_gpu.
program() {
    local name=$1
    shift
    "$nvcc" -O3 -std=c++17 -arch="$arch" -I kernels "$@" -o "$work/${name}_gpu" "tests/gpu/$name.cu"
}

say "sealing and opening: bytes against the codec"
vectors seal
program seal -fmad=false
timeout 600 "$work/seal_gpu" "$work"/seal/*.bin
say "attention: against fp64"
vectors attend
program attend
timeout 900 "$work/attend_gpu" check "$work"/attend/*.bin

if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck initcheck synccheck; do
        say "compute-sanitizer $tool"
        timeout 900 compute-sanitizer --tool "$tool" --error-exitcode 9 "$work/seal_gpu" "$(ls "$work"/seal/*.bin | head -1)"
        timeout 900 compute-sanitizer --tool "$tool" --error-exitcode 9 "$work/attend_gpu" small "$work"/attend/*.bin
    done
else
    echo "compute-sanitizer is not installed: left out"
fi

say "the plugin, engines on the GPU"
"$PY" -m pytest tests/vllm -m "not cpu_only" --timeout 900
