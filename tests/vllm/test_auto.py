"""KAKEYA_CALIBRATION=auto: real engines that calibrate when they start, and processes that meet."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engines
import pytest
from engines import run_elsewhere, tokens
from kakeya_vllm import auto, config
from kakeya_vllm.config import ConfigError

PROMPTS = [tokens(1, 300)]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = engines.make_tiny_model(tmp_path_factory.mktemp("auto"))
    return engines.add_byte_tokenizer(path)


def test_engines_calibrate_once(served: Path, tmp_path: Path) -> None:
    """In a child, before workers are spawned (two of them, where no GPU has to be shared); the next
    engine takes what is there."""
    env = {
        "KAKEYA_CACHE": str(tmp_path),
        "KAKEYA_CALIBRATION": "auto",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    ranks = 1 if engines.on_gpu() else 2
    run_elsewhere(served, PROMPTS, 4, env=env, tensor_parallel_size=ranks)
    (artefact,) = (tmp_path / "calibration").glob("*.safetensors")
    assert len(list(artefact.parent.iterdir())) == 2  # it and the lock
    written = artefact.stat().st_mtime_ns
    again = run_elsewhere(served, PROMPTS, 4, env=env, pages=True)
    assert artefact.stat().st_mtime_ns == written
    assert again["pages"][0]["0"]


def test_a_calibration_that_fails_stops_the_start(served: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"  # a model without a tokenizer
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        os.link(served / name, bare / name)
    env = {"KAKEYA_CACHE": str(tmp_path / "cache"), "KAKEYA_CALIBRATION": "auto"}
    with pytest.raises(RuntimeError) as error:
        run_elsewhere(bare, PROMPTS, 4, env=env, skip_tokenizer_init=True)
    assert "KAKEYA_CALIBRATION=auto: the calibration of" in str(error.value)
    assert "calibration-free recipe" in str(error.value)
    assert not list((tmp_path / "cache").glob("calibration/*.safetensors"))


def _make(path: Path, log: Path) -> None:
    with auto.locked(path, lambda: None):
        if not path.is_file():
            with log.open("a") as file:
                file.write("made\n")
            time.sleep(0.5)
            path.write_text("x")


def test_processes_that_start_together_make_one(tmp_path: Path) -> None:
    path, log = tmp_path / "deep" / "a.safetensors", tmp_path / "log"
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_make, args=(path, log)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert log.read_text() == "made\n"


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigError, match="nothing can be kept at"),
        auto.locked(tmp_path / "file" / "a.safetensors", lambda: None),
    ):
        pass


def vllm_config(**model: Any) -> Any:
    fields = {
        "model": "M",
        "tokenizer": "M",
        "revision": None,
        "code_revision": None,
        "tokenizer_revision": "abc",
        "trust_remote_code": False,
        "dtype": "torch.bfloat16",
        "quantization": None,
        "hf_overrides": {"rope_theta": 5},
    }
    return SimpleNamespace(
        model_config=SimpleNamespace(**fields | model),
        load_config=SimpleNamespace(load_format="auto", download_dir=None),
        cache_config=SimpleNamespace(gpu_memory_utilization=0.5, kv_cache_memory_bytes=None),
    )


def test_the_child_is_told_what_decides_the_weights() -> None:
    request = auto.request_of(vllm_config(), Path("/a"), "f" * 64)
    assert request["expected_fingerprint"] == "f" * 64
    assert request["settings"] == {
        "tokenizer_revision": "abc",
        "trust_remote_code": False,
        "dtype": "bfloat16",
        "hf_overrides": {"rope_theta": 5},
        "load_format": "auto",
        "gpu_memory_utilization": 0.5,
    }
    with pytest.raises(ConfigError, match="hf_overrides that are a function"):
        auto.request_of(vllm_config(hf_overrides=lambda c: c), Path("/a"), "f")


def test_the_child_does_not_inherit_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def run(command: list[str], env: dict[str, str], **_: Any) -> Any:
        seen.update(env)
        return SimpleNamespace(returncode=3)

    monkeypatch.setattr(auto.subprocess, "run", run)
    for name in auto._NOT_INHERITED:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("KAKEYA_CACHE", "/c")
    assert auto.run_in_child({}) == 3
    assert not set(auto._NOT_INHERITED) & set(seen)
    assert seen["KAKEYA_CACHE"] == "/c"
    assert set(auto._NOT_INHERITED) > {n for n in config.VARIABLES if n.endswith("CALIBRATION")}
