# Shared by the scripts of this directory (sourced): paths, progress lines, stamps. Expects bash and `set -eu`.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$ROOT/.venv
CACHE=$ROOT/.cache
# Another environment, with vLLM, the plugin and pytest in it, may serve instead of .venv: set-up then installs nothing. For
# machines with a GPU and without a network or compilers (scripts/test_gpu.sh build makes what they need elsewhere).
PY=${KAKEYA_PYTHON:-$VENV/bin/python}

# Where the demo and the tests keep calibration artefacts: inside the checkout, so that a clone changes nothing outside it.
export KAKEYA_CACHE=${KAKEYA_CACHE:-$CACHE/kakeya}
# The model is local; vLLM must not ask a hub for it, nor report usage.
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1
# Threads that wait by spinning would take the cores from other thread pools (kakeya_vllm/engine.py).
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE} KMP_BLOCKTIME=${KMP_BLOCKTIME:-0}
# CUDA kernels are embedded in libkakeya once `make kernels` has compiled them; until then the library has none.
if [[ -f $ROOT/target/kernels/archs.txt ]]; then export KAKEYA_KERNELS=$ROOT/target/kernels; fi
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf '\n== %s\n' "$*"; }
die() {
    printf '\nerror: %s\n' "$*" >&2
    exit 1
}

# digest FILE...: one hash over names and contents.
digest() { sha256sum -- "$@" | sha256sum | cut -d ' ' -f 1; }

# step NAME KEY COMMAND...: run COMMAND unless it succeeded before with the same KEY; prints how long it took.
step() {
    local name=$1 key=$2 stamp=$CACHE/stamps/$1 start=$SECONDS
    shift 2
    if [[ -f $stamp && $(<"$stamp") == "$key" ]]; then
        printf '== %s: up to date\n' "$name"
        return
    fi
    say "$name"
    rm -f "$stamp"
    "$@"
    mkdir -p "$CACHE/stamps"
    printf '%s' "$key" >"$stamp"
    printf '== %s: done in %d s\n' "$name" $((SECONDS - start))
}
