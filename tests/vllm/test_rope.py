"""The model's own rotary embedding: found, exact, and refused where angles are not fixed."""

from __future__ import annotations

import copy
import importlib
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kakeya_vllm import probe, rope
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


def test_several_scaling_factors_are_refused() -> None:
    module = copy.deepcopy(make({"rope_type": "linear", "factor": 2.0}))  # vLLM shares its modules
    module.scaling_factors = [2.0, 4.0]
    with pytest.raises(UnsupportedFeature, match="with several scaling factors"):
        rope.extract(module)


def test_a_table_of_other_channels_is_refused() -> None:
    module = copy.deepcopy(make({}))
    module.cos_sin_cache = module.cos_sin_cache[:, :32]
    with pytest.raises(UnsupportedFeature, match="rotary embedding RotaryEmbedding of 32 channels"):
        rope.extract(module)


def test_two_rotary_embeddings_beside_one_layer_are_refused() -> None:
    made = model(make({}))
    made.layers[0].self_attn.other = make(YARN)
    with pytest.raises(UnsupportedFeature, match=r"several rotary embeddings in layers\.0"):
        rope._nearest_rotary(dict(made.named_modules()), *names(1))


def longrope(longest: int, **more: Any) -> Any:
    """vLLM's module in an engine of this max_model_len."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import Phi3LongRoPEScaledRotaryEmbedding

    config = VllmConfig()
    config.model_config = SimpleNamespace(max_model_len=longest)
    with set_current_vllm_config(config):
        return Phi3LongRoPEScaledRotaryEmbedding(
            head_size=HEAD,
            rotary_dim=48,
            max_position_embeddings=8192,
            original_max_position_embeddings=1024,
            base=10000.0,
            is_neox_style=True,
            dtype=torch.bfloat16,
            short_factor=[1.0 + i / 100 for i in range(24)],
            long_factor=[2.0 + i for i in range(24)],
            **more,
        )


@pytest.mark.parametrize(("longest", "first"), [(1024, 1.0), (1025, 0.5)])
def test_longrope_has_the_angles_of_the_engines_length(longest: int, first: float) -> None:
    found = rope.extract(longrope(longest))
    assert (found.rotary_dim, found.interleaved) == (48, False)
    assert found.inv_freq[0] == first
    assert found.mscale == pytest.approx((1 + math.log(8) / math.log(1024)) ** 0.5)


def test_longrope_turns_keys_by_them() -> None:
    module, keys = longrope(8192), unturned()
    flat = keys.reshape(-1, keys.shape[-2] * HEAD)
    places = torch.tensor(PLACES).repeat(keys.shape[0])
    seen = module(places, flat.clone(), flat.clone())[1].reshape(keys.shape).double()
    assert rope.extract(module).gives(seen, PLACES)
    module.use_long_rope = False
    assert not rope.extract(module).gives(seen, PLACES)


def test_longrope_with_two_scales_of_keys_is_refused() -> None:
    with pytest.raises(UnsupportedFeature, match="another scale in short contexts"):
        rope.extract(longrope(8192, short_mscale=1.1, long_mscale=1.2))


HEAD, PLACES = 64, [0, 1, 2, 5, 17, 100, 1000, 3001]


def unturned(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Keys [samples, positions, heads, head_dim] that are the same at all positions."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(2, 1, 3, HEAD, generator=generator).to(dtype)
    return keys.expand(-1, len(PLACES), -1, -1)


def turned(module: Any, keys: torch.Tensor) -> torch.Tensor:
    """What vLLM's own module makes of them."""
    flat = keys.reshape(-1, keys.shape[-2] * HEAD)
    places = torch.tensor(PLACES).repeat(keys.shape[0])
    # It would round its table to the keys' type, and get_rope gives it to the next test.
    module = copy.deepcopy(module)
    return module.forward_native(places, flat.clone(), flat.clone())[1].reshape(keys.shape)


def find(root: nn.Module, *layers: torch.Tensor, config: Any = CONFIG) -> rope.Rope | None:
    """Of layers that were given these keys."""
    found = dict(zip(names(len(layers)), layers, strict=True))
    seen = probe.Keys(PLACES, {name: keys.double() for name, keys in found.items()})
    return rope.of_keys(root, list(found), config, seen)


@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize(
    "parameters", [{}, LLAMA3, YARN, {"rope_type": "linear", "factor": 2.0}], ids=str
)
def test_keys_of_the_module_are_known(parameters: dict[str, Any], neox: bool) -> None:
    module = make(parameters, neox=neox)
    for dtype in (torch.bfloat16, torch.float32):
        keys = turned(module, unturned(dtype=dtype))
        assert find(model(module), keys) == rope.extract(module)


def test_shared_and_equal_modules_are_one() -> None:
    module = make({})
    keys = turned(module, unturned(1)), turned(module, unturned(2))
    assert find(model(module, module), *keys) == rope.extract(module)


def test_layers_that_differ_are_refused() -> None:
    first, second = make({}), make({"rope_theta": 5e5})
    keys = turned(first, unturned()), turned(second, unturned())
    with pytest.raises(UnsupportedFeature, match="several different rotary embeddings"):
        find(model(first, second), *keys)
    # A difference in a layer that is not compressed does not matter.
    assert find(model(first, second), keys[0]) == rope.extract(first)


def test_layers_without_rotation_are_refused() -> None:
    module = make({})
    keys = turned(module, unturned()), unturned()
    for other in (None, module):
        with pytest.raises(UnsupportedFeature, match=r"rotate only some layers \(layers.1"):
            find(model(module, other), *keys)


def test_a_module_that_no_layer_applies_is_none() -> None:
    dynamic = make({"rope_type": "dynamic", "factor": 2.0})
    assert find(model(make({}), dynamic), unturned(), unturned(1)) is None


def test_no_rotary_at_all() -> None:
    assert find(model(None, None), unturned(), unturned(1), config=SimpleNamespace()) is None
    # Learned positions: keys differ, in length too.
    moved = unturned() + torch.randn(2, len(PLACES), 3, HEAD)
    assert find(model(None), moved, config=SimpleNamespace()) is None
    by_hand = turned(make({}), unturned())
    for config, keys in ((CONFIG, moved), (CONFIG, by_hand), (SimpleNamespace(), by_hand)):
        with pytest.raises(UnsupportedFeature, match="not beside its attention layers"):
            find(model(None), keys, config=config)


def test_rotary_held_further_up_is_found() -> None:
    root = model(None, None)
    root.rotary = make({})
    keys = turned(root.rotary, unturned())
    assert find(root, keys, keys) == rope.extract(root.rotary)


OTHERWISE = {
    "other pairs": lambda keys: turned(make({}, neox=False), keys),
    "another base": lambda keys: turned(make({"rope_theta": 10100.0}), keys),
    "half of the channels": lambda keys: turned(make({"partial_rotary_factor": 0.5}), keys),
    "other channels": lambda keys: turned(make({}), keys.flip(-1)).flip(-1),
    "a scale by position": lambda keys: (
        turned(make({}), keys) * (1 + torch.tensor(PLACES) / 8000)[:, None, None]
    ),
    "one position further": lambda keys: turned(make({}), keys).roll(-1, 1),
}


@pytest.mark.parametrize("otherwise", OTHERWISE)
def test_keys_that_are_turned_otherwise_are_refused(otherwise: str) -> None:
    keys = OTHERWISE[otherwise](unturned())
    with pytest.raises(UnsupportedFeature, match="RotaryEmbedding: keys are not turned by its"):
        find(model(make({})), keys)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        (torch.empty(0), "was given none"),
        (torch.zeros(2, 8, 3, HEAD), "they are zero"),
        (torch.full((2, 8, 3, HEAD), torch.nan), "they are not finite"),
    ],
)
def test_keys_that_show_nothing_are_refused(keys: torch.Tensor, reason: str) -> None:
    with pytest.raises(UnsupportedFeature, match=rf"cannot be looked at \(layers.0.*{reason}"):
        find(model(make({})), keys)


# --- rotary modules of transformers ----------------------------------------------------------


def of_transformers(name: str, **more: Any) -> tuple[Any, Any]:
    """The rotary module of a model of transformers, and its config; heads of 64 channels."""
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING[name](
        hidden_size=256, num_attention_heads=4, max_position_embeddings=8192, **more
    )
    source = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    (kind,) = (k for k in vars(source) if k.endswith("RotaryEmbedding"))
    return getattr(source, kind)(config), config


def applied(name: str, module: Any, keys: torch.Tensor, layer_type: str = "") -> torch.Tensor:
    """What a model of transformers makes of keys with its own code."""
    source = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    arguments = (keys, torch.tensor(PLACES)[None], *([layer_type] if layer_type else []))
    cos, sin = module(*arguments)
    part = keys[..., : cos.shape[-1]].transpose(1, 2)
    rotated = source.apply_rotary_pos_emb(part, part, cos, sin)[1].transpose(1, 2)
    return torch.cat((rotated, keys[..., cos.shape[-1] :]), -1)


PARTIAL = {"rope_parameters": ROPE | {"rope_type": "default", "partial_rotary_factor": 0.25}}


@pytest.mark.parametrize(
    ("name", "more", "channels", "interleaved"),
    [
        ("llama", {}, 64, False),
        ("llama", {"rope_parameters": ROPE | LLAMA3}, 64, False),
        ("olmo2", {"rope_parameters": ROPE | YARN}, 64, False),
        (
            "starcoder2",
            {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 2.0}},
            64,
            False,
        ),
        ("phi", PARTIAL, 16, False),
        ("cohere", {}, 64, True),
    ],
)
def test_modules_of_transformers(
    name: str, more: dict[str, Any], channels: int, interleaved: bool
) -> None:
    module, config = of_transformers(name, **more)
    root = model(None)
    root.rotary_emb = module
    for dtype in (torch.bfloat16, torch.float32):
        found = find(root, applied(name, module, unturned(dtype=dtype)), config=config)
        assert found is not None
        assert (found.rotary_dim, found.interleaved) == (channels, interleaved)
        assert found.inv_freq == tuple(module.inv_freq.double().tolist())
    with pytest.raises(UnsupportedFeature, match="keys are not turned by its angles"):
        find(root, applied(name, module, unturned()).flip(-1), config=config)


def test_a_module_of_transformers_with_angles_for_types_of_layers() -> None:
    kinds = ["sliding_attention", "full_attention"]
    parameters = {kind: ROPE | {"rope_type": "default"} for kind in kinds}
    parameters["sliding_attention"] |= {"rope_theta": 1000.0}
    module, config = of_transformers(
        "olmo3", num_hidden_layers=2, layer_types=kinds, rope_parameters=parameters
    )
    root = model(None, None)
    root.rotary_emb = module
    full = applied("olmo3", module, unturned(), "full_attention")
    seen = probe.Keys(PLACES, {names(2)[1]: full.double()})
    found = rope.of_keys(root, names(2)[1:], config, seen)
    assert found is not None
    assert found.inv_freq[1] == pytest.approx(10000.0 ** (-2 / 64))


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "depend on the sequence length"),
        (
            {
                "rope_type": "longrope",
                "short_factor": [1.0] * 32,
                "long_factor": [2.0] * 32,
                "original_max_position_embeddings": 1024,
                "factor": 8.0,
            },
            "longrope switches angles",
        ),
    ],
)
def test_other_kinds_of_transformers_are_refused(parameters: dict[str, Any], reason: str) -> None:
    module, config = of_transformers("llama", rope_parameters=ROPE | parameters)
    root = model(None)
    root.rotary_emb = module
    with pytest.raises(UnsupportedFeature, match=reason):
        find(root, turned(make({}), unturned()), config=config)


def test_a_module_of_transformers_that_answers_otherwise_is_refused() -> None:
    module, config = of_transformers("llama")
    root = model(None)
    root.rotary_emb = module
    keys = applied("llama", module, unturned())
    original = type(module).forward
    module.forward = lambda x, places: original(module, x, places + 1)
    with pytest.raises(UnsupportedFeature, match="does not follow its own frequencies"):
        find(root, keys, config=config)


def test_a_module_of_transformers_without_angles_for_a_layer_is_refused() -> None:
    module, config = SimpleNamespace(rope_type={"full_attention": "default"}), SimpleNamespace()
    config.layer_types = ["sliding_attention"]
    with pytest.raises(UnsupportedFeature, match=r"which has no angles for layers\.0"):
        rope._layer_type(module, config, "layers.0.attn")


def test_a_module_of_transformers_that_answers_one_tensor_is_refused() -> None:
    module, config = of_transformers("llama")
    answers = type(module).forward
    module.forward = lambda *arguments: answers(module, *arguments)[0]
    with pytest.raises(UnsupportedFeature, match="which answers no cosines and sines"):
        rope.extract_of_transformers(module, "", config)
