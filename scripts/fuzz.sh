#!/usr/bin/env bash
# The fuzz targets of crates/fuzz under libFuzzer and AddressSanitizer.
#
#   scripts/fuzz.sh                    # 20 s a target
#   scripts/fuzz.sh 600 page abi       # 10 minutes each of two targets
#   scripts/fuzz.sh build              # only builds: fuzz/target/<host>/release/<target> runs anywhere
#
# Needs the toolchain `nightly` and cargo-fuzz; where they are missing it says so and does nothing, because `make test` runs
# every kept input through the same targets with the stable compiler. New inputs go to .cache/fuzz; what breaks a promise is
# left in fuzz/artifacts, and goes to fuzz/crashes/<target> once it is understood (fuzz/README.md).
set -euo pipefail
source "$(dirname "$0")/common.sh"
cd "$ROOT"

if ! cargo +nightly --version >/dev/null 2>&1 || ! command -v cargo-fuzz >/dev/null; then
    echo "fuzzing is left out: it needs 'rustup toolchain install nightly' and 'cargo install cargo-fuzz --locked'"
    exit 0
fi
mapfile -t all < <(cargo fuzz list)
seconds=20
case ${1:-} in
    build)
        cargo +nightly fuzz build
        exit
        ;;
    '') ;;
    *[!0-9]*) die "$1 is no number of seconds; usage: scripts/fuzz.sh [SECONDS [TARGET...]], targets: ${all[*]}" ;;
    *)
        seconds=$1
        shift
        ;;
esac
for target in "$@"; do
    [[ " ${all[*]} " == *" $target "* ]] || die "no target $target; valid: ${all[*]}"
done
[[ $# -gt 0 ]] || set -- "${all[@]}"

cargo +nightly fuzz build
host=$(rustc +nightly -vV | sed -n 's/^host: //p')
for target in "$@"; do
    say "fuzz $target, $seconds s"
    found=$CACHE/fuzz/$target
    mkdir -p "$found" "fuzz/artifacts/$target"
    # Memory and time of one input are bounded too: 2 GiB in all, 1 GiB an allocation, 10 s.
    "fuzz/target/$host/release/$target" "$found" "fuzz/corpus/$target" -artifact_prefix="fuzz/artifacts/$target/" \
        -max_total_time="$seconds" -rss_limit_mb=2048 -malloc_limit_mb=1024 -timeout=10 -max_len=65536 \
        -print_final_stats=1 2>"$found.log" || {
        tail -40 "$found.log"
        die "$target broke a promise: fuzz/artifacts/$target"
    }
    grep -E 'stat::number_of_executed_units|cov:' "$found.log" | tail -2
done
