#!/usr/bin/env bash
# Compile the CUDA kernels into target/kernels, whence `cargo build` embeds them (KAKEYA_KERNELS; scripts/common.sh sets it
# once they are there). Needs no GPU. nvcc: KAKEYA_NVCC, else the one on the path, else fetched from the package registry
# into .cache/nvcc.
#
#   scripts/kernels.sh                              # all that a release serves: half an hour on two cores
#   KAKEYA_CUDA_ARCHS="80 90" scripts/kernels.sh    # only these GPUs, and portable code for newer ones
#   scripts/kernels.sh here                         # only the GPUs of this machine; what covers them already will do
set -euo pipefail
source "$(dirname "$0")/common.sh"
cd "$ROOT"

ARCHS=${KAKEYA_CUDA_ARCHS:-80 86 89 90 100 120}
if [[ ${1:-} == here && -z ${KAKEYA_CUDA_ARCHS:-} ]]; then
    ARCHS=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | tr -d . | sort -nu | xargs)
fi
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

flags=(-fatbin -O3 -std=c++17 -I kernels --compress-mode=size --threads "$(nproc)")
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
        if [[ $name == attend* ]]; then
            # One head dimension a compilation: they take the longest.
            for dim in 64 96 128 256; do
                compile "${name}_$dim" -DKAKEYA_HEAD_DIM=$dim "$unit" &
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
    printf '%s\n' "$inputs" >"$work/inputs.txt"
    rm -rf "$OUT"
    mv "$work" "$OUT"
    ls -l "$OUT"
}

# Whether what is there was made from the same files and serves all of ARCHS.
covered() {
    [[ -f $OUT/inputs.txt && $(<"$OUT/inputs.txt") == "$inputs" ]] || return 1
    local arch
    for arch in $ARCHS; do [[ " $(<"$OUT/archs.txt") " == *" sm_$arch "* ]] || return 1; done
}

mkdir -p "$CACHE" target
mapfile -t sources < <(find kernels -type f | LC_ALL=C sort)
inputs=$(digest "${sources[@]}" scripts/kernels.sh requirements/nvcc.lock)
if covered; then
    echo "== kernels: up to date ($(<"$OUT/archs.txt"))"
else
    find_nvcc
    say "kernels for $names"
    start=$SECONDS
    build
    echo "== kernels: done in $((SECONDS - start)) s"
fi
