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
# Log-probabilities where sums are taken in another order, in bf16 over 30 layers, without codes.
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
        counters=["vllm:num_preemptions", "vllm:spec_decode_num_accepted_tokens"],
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


def stock(model: Path, **options: Any) -> dict[str, Any]:
    """The same requests with the stock bf16 cache."""
    return run(model, json.dumps({"attention_backend": None, "block_size": 128} | options))


def apart(first: list[Run], second: list[Run]) -> float:
    """Root mean square difference of log-probabilities, over the tokens that two runs share."""
    squares = []
    for a, b in zip(first, second, strict=True):
        for s, t, x, y in zip(a.tokens, b.tokens, a.logprobs, b.logprobs, strict=True):
            if s != t:
                break
            squares.append((x - y) ** 2)
    assert len(squares) >= 3 * len(first), "hardly a token is the same"
    return (sum(squares) / len(squares)) ** 0.5


def assert_within_the_recipe(model: Path, options: dict[str, Any]) -> None:
    """With ``options`` the recipe moves answers, from the stock cache's with the same options, no
    further than it does without them.

    Where the model itself computes in another order (compiled, several tokens a step), its keys and
    values differ in their last bit, and some codes fall on the other side of a threshold: answers
    are never those without the options, but as near to what an exact cache gives.
    """
    assert_near(
        run(model, json.dumps(options))["runs"],
        run(model)["runs"],
        stock(model)["runs"],
        stock(model, **options)["runs"],
    )


def assert_near(runs: list[Run], plain: list[Run], exact: list[Run], exact_runs: list[Run]) -> None:
    """`runs` are no further from the exact cache's than `plain` are from theirs, but for the small
    sample, which grants half as much again."""
    noise, own = apart(plain, exact), apart(runs, exact_runs)
    between, exact_between = apart(runs, plain), apart(exact_runs, exact)
    print(f"the recipe moves answers by {own:.4f}, plainly by {noise:.4f}")
    print(f"the options move them by {between:.4f}, the stock cache's by {exact_between:.4f}")
    assert own < 1.6 * noise


def test_compiled_with_piecewise_graphs(smollm2: Path) -> None:
    assert_within_the_recipe(smollm2, {"compilation_config": {}})


def test_drafts_change_nothing(smollm2: Path) -> None:
    drafts = {"method": "ngram", "num_speculative_tokens": 3}
    drafts |= {"prompt_lookup_max": 4, "prompt_lookup_min": 2}
    assert_within_the_recipe(smollm2, {"speculative_config": drafts})


def test_drafts_give_exactly_the_plain_tokens(smollm2: Path) -> None:
    """Where the model itself does not depend on how many tokens come at a time. Prompts are whole:
    drafts would otherwise take their share of a step."""
    exact = json.dumps(engines.INVARIANT)
    whole = {"max_num_batched_tokens": 4096}
    drafts = {"method": "ngram", "num_speculative_tokens": 3}
    drafts |= {"prompt_lookup_max": 4, "prompt_lookup_min": 2}
    plain = run(smollm2, json.dumps(whole), exact)
    drafted = run(smollm2, json.dumps(whole | {"speculative_config": drafts}), exact)
    accepted = drafted["counters"]["vllm:spec_decode_num_accepted_tokens"]
    assert accepted > MAX_TOKENS, "hardly a draft was right"
    assert tokens(drafted["runs"]) == tokens(plain["runs"])


def test_forced_preemption_finishes_every_request(smollm2: Path) -> None:
    # All requests but the longest start in 14 blocks and want 22; the longest fits alone (13).
    small = run(smollm2, json.dumps({"num_gpu_blocks_override": 18, "max_model_len": 2048}))
    assert small["counters"]["vllm:num_preemptions"] > 0
    assert [len(one.tokens) for one in small["runs"]] == [MAX_TOKENS] * len(LENGTHS)


def test_all_boundary_layers_give_the_stock_tokens(smollm2: Path) -> None:
    every = ",".join(str(i) for i in range(30))
    kept = run(smollm2, env=json.dumps({"KAKEYA_BOUNDARY_SKIP_LAYERS": every}))
    for a, b in zip(kept["runs"], stock(smollm2)["runs"], strict=True):
        assert_same_run(a, b, CLOSE)


def test_tensor_parallel_2_is_within_the_recipe(tiny: Path) -> None:
    engines.need_gpus(2)
    prompts = [engines.tokens(70 + i, n) for i, n in enumerate([300, 45, 129, 700])]
    options = {"skip_tokenizer_init": True, "dtype": "bfloat16", "enable_prefix_caching": False}
    two_gpus = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}

    def runs(**more: Any) -> list[Run]:
        return engines.run_elsewhere(tiny, prompts, 40, **options | more)["runs"]

    stock_cache = {"attention_backend": None, "block_size": 128}
    assert_near(runs(**two_gpus), runs(), runs(**stock_cache), runs(**stock_cache, **two_gpus))
