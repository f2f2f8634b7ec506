"""Compression by hooks in the stock engine, on one passage of real text through SmolLM2."""

from __future__ import annotations

from pathlib import Path

import engines
import numpy as np
import pytest
from kakeya_vllm.evaluation import protocol
from kakeya_vllm.evaluation.metrics import TokenFigures
from kakeya_vllm.evaluation.protocol import REFERENCE, Cache
from kakeya_vllm.text import consecutive_passages, read_text, tokenise

RECIPE = "kakeya-free-4.6x"
TEXT = engines.ROOT / "data" / "wikitext2-test.txt"


@pytest.fixture(scope="module")
def model() -> str:
    path = engines.ROOT / ".cache" / "models" / "smollm2"
    if not path.is_dir():
        pytest.fail(f"no model at {path}: run `make setup`")
    return str(path)


@pytest.fixture(scope="module")
def passage(model: str) -> list[list[int]]:
    return consecutive_passages(tokenise(model, read_text(TEXT)[:40000]), protocol.PASSAGE, 1)


def run(
    model: str, passages: list[list[int]], directory: Path, cache: Cache, reference: str
) -> tuple[dict, TokenFigures]:
    out = str(directory / "figures.npz")
    spec = {"model": model, "passages": passages, "caches": [cache], "dtype": "float32"}
    environment = {"KAKEYA_RECIPE": RECIPE, "KAKEYA_CALIBRATION": ""}
    (about,) = protocol.in_child(spec | {"reference": reference, "figures": [out]}, environment)
    if cache.name == REFERENCE:
        return about, None
    with np.load(out) as saved:
        return about, TokenFigures(**saved)


def test_modes_against_each_other(model: str, passage: list[list[int]], tmp_path: Path) -> None:
    """The identity changes nothing at all; a simulated snapshot is what the backend does."""
    rows = str(tmp_path / "reference.npy")
    run(model, passage, tmp_path, Cache(REFERENCE, "stock", REFERENCE), rows)
    _, identity = run(
        model, passage, tmp_path, Cache("identity", "simulated", None, "identity"), rows
    )
    assert (identity.kl == 0).all()
    assert (identity.agree == 1).all()

    native_about, native = run(model, passage, tmp_path, Cache("k", "kakeya", RECIPE), rows)
    about, snapshot = run(model, passage, tmp_path, Cache("s", "simulated", RECIPE), rows)
    assert native.kl.mean() > 1e-3
    # The same pages, attention's sums in another order.
    np.testing.assert_allclose(snapshot.nll, native.nll, atol=2e-3)
    assert about["codec"]["fingerprint"] == native_about["codec"]["fingerprint"]
    for stream in "kv":
        errors = about["layer_error"][stream]
        assert len(errors) == 30
        assert all(0 < x < 0.4 for x in errors)
        # Attention below adds up in another order: a code here and there is another.
        assert errors == pytest.approx(native_about["layer_error"][stream], rel=1e-3)

    keys = Cache("k only", "simulated", RECIPE, "snapshot", "k", (3, 4))
    about, partial = run(model, passage, tmp_path, keys, rows)
    assert 0 < partial.kl.mean() < native.kl.mean()
    assert len(about["layer_error"]["k"]) == 2
