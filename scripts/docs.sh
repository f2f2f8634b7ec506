#!/usr/bin/env bash
# Build the site of docs/ into target/book. mdBook is taken from the path, else compiled once into .cache (minutes).
# That every page is listed and every link leads somewhere, the tests say without it (tests/python/test_docs.py).
#
#   scripts/docs.sh           # target/book/index.html
#   scripts/docs.sh serve     # and show it at http://localhost:3000, built again when a page changes
set -euo pipefail
source "$(dirname "$0")/common.sh"
cd "$ROOT"

MDBOOK_VERSION=0.5.4
export PATH=$CACHE/cargo-tools/bin:$PATH
if ! command -v mdbook >/dev/null; then
    command -v cargo >/dev/null || die "mdbook and cargo not found: install one of them"
    say "mdBook $MDBOOK_VERSION, once, into .cache/cargo-tools"
    cargo install mdbook --version "$MDBOOK_VERSION" --locked --root "$CACHE/cargo-tools"
fi
mdbook --version
case ${1:-build} in
    build) mdbook build docs ;;
    serve) mdbook serve docs ;;
    *) die "scripts/docs.sh $1: build or serve" ;;
esac
echo "$ROOT/target/book/index.html"
