"""Fixtures: models, and the environment that every engine of these tests runs under.

The variables are set when the module is imported, before anything imports vLLM.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

for _name in [n for n in os.environ if n.startswith("KAKEYA_")]:
    # A developer's own settings must not leak into the tests.
    if _name != "KAKEYA_LIBRARY" and not _name.startswith("KAKEYA_TEST_"):
        del os.environ[_name]
os.environ.pop("VLLM_ATTENTION_BACKEND", None)
os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # would win over kv_cache_memory_bytes

import engines  # noqa: E402

for _name, _value in engines.ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where vLLM runs on a GPU, leave out what is about its engine on the CPU, and the reverse."""
    from vllm.platforms import current_platform

    on_gpu = current_platform.is_cuda()
    for item in items:
        if on_gpu and item.get_closest_marker("cpu_only"):
            item.add_marker(pytest.mark.skip(reason="about vLLM on the CPU"))
        if not on_gpu and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU and vLLM for it"))


@pytest.fixture(scope="session", autouse=True)
def _no_artefacts(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Look for calibration artefacts in an empty directory, not in the developer's cache."""
    os.environ["KAKEYA_CACHE"] = str(tmp_path_factory.mktemp("kakeya-cache"))


@pytest.fixture
def own_environment() -> Iterator[None]:
    """For tests that run the command in this process: it sets variables for the engines that it
    starts, which other tests' engines must not meet."""
    saved = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(saved)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M: KAKEYA_TEST_SMOLLM2, or where `make setup` puts it."""
    default = engines.ROOT / ".cache" / "models" / "smollm2"
    path = Path(os.environ.get("KAKEYA_TEST_SMOLLM2") or default)
    if not (path / "config.json").is_file():
        pytest.fail(f"no model at {path}: run `make setup` or set KAKEYA_TEST_SMOLLM2")
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2-like model: head_dim 128, QKV bias, 4 layers, 4 query and 2 KV heads."""
    return engines.make_tiny_model(tmp_path_factory.mktemp("tiny"))
