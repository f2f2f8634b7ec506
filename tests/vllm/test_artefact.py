"""Calibration artefacts: which are refused with which reason, and what degenerate ones do."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kakeya_vllm import calibrate, config, lib, runtime
from kakeya_vllm.evaluation.simulate import PageCoder
from safetensors.torch import save

LAYERS, HEADS, DIM = 2, 2, 64
SHAPE = {
    "num_layers": LAYERS,
    "num_kv_heads": HEADS,
    "num_q_heads": 4,
    "head_dim": DIM,
    "max_position": 4096,
    "rope": {
        "rotary_dim": DIM,
        "interleaved": False,
        "inv_freq": [10000.0 ** (-2 * i / DIM) for i in range(DIM // 2)],
    },
}


def statistics(dim: int = DIM) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    draw = lambda: torch.randn(LAYERS, HEADS, dim, generator=generator)  # noqa: E731
    found = {name: draw() for name in ("k_mean", "q_mean", "v_mean")}
    found |= {name: draw().exp() for name in ("k_var", "q_sq", "v_var")}
    return found | {"sink_mass": torch.full((LAYERS, HEADS, 8), 0.1)}


def artefact(tensors: dict[str, torch.Tensor], file_format: str = config.ARTEFACT_FORMAT) -> bytes:
    return save(tensors, metadata={"format": file_format, "model_fingerprint": "x"})


def spoilt(name: str, value: float) -> dict[str, torch.Tensor]:
    tensors = statistics()
    tensors[name][1, 0, 5] = value
    return tensors


def without(name: str) -> dict[str, torch.Tensor]:
    return {n: t for n, t in statistics().items() if n != name}


REFUSED = {
    "truncated": (artefact(statistics())[:-100], "not a safetensors file"),
    "not a safetensors file": (b"PK" + bytes(200), "not a safetensors file"),
    "empty": (b"", "not a safetensors file"),
    "version": (
        artefact(statistics(), "kakeya-calibration-2"),
        "'format' is 'kakeya-calibration-2', expected 'kakeya-calibration-1'",
    ),
    "shape": (artefact(statistics(128)), "[2, 2, 64]"),
    "layers": (artefact({n: t[:1] for n, t in statistics().items()}), "[1, 2, 64]"),
    "dtype": (artefact({n: t.double() for n, t in statistics().items()}), "F64, expected F32"),
    "missing": (artefact(without("q_sq")), "tensor 'q_sq' is missing"),
    "NaN": (artefact(spoilt("k_mean", float("nan"))), "tensor 'k_mean' holds NaN at element 133"),
    "infinity": (artefact(spoilt("v_var", float("inf"))), "tensor 'v_var' holds inf at element"),
    "negative": (artefact(spoilt("k_var", -1.0)), "it must not be negative"),
    "absurd mean": (artefact(spoilt("v_mean", 1e30)), "valid: -268435460..=268435460"),
    "absurd variance": (artefact(spoilt("q_sq", 1e30)), "valid: 0..=72057594000000000"),
    "header": ((1 << 30).to_bytes(8, "little") + bytes(200), "a header of 1073741824 bytes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    """By the codec, and by the process that builds an engine, which adds the path."""
    data, words = REFUSED[name]
    with pytest.raises(lib.KakeyaError) as error:
        lib.load().codec("kakeya-4.6x", SHAPE, data or None)
    assert words in error.value.text or not data
    path = tmp_path / "artefact.safetensors"
    path.write_bytes(data)
    settings = config.Settings("kakeya-4.6x", str(path), (), "raw")
    with pytest.raises(config.ConfigError) as refusal:
        runtime.check_artefact(vllm_config(), settings)
    assert str(path) in str(refusal.value)
    assert words in str(refusal.value) or not data


def test_a_good_one_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "artefact.safetensors"
    path.write_bytes(artefact(statistics()))
    runtime.check_artefact(vllm_config(), config.Settings("kakeya-4.6x", str(path), (), "raw"))
    runtime.check_artefact(vllm_config(), config.Settings("kakeya-free-4.6x", None, (), "raw"))
    lib.load().codec("kakeya-4.6x", SHAPE, artefact(without("sink_mass")))


def test_what_is_larger_than_any_is_not_read(tmp_path: Path) -> None:
    """Files with holes, which take no room: reading them would take all memory."""
    path = tmp_path / "artefact.safetensors"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    settings = config.Settings("kakeya-4.6x", str(path), (), "raw")
    with pytest.raises(config.ConfigError, match="1099511627776 bytes; valid: up to 1073741824"):
        runtime.check_artefact(vllm_config(), settings)
    recipe = tmp_path / "recipe.json"
    recipe.write_text("{" + " " * (1 << 16) + "}")
    with pytest.raises(config.ConfigError, match="65538 bytes; valid: up to 65536"):
        config.read_recipe(str(recipe))


def vllm_config() -> Any:
    model = SimpleNamespace(
        get_total_num_hidden_layers=lambda: LAYERS,
        get_total_num_kv_heads=lambda: HEADS,
        get_head_size=lambda: DIM,
        model_arch_config=SimpleNamespace(total_num_attention_heads=4),
        hf_text_config=SimpleNamespace(max_position_embeddings=4096),
        max_model_len=2048,
    )
    return SimpleNamespace(model_config=model)


def every(value: float) -> dict[str, torch.Tensor]:
    tensors = statistics()
    for name in ("k_var", "v_var", "q_sq"):
        tensors[name] = torch.full_like(tensors[name], value)
    return tensors


def some(names: tuple[str, ...], value: float) -> dict[str, torch.Tensor]:
    tensors = statistics()
    for name in names:
        tensors[name][..., ::3] = value
    return tensors


DEGENERATE = {
    "all dead": every(0.0),
    "all tiny": every(1e-38),
    "all huge": every(2.0**56),
    "dead channels": some(("k_var", "v_var"), 0.0),
    "queries look nowhere": some(("q_sq",), 0.0),
    "queries look at few": some(("q_sq",), 2.0**56),
    "one channel has everything": some(("k_var", "v_var"), 1e12),
    "no mean query": statistics() | {"q_mean": torch.zeros(LAYERS, HEADS, DIM)},
    "far means": statistics() | {"k_mean": torch.full((LAYERS, HEADS, DIM), 1e5)},
    "no sinks": statistics() | {"sink_mass": torch.zeros(LAYERS, HEADS, 8)},
}


@pytest.mark.parametrize("recipe", ["kakeya-4.6x", "kakeya-4.6x-trellis", "kakeya-6.4x-lloyd-max"])
@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_statistics_give_finite_pages(name: str, recipe: str) -> None:
    codec = lib.load().codec(recipe, SHAPE, artefact(DEGENERATE[name]))
    generator = torch.Generator().manual_seed(4)
    for scale in (0.0, 1e-3, 1.0, 300.0):
        k, v = (scale * torch.randn(256, HEADS, DIM, generator=generator) for _ in "kv")
        for layer in range(LAYERS):
            rows = PageCoder(codec).round_trip(layer, k, v, 2)
            assert all(bool(torch.isfinite(x).all()) for x in rows)


@pytest.mark.parametrize("recipe", ["kakeya-4.6x", "kakeya-4.6x-trellis"])
def test_a_channel_that_stood_still_may_move(recipe: str) -> None:
    """One channel was dead on the calibration text and moves like the others here. With the least
    variance it is coded like them; without, it is lost, and its unit has fewer bits for others."""
    tensors = statistics()
    for name in ("k_var", "v_var", "q_sq"):
        tensors[name] = torch.ones(LAYERS, HEADS, DIM)
    for name in ("k_mean", "v_mean"):
        tensors[name] = torch.zeros(LAYERS, HEADS, DIM)
    tensors["v_var"][..., 0] = 0.0
    raised = dict(tensors)
    assert calibrate.regularise(raised) == LAYERS * HEADS
    generator = torch.Generator().manual_seed(5)
    k, v = (torch.randn(128, HEADS, DIM, generator=generator) for _ in "kv")
    hadamard = calibrate.hadamard(DIM).float()
    errors = []
    for found in (tensors, raised):
        codec = lib.load().codec(recipe, SHAPE, artefact(found))
        _, v_new = PageCoder(codec).round_trip(0, k, v, 1)
        errors.append(((v_new - v) @ hadamard).square().mean((0, 1)))
    assert float(errors[0][0]) > 0.9
    assert float(errors[1][0]) < 0.3
    assert float(errors[1][1:].mean()) < float(errors[0][1:].mean())
