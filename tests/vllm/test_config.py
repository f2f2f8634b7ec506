"""Settings: where they come from, and what is refused with which reason."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kakeya_vllm import config, version
from kakeya_vllm.config import ConfigError, parse_layers
from safetensors.torch import save_file

NAME = "KAKEYA_BOUNDARY_SKIP_LAYERS"
HF = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 30,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "rope_theta": 10000.0,
}


def model_config() -> Any:
    return SimpleNamespace(
        model="some/model",
        hf_text_config=SimpleNamespace(**HF),
        get_total_num_hidden_layers=lambda: HF["num_hidden_layers"],
    )


def resolve(
    env: dict[str, str] | None = None, chosen: dict[str, Any] | None = None, calibrate: Any = None
) -> Any:
    base = {"KAKEYA_CACHE": "/nonexistent"}
    additional = {} if chosen is None else {config.KEY: chosen}
    return config.resolve(additional, model_config(), base | (env or {}), calibrate)


def artefact(path: Path, fingerprint: str | None) -> Path:
    metadata = {"format": config.ARTEFACT_FORMAT}
    metadata |= {} if fingerprint is None else {"model_fingerprint": fingerprint}
    save_file({"x": torch.zeros(1)}, path, metadata=metadata)
    return path


@pytest.mark.parametrize(
    ("text", "layers"),
    [("", ()), ("  ", ()), ("0", (0,)), (" 29 , 0,1 ", (0, 1, 29)), ([3, 1], (1, 3)), (None, ())],
)
def test_layer_lists(text: Any, layers: tuple[int, ...]) -> None:
    assert parse_layers(text, 30, NAME) == layers


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("0,x", "'x' is not a layer number"),
        ("0,,1", "'' is not a layer number"),
        ("1.5", "'1.5' is not a layer number"),
        ("0-3", "'0-3' is not a layer number"),
        ("-1", "-1 is negative"),
        ("1,2,1", "layer 1 is named twice"),
        ("30", "layer 30 does not exist, the model has 30 layers"),
        ([True], "True is not a layer number"),
        ({"a": 1}, "is not a list of layer numbers"),
    ],
)
def test_bad_layer_lists(text: Any, reason: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_layers(text, 30, NAME)
    assert reason in str(error.value)
    assert NAME in str(error.value)
    assert "numbers from 0 to 29" in str(error.value)


def test_defaults() -> None:
    settings = resolve()
    assert settings.recipe == "kakeya-free-4.6x"
    assert settings.calibration is None
    assert settings.boundary_skip_layers == ()
    assert settings.prefill == "raw"
    (warning,) = settings.warnings
    assert "kakeya calibrate some/model" in warning


def test_additional_config_wins_over_the_environment() -> None:
    env = {NAME: "1", "KAKEYA_PREFILL": "raw", "KAKEYA_RECIPE": "kakeya-free-4.0x"}
    assert resolve(env).boundary_skip_layers == (1,)
    assert resolve(env).recipe == "kakeya-free-4.0x"
    settings = resolve(env, {"boundary_skip_layers": [2, 3], "prefill": "sealed"})
    assert settings.boundary_skip_layers == (2, 3)
    assert settings.prefill == "sealed"
    assert settings.recipe == "kakeya-free-4.0x"
    assert resolve(env, {"boundary_skip_layers": []}).boundary_skip_layers == ()


def test_resolved_settings_mean_the_same_to_a_worker() -> None:
    settings = resolve({NAME: "0,29", "KAKEYA_PREFILL": "sealed"})
    worker = resolve({NAME: "5"}, settings.to_dict())
    assert (worker.recipe, worker.calibration) == (settings.recipe, settings.calibration)
    assert worker.boundary_skip_layers == (0, 29)
    assert worker.prefill == "sealed"
    assert worker.warnings == ()
    json.dumps(settings.to_dict())


@pytest.mark.parametrize(
    ("env", "chosen", "reason"),
    [
        ({"KAKEYA_PREFILL": "cooked"}, None, "KAKEYA_PREFILL='cooked'; valid: raw or sealed"),
        ({"KAKEYA_RECIPE": "kakeya-9.9x"}, None, "kakeya-free-4.6x-trellis"),
        ({"KAKEYA_RECIPE": "./no.json"}, None, "cannot read the recipe file './no.json'"),
        ({"KAKEYA_RECIPE": "kakeya-4.6x"}, None, "kakeya calibrate some/model"),
        ({"KAKEYA_CALIBRATION": "/no/file"}, None, "'/no/file' is not a file"),
        ({NAME: "31"}, None, "layer 31 does not exist"),
        ({}, {"recipes": "x"}, "unknown fields recipes"),
        ({}, {"recipe": 4.6}, '["recipe"] must be a string'),
        ({}, [1], "must be an object"),
        ({}, {"prefill": "hot"}, 'additional_config["kakeya"]["prefill"]=\'hot\''),
    ],
)
def test_refused_with_the_reason(env: dict[str, str], chosen: Any, reason: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve(env, chosen)
    assert reason in str(error.value)


def test_unknown_variables() -> None:
    env = {"KAKEYA_RECIPES": "x", "KAKEYA_RECIPE": "y", "KAKEYA_TEST_SMOLLM2": "z", "PATH": ""}
    assert config.unknown_variables(env) == ["KAKEYA_RECIPES"]


def test_recipe_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text('{"base": "kakeya-free-4.6x", "name": "mine"}')
    assert json.loads(resolve({"KAKEYA_RECIPE": str(path)}).recipe)["name"] == "mine"
    path.write_text('{"base": "kakeya-free-4.6x", "ratoi": 4}')
    with pytest.raises(ConfigError, match="ratoi"):
        resolve({"KAKEYA_RECIPE": str(path)})


def test_artefacts(tmp_path: Path) -> None:
    fingerprint = config.model_fingerprint(HF)
    right = artefact(tmp_path / "right.safetensors", fingerprint)
    settings = resolve({"KAKEYA_CALIBRATION": str(right)})
    assert settings.recipe == "kakeya-4.6x"
    assert settings.calibration == str(right)
    assert settings.warnings == ()

    wrong = artefact(tmp_path / "wrong.safetensors", "0" * 64)
    with pytest.raises(ConfigError, match="calibrated for another model"):
        resolve({"KAKEYA_CALIBRATION": str(wrong)})
    plain = artefact(tmp_path / "plain.safetensors", None)
    with pytest.raises(ConfigError, match="has no model_fingerprint"):
        resolve({"KAKEYA_CALIBRATION": str(plain)})
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not a safetensors file")
    with pytest.raises(ConfigError, match="not a readable safetensors file"):
        resolve({"KAKEYA_CALIBRATION": str(broken)})

    old = tmp_path / "old.safetensors"
    metadata = {"format": "kakeya-calibration-0", "model_fingerprint": fingerprint}
    save_file({"x": torch.zeros(1)}, old, metadata=metadata)
    with pytest.raises(ConfigError, match="has the format kakeya-calibration-0, this version"):
        resolve({"KAKEYA_CALIBRATION": str(old)})

    free = resolve({"KAKEYA_CALIBRATION": str(right), "KAKEYA_RECIPE": "kakeya-free-4.6x"})
    assert free.calibration is None
    assert "is not used" in free.warnings[0]


def test_artefact_at_the_default_place(tmp_path: Path) -> None:
    env = {"KAKEYA_CACHE": str(tmp_path)}
    path = config.default_calibration_path(config.model_fingerprint(HF), env)
    path.parent.mkdir(parents=True)
    artefact(path, config.model_fingerprint(HF))
    settings = resolve(env)
    assert settings.recipe == "kakeya-4.6x"
    assert settings.calibration == str(path)


def test_auto_makes_the_artefact_where_there_is_none(tmp_path: Path) -> None:
    env = {"KAKEYA_CACHE": str(tmp_path), "KAKEYA_CALIBRATION": "auto"}
    made = []

    def calibrate(path: Path, fingerprint: str) -> None:
        made.append(path)
        path.parent.mkdir(parents=True)
        artefact(path, fingerprint)

    with pytest.raises(ConfigError, match="kakeya calibrate some/model"):
        resolve(env)  # a worker, or an engine without the backend: nobody to calibrate
    with pytest.raises(ConfigError, match="KAKEYA_PREFILL"):
        resolve(env | {"KAKEYA_PREFILL": "cooked"}, calibrate=calibrate)
    with pytest.raises(ConfigError, match=r"kakeya-9\.9x"):
        resolve(env | {"KAKEYA_RECIPE": "kakeya-9.9x"}, calibrate=calibrate)
    free = resolve(env | {"KAKEYA_RECIPE": "kakeya-free-4.6x"}, calibrate=calibrate)
    assert free.calibration is None
    assert "KAKEYA_CALIBRATION=auto is not used" in free.warnings[0]
    assert made == []

    settings = resolve(env, calibrate=calibrate)
    path = config.default_calibration_path(config.model_fingerprint(HF), env)
    assert made == [path]
    assert (settings.recipe, settings.calibration) == ("kakeya-4.6x", str(path))
    assert settings.warnings == ()
    assert resolve(env, calibrate=calibrate) == resolve(env) == settings
    assert made == [path]
    # A worker is told the path, not the word.
    worker = resolve(env, settings.to_dict())
    assert (worker.recipe, worker.calibration) == (settings.recipe, settings.calibration)


def test_auto_checks_what_was_made(tmp_path: Path) -> None:
    def calibrate(path: Path, _fingerprint: str) -> None:
        path.parent.mkdir(parents=True)
        artefact(path, "0" * 64)

    chosen = {"calibration": "auto", "recipe": "kakeya-5.3x"}
    with pytest.raises(ConfigError, match="another model"):
        resolve({"KAKEYA_CACHE": str(tmp_path)}, chosen, calibrate)


def test_cache_directory() -> None:
    assert config.cache_dir({"KAKEYA_CACHE": "/a"}) == Path("/a")
    assert config.cache_dir({"XDG_CACHE_HOME": "/b"}) == Path("/b/kakeya")
    assert config.cache_dir({}) == Path.home() / ".cache" / "kakeya"


def test_fingerprint_does_not_depend_on_the_spelling() -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    old = HF | {"rope_scaling": scaling}
    new = {k: v for k, v in HF.items() if k != "rope_theta"}
    new["rope_parameters"] = scaling | {"rope_theta": 10000, "factor": 8}
    explicit = HF | {"head_dim": 16, "attention_bias": False, "partial_rotary_factor": 1.0}
    assert config.model_fingerprint(old) == config.model_fingerprint(new)
    assert config.model_fingerprint(HF) == config.model_fingerprint(explicit)
    assert config.model_fingerprint(HF) == config.model_fingerprint(SimpleNamespace(**HF))
    different = [
        {"rope_theta": 5e5},
        {"num_key_value_heads": 1},
        {"attention_bias": True},
        {"vocab_size": 101},
        {"rope_scaling": scaling},
    ]
    fingerprints = {config.model_fingerprint(HF | change) for change in different}
    assert len(fingerprints | {config.model_fingerprint(HF)}) == len(different) + 1


def test_fingerprint_is_the_same_through_transformers_and_vllm(tiny: Path) -> None:
    from transformers import AutoConfig
    from vllm.transformers_utils.config import get_config

    seen = {
        config.model_fingerprint(json.loads((tiny / "config.json").read_text())),
        config.model_fingerprint(AutoConfig.from_pretrained(tiny)),
        config.model_fingerprint(get_config(str(tiny), trust_remote_code=False)),
    }
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("number", "supported"),
    [
        ("0.32.0", True),
        ("0.32.0+cpu", True),
        ("0.33.1", True),
        ("0.31.9", False),
        ("0.34.0", False),
        ("1.0", False),
        ("dev", False),
    ],
)
def test_vllm_versions(number: str, supported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(version.OVERRIDE, raising=False)
    assert version.is_supported(number) is supported
    if supported:
        version.require(number)
        return
    with pytest.raises(version.UnsupportedVllm) as error:
        version.require(number)
    assert "0.32.x and 0.33.x" in str(error.value)
    assert number in str(error.value)
    assert "KAKEYA_ALLOW_UNTESTED_VLLM=1" in str(error.value)
    monkeypatch.setenv(version.OVERRIDE, "1")
    version.require(number)
