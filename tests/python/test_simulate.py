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
    model: str, passages: list[list[int]], directory: Path, caches: list[Cache], reference: str
) -> list[tuple[dict, TokenFigures | None]]:
    """What one engine says of its caches, and their figures (None of the reference)."""
    files = [str(directory / f"figures-{i}.npz") for i in range(len(caches))]
    spec = {"model": model, "passages": passages, "caches": caches, "dtype": "float32"}
    environment = {"KAKEYA_RECIPE": RECIPE, "KAKEYA_CALIBRATION": ""}
    answers = protocol.in_child(spec | {"reference": reference, "figures": files}, environment)
    found = []
    for about, file, cache in zip(answers, files, caches, strict=True):
        if cache.name == REFERENCE:
            found.append((about, None))
            continue
        with np.load(file) as saved:
            found.append((about, TokenFigures(**saved)))
    return found


def test_modes_against_each_other(model: str, passage: list[list[int]], tmp_path: Path) -> None:
    """The identity changes nothing at all; a simulated snapshot is what the backend does. The
    reference and all simulated caches run in one engine."""
    rows = str(tmp_path / "reference.npy")
    simulated = [
        Cache(REFERENCE, "stock", REFERENCE),
        Cache("identity", "simulated", None, "identity"),
        Cache("s", "simulated", RECIPE),
        Cache("k only", "simulated", RECIPE, "snapshot", "k", (3, 4)),
        Cache("seed", "simulated", "v1.3-bare"),
        Cache("again", "simulated", None, "identity"),
    ]
    answers = run(model, passage, tmp_path, simulated, rows)
    for _, identity in (answers[1], answers[5]):
        assert (identity.kl == 0).all()
        assert (identity.agree == 1).all()

    (about, snapshot), (partial_about, partial), (seed_about, seed) = answers[2:5]
    backend = [Cache("k", "kakeya", RECIPE)]
    ((native_about, native),) = run(model, passage, tmp_path, backend, rows)
    assert native.kl.mean() > 1e-3
    # The same pages, attention's sums in another order.
    np.testing.assert_allclose(snapshot.nll, native.nll, atol=2e-3)
    assert about["codec"]["fingerprint"] == native_about["codec"]["fingerprint"]
    # The prefix is whole blocks, so what is stored of it is what the backend allocates a token.
    assert about["stored"]["ratio"] == pytest.approx(4.6, abs=0.01)
    assert native_about["stored"] is None
    for stream in "kv":
        errors = about["layer_error"][stream]
        assert len(errors) == 30
        assert all(0 < x < 0.4 for x in errors)
        # Attention below adds up in another order: a code here and there is another.
        assert errors == pytest.approx(native_about["layer_error"][stream], rel=1e-3)

    assert 0 < partial.kl.mean() < native.kl.mean()
    assert len(partial_about["layer_error"]["k"]) == 2
    assert partial_about["stored"] is None  # a page has both streams
    assert seed.kl.mean() > native.kl.mean()
    assert 5 < seed_about["stored"]["ratio"] < 7
    assert seed_about["codec"]["recipe"]["name"] == "v1.3-bare"
