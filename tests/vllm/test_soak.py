"""A minute of scripts/soak.py: random load, every answer against its answer alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import engines
import pytest

SCRIPT = engines.ROOT / "scripts" / "soak.py"


def soak(*arguments: str) -> tuple[int, dict[str, Any], str]:
    """Exit status, figures and messages of a soak of a tiny model."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    # vLLM's log may follow the figures there.
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines, done.stderr[-8000:]
    return done.returncode, json.loads(lines[-1]), done.stderr[-8000:]


@pytest.mark.parametrize("drafts", [3, pytest.param(0, marks=pytest.mark.gpu)])
def test_every_answer_equals_its_answer_alone(drafts: int) -> None:
    """How many requests, not how long: the load is then the same on every machine. Without drafts
    vLLM schedules ahead, on a GPU."""
    load = ["--seed", "5", "--prompts", "20", "--requests", "70"]
    code, figures, said = soak(*load, "--drafts", str(drafts))
    assert code == 0, said
    assert figures["problems"] == []
    if not engines.on_gpu():
        assert figures["different"] == 0
    expected = ["aborted", "whole", "chunked", "prefix_hits", "preemptions", "poisoned_blocks"]
    for name in [*expected, "poisoned_slots", "idle_checks", *["accepted_drafts"][: drafts > 0]]:
        assert figures[name] > 0, f"{name} did not occur: {figures}"


@pytest.mark.cpu_only  # there every answer is compared bit for bit
def test_a_wrong_row_is_found() -> None:
    """One open block of a running request is changed: the soak names seed and request, and ends."""
    code, figures, said = soak("--seed", "5", "--prompts", "8", "--requests", "40", "--spoil", "20")
    assert code == 1
    (problem,) = figures["problems"]
    assert "differs from its answer alone at token" in problem
    assert "prompt" in problem
    assert "again: --seed 5 --prompts 8 --requests" in said


def test_the_script_is_executable() -> None:
    assert Path(SCRIPT).stat().st_mode & 0o111
