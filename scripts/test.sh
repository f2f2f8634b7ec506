#!/usr/bin/env bash
# Every test, part by part, each with its name and duration. `scripts/test.sh lint` runs the formatters and linters only.
# The first part that fails ends the run.
set -euo pipefail
source "$(dirname "$0")/common.sh"
cd "$ROOT"

started=$SECONDS
durations=()

# part NAME COMMAND...
part() {
    local name=$1 start=$SECONDS
    shift
    say "$name: $*"
    "$@" || die "$name failed after $((SECONDS - start)) s"
    durations+=("$(printf '%6d s  %s' $((SECONDS - start)) "$name")")
}

c_sources() { find csrc kernels tests/capi tests/emulated tests/gpu \( -name '*.[ch]' -o -name '*.hpp' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \) -not -name kakeya.h | sort; }

clang_format() { c_sources | xargs "$VENV/bin/clang-format" --dry-run --Werror; }

# cargo-nextest runs every test in a process of its own, several at a time. Where it is missing it is built once into
# .cache (minutes); where even that fails, cargo's own runner runs the same tests.
rust_tests() {
    export PATH=$CACHE/cargo-tools/bin:$PATH
    if ! command -v cargo-nextest >/dev/null; then
        echo "cargo-nextest is not installed: building it into .cache/cargo-tools, once"
        cargo install cargo-nextest --locked --root "$CACHE/cargo-tools" ||
            echo "cargo-nextest could not be built: running the tests with cargo test"
    fi
    if command -v cargo-nextest >/dev/null; then
        cargo nextest run --workspace --locked --no-fail-fast
    else
        cargo test --workspace --locked --no-fail-fast --lib --bins --tests
    fi
}

capi_tests() {
    PATH=$VENV/bin:$PATH
    cmake -S tests/capi -B .cache/capi -G Ninja -DKAKEYA_LIBRARY="$ROOT/target/release/libkakeya.so"
    cmake --build .cache/capi
    ctest --test-dir .cache/capi --output-on-failure
}

# Kept inputs are replayed by the Rust tests; this looks for new ones where fuzzing was built before. The first build takes
# minutes, more than the rest of it is worth here.
fuzz() {
    if ! compgen -G "fuzz/target/*/release/recipe" >/dev/null; then
        echo "fuzzing skipped: not built yet; 'make fuzz' builds it"
        return
    fi
    FUZZ_BUILD_LIMIT=90 scripts/fuzz.sh 5
}

part "rustfmt" cargo fmt --all --check
part "ruff check" "$VENV/bin/ruff" check .
part "ruff format" "$VENV/bin/ruff" format --check .
part "clang-format" clang_format
part "docs/support.md" "$PY" scripts/support.py check
part "clippy" cargo clippy --workspace --all-targets --locked -- -D warnings
if [[ ${1:-} != lint ]]; then
    part "rust tests" rust_tests
    part "rust doc tests" cargo test --workspace --locked --doc
    # The Rust tests compare the header too; this says what changed.
    part "C header" scripts/header.sh
    part "ctest" capi_tests
    part "CUDA kernels, emulated" scripts/emulated.sh
    # `make sanitize` runs the parts that take longer.
    part "panic=abort, sanitizers, valgrind" scripts/sanitize.sh short
    part "pytest, tools" "$PY" -m pytest tests/python
    part "pytest, vLLM engines" "$PY" -m pytest tests/vllm
    part "fuzz, 5 s a target" fuzz
fi

say "all parts passed in $((SECONDS - started)) s"
printf '%s\n' "${durations[@]}"
