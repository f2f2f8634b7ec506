#!/usr/bin/env bash
# scripts/fuzz.sh [SECONDS] [TARGET...]: builds the fuzz targets and runs each that long (15 s), all of them if none is named.
# Prints a line a target: executions, coverage, CPU time. New inputs go to fuzz/work (not committed), a finding to
# fuzz/artifacts/TARGET, and the command then fails. docs/testing.md says what to do with one.
#
# scripts/fuzz.sh pack FILE.tar.gz: the executables (built now, without symbols), kept inputs and fuzz/run.sh, for a machine of
# many cores without a compiler: `tar xzf FILE.tar.gz && PROCESSES=$(nproc) kakeya-fuzz/run.sh 3600`. The long run is of these.
#
# FUZZ_BUILD_LIMIT: seconds after which an unfinished build is given up and the run skipped (0, the default: none).
# FUZZ_REQUIRED=1 makes it an error that something is missing. KAKEYA_SIMD chooses the instruction set, as everywhere.
set -euo pipefail
source "$(dirname "$0")/common.sh"
cd "$ROOT"

archive=
if [[ ${1:-} == pack ]]; then
    archive=$(realpath -m "${2:?usage: scripts/fuzz.sh pack FILE.tar.gz}")
    set -- 0
fi
seconds=${1:-15}
[[ $seconds =~ ^[0-9]+$ ]] || die "'$seconds' is no number of seconds; usage: scripts/fuzz.sh [SECONDS] [TARGET...]"
shift || true
targets=("$@")
if ((${#targets[@]} == 0)); then targets=(recipe calibration page abi scalar_simd device); fi
for target in "${targets[@]}"; do
    [[ -f fuzz/fuzz_targets/$target.rs ]] || die "no target is called '$target'; valid: $(cd fuzz/fuzz_targets && echo *.rs | sed 's/\.rs//g')"
done

skip() {
    [[ ${FUZZ_REQUIRED:-0} == 0 ]] || die "fuzzing: $1"
    say "fuzzing skipped: $1"
    exit 0
}

cargo fuzz --version >/dev/null 2>&1 || skip "cargo-fuzz is not installed (cargo install cargo-fuzz@0.13.2 --locked)"
cargo +nightly --version >/dev/null 2>&1 || skip "the nightly toolchain is not installed (rustup toolchain install nightly)"

# The kernels' images are no part of what is fuzzed. A target folder of its own: flags and compiler differ from all else.
unset KAKEYA_KERNELS
export CARGO_TARGET_DIR=$ROOT/fuzz/target
host=$(rustc -vV | sed -n 's/^host: //p')
binaries=$CARGO_TARGET_DIR/$host/release
started=$SECONDS
build=(cargo +nightly fuzz build --release --target "$host")
if ((${FUZZ_BUILD_LIMIT:-0} > 0)); then
    code=0
    timeout "$FUZZ_BUILD_LIMIT" "${build[@]}" || code=$?
    ((code != 124)) || skip "the build takes more than $FUZZ_BUILD_LIMIT s; scripts/fuzz.sh finishes it"
    ((code == 0)) || die "the fuzz targets do not build"
else
    "${build[@]}"
fi
if [[ -n $archive ]]; then
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    mkdir -p "$folder/kakeya-fuzz/bin"
    for target in "${targets[@]}"; do
        # A finding is repeated here, where names and lines are: an executable is several times as large with them.
        strip -o "$folder/kakeya-fuzz/bin/$target" "$binaries/$target"
    done
    cp -r fuzz/corpus fuzz/crashes fuzz/run.sh "$folder/kakeya-fuzz/"
    tar -C "$folder" -czf "$archive" kakeya-fuzz
    say "packed"
    ls -l "$folder/kakeya-fuzz/bin" "$archive"
fi
((seconds > 0)) || exit 0
say "built in $((SECONDS - started)) s"

# One thread does what is asked in the order in which it is asked: what is found is found again.
export RAYON_NUM_THREADS=1
failed=()
for target in "${targets[@]}"; do
    work=fuzz/work/$target artifacts=fuzz/artifacts/$target log=fuzz/work/$target.log
    mkdir -p "$work" "$artifacts"
    inputs=("$work" "fuzz/corpus/$target")
    if [[ -d fuzz/crashes/$target ]]; then inputs+=("fuzz/crashes/$target"); fi
    code=0
    TIMEFORMAT='%U %S'
    { time "$binaries/$target" "${inputs[@]}" -artifact_prefix="$artifacts/" -max_total_time="$seconds" \
        -rss_limit_mb=2048 -malloc_limit_mb=1024 -timeout=10 -print_final_stats=1 -max_len=32768 >"$log" 2>&1 || code=$?; } 2>"$log.time" || true
    runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log" | tail -1)
    coverage=$(grep -o 'cov: [0-9]* ft: [0-9]*' "$log" | tail -1 || true)
    cpu=$(awk '{ printf "%.1f", $1 + $2 }' "$log.time")
    say "$target: ${runs:-?} executions, ${coverage:-no coverage}, $cpu s of CPU time"
    if ((code != 0)); then
        failed+=("$target")
        tail -40 "$log"
    fi
done
((${#failed[@]} == 0)) || die "found something: ${failed[*]} (fuzz/artifacts, fuzz/work/TARGET.log)"
