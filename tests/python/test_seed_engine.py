"""The seed in a real engine: calibration, modes, attribution, on a tiny random model.

Rows are those of docs/seed.md. One engine serves all tests of this file.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import engines
import numpy as np
import pytest
import torch
from kakeya_vllm import cli, config, engine
from kakeya_vllm.evaluation import protocol
from kakeya_vllm.evaluation.metrics import TokenFigures
from kakeya_vllm.evaluation.protocol import Cache, Steps
from kakeya_vllm.seed import calibration
from kakeya_vllm.seed.calibration import CalibrationError
from kakeya_vllm.seed.recipe import find

ROOT = Path(__file__).resolve().parents[2]
TEXT = ROOT / "data" / "wikitext2-valid-tokenised.txt"
# A destroyed in-process engine takes down process groups that engines of later tests share.
KEPT = []


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    model = engines.make_tiny_model(tmp_path_factory.mktemp("tiny"))
    made = engine.in_process_engine(
        str(model),
        skip_tokenizer_init=True,
        dtype="float32",
        kv_cache_memory_bytes=engines.KV_BYTES,
    )
    KEPT.append(made)
    return made


@pytest.fixture(scope="module")
def artefact(llm, tmp_path_factory):
    """Of three passages, written as the command writes it, and found by the engine's caches."""
    passages = [engines.tokens(seed, 1024) for seed in (1, 2, 3)]
    tensors, about = calibration.collect(llm, passages, find("v1.3-ppl"))
    fingerprint = config.model_fingerprint(llm.llm_engine.vllm_config.model_config.hf_text_config)
    path = tmp_path_factory.mktemp("artefact") / "tiny.safetensors"
    return calibration.write(path, tensors, fingerprint, "tiny", {"split": "validation"} | about)


@pytest.fixture(scope="module")
def steps(llm):
    return engine.on_model(llm, Steps)


PASSAGE = engines.tokens(7, protocol.PASSAGE)


@pytest.fixture(scope="module")
def reference(llm, steps):
    return steps.log_probabilities(llm, PASSAGE)


@pytest.fixture
def run(llm, steps, reference, artefact, monkeypatch):
    monkeypatch.setenv(calibration.VARIABLE, str(artefact))

    def figures(name: str, mode: str = "snapshot", **more) -> tuple[TokenFigures, object]:
        cache = Cache(name, "simulated", name, mode, **more)
        hooks = engine.on_model(llm, lambda model: protocol._hooks(llm, model, cache))
        rows = protocol._log_probabilities(llm, steps, hooks, PASSAGE, observe=True)
        targets = np.array([PASSAGE[engine.CHUNK + 1 :]])
        return TokenFigures.of(reference[None], rows[None], targets), hooks

    return figures


def test_row_32_fitted_tables_are_better_on_what_was_held_out(artefact):
    metadata = config.read_metadata(artefact)
    errors = json.loads(metadata["held_out_error"])
    assert len(errors) == 12
    for name, of in errors.items():
        assert of["fitted"] < 1.002 * of["gaussian"], name
    # A random model's values are close to Gaussian, so little can be won; none may be lost.
    assert sum(e["fitted"] for e in errors.values()) < sum(e["gaussian"] for e in errors.values())


def test_row_33_moments_are_those_of_queries_before_rope(artefact, llm):
    found = calibration.load(
        artefact, config.read_metadata(artefact)["model_fingerprint"], (4, 2, 128)
    )
    sums = torch.zeros(2, 128, 128, dtype=torch.float64)

    def add(layer, q, _k, _v):
        if layer == 2:
            for head in range(2):
                rows = q[:, 2 * head : 2 * head + 2].reshape(-1, 128).double()
                sums[head] += rows.T @ rows / (2 * 1024 * 3)

    vllm_config = llm.llm_engine.vllm_config
    rows = engine.on_model(llm, lambda model: calibration.Rows(model, vllm_config))
    with rows.handed_to(add):
        for seed in (1, 2, 3):
            engine.run_prompt(llm, engines.tokens(seed, 1024))
    torch.testing.assert_close(found.sigma_q[2].double(), sums, rtol=1e-4, atol=1e-4)


def test_row_76_the_split_is_recorded_and_the_test_text_refused(artefact):
    assert config.read_metadata(artefact)["split"] == "validation"
    test = str(ROOT / "data" / "wikitext2-test.txt")
    with pytest.raises(SystemExit, match="for evaluation only"):
        cli.main(["calibrate", "MODEL", "--text", test, "--for", "v1.3-ppl"])
    with pytest.raises(SystemExit, match=r"valid are v1\.3-bare"):
        cli.main(["calibrate", "MODEL", "--text", str(TEXT), "--for", "d4-10"])


def test_an_artefact_of_something_else_is_refused(artefact, tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    metadata = config.read_metadata(artefact)
    own = metadata["model_fingerprint"]
    shape = (4, 2, 128)
    assert calibration.load(artefact, own, shape).tables["k", 3]
    with pytest.raises(config.ConfigError, match="calibrated for another model"):
        calibration.load(artefact, "0" * 64, shape)
    with pytest.raises(CalibrationError, match=r"sigma_q has shape \(4, 2, 128, 128\), expected"):
        calibration.load(artefact, own, (4, 2, 64))
    with pytest.raises(CalibrationError, match="is not a file"):
        calibration.load(tmp_path / "none", own, shape)
    tensors = load_file(str(artefact))
    changed = tmp_path / "changed.safetensors"
    save_file(tensors, str(changed), metadata | {"format": "kakeya-seed-calibration-0"})
    with pytest.raises(CalibrationError, match="this version reads kakeya-seed-calibration-1"):
        calibration.load(changed, own, shape)
    save_file(tensors | {"v_table_2": tensors["v_table_2"].flip(0)}, str(changed), metadata)
    with pytest.raises(ValueError, match="not strictly ascending"):
        calibration.load(changed, own, shape)
    monkeypatch.setenv(calibration.VARIABLE, "")
    monkeypatch.setenv("KAKEYA_CACHE", str(tmp_path))
    hf_config = {"model_type": "other"}
    with pytest.raises(CalibrationError, match=r"kakeya calibrate m --text TEXT --for v1\.3-ppl"):
        calibration.find_artefact(find("v1.3-ppl"), "m", hf_config, shape)
    shutil.copy(artefact, tmp_path / "calibration.safetensors")
    monkeypatch.setenv(calibration.VARIABLE, str(tmp_path / "calibration.safetensors"))
    with pytest.raises(config.ConfigError, match="another model"):
        calibration.find_artefact(find("v1.3-ppl"), "m", hf_config, shape)


def test_rows_40_and_42_a_codec_without_loss_changes_nothing(run, tmp_path):
    whole = tmp_path / "whole.json"
    whole.write_text('{"base": "v1.3-ppl", "boundary_depth": 2}')
    for name, mode in (("raw", "snapshot"), (str(whole), "in-forward"), ("v1.3-ppl", "identity")):
        figures, hooks = run(name, mode)
        assert (figures.kl == 0).all()
        assert (figures.nll == figures.nll_reference).all()
        assert (figures.agree == 1).all()
        if mode != "identity":
            assert hooks.stored()["ratio"] == 1


def test_row_39_in_forward_every_layer_is_coded_and_errors_add_up(run):
    snapshot, hooks = run("v1.3-sigma")
    assert hooks.fired == 8
    forward, hooks = run("v1.3-sigma", "in-forward")
    assert hooks.fired == 4
    assert sorted(hooks.coder.ranks["k"]) == [0, 1, 2, 3]
    assert 0 < snapshot.kl.mean() < forward.kl.mean()
    assert hooks.coder.describe()["calibration"]["split"] == "validation"
    assert hooks.stored()["ratio"] == pytest.approx(5, abs=0.5)


def test_row_13_and_38_streams_by_themselves(run, tmp_path):
    path = tmp_path / "v.json"
    path.write_text('{"base": "v1.3-bare", "v_outlier_threshold": 2.0}')
    keys, hooks = run("v1.3-bare", streams="k")
    assert hooks.stored()["ratio"] < 2
    values, _ = run("v1.3-bare", streams="v")
    both, _ = run("v1.3-bare")
    assert 0 < keys.kl.mean() < both.kl.mean()
    assert 0 < values.kl.mean() < both.kl.mean()
    assert run(str(path), streams="v")[0].kl.mean() < values.kl.mean()


def test_row_41_of_a_prefix_only_the_first_tokens_are_coded(run):
    short, hooks = run("v1.3-per-head", "prefix-only", coded_tokens=512, layers=(1,))
    assert hooks.fired == 1
    whole, _ = run("v1.3-per-head", "in-forward", layers=(1,))
    boundary, _ = run("v1.3-per-head", layers=(0,))
    assert boundary.kl.mean() == 0
    assert short.kl.mean() <= whole.kl.mean()


def test_row_49_layers_one_at_a_time(run):
    alone = []
    for layer in range(4):
        figures, hooks = run("v1.3-bare", layers=(layer,))
        alone.append(figures.kl.mean())
        # Only its own keys and values are coded: the other layers' stay those of a clean pass.
        assert sorted(hooks.errors.error["k"]) == [layer]
        assert not hooks.kept
        assert hooks.stored()["ratio"] < 1.3
    joint = run("v1.3-bare")[0].kl.mean()
    assert all(kl > 0 for kl in alone)
    assert max(alone) < 1.2 * joint
    assert joint == pytest.approx(sum(alone), rel=0.7)


def test_row_50_more_noise_does_more(run):
    found = [run(f"noise-{x}", "in-forward")[0].kl.mean() for x in (0.01, 0.05, 0.2)]
    assert found == sorted(found)
    assert 0 < found[0] < 0.1 * found[2]


def test_row_14_bug_b1_and_its_correction(run, tmp_path):
    path = tmp_path / "unit.json"
    path.write_text('{"base": "v1.3-bare", "k_residual_norm": "unit"}')
    wrong, hooks = run(str(path), streams="k")
    lost = hooks.errors.relative()["k"]
    right, hooks = run("v1.3-bare", streams="k")
    assert wrong.kl.mean() > right.kl.mean()
    assert all(a > 1.2 * b for a, b in zip(lost, hooks.errors.relative()["k"], strict=True))
