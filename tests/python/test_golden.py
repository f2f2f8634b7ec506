"""The golden artefact as the plugin reads it: by its own tensors, and by the loaded library."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import seal_digest
from kakeya_vllm import config, lib
from safetensors import safe_open

GOLDEN = Path(__file__).resolve().parents[2] / "crates" / "codec" / "tests" / "golden"
ARTEFACT = GOLDEN / "calibration-1.safetensors"
MODEL = {
    "num_layers": 4,
    "num_kv_heads": 2,
    "num_q_heads": 4,
    "head_dim": 128,
    "max_position": 2048,
    "rope": None,
}


def test_its_format_is_the_one_that_is_written() -> None:
    """A new format needs a golden file of its own, beside this one."""
    with safe_open(ARTEFACT, "np") as file:
        about, names = file.metadata(), set(file.keys())
    assert about["format"] == config.ARTEFACT_FORMAT == "kakeya-calibration-1"
    assert names == {"k_mean", "k_var", "q_sq", "q_mean", "v_mean", "v_var", "sink_mass"}


def test_the_loaded_library_makes_the_same_tables() -> None:
    listed = dict(
        re.findall(
            r'\("(kakeya-[\w.-]+)",\s*"([0-9a-f]{64})"\)', (GOLDEN.parent / "golden.rs").read_text()
        )
    )
    assert listed
    for recipe, fingerprint in listed.items():
        codec = lib.load().codec(recipe, MODEL, ARTEFACT.read_bytes())
        codec.require_fingerprint(fingerprint)


def test_a_later_format_is_refused_by_its_number() -> None:
    later = ARTEFACT.read_bytes().replace(b"kakeya-calibration-1", b"kakeya-calibration-2")
    with pytest.raises(lib.KakeyaError, match="KAKEYA_ERR_WRONG_VERSION") as refused:
        lib.load().codec("kakeya-4.6x", MODEL, later)
    assert "'kakeya-calibration-2', expected 'kakeya-calibration-1'" in refused.value.text


def test_the_loaded_library_seals_the_same_bytes() -> None:
    """The digests that a wheel is held to (test_wheel.py) are those of this build as well."""
    committed = Path(seal_digest.__file__).with_suffix(".json")
    assert seal_digest.digests() == json.loads(committed.read_text())
