#!/usr/bin/env bash
# What needs an NVIDIA GPU: the kernels by themselves, under compute-sanitizer where that is installed, then the plugin's
# tests, whose engines run on the GPU. `make test` has everything else.
#
#   scripts/test_gpu.sh              # build what is missing, then run
#   scripts/test_gpu.sh build        # needs no GPU if KAKEYA_CUDA_ARCHS names one, such as 90
#   scripts/test_gpu.sh run          # needs neither a compiler nor a network: .cache/gpu from elsewhere will do
#   scripts/test_gpu.sh run kernels  # only a part: kernels, sanitizer, or plugin (arguments after it go to pytest)
set -euo pipefail
source "$(dirname "$0")/common.sh"
cd "$ROOT"
work=$CACHE/gpu
dims="64 96 128 256"

# generators: programs that write inputs, and the codec's answers, for tests/gpu.
generators() {
    mkdir -p "$work"
    cargo build --release --locked --quiet -p kakeya-bridge --examples
    cp target/release/examples/{seal,attend}_vectors "$work"
}
# vectors NAME: what tests/gpu/NAME.cu reads.
vectors() {
    rm -rf "${work:?}/$1"
    mkdir -p "$work/$1"
    "$work/$1_vectors" "$work/$1"
}

# program NAME SOURCE FLAGS...: tests/gpu/SOURCE.cu as $work/NAME_gpu.
program() {
    local name=$1 source=$2
    shift 2
    [[ -x $nvcc ]] || die "no nvcc: remove target/kernels and try again"
    mkdir -p "$work"
    # The fetched nvcc does not look for its libraries where its package has them.
    "$nvcc" -O3 -std=c++17 -arch="sm_$arch" -I kernels -L "$(dirname "$nvcc")/../lib" "$@" -o "$work/${name}_gpu" "tests/gpu/$source.cu"
}

build() {
    local arch=${KAKEYA_CUDA_ARCHS:-}
    [[ -n $arch ]] || arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .) ||
        die "no NVIDIA GPU: KAKEYA_CUDA_ARCHS=90 builds for one that is not here"
    [[ $arch != *" "* ]] || die "KAKEYA_CUDA_ARCHS is $arch; the tests are built for one GPU"
    KAKEYA_CUDA_ARCHS=$arch scripts/kernels.sh
    local nvcc=${KAKEYA_NVCC:-} codec kernels dim
    [[ -n $nvcc ]] || nvcc=$CACHE/nvcc/nvidia/cu13/bin/nvcc
    [[ -x $nvcc ]] || nvcc=$(command -v nvcc || true)
    codec=$(find crates csrc/bridge -type f -name '*.rs' | LC_ALL=C sort | xargs cat | sha256sum)
    kernels=$arch$(find kernels tests/gpu -type f | LC_ALL=C sort | xargs cat | sha256sum)
    step gpu-generators "$codec" generators
    step gpu-program-seal "$kernels" program seal seal -fmad=false
    # One head dimension a program: they take the longest.
    for dim in $dims; do
        step "gpu-program-attend-$dim" "$kernels" program "attend_$dim" attend "-DKAKEYA_HEAD_DIM=$dim"
    done
}

run_kernels() {
    local dim
    say "sealing and opening: bytes against the codec"
    timeout 600 "$work/seal_gpu" "$work"/seal/*.bin
    for dim in $dims; do
        say "attention, head_dim $dim: against fp64"
        timeout 900 "$work/attend_${dim}_gpu" check "$work"/attend/*-d"$dim"-*.bin
    done
}

run_sanitizer() {
    command -v compute-sanitizer >/dev/null || {
        echo "compute-sanitizer is not installed: left out"
        return
    }
    local tool dim
    for tool in memcheck racecheck initcheck synccheck; do
        say "compute-sanitizer $tool"
        timeout 900 compute-sanitizer --tool "$tool" --error-exitcode 9 "$work/seal_gpu" "$(ls "$work"/seal/*.bin | head -1)"
        for dim in $dims; do
            timeout 900 compute-sanitizer --tool "$tool" --error-exitcode 9 "$work/attend_${dim}_gpu" small \
                "$work"/attend/kakeya-4.6x*-d"$dim"-*.bin
        done
    done
}

run_plugin() {
    say "the plugin, engines on the GPU"
    "$PY" -m pytest -m "not cpu_only" --timeout 900 "${@:-tests/vllm}"
}

run() {
    nvidia-smi -L || die "no NVIDIA GPU"
    [[ -x $work/seal_gpu ]] || die "$work has no programs: scripts/test_gpu.sh build"
    local name
    for name in seal attend; do
        step "gpu-vectors-$name" "$(digest "$work/${name}_vectors")" vectors "$name"
    done
    case ${1:-all} in
        all)
            run_kernels
            run_sanitizer
            run_plugin
            ;;
        kernels) run_kernels ;;
        sanitizer) run_sanitizer ;;
        plugin) run_plugin "${@:2}" ;;
        *) die "$1: valid are kernels, sanitizer and plugin" ;;
    esac
}

case ${1:-all} in
    all)
        build
        run
        ;;
    build) build ;;
    run) run "${@:2}" ;;
    *) die "$1: valid are build and run" ;;
esac
