#!/usr/bin/env bash
# Compile the CUDA kernels into target/kernels, whence `cargo build` embeds them (KAKEYA_KERNELS; scripts/common.sh sets it
# once they are there). Needs no GPU. nvcc: KAKEYA_NVCC, else the one on the path, else fetched from the package registry
# into .cache/nvcc.
#
#   KAKEYA_CUDA_ARCHS="80 90" scripts/kernels.sh    # only these GPUs, and the portable code for newer ones
set -euo pipefail
source "$(dirname "$0")/common.sh"
cd "$ROOT"

ARCHS=${KAKEYA_CUDA_ARCHS:-80 86 89 90 100 120}
OUT=$ROOT/target/kernels
FETCHED=$CACHE/nvcc

fetch_nvcc() {
    local python=$PY
    [[ -x $python ]] || python=${PYTHON:-python3}
    "$python" -m pip install -q --no-deps --only-binary=:all: --target "$FETCHED" -r requirements/nvcc.lock
    # pip's own unpacking drops the executable bit of files outside bin/.
    chmod +x "$FETCHED"/nvidia/cu13/bin/* "$FETCHED"/nvidia/cu13/nvvm/bin/*
}

find_nvcc() {
    if [[ -n ${KAKEYA_NVCC:-} ]]; then
        nvcc=$KAKEYA_NVCC
    elif command -v nvcc >/dev/null && nvcc --version | grep -qE 'release 1[3-9]'; then
        nvcc=nvcc
    else
        step nvcc "$(digest requirements/nvcc.lock)" fetch_nvcc
        nvcc=$FETCHED/nvidia/cu13/bin/nvcc
    fi
    "$nvcc" --version | tail -2
}

flags=(-fatbin -O3 -std=c++17 -I kernels --compress-mode=size)
names=
for arch in $ARCHS; do
    flags+=(-gencode "arch=compute_$arch,code=sm_$arch")
    names+="sm_$arch "
done
# For GPUs newer than this list the driver compiles from the oldest common ground.
first=${ARCHS%% *}
flags+=(-gencode "arch=compute_$first,code=compute_$first")
names+=compute_$first

# compile NAME FLAGS...: one fat binary of kernels/*.cu into the new folder.
compile() {
    local name=$1
    shift
    "$nvcc" "${flags[@]}" "$@" -o "$work/$name.fatbin"
}

build() {
    # Beside the old ones, then in one move: a library is never built from a mixture.
    work=$OUT.new
    rm -rf "$work"
    mkdir -p "$work"
    local jobs=() unit name dim
    for unit in kernels/*.cu; do
        name=$(basename "$unit" .cu)
        if [[ $name == attend ]]; then
            # One head dimension a compilation: they take the longest.
            for dim in 64 128 256; do
                compile "attend_$dim" -DKAKEYA_HEAD_DIM=$dim "$unit" &
                jobs+=($!)
            done
        else
            # Page bytes are the codec's: products and sums round one by one.
            compile "$name" -fmad=false "$unit" &
            jobs+=($!)
        fi
    done
    local job failed=0
    for job in "${jobs[@]}"; do wait "$job" || failed=1; done
    ((failed == 0)) || die "nvcc failed, see above"
    printf '%s\n' "$names" >"$work/archs.txt"
    rm -rf "$OUT"
    mv "$work" "$OUT"
    ls -l "$OUT"
}

mkdir -p "$CACHE" target
find_nvcc
mapfile -t sources < <(find kernels -type f | LC_ALL=C sort)
[[ -f $OUT/archs.txt ]] || rm -f "$CACHE/stamps/kernels"
step kernels "$names $("$nvcc" --version | tail -1) $(digest "${sources[@]}" scripts/kernels.sh)" build
