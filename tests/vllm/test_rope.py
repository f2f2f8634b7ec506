"""The model's own rotary embedding: found, exact, and refused where angles are not fixed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kakeya_vllm import rope
from kakeya_vllm.support import UnsupportedFeature
from torch import nn

ROPE = {"rope_theta": 10000.0}
CONFIG = SimpleNamespace(rope_parameters=ROPE)


@pytest.fixture(autouse=True)
def _vllm_config() -> Any:
    from vllm.config import VllmConfig, set_current_vllm_config

    with set_current_vllm_config(VllmConfig()):
        yield


def make(
    parameters: dict[str, Any], head: int = 64, neox: bool = True, positions: int = 4096
) -> Any:
    from vllm.model_executor.layers.rotary_embedding import get_rope

    return get_rope(head, positions, neox, ROPE | parameters, dtype=torch.bfloat16)


def model(*rotary: Any) -> nn.Module:
    """layers.{i}.self_attn holds rotary_emb and attn, as vLLM's decoders do."""
    layers = nn.ModuleList()
    for module in rotary:
        attention = nn.Module()
        attention.attn = nn.Identity()
        if module is not None:
            attention.rotary_emb = module
        layer = nn.Module()
        layer.self_attn = attention
        layers.append(layer)
    root = nn.Module()
    root.layers = layers
    return root


def names(count: int) -> list[str]:
    return [f"layers.{i}.self_attn.attn" for i in range(count)]


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        LLAMA3,
        YARN,
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "ntk", "factor": 2.0},
        {"partial_rotary_factor": 0.5},
    ],
)
def test_angles_are_those_of_the_table(parameters: dict[str, Any]) -> None:
    module = make(parameters)
    found = rope.extract(module)
    assert found.rotary_dim == module.rotary_dim == 2 * len(found.inv_freq)
    assert found.interleaved is False
    # Far into the context: an error of one part in a thousand in a frequency would show.
    position = 3000
    angles = position * torch.tensor(found.inv_freq, dtype=torch.float64)
    row = module.cos_sin_cache[position].double()
    expected = torch.cat((angles.cos(), angles.sin())) * found.mscale
    assert (row - expected).abs().max() < 0.01


def test_plain_frequencies_and_pairing() -> None:
    found = rope.extract(make({}, head=128, neox=False))
    assert found.interleaved is True
    expected = 10000.0 ** (-torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    assert torch.allclose(torch.tensor(found.inv_freq, dtype=torch.float64), expected, rtol=1e-6)
    assert found.to_json() == {
        "rotary_dim": 128,
        "interleaved": True,
        "inv_freq": list(found.inv_freq),
    }


def test_yarn_scale_is_constant_and_kept_apart() -> None:
    assert rope.extract(make(YARN)).mscale > 1.1


@pytest.mark.parametrize("change", ["frequency", "shift"])
def test_a_table_that_disagrees_is_refused(change: str) -> None:
    module = make({"rope_theta": 10001.0 if change == "frequency" else 10002.0})
    table = module.cos_sin_cache.float()
    if change == "frequency":
        table[:, 5] = (torch.arange(table.shape[0]) * module._compute_inv_freq(1e4)[5] * 1.01).cos()
    else:
        table = torch.roll(table, 1, dims=0)
    module.cos_sin_cache = table.to(torch.bfloat16)
    with pytest.raises(UnsupportedFeature, match="does not follow its own frequencies"):
        rope.extract(module)


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "depend on the sequence length"),
        ({"mrope_section": [16, 8, 8]}, "M-RoPE"),
    ],
)
def test_other_kinds_are_refused(parameters: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedFeature, match=reason):
        rope.extract(make(parameters))


def test_longrope_is_refused() -> None:
    module = nn.Module()
    module.rotary_dim, module.long_short_cos_sin_cache = 64, torch.zeros(1)
    with pytest.raises(UnsupportedFeature, match="only embeddings with fixed angles are known"):
        rope.extract(module)


def test_shared_and_equal_modules_are_one() -> None:
    module = make({})
    assert rope.find(model(module, module), names(2), CONFIG) == rope.extract(module)


def test_layers_that_differ_are_refused() -> None:
    with pytest.raises(UnsupportedFeature, match="several different rotary embeddings"):
        rope.find(model(make({}), make({"rope_theta": 5e5})), names(2), CONFIG)
    # A difference in a layer that is not compressed does not matter.
    assert rope.find(model(make({}), make({"rope_theta": 5e5})), names(1), CONFIG)


def test_layers_without_rotation_are_refused() -> None:
    with pytest.raises(UnsupportedFeature, match="rotate only some layers"):
        rope.find(model(make({}), None), names(2), CONFIG)
    skipping = SimpleNamespace(rope_parameters=ROPE, no_rope_layers=[1, 0])
    with pytest.raises(UnsupportedFeature, match="rotate only some layers"):
        rope.find(model(make({}), make({})), names(2), skipping)


def test_no_rotary_at_all() -> None:
    assert rope.find(model(None, None), names(2), SimpleNamespace()) is None
    with pytest.raises(UnsupportedFeature, match="not beside its attention layers"):
        rope.find(model(None, None), names(2), CONFIG)


def test_rotary_held_further_up_is_found() -> None:
    root = model(None, None)
    root.rotary = make({})
    assert rope.find(root, names(2), CONFIG) == rope.extract(root.rotary)
