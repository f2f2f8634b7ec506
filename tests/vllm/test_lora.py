"""LoRA: adapters and their base model share one engine, its pages and its prefix cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import engines
import pytest
from adapters import make_adapter
from engines import Engine, Run, assert_same_run, engine, tokens

# One more than there are adapters. On the CPU vLLM itself gives a request without an adapter the
# adapter in the last place, if another request of the step has one (vllm-project/vllm#49656).
MAX_LORAS = 3
PROMPT = tokens(5, 300)  # two sealed blocks and an open one
OPTIONS = {
    "skip_tokenizer_init": True,
    "dtype": engines.exact_dtype(),
    "enable_lora": True,
    "max_loras": MAX_LORAS,
    "max_lora_rank": 8,
}
SEALED = {} if engines.on_gpu() else {"KAKEYA_PREFILL": "sealed"}
# Log-probabilities that should agree except for the order of sums, of float32 and of bfloat16.
EXACT = 0.25 if engines.on_gpu() else 1e-3


@pytest.fixture(scope="module")
def models(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The base model and two adapters, as generate() takes them."""
    from vllm.lora.request import LoRARequest

    root = tmp_path_factory.mktemp("lora")
    paths = [make_adapter(tiny, root / name, seed) for seed, name in enumerate("ab")]
    return [None, *(LoRARequest(path.name, i + 1, str(path)) for i, path in enumerate(paths))]


def run(made: Engine, models: list[Any]) -> list[Run]:
    """PROMPT with each of the models, in one call."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=16, logprobs=1, ignore_eos=True)
    prompts = [{"prompt_token_ids": PROMPT} for _ in models]
    outputs = made.llm.generate(prompts, params, lora_request=models, use_tqdm=False)
    return [engines.to_run(output) for output in outputs]


def prompt_logprobs(made: Engine, model: Any, prompt: list[int]) -> list[float]:
    """Log-probabilities of the prompt's tokens that are predicted from pages."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    inputs = {"prompt_token_ids": prompt}
    (output,) = made.llm.generate(inputs, params, lora_request=model, use_tqdm=False)
    pairs = zip(prompt[257:], output.prompt_logprobs[257:], strict=True)
    return [entry[token].logprob for token, entry in pairs]


def test_adapters_and_base_share_an_engine_and_no_pages(tiny: Path, models: list[Any]) -> None:
    with engine(tiny, SEALED, **OPTIONS) as made:
        alone = []
        for model in models:
            alone += run(made, [model])
            made.reset_prefix_cache()
        together = run(made, models)  # the same prompt three times: nobody hits another's blocks
        again = run(made, models[::-1])[::-1]
    assert [r.cached for r in together] == [0, 0, 0]
    assert [r.cached for r in again] == [256, 256, 256]
    assert len({tuple(r.logprobs) for r in alone}) == 3
    for one, two, three in zip(alone, together, again, strict=True):
        assert_same_run(one, two, EXACT)
        if not engines.on_gpu():  # there a prompt that hits its blocks reads what they lost
            assert_same_run(one, three, EXACT)


def test_with_every_layer_kept_the_answers_are_the_stock_ones(
    tiny: Path, models: list[Any]
) -> None:
    with engine(tiny, attention_backend=None, block_size=128, **OPTIONS) as stock:
        expected = run(stock, models)
    with engine(tiny, {"KAKEYA_BOUNDARY_SKIP_LAYERS": "0,1,2,3"}, **OPTIONS) as kept:
        runs = run(kept, models)
    for a, b in zip(expected, runs, strict=True):
        if engines.on_gpu():  # where the adapters' sums are not the same twice
            assert_same_run(a, b, EXACT)
        else:
            assert (a.tokens, a.logprobs) == (b.tokens, b.logprobs)


def test_an_adapter_loses_what_the_base_model_loses(tiny: Path, models: list[Any]) -> None:
    """Read from pages by a second chunk: the recipe's error, with an adapter as without."""
    options = OPTIONS | {"max_num_batched_tokens": 256}
    prompt = tokens(6, 512)
    values = []
    for backend in (None, "KAKEYA"):
        with engine(tiny, attention_backend=backend, block_size=128, **options) as made:
            values.append([prompt_logprobs(made, model, prompt) for model in models])
    losses = [
        sum(abs(x - y) for x, y in zip(a, b, strict=True)) / len(a)
        for a, b in zip(*values, strict=True)
    ]
    # Pages were read; and an adapter makes queries and keys somewhat larger.
    assert losses[0] > 0.05
    assert all(losses[0] / 2 < loss < losses[0] * 2 for loss in losses), losses
