#!/usr/bin/env python3
"""What libkakeya is made of: the crates that are compiled into it, from Cargo.lock.

    scripts/sbom.py list     # writes THIRD_PARTY.md: name, version, licence, source
    scripts/sbom.py check    # 1 if THIRD_PARTY.md is stale
    scripts/sbom.py sbom     # prints a CycloneDX 1.5 document, as the wheel has it
    scripts/sbom.py texts    # prints the crates' licence texts, as the wheel has them

Crates that only tests or build scripts use are not in the library, so not here; deny.toml judges
them as well. Asks cargo and nothing else; the same checkout gives the same bytes.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
import uuid
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LIST = ROOT / "THIRD_PARTY.md"
LIBRARY = "kakeya-ffi"
# Where the wheel is built for; what other platforms add (windows-sys and the like) is not in it.
PLATFORM = os.environ.get("CARGO_BUILD_TARGET", "x86_64-unknown-linux-gnu")
REGISTRY = "registry+https://github.com/rust-lang/crates.io-index"


def crates() -> list[dict[str, Any]]:
    """The packages of libkakeya as `cargo metadata` describes them, by name; each with `needs`,
    the ids of the packages that it is compiled with, and `sha256` of its file on crates.io."""
    command = [os.environ.get("CARGO", "cargo"), "metadata", "--locked", "--format-version", "1"]
    run = subprocess.run(
        [*command, "--filter-platform", PLATFORM], cwd=ROOT, check=True, capture_output=True
    )
    metadata = json.loads(run.stdout)
    packages = {package["id"]: package for package in metadata["packages"]}
    lock = tomllib.loads((ROOT / "Cargo.lock").read_text())["package"]
    sums = {(p["name"], p["version"]): p.get("checksum") for p in lock}
    needs = {
        # kind null: compiled in. "dev" and "build" are tests and build scripts.
        node["id"]: [
            d["pkg"] for d in node["deps"] if any(kind["kind"] is None for kind in d["dep_kinds"])
        ]
        for node in metadata["resolve"]["nodes"]
    }
    (first,) = (p["id"] for p in packages.values() if p["name"] == LIBRARY)
    found, left = set(), [first]
    while left:
        if (package := left.pop()) not in found:
            found.add(package)
            left += needs[package]
    out = [packages[i] | {"needs": sorted(needs[i])} for i in found]
    for package in out:
        package["sha256"] = sums[package["name"], package["version"]]
        # "MIT/Apache-2.0" is how it was once written.
        package["license"] = (package["license"] or "").replace("/", " OR ")
        if package["source"] not in (None, REGISTRY) or not package["license"]:
            raise SystemExit(f"{package['id']}: no crate of crates.io, or without a licence")
    return sorted(out, key=lambda p: (p["name"], p["version"]))


def proc_macro(package: dict[str, Any]) -> bool:
    """Whether it runs in the compiler, and only what it writes is in the library."""
    return any("proc-macro" in target["kind"] for target in package["targets"])


def listing(packages: list[dict[str, Any]]) -> str:
    """THIRD_PARTY.md."""
    lines = [
        "# Third-party code in libkakeya",
        "",
        "Written by `scripts/sbom.py list` from Cargo.lock; the tests refuse a stale one.",
        "Every crate that is compiled into `libkakeya.so`, and with it into the wheel. The",
        "wheel has the same as an SBOM (`*.dist-info/sboms/`), and the licences' texts",
        "(`*.dist-info/licenses/`). `deny.toml` says which licences are taken.",
        "",
        "| crate | version | licence |",
        "|---|---|---|",
    ]
    for p in packages:
        if p["source"]:
            at = f"https://crates.io/crates/{p['name']}/{p['version']}"
            note = ", macro" if proc_macro(p) else ""
            lines.append(f"| [{p['name']}]({at}) | {p['version']} | {p['license']}{note} |")
    lines += [
        "",
        "The Python package asks for numpy (BSD-3-Clause), safetensors (Apache-2.0) and tqdm",
        "(MPL-2.0 AND MIT), and runs in vLLM (Apache-2.0): installed beside it, not shipped.",
        "`requirements/*.lock` pin what set-up installs.",
        "",
    ]
    return "\n".join(lines)


def purl(package: dict[str, Any]) -> str:
    """The package URL of a crate."""
    return f"pkg:cargo/{package['name']}@{package['version']}"


def sbom(packages: list[dict[str, Any]], version: str) -> dict[str, Any]:
    """A CycloneDX 1.5 document of the wheel `kakeya-vllm` of this version."""
    by_id = {package["id"]: package for package in packages}
    components = []
    for p in packages:
        component: dict[str, Any] = {
            "type": "library",
            "bom-ref": purl(p),
            "name": p["name"],
            "version": p["version"],
            "purl": purl(p),
            "licenses": [{"expression": p["license"]}],
        }
        if p["sha256"]:
            component["hashes"] = [{"alg": "SHA-256", "content": p["sha256"]}]
        if p["repository"]:
            component["externalReferences"] = [{"type": "vcs", "url": p["repository"]}]
        components.append(component)
    wheel = f"pkg:pypi/kakeya-vllm@{version}"
    library = next(p for p in packages if p["name"] == LIBRARY)
    graph = [{"ref": wheel, "dependsOn": [purl(library)]}]
    graph += [
        {"ref": purl(p), "dependsOn": sorted(purl(by_id[i]) for i in p["needs"])} for p in packages
    ]
    # From what the document lists, so that the same build has the same number.
    name = " ".join([wheel, *(f"{purl(p)} {p['sha256']}" for p in packages)])
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, name)}",
        "version": 1,
        "metadata": {
            "component": {
                "type": "library",
                "bom-ref": wheel,
                "name": "kakeya-vllm",
                "version": version,
                "purl": wheel,
                "licenses": [{"expression": "Apache-2.0"}],
            },
        },
        "components": components,
        "dependencies": graph,
    }


def texts(packages: list[dict[str, Any]]) -> str:
    """The licence and notice files that the crates come with; one text that many share, once."""
    owners: dict[str, list[str]] = {}
    for p in packages:
        if not p["source"]:
            continue
        folder = Path(p["manifest_path"]).parent
        names = re.compile(r"(licen[sc]e|copying|notice|unlicense)", re.IGNORECASE)
        files = [f for f in sorted(folder.iterdir()) if f.is_file() and names.match(f.name)]
        who = f"{p['name']} {p['version']} ({p['license']})"
        if not files:
            owners.setdefault("(comes without a licence file)\n", []).append(who)
        for file in files:
            owners.setdefault(file.read_text(errors="replace").strip() + "\n", []).append(who)
    parts = []
    for text, who in owners.items():
        parts += ["=" * 80, *who, "-" * 80, text]
    return "\n".join(parts)


def package_version() -> str:
    """The version of the Python package."""
    text = (ROOT / "vllm_plugin" / "kakeya_vllm" / "__init__.py").read_text()
    return re.search(r'^__version__ = "(.+)"', text, re.M)[1]


def main() -> int:
    """0: done; 1: THIRD_PARTY.md is stale."""
    command = sys.argv[1] if len(sys.argv) == 2 else ""
    packages = crates()
    if command == "list":
        LIST.write_text(listing(packages))
    elif command == "check":
        if LIST.read_text() != listing(packages):
            print("THIRD_PARTY.md is stale: scripts/sbom.py list")
            return 1
        print(f"THIRD_PARTY.md lists the {len(packages)} crates of libkakeya, its own included")
    elif command == "sbom":
        print(json.dumps(sbom(packages, package_version()), indent=1))
    elif command == "texts":
        print(texts(packages), end="")
    else:
        raise SystemExit(__doc__)
    return 0


if __name__ == "__main__":
    sys.exit(main())
