#!/usr/bin/env bash
# Apply the formatters that `make test` checks.
set -euo pipefail
source "$(dirname "$0")/common.sh"
cd "$ROOT"
cargo fmt --all
"$VENV/bin/ruff" check --fix .
"$VENV/bin/ruff" format .
find csrc kernels tests/capi tests/emulated tests/gpu \( -name '*.[ch]' -o -name '*.hpp' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \) -not -name kakeya.h -print0 |
    xargs -0 "$VENV/bin/clang-format" -i
