"""Pipeline parallelism: each stage compresses its own layers, which keep their numbers."""

from __future__ import annotations

import json
from pathlib import Path

import engines
import pytest
import torch
from engines import assert_same_run, engine, run_elsewhere, tokens
from kakeya_vllm import config
from safetensors.torch import save_file

LAYERS, HEADS, DIM = 4, 2, 128
# Blocks are sealed in prefill, in chunks and while decoding.
PROMPTS = [tokens(80, 300), tokens(81, 120), tokens(82, 5)]
OPTIONS = {
    "skip_tokenizer_init": True,
    "dtype": engines.exact_dtype(),
    # On a GPU prompts are whole: where they are cut shows there.
    "max_num_batched_tokens": 2048 if engines.on_gpu() else 160,
}
SEALED = engines.INVARIANT if engines.on_gpu() else {"KAKEYA_PREFILL": "sealed"}
STAGES = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the stages may share this machine's cores
}


@pytest.fixture(scope="module")
def artefact(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A calibration in which every layer is another one: made up, which no test here minds."""
    generator = torch.Generator().manual_seed(4)
    draw = lambda: torch.randn(LAYERS, HEADS, DIM, generator=generator)  # noqa: E731
    found = {name: draw() for name in ("k_mean", "q_mean", "v_mean")}
    found |= {name: draw().exp() for name in ("k_var", "q_sq", "v_var")}
    found["sink_mass"] = torch.full((LAYERS, HEADS, 8), 0.1)
    about = json.loads((tiny / "config.json").read_text())
    metadata = {
        "format": config.ARTEFACT_FORMAT,
        "model_fingerprint": config.model_fingerprint(about),
    }
    path = tmp_path_factory.mktemp("pipeline") / "artefact.safetensors"
    save_file(found, path, metadata=metadata)
    return str(path)


def test_two_stages_give_the_pages_of_one(tiny: Path, artefact: str) -> None:
    """Calibrated, with the model's last layer a boundary layer: the second of the second stage."""
    engines.need_gpus(2)
    env = SEALED | {"KAKEYA_CALIBRATION": artefact, "KAKEYA_BOUNDARY_SKIP_LAYERS": "3"}
    with engine(tiny, env, **OPTIONS) as one:
        runs = one.run(PROMPTS, 20)
        pages = one.worker(engines.read_pages)
    assert all(len(blocks) == 3 for blocks in pages.values())
    two = run_elsewhere(
        tiny,
        PROMPTS,
        20,
        env=env | STAGES,
        pages=True,
        pipeline_parallel_size=2,
        distributed_executor_backend="mp",
        **OPTIONS,
    )
    assert [sorted(stage) for stage in two["pages"]] == [["0", "1"], ["2"]]
    for layer, blocks in (two["pages"][0] | two["pages"][1]).items():
        # Stages divide the steps otherwise, so block ids may differ.
        assert sorted(blocks) == sorted(pages[layer]), f"layer {layer}"
    for a, b in zip(runs, two["runs"], strict=True):
        # In a stock layer the last bit depends on how vLLM divides a step.
        assert_same_run(a, b, 1e-4)
        assert a.tokens == b.tokens
