"""Families of models: a tiny random instance of each runs with KAKEYA, or is refused by name.

All are measured in one process, those that are selected by `-k` only. docs/support.md is made from
what is measured here: with KAKEYA_TEST_FAMILIES=PATH it is written there (scripts/support.py does
so), otherwise it must be what docs/support.json holds.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import engines
import families
import mixed
import pytest
import torch
from families import FAMILIES
from kakeya_vllm import lib, version

OUT = os.environ.get("KAKEYA_TEST_FAMILIES")
KEPT = engines.ROOT / "docs" / "support.json"
RUNNING = [name for name, family in FAMILIES.items() if not family.refused]
REFUSED = [name for name, family in FAMILIES.items() if family.refused]
# Codes at the edge of two values fall either way on another processor.
KEPT_WITHIN = 0.25


@pytest.fixture(scope="module")
def measured(request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    """What was found of the selected families, by name."""
    calls = [getattr(item, "callspec", None) for item in request.session.items]
    chosen = {call.params["name"] for call in calls if call and "name" in call.params}
    return families.measured(name for name in FAMILIES if name in chosen)


def found(measured: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    entry = measured[name]
    assert "error" not in entry, entry["error"]
    return entry


@pytest.mark.parametrize("name", RUNNING)
def test_it_loses_what_the_recipe_loses(measured: Any, name: str) -> None:
    """What a model says of prompts moves, and less with more bits; every layer that grows with the
    context is compressed; KAKEYA_VERIFY held seals and outputs against references."""
    entry = found(measured, name)
    moved = {ratio: mixed.apart(entry[ratio], entry["stock"]) for ratio in families.RATIOS}
    # In bfloat16, the type on a GPU, the last digits move as well.
    assert 0 < (1 if engines.on_gpu() else 2) * moved["2.7x"] < moved["6.4x"]
    kinds = FAMILIES[name].about.get("layer_types") or [families.FULL] * entry["layers"]
    growing = (families.FULL, "attention")
    assert entry["compressed"] == [i for i, kind in enumerate(kinds) if kind in growing]
    checked = entry["checked"]
    assert min(checked["pages"], checked["seals"], checked["outputs"]) > 0, checked


@pytest.mark.parametrize("name", RUNNING)
def test_pages_take_what_the_recipe_says(measured: Any, name: str) -> None:
    """By vLLM's own KV-cache specs, for a model in bfloat16. Beside windows, whose smallest block
    on the CPU is 32 tokens, a page is padded to a quarter of its tokens' bytes."""
    entry = found(measured, name)
    page = lib.load().recipe_page_bytes(entry["recipe"], entry["head_dim"])
    stock = 2 * 2 * entry["head_dim"] * lib.BLOCK_TOKENS
    windowed = families.SLIDING in FAMILIES[name].about.get("layer_types", ())
    padded = windowed and not engines.on_gpu()
    assert entry["ratio"] == pytest.approx(4.0 if padded else stock / page)


@pytest.mark.parametrize("name", RUNNING)
def test_what_is_decoded_is_what_would_be_read(measured: Any, name: str) -> None:
    """Greedy tokens over the end of a block have the log-probabilities that they have as a prompt,
    and requests that hit the prefix cache answer the same."""
    entry = found(measured, name)
    assert any(
        length // lib.BLOCK_TOKENS < (length + families.NEW_TOKENS) // lib.BLOCK_TOKENS
        for length in families.LENGTHS
    )
    if not engines.on_gpu():  # where a prompt's own tokens are read as they were
        for decoded, read in zip(entry["decoded"], entry["read"], strict=True):
            difference = max(abs(a - b) for a, b in zip(decoded, read, strict=True))
            assert difference <= FAMILIES[name].exact
        first, again = entry["tokens"]
        assert first == again
    caching = FAMILIES[name].options.get("enable_prefix_caching", True)
    block = entry["block"]
    hits = [(length - 1) // block * block if caching else 0 for length in families.LENGTHS]
    assert entry["hits"] == hits


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(measured: Any, name: str) -> None:
    entry = found(measured, name)
    assert FAMILIES[name].refused in entry["refused"]
    assert entry["kind"] == FAMILIES[name].error
    assert entry["engines"] == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_the_page_has_what_was_measured(measured: Any, name: str) -> None:
    entry = families.summary(name, found(measured, name))
    if OUT:
        path = Path(OUT)
        kept = json.loads(path.read_text()) if path.is_file() else {}
        kept |= {"versions": families.versions()}
        if engines.on_gpu():
            kept["gpu"] = torch.cuda.get_device_name()
        kept.setdefault("families", {})[name] = entry
        path.write_text(json.dumps(kept, indent=1) + "\n")
        return
    kept = json.loads(KEPT.read_text())
    if version.installed() != kept["versions"]["vllm"]:
        pytest.skip(f"docs/support.json is of vLLM {kept['versions']['vllm']}")
    expected = kept["families"][name]
    for ratio, value in expected.pop("moved", {}).items():
        assert entry["moved"][ratio] == pytest.approx(value, rel=KEPT_WITHIN)
    entry.pop("moved", None)
    assert entry == expected, "scripts/support.py measure"


@pytest.mark.skipif(bool(OUT), reason="it is being written")
def test_the_page_has_no_others() -> None:
    assert set(json.loads(KEPT.read_text())["families"]) == set(FAMILIES)
