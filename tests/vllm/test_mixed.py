"""Models that mix full-attention and sliding-window layers: the former are compressed, the latter
keep vLLM's cache, and a block of either takes the same bytes of the one pool."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import engines
import mixed
import pytest
from kakeya_vllm import calibrate, lib
from kakeya_vllm.support import UnsupportedFeature


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("mixed")
    return functools.cache(lambda name: mixed.make(root / name, name))


@pytest.mark.parametrize("name", ["gemma3", "gemma2", "gpt_oss"])
def test_full_layers_are_compressed_and_the_rest_is_stock(models: Any, name: str) -> None:
    """What a model says of prompts moves by what the recipe loses, and less with more bits. The
    verifier compares seals and outputs, soft cap and sinks included, with references."""
    found = mixed.measured(models(name))
    moved = {ratio: mixed.apart(found[ratio], found["stock"]) for ratio in mixed.RATIOS}
    print(name, moved)
    # Where experts are chosen, a small change can take another one.
    assert 0 < 2 * moved["2.7x"] < moved["6.4x"]
    kinds = mixed.MODELS[name]["layer_types"]
    assert found["compressed"] == [i for i, kind in enumerate(kinds) if kind == mixed.FULL]
    assert found["checked"]["outputs"] > 0
    assert len({group["bytes"] for group in found["groups"]}) == 1
    for group in found["groups"]:
        if group["window"]:
            # The next larger block would not fit: at most half of the bytes are idle.
            assert group["bytes"] < 2 * group["used"]
            assert group["block"] < lib.BLOCK_TOKENS


# Before engines in batch-invariant mode, which this process would stay in.
@pytest.mark.usefixtures("own_environment")  # the calibration's engine sets variables
def test_a_calibration_has_the_full_layers(
    models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file

    model = engines.add_byte_tokenizer(models("gemma3"))
    monkeypatch.setenv("KAKEYA_CACHE", str(tmp_path))
    out = tmp_path / "artefact.safetensors"
    calibrate.calibrate(
        str(model), tokens=2 * 2048, out=out, settings={"dtype": engines.exact_dtype()}
    )
    variances = load_file(out)["k_var"]
    assert [bool(layer.any()) for layer in variances] == [False, False, False, True]
    env = mixed.EXACT | {"KAKEYA_CALIBRATION": str(out), "KAKEYA_RECIPE": "kakeya-4.6x"}
    with engines.engine(model, env, **mixed.OPTIONS, dtype=engines.exact_dtype()) as engine:
        assert [len(run.tokens) for run in engine.run(mixed.prompts(), 5)] == [5] * 4


def test_requests_together_equal_each_alone(models: Any) -> None:
    """With prefix hits and preemption: blocks of one pool go from windows to pages and back."""
    options = mixed.OPTIONS | {"dtype": engines.exact_dtype(), "enable_prefix_caching": True}
    with engines.engine(models("gemma3"), mixed.EXACT, **options) as engine:
        alone = []
        for prompt in mixed.prompts():
            alone += engine.run([prompt], 100)
            engine.reset_prefix_cache()
        together = engine.run(mixed.prompts(), 100)
        again = engine.run(mixed.prompts(), 100)
        assert again[3].cached >= 5 * lib.BLOCK_TOKENS
        assert engine.open_blocks.in_use <= len(mixed.LENGTHS)
    # The longest request alone takes 7 pages and 3 windows of up to 13 blocks. On a GPU, where a
    # block of a window is 16 tokens, vLLM asks for room for all tokens of three layers.
    blocks = 210 if engines.on_gpu() else 48
    small = options | {"num_gpu_blocks_override": blocks, "max_model_len": 1024}
    with engines.engine(models("gemma3"), mixed.EXACT, **small) as engine:
        crowded = engine.run(3 * mixed.prompts(), 100)
        assert engine.counter("vllm:num_preemptions") > 0
    # On a GPU prefill is raw, and where a prompt is cut or hits the prefix cache shows.
    for runs in (together, again, crowded) if not engines.on_gpu() else (together,):
        assert [r.tokens for r in runs] == [r.tokens for r in alone] * (len(runs) // len(alone))


def test_doctor_counts_the_full_layers(models: Any, tmp_path: Path) -> None:
    out = tmp_path / "doctor.json"
    model = engines.add_byte_tokenizer(models("gemma3"))
    command = [sys.executable, "-m", "kakeya_vllm.cli", "doctor", str(model), "--json", str(out)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    figures = json.loads(out.read_text())["figures"]
    assert (figures["layers"], figures["windowed_layers"]) == (1, 3)
    page = lib.load().recipe_page_bytes(figures["recipe"], 256)
    assert figures["bytes_per_token"]["kakeya"] == 2 * page / lib.BLOCK_TOKENS
    assert "capacity_tokens" not in figures


@pytest.mark.parametrize(
    ("overrides", "env", "feature"),
    [
        ({}, {"KAKEYA_BOUNDARY_SKIP_LAYERS": "3"}, "boundary layers in a model that mixes"),
        (
            {"layer_types": [mixed.FULL, mixed.FULL, mixed.FULL, mixed.SLIDING]},
            {},
            "compressed layers in 3 KV cache groups",
        ),
        ({"layer_types": [mixed.SLIDING] * 4}, {}, "sliding-window attention in all layers"),
    ],
)
def test_refused_by_name(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    overrides: dict[str, Any],
    env: dict[str, str],
    feature: str,
) -> None:
    about = mixed.MODELS["gemma3"] | overrides
    monkeypatch.setitem(mixed.MODELS, "gemma3", about)
    model = mixed.make(tmp_path / "model", "gemma3")
    with (
        pytest.raises(UnsupportedFeature, match=feature),
        engines.engine(model, env, **mixed.OPTIONS),
    ):
        pass
