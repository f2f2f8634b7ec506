#!/usr/bin/env bash
# Is the committed C header the one that the Rust sources give? Writes it anew, shows the difference and restores it.
set -euo pipefail
source "$(dirname "$0")/common.sh"
cd "$ROOT"
header=csrc/include/kakeya.h
committed=$(mktemp)
cp "$header" "$committed"
trap 'cp "$committed" "$header"; rm -f "$committed"' EXIT
cargo run --locked --quiet -p kakeya-ffi --example write_header
diff -u "$committed" "$header" || die "$header is stale: cargo run -p kakeya-ffi --example write_header"
echo "$header is current"
