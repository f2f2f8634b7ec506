"""What the checkout depends on is pinned: crates, packages, actions of workflows."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# A full commit, or an image by its digest; a local action has neither.
PINNED = re.compile(r"^(\./.*|[\w.-]+/[\w./-]+@[0-9a-f]{40}|docker://\S+@sha256:[0-9a-f]{64})$")


def unpinned(workflow: str) -> list[str]:
    """The actions that a workflow's text uses by a name that can be moved."""
    used = re.findall(r"^\s*(?:-\s*)?uses:\s*['\"]?([^\s'\"#]+)", workflow, re.M)
    return [action for action in used if not PINNED.match(action)]


def test_actions_are_pinned() -> None:
    """Of every workflow in the checkout. There is none: `.ci/run` is a script of its own."""
    found = [
        p for p in ROOT.glob(".*/**/*.y*ml") if ".venv" not in p.parts and ".cache" not in p.parts
    ]
    assert {str(p): bad for p in found if (bad := unpinned(p.read_text()))} == {}


@pytest.mark.parametrize(
    ("line", "bad"),
    [
        ("- uses: actions/checkout@v4", ["actions/checkout@v4"]),
        ("  uses: 'actions/checkout@main' # newest", ["actions/checkout@main"]),
        (f"- uses: actions/checkout@{'0a' * 20} # v4", []),
        ("- uses: ./.ci/action", []),
    ],
)
def test_pinned_actions_are_told_from_others(line: str, bad: list[str]) -> None:
    assert unpinned(line) == bad


def test_packages_are_pinned() -> None:
    for lock in sorted((ROOT / "requirements").glob("*.lock")):
        lines = [line for line in lock.read_text().splitlines() if line and line[0] != "#"]
        assert lines, lock
        for line in lines:
            assert re.match(r"^[\w.\[\]-]+==[\w.+!]+( *;.*)?( *--hash=.*)?$", line), (
                f"{lock}: {line}"
            )


def test_crates_are_from_the_registry_and_pinned() -> None:
    for package in tomllib.loads((ROOT / "Cargo.lock").read_text())["package"]:
        if "source" in package:
            assert package["source"] == "registry+https://github.com/rust-lang/crates.io-index"
            assert re.fullmatch(r"[0-9a-f]{64}", package["checksum"]), package["name"]
        else:
            assert package["name"].startswith("kakeya-"), package["name"]
