#!/usr/bin/env bash
# What the code depends on, judged: licences, sources and bans (deny.toml), known vulnerabilities, the list of third-party code.
# Each part runs where its tool and its data can be had, and says so where they cannot; a part that runs and finds something
# ends in failure. Tools go to .cache (minutes, once).
#
#   scripts/supply_chain.sh               # every part
#   scripts/supply_chain.sh list deny     # some: list, deny, audit (Rust's advisories), pip (Python's), actions
#   KAKEYA_TOOLS=never scripts/supply_chain.sh    # use tools that are there, install none
set -euo pipefail
source "$(dirname "$0")/common.sh"
cd "$ROOT"
export PATH=$CACHE/cargo-tools/bin:$PATH
left_out=()

skip() {
    left_out+=("$1: $2")
    printf 'left out: %s\n' "$2"
}

# tool NAME: whether a cargo tool is there, or could be installed.
tool() {
    command -v "$1" >/dev/null && return
    [[ ${KAKEYA_TOOLS:-} != never ]] || return
    cargo install --locked --quiet --root "$CACHE/cargo-tools" "$1" >&2
}

# The list of third-party code is the one that Cargo.lock gives.
part_list() { "$PY" scripts/sbom.py check; }

# Licences, bans and sources need nothing from outside.
part_deny() {
    if ! tool cargo-deny; then
        skip deny "cargo-deny is not installed and could not be"
        return
    fi
    cargo deny --locked check licenses bans sources
}

# advisories DATABASE: a fetched copy of RustSec's database, or nothing where it cannot be fetched.
advisories() {
    local database=${KAKEYA_ADVISORY_DB:-$CACHE/advisory-db}
    if [[ ! -d $database/crates ]]; then
        rm -rf "$database"
        timeout 120 git clone --quiet --depth 1 https://github.com/RustSec/advisory-db "$database" >&2 || return
    elif [[ -z ${KAKEYA_ADVISORY_DB:-} ]]; then
        timeout 120 git -C "$database" pull --quiet --ff-only >&2 || return
    fi
    printf '%s' "$database"
}

part_audit() {
    local database
    if ! database=$(advisories); then
        skip audit "the advisory database (github.com/RustSec/advisory-db) cannot be fetched; KAKEYA_ADVISORY_DB names a copy"
        return
    fi
    if ! tool cargo-audit; then
        skip audit "cargo-audit is not installed and could not be"
        return
    fi
    cargo audit --db "$database" --no-fetch --deny warnings
}

# What set-up installs, by the pinned versions themselves: nothing is resolved, so nothing is downloaded but advisories.
part_pip() {
    local audit=$CACHE/pip-audit/bin/pip-audit lock
    if [[ ! -x $audit && ${KAKEYA_TOOLS:-} != never ]]; then
        "$PY" -m venv "$CACHE/pip-audit" && "$CACHE/pip-audit/bin/pip" install -q pip-audit==2.10.1 || rm -rf "$CACHE/pip-audit"
    fi
    if [[ ! -x $audit ]]; then
        skip pip "pip-audit is not installed and could not be"
        return
    fi
    # One question first: a mirror of the registry may have packages but no advisories.
    if ! "$PY" - "$(grep -m 1 -E '^pip==' requirements/dev.lock)" <<'PY'; then
import json, sys, urllib.request
name, version = sys.argv[1].split("==")
try:
    answer = json.load(urllib.request.urlopen(f"https://pypi.org/pypi/{name}/{version}/json", timeout=20))
    answer["vulnerabilities"]
except (OSError, ValueError, KeyError) as error:
    sys.exit(f"no advisories at pypi.org: {error!r}")
PY
        skip pip "the advisories of pypi.org cannot be reached"
        return
    fi
    for lock in requirements/*.lock; do
        echo "$lock"
        # strict: a package that could not be asked about is no clean package.
        "$audit" --strict --disable-pip --no-deps --progress-spinner off -r "$lock"
    done
}

# Actions of a workflow are pinned by commit hash.
part_actions() { "$PY" -m pytest -q tests/python/test_supply_chain.py -k actions; }

for part in ${@:-list deny audit pip actions}; do
    declare -F "part_$part" >/dev/null || die "$part: valid are list, deny, audit, pip and actions"
    say "supply chain: $part"
    "part_$part"
done
if ((${#left_out[@]})); then printf '\nleft out:\n'; printf '  %s\n' "${left_out[@]}"; fi
