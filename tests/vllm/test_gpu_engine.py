"""Engines on a GPU: graphs, both model runners, speculation, preemption. SmolLM2-135M, real text.

Every engine runs in a process of its own, which gives the GPU's memory back.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import engines
import pytest
from engines import Run, assert_same_run

pytestmark = pytest.mark.gpu

FULL = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
# Log-probabilities where sums are taken in another order, in bf16 over 30 layers.
CLOSE = 0.25
LENGTHS = [5, 127, 128, 129, 300, 700, 1500, 37]
MAX_TOKENS = 150


def prompts() -> list[str]:
    """Texts of about so many tokens."""
    text = (engines.ROOT / "data" / "wikitext2-test.txt").read_text(encoding="utf-8")
    return [text[9000 * i :][: 4 * length] for i, length in enumerate(LENGTHS)]


@functools.cache
def run(model: Path, options: str = "{}", env: str = "{}") -> dict[str, Any]:
    settings = {
        "enforce_eager": False,
        "gpu_memory_utilization": 0.3,
        "max_num_batched_tokens": 512,
        "compilation_config": FULL,
    }
    settings |= json.loads(options)
    if settings["enforce_eager"]:
        del settings["compilation_config"]
    return engines.run_elsewhere(
        model,
        prompts(),
        MAX_TOKENS,
        env=json.loads(env),
        counters=["vllm:num_preemptions"],
        **settings,
    )


def tokens(runs: list[Run]) -> list[list[int]]:
    return [one.tokens for one in runs]


def test_graphs_give_the_eager_tokens(smollm2: Path) -> None:
    eager = run(smollm2, json.dumps({"enforce_eager": True}))
    assert tokens(run(smollm2)["runs"]) == tokens(eager["runs"])


def test_both_model_runners_give_the_same_tokens(smollm2: Path) -> None:
    first = run(smollm2, env=json.dumps({"VLLM_USE_V2_MODEL_RUNNER": "0"}))
    second = run(smollm2, env=json.dumps({"VLLM_USE_V2_MODEL_RUNNER": "1"}))
    assert tokens(first["runs"]) == tokens(second["runs"])


def test_compiled_with_piecewise_graphs(smollm2: Path) -> None:
    compiled = run(smollm2, json.dumps({"compilation_config": {}}))
    for a, b in zip(compiled["runs"], run(smollm2)["runs"], strict=True):
        assert_same_run(a, b, CLOSE)


def test_drafts_change_nothing(smollm2: Path) -> None:
    drafts = {"method": "ngram", "num_speculative_tokens": 3}
    drafts |= {"prompt_lookup_max": 4, "prompt_lookup_min": 2}
    drafted = run(smollm2, json.dumps({"speculative_config": drafts}))
    for a, b in zip(drafted["runs"], run(smollm2)["runs"], strict=True):
        assert_same_run(a, b, CLOSE)


def test_forced_preemption_finishes_every_request(smollm2: Path) -> None:
    small = run(smollm2, json.dumps({"num_gpu_blocks_override": 24, "max_model_len": 2048}))
    assert small["counters"]["vllm:num_preemptions"] > 0
    assert [len(one.tokens) for one in small["runs"]] == [MAX_TOKENS] * len(LENGTHS)


def test_all_boundary_layers_give_the_stock_tokens(smollm2: Path) -> None:
    every = ",".join(str(i) for i in range(30))
    kept = run(smollm2, env=json.dumps({"KAKEYA_BOUNDARY_SKIP_LAYERS": every}))
    stock = run(smollm2, json.dumps({"attention_backend": None, "block_size": 128}))
    for a, b in zip(kept["runs"], stock["runs"], strict=True):
        assert_same_run(a, b, CLOSE)
