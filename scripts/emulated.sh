#!/usr/bin/env bash
# The CUDA kernels on a machine without a GPU: tests/gpu's checks with threads emulated (tests/emulated).
#
#   scripts/emulated.sh              # what `make test` runs: every kernel, a share of the shapes
#   scripts/emulated.sh all          # every short shape too, by both ways of copying pages: ten minutes on two cores
#   scripts/emulated.sh sanitize     # the share, with AddressSanitizer and UndefinedBehaviorSanitizer
set -euo pipefail
source "$(dirname "$0")/common.sh"
cd "$ROOT"
PATH=$VENV/bin:$PATH
mode=${1:-some}
vectors=$CACHE/emulated/vectors build=$CACHE/emulated/$mode

case $mode in
    some | all) arguments=(-DKAKEYA_SANITIZE=) ;;
    sanitize) arguments=(-DKAKEYA_SANITIZE=address,undefined) ;;
    *) die "$mode: valid are all, sanitize, and no argument" ;;
esac
[[ $mode != all ]] || arguments+=(-DKAKEYA_EMULATED_ALL=ON)

rm -rf "$vectors"
mkdir -p "$vectors"
# Few blocks: batches take pages in random order.
cargo run --locked --quiet -p kakeya-bridge --example attend_vectors -- "$vectors/attend" 6 2
cargo run --locked --quiet -p kakeya-bridge --example seal_vectors -- "$vectors/seal"
cmake -S tests/emulated -B "$build" -G Ninja -DKAKEYA_VECTORS="$vectors" "${arguments[@]}" >/dev/null
cmake --build "$build"
UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 ctest --test-dir "$build" --output-on-failure -j "$(nproc)"
