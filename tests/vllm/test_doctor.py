"""`kakeya doctor` and `kakeya inspect`: what they say and with which exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import engines
import pytest
import torch
from kakeya_vllm import cli, doctor, inspection, lib

GOLDEN = engines.ROOT / "crates" / "codec" / "tests" / "golden" / "calibration-1.safetensors"


pytestmark = pytest.mark.usefixtures("own_environment")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model with a tokenizer."""
    return engines.add_byte_tokenizer(engines.make_tiny_model(tmp_path_factory.mktemp("doctor")))


def run(*argv: str, **env: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: it builds engine configurations."""
    with engines.variables({"VLLM_LOGGING_LEVEL": "ERROR", **env}):
        return subprocess.run(
            [sys.executable, "-m", "kakeya_vllm.cli", *argv],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )


def test_a_machine_and_a_model(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "doctor.json"
    done = run("doctor", str(model), "--max-num-seqs", "8", "--json", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    figures = found["figures"]
    # 4 layers, 2 KV heads of 128 channels, in the model's own type.
    raw = 4 * 2 * 2 * 128 * (2 if figures["dtype"] == "bfloat16" else 4)
    assert figures["bytes_per_token"]["bf16"] == raw
    assert figures["page_bytes"] == lib.load().recipe_page_bytes(figures["recipe"], 128)
    assert figures["bytes_per_token"]["kakeya"] == 4 * 2 * figures["page_bytes"] / 128
    assert (figures["layers"], figures["kv_heads"], figures["query_heads"]) == (4, 2, 4)
    assert figures["open_blocks"]["slots"] == 8 + 16
    assert found["problems"] == 0
    assert "KAKEYA would run: vllm serve" in done.stdout
    assert "kakeya-free-4.6x" in done.stdout, "without an artefact"
    assert "! note" in done.stdout
    assert "no calibration artefact for this model" in done.stdout


def test_a_refusal_is_named_with_the_way_round(model: Path) -> None:
    done = run("doctor", str(model), "--tensor-parallel-size", "4", KAKEYA_RECIPEE="x")
    assert done.returncode == 1
    if engines.on_gpu() and torch.cuda.device_count() < 4:
        # vLLM refuses first, in its own words.
        assert "World size (4) is larger than the number of available GPUs" in done.stdout
    else:
        assert "4 tensor-parallel ranks for 2 KV heads" in done.stdout
        assert "-> use fewer ranks" in done.stdout
    assert "KAKEYA_RECIPEE" in done.stdout
    assert "is not read" in done.stdout
    done = run("doctor", str(model), KAKEYA_RECIPE="kakeya-4.6x")
    assert done.returncode == 1
    assert "needs a calibration artefact" in done.stdout
    assert "-> run `kakeya calibrate MODEL`" in done.stdout
    done = run("doctor", str(model / "nowhere"))
    assert done.returncode == 1
    assert "refused" in done.stdout


def test_capacity_counts_every_byte(model: Path, tmp_path: Path) -> None:
    if engines.on_gpu():
        pytest.skip("the CPU's setting")
    out = tmp_path / "doctor.json"
    options = "--max-num-seqs", "4", "--json", str(out)
    done = run("doctor", str(model), *options, VLLM_CPU_KVCACHE_SPACE="1")
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(out.read_text())["figures"]
    assert figures["cache_bytes"] == 2**30
    sizes, capacity = figures["bytes_per_token"], figures["capacity_tokens"]
    for name in ("bf16", "fp8", "kakeya"):
        assert capacity[name] * sizes[name] <= 2**30 < (capacity[name] + 128) * sizes[name]


def test_auto_does_not_calibrate(model: Path, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    done = run("doctor", str(model), KAKEYA_CALIBRATION="auto", KAKEYA_CACHE=cache)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "made at the first start" in done.stdout
    assert "kakeya-4.6x, " in done.stdout
    assert "no calibration artefact" not in done.stdout
    named = {"KAKEYA_RECIPE": "kakeya-5.3x", "KAKEYA_CALIBRATION": "auto", "KAKEYA_CACHE": cache}
    done = run("doctor", str(model), **named)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kakeya-5.3x, " in done.stdout
    done = run("doctor", str(model), **(named | {"KAKEYA_RECIPE": "kakeya-99x"}))
    assert done.returncode == 1
    assert "no recipe is named 'kakeya-99x'" in done.stdout
    assert not list(tmp_path.rglob("*.safetensors"))


def test_every_known_refusal_has_a_way() -> None:
    assert doctor.advice_for("block size 64 (valid: 128, the codec's block)")
    assert doctor.advice_for("KV connectors (kv_transfer_config)")
    assert not doctor.advice_for("something else")


@pytest.mark.parametrize("name", ["kakeya-4.6x", "kakeya-free-6.4x-trellis", "kakeya-2.7x"])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_a_page_is_drawn_whole(name: str, head_dim: int) -> None:
    found = inspection.inspect(name, head_dim=head_dim)
    size = lib.load().recipe_page_bytes(name, head_dim)
    at = 0
    for field in found["page"]:
        assert field["offset"] == at, "fields lie one behind the other"
        at += field["bytes"]
    assert at == size
    (row,) = [row for row in found["sizes"] if row["head_dim"] == head_dim]
    assert row["page_bytes"] == size
    assert inspection.report(found).count("#") > 40


def test_an_artefact_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {name: tmp_path / f"out.{name}" for name in ("json", "html")}
    argv = [f"--{name}={path}" for name, path in files.items()]
    assert cli.main(["inspect", str(GOLDEN), "--recipe", "kakeya-5.3x", *argv]) == 0
    printed = capsys.readouterr().out
    found: dict[str, Any] = json.loads(files["json"].read_text())
    assert found["shape"] == {"layers": 4, "kv_heads": 2, "head_dim": 128}
    assert found["recipe"]["name"] == "kakeya-5.3x"
    assert len(found["bits"]) == 4
    # K and V of a head share the layer's bits.
    layout = 5.3 * (sum(found["bits"][0]["k"]) + sum(found["bits"][0]["v"])) / 4
    assert 12 < layout < 16.5
    assert "golden-model" in printed
    page = files["html"].read_text()
    assert page.count("<rect") == 4 * 2 * 2
    assert "http" not in page


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["kakeya-99x"], "no recipe is named 'kakeya-99x'"),
        (["kakeya-4.6x", "--recipe", "kakeya-5.3x"], "is a recipe itself"),
        (["no/such.safetensors"], "not a readable safetensors file"),
        (["kakeya-4.6x", "--html", "x.html"], "which an artefact decides"),
        ([str(GOLDEN), "--recipe", "kakeya-99x"], "no recipe is named"),
    ],
)
def test_what_cannot_be_inspected_is_named(argv: list[str], words: str) -> None:
    with pytest.raises(SystemExit, match=words):
        cli.main(["inspect", *argv])
