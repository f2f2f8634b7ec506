#!/usr/bin/env bash
# Runs fuzz targets that are built already, one after the other. Needs bash, coreutils, glibc and libstdc++ only: what
# `scripts/fuzz.sh pack` packs goes to a machine of many cores without a compiler.
#
#   run.sh SECONDS [TARGET...]        # each target that long
#
#   PROCESSES=N   so many processes a target (libFuzzer's fork mode); default 1
#   FOUND=FOLDER  inputs that were found go to FOUND/TARGET, those that break a promise to FOUND/artifacts/TARGET, what was
#                 printed to FOUND/TARGET.log; default: found, beside this file
#   KAKEYA_SIMD   instruction set, as everywhere
#
# Prints a line of a table for each target: executions, CPU time (all processes), what broke. Ends with 1 if anything did.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
bin=$here/bin
found=${FOUND:-$here/found}
processes=${PROCESSES:-1}
seconds=${1:-}
[[ $seconds =~ ^[1-9][0-9]*$ && $processes =~ ^[1-9][0-9]*$ ]] || {
    sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"
    exit 2
}
shift
[[ $# -gt 0 ]] || set -- recipe calibration page abi scalar_simd device

# As scripts/fuzz.sh: memory and time of one input are bounded too.
limits=(-rss_limit_mb=2048 -malloc_limit_mb=1024 -timeout=10 -max_len=32768)
# One thread a process: the processes are enough for the cores.
export RAYON_NUM_THREADS=${RAYON_NUM_THREADS:-1}
broken=0
printf '| target | executions | CPU time | broke |\n|---|---|---|---|\n'
for target in "$@"; do
    [[ -x $bin/$target ]] || {
        echo "no target $target in $bin"
        exit 2
    }
    mkdir -p "$found/$target" "$found/artifacts/$target"
    inputs=("$found/$target" "$here/corpus/$target")
    [[ -d $here/crashes/$target ]] && inputs+=("$here/crashes/$target")
    fork=()
    [[ $processes -eq 1 ]] || fork=(-fork="$processes" -ignore_crashes=0)
    TIMEFORMAT='%U %S'
    cpu=$({ time "$bin/$target" "${inputs[@]}" "${limits[@]}" "${fork[@]}" \
        -artifact_prefix="$found/artifacts/$target/" -max_total_time="$seconds" -print_final_stats=1 \
        >"$found/$target.log" 2>&1; } 2>&1)
    status=$?
    cpu=$(awk '{ printf "%.0f s", $1 + $2 }' <<<"$(tail -1 <<<"$cpu")")
    # The last of the lines "#N ..." (fork mode: "#N: ...").
    count=$(grep -oE '^#[0-9]+' "$found/$target.log" | tail -1 | tr -d '#')
    # libFuzzer leaves slow inputs there too: on a busy machine many are.
    broke=$(find "$found/artifacts/$target" -type f -not -name 'slow-unit-*' | wc -l)
    # A target may also end without leaving an input.
    [[ $status -eq 0 ]] || {
        broken=1
        broke="$broke, exit $status: $found/$target.log"
    }
    printf '| `%s` | %s | %s | %s |\n' "$target" "${count:-0}" "$cpu" "$broke"
done
exit "$broken"
