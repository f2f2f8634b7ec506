"""`kakeya bench`: what it measures is what it says, and losing cells are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import engines
import pytest
from kakeya_vllm import bench, cli

pytestmark = pytest.mark.usefixtures("own_environment")

RESULTS: dict[str, Any] = {
    "bf16": {
        "": {"capacity": 1000},
        "1x512": {"first_token_ms": 10.0, "ms_a_token": 5.0, "tokens_a_s": 200.0},
        "8x512": {"ms_a_token": 9.0, "tokens_a_s": 888.9, "prefill_tokens_a_s": 1000.0},
    },
    "kakeya-4.6x": {
        "": {"capacity": 4600},
        "1x512": {"first_token_ms": 10.4, "ms_a_token": 5.5, "tokens_a_s": 181.8},
        "8x512": {"ms_a_token": 4.5, "tokens_a_s": 1777.8, "prefill_tokens_a_s": 900.0},
    },
    "fp8": {"": {"capacity": 2000}, "1x512": {"does_not_fit": True}},
}


def test_cells() -> None:
    assert bench.cells("64x8192, 1x512") == [(64, 8192), (1, 512)]
    for text in ("", "64", "0x8", "ax8", "4x8,"):
        with pytest.raises(ValueError, match="is not a cell"):
            bench.cells(text)


def test_what_loses_is_named() -> None:
    """Decoding loses below 1, prefill and first tokens below 0.95; capacity wins."""
    assert bench.lost(RESULTS) == [
        "kakeya-4.6x: a token, ms at 1x512, 0.91x bf16",
        "kakeya-4.6x: decoding, tokens/s at 1x512, 0.91x bf16",
        "kakeya-4.6x: prefill, tokens/s at 8x512, 0.90x bf16",
    ]


def test_a_table_has_every_cell() -> None:
    header, rows = bench.rows(RESULTS)
    assert header[:3] == ["cache", "capacity, tokens", "first token, ms 1x512"]
    assert [row[0] for row in rows] == ["bf16", "kakeya-4.6x", "fp8"]
    by_name = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    assert by_name["kakeya-4.6x"]["capacity, tokens"] == "4,600 (4.60x)"
    assert by_name["kakeya-4.6x"]["a token, ms 8x512"] == "4.5 (2.00x)"
    assert by_name["fp8"]["a token, ms 1x512"] == "does not fit"
    assert by_name["fp8"]["a token, ms 8x512"] == "failed"


def test_the_page_stands_alone() -> None:
    result = {
        "model": "<b>model",
        "cells": [(1, 512), (8, 512)],
        "versions": {"vllm": "0"},
        "caches": RESULTS,
    }
    page = bench.page(result)
    assert "<b>model" not in page
    assert page.count("<figure>") == 3
    assert "0.91x bf16" in page
    assert "http" not in page
    assert "<script" not in page


def test_growth_covers_what_the_first_sequence_decodes() -> None:
    # While 63 other prompts of 8,192 tokens are prefilled at about one a step, the first decodes.
    assert bench.growth(64, 8192, 32) >= 64 + 32
    assert bench.growth(1, 512, 8) >= 9


def test_engines_are_measured(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, capfd: pytest.CaptureFixture[str]
) -> None:
    model = engines.make_tiny_model(tmp_path_factory.mktemp("bench"))
    options = {
        "enforce_eager": True,
        "kv_cache_memory_bytes": engines.KV_BYTES,
        "gpu_memory_utilization": 0.2,
    }
    files = {name: tmp_path / f"out.{name}" for name in ("json", "html")}
    argv = ["bench", str(model), "--caches", "bf16,kakeya-free-4.6x", "--cells", "1x128,2x64"]
    argv += ["--steps", "4", "--repeats", "1", "--options", json.dumps(options)]
    argv += [f"--{name}={path}" for name, path in files.items()]
    assert cli.main(argv) == 0
    printed = capfd.readouterr().out
    caches = json.loads(files["json"].read_text())["caches"]
    assert list(caches) == ["bf16", "kakeya-free-4.6x"]
    for found in caches.values():
        assert set(found) == {"", "1x64", "1x128", "2x64"}
        assert found["2x64"]["tokens_a_s"] == pytest.approx(
            2e3 / found["2x64"]["ms_a_token"], rel=1e-2
        )
    # The model is float32 here on the CPU: pages stand against four bytes a value.
    ratio = caches["kakeya-free-4.6x"][""]["capacity"] / caches["bf16"][""]["capacity"]
    assert ratio > 4.4
    assert "capacity, tokens" in printed
    assert files["html"].read_text().startswith("<!doctype html>")


def test_an_engine_that_fails_leaves_the_others(
    tmp_path_factory: pytest.TempPathFactory, capfd: pytest.CaptureFixture[str]
) -> None:
    model = engines.make_tiny_model(tmp_path_factory.mktemp("bench"))
    options = json.dumps({"enforce_eager": True, "kv_cache_memory_bytes": engines.KV_BYTES})
    argv = ["bench", str(model), "--caches", "kakeya-9.9x", "--cells", "1x64", "--options", options]
    assert cli.main(argv) == 1
    out = capfd.readouterr()
    assert "kakeya-9.9x failed: exit" in out.out
    assert "no recipe is named 'kakeya-9.9x'" in out.err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["bench", "M", "--options", "[1]"], "is no JSON object"),
        (["bench", "M", "--steps", "0"], "not a positive"),
    ],
)
def test_bad_arguments_are_refused(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(argv)
    assert words in capsys.readouterr().err


def test_a_bad_cell_is_refused() -> None:
    with pytest.raises(SystemExit, match="'8' is not a cell"):
        cli.main(["bench", "M", "--cells", "8", "--caches", "bf16"])
