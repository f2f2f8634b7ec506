#!/usr/bin/env bash
# Memory and races: the tests again, under tools that watch. Each part runs where its tools are and says so where they are not;
# a part that runs and finds something ends the run. Builds go to target/<part>, so that those of `make build` stay.
#
#   scripts/sanitize.sh                  # every part
#   scripts/sanitize.sh short            # what `make test` runs: abort, capi, valgrind on the example
#   scripts/sanitize.sh miri asan        # some
#
#   abort     C tests and loaded-library tests over a libkakeya that was built with panic=abort
#   capi      C and C++ tests compiled with AddressSanitizer and UndefinedBehaviorSanitizer
#   asan      Rust tests, bridge to the device code included, with AddressSanitizer (nightly); C tests against that library
#   bridge    device code compiled for the host with UndefinedBehaviorSanitizer
#   emulated  CUDA kernels, their threads emulated (tests/emulated), with AddressSanitizer and UndefinedBehaviorSanitizer
#   tsan      Rust tests with ThreadSanitizer (nightly with rust-src). Not helgrind: it knows locks, and takes the atomics of a
#             lock-free queue (rayon's) for races
#   miri      unit tests of the Rust crates (nightly with miri); KAKEYA_MIRI=all: slow ones and tests/memory.rs too, hours
#   valgrind  the example and the C tests under memcheck
# compute-sanitizer on the GPU tests is `scripts/test_gpu.sh run sanitizer`.
set -euo pipefail
source "$(dirname "$0")/common.sh"
cd "$ROOT"
PATH=$VENV/bin:$PATH
TARGET=x86_64-unknown-linux-gnu
left_out=()

skip() {
    left_out+=("$1: $2")
    printf 'left out: %s\n' "$2"
}

nightly() { cargo +nightly --version >/dev/null 2>&1; }
component() { rustup component list --toolchain nightly 2>/dev/null | grep -q "^$1.*(installed)"; }

# capi NAME LIBRARY CMAKE-ARGUMENTS...: the C tests built in .cache/NAME against a library.
capi() {
    local name=$1 library=$2
    shift 2
    cmake -S tests/capi -B "$CACHE/$name" -G Ninja -DKAKEYA_LIBRARY="$library" "$@" >/dev/null
    cmake --build "$CACHE/$name"
}

release() {
    cargo build --release --locked --quiet -p kakeya-ffi
    library=${CARGO_TARGET_DIR:-$ROOT/target}/release/libkakeya.so
}

part_abort() {
    local target=${CARGO_TARGET_DIR:-$ROOT/target}
    cargo build --profile release-abort --locked --quiet -p kakeya-ffi
    capi capi-abort "$target/release-abort/libkakeya.so"
    ctest --test-dir "$CACHE/capi-abort" --output-on-failure
    # The test programs themselves unwind, as tests must; the library that they load does not.
    KAKEYA_LIBRARY=$target/release-abort/libkakeya.so cargo test --locked --quiet -p kakeya-ffi --test loaded
}

part_capi() {
    local library
    release
    capi capi-sanitize "$library" -DKAKEYA_SANITIZE=address,undefined
    UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 ctest --test-dir "$CACHE/capi-sanitize" --output-on-failure
}

part_asan() {
    nightly || { skip asan "no nightly toolchain (rustup toolchain install nightly)"; return; }
    # A host triple named with --target keeps the flags from build scripts and macros, which run uninstrumented.
    export RUSTFLAGS=-Zsanitizer=address CXXFLAGS=-fsanitize=address CARGO_TARGET_DIR=$ROOT/target/asan
    # An instrumented library cannot be loaded by an executable that has the sanitizer's runtime linked in statically:
    # tests/loaded.rs is left to the C programs below, which share theirs.
    CXXFLAGS="" cargo +nightly test --locked --quiet --target $TARGET -p kakeya-codec --lib --tests
    CXXFLAGS="" cargo +nightly test --locked --quiet --target $TARGET -p kakeya-ffi --lib --test memory --test threads --test boundary
    cargo +nightly test --locked --quiet --target $TARGET -p kakeya-bridge --tests
    cargo +nightly build --locked --quiet --target $TARGET -p kakeya-ffi
    unset RUSTFLAGS CXXFLAGS CARGO_TARGET_DIR
    capi capi-asan "$ROOT/target/asan/$TARGET/debug/libkakeya.so" -DKAKEYA_SANITIZE=address,undefined
    # The programs bring GCC's runtime, the library was made by LLVM: both know the same interface (version 8).
    ctest --test-dir "$CACHE/capi-asan" --output-on-failure
}

part_bridge() {
    # Compiled by the C++ compiler with both sanitizers' checks; what they find ends the test with a trap.
    CXXFLAGS="-fsanitize=undefined -fno-sanitize=vptr -fsanitize-undefined-trap-on-error" CARGO_TARGET_DIR=$ROOT/target/bridge \
        cargo test --locked --quiet -p kakeya-bridge --tests
}

part_emulated() { scripts/emulated.sh sanitize; }

part_tsan() {
    nightly && component rust-src || { skip tsan "no nightly toolchain with rust-src: the standard library must be instrumented too"; return; }
    export RUSTFLAGS=-Zsanitizer=thread CARGO_TARGET_DIR=$ROOT/target/tsan
    cargo +nightly test -Zbuild-std --locked --quiet --target $TARGET -p kakeya-codec --test steps --test memory
    cargo +nightly test -Zbuild-std --locked --quiet --target $TARGET -p kakeya-ffi --lib --test memory --test threads
    unset RUSTFLAGS CARGO_TARGET_DIR
}

part_miri() {
    nightly && component miri || { skip miri "no nightly toolchain with miri (rustup component add miri --toolchain nightly)"; return; }
    # Interpreted code is some thousand times slower. Of the codec, whose only unsafe code is the choice of an instruction set
    # (Miri runs the portable one): what packs, places and reads bytes; making a whole codec takes many minutes. Of the C
    # ABI: what turns pointers into slices. Isolation off: variables of the environment are read.
    export MIRIFLAGS=-Zmiri-disable-isolation CARGO_TARGET_DIR=$ROOT/target/miri
    cargo +nightly miri test --locked -p kakeya-ffi --lib
    cargo +nightly miri test --locked -p kakeya-codec --lib -- hadamard:: recipe:: side_area a_lanes_words slot_bytes tiles_of
    if [[ ${KAKEYA_MIRI:-} == all ]]; then
        # Hours. Leaks: rayon's threads live as long as the process. Tree borrows: stacked borrows refuse rayon's queues.
        MIRIFLAGS+=" -Zmiri-ignore-leaks -Zmiri-tree-borrows" RAYON_NUM_THREADS=2 \
            cargo +nightly miri test --locked -p kakeya-codec -p kakeya-ffi --lib --test memory
    fi
    unset MIRIFLAGS CARGO_TARGET_DIR
}

# checked PROGRAM ARGUMENTS...: a program under valgrind, which knows no AVX-512.
checked() {
    echo "valgrind $*"
    KAKEYA_SIMD=avx2 valgrind --quiet --error-exitcode=9 "$@"
}

part_valgrind() {
    command -v valgrind >/dev/null || { skip valgrind "valgrind is not installed (apt-get install valgrind)"; return; }
    local library name
    release
    capi capi "$library"
    # Reachable memory (the pool of threads) is no leak; lost memory is.
    local memcheck=(--leak-check=full --show-leak-kinds=definite,indirect --errors-for-leak-kinds=definite,indirect)
    for name in ${@:-seal_open frozen_abi test_abi test_errors test_raii}; do
        checked "${memcheck[@]}" "$CACHE/capi/$name"
    done
    [[ $# -gt 0 ]] || RAYON_NUM_THREADS=2 checked "${memcheck[@]}" "$CACHE/capi/test_threads" 1
}

part_short() {
    part_abort
    part_capi
    part_valgrind seal_open
}

for part in ${@:-abort capi asan bridge emulated tsan miri valgrind}; do
    declare -F "part_$part" >/dev/null || die "$part: see the top of $0"
    started=$SECONDS
    say "sanitize: $part"
    "part_$part"
    printf '%s: %d s\n' "$part" $((SECONDS - started))
done
if ((${#left_out[@]})); then printf '\nleft out:\n'; printf '  %s\n' "${left_out[@]}"; fi
