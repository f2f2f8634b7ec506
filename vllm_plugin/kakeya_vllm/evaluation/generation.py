"""Mode ``generate``: long greedy answers of the real backend against those of the stock cache.

Each prompt is the beginning of a passage of the text. Greedy decoding is a chain: once one token
differs the texts are different texts, so what is asked is how long they stay the same. The stock
cache itself, with another attention kernel or another batch, diverges as well; a recipe is judged
by ``delta ppl`` and top-1 agreement, not by this.
"""

from __future__ import annotations

import sys
import time
from itertools import zip_longest
from typing import Any

import numpy as np

from kakeya_vllm.evaluation.metrics import interval
from kakeya_vllm.evaluation.protocol import (
    REFERENCE,
    Cache,
    answer_request,
    engine_of,
    in_child,
)

PROMPT_TOKENS = 512


def first_difference(reference: list[int], ids: list[int]) -> int:
    """Index of the first token that differs; the shorter length where none does."""
    for i, (a, b) in enumerate(zip(reference, ids, strict=False)):
        if a != b:
            return i
    return min(len(reference), len(ids))


def compare(reference: list[list[int]], ids: list[list[int]]) -> dict[str, Any]:
    """Of answers to the same prompts, token ids each: where they part, and how many tokens stand at
    the same place in both, before and after.

    ``agreement_by_position``: of the answers that reach a place in either cache, the share with the
    same token there. ``agreement_after``: the share of equal tokens behind the first different one;
    None where no answer goes on behind one.
    """
    if len(reference) != len(ids) or not reference:
        raise ValueError(f"{len(ids)} answers for {len(reference)} of the reference")
    pairs = list(zip(reference, ids, strict=True))
    parted = np.array([first_difference(a, b) for a, b in pairs])
    whole = np.array([p == len(a) == len(b) for p, (a, b) in zip(parted, pairs, strict=True)])
    agreement = np.array(
        [sum(x == y for x, y in zip(a, b, strict=False)) / max(len(a), len(b), 1) for a, b in pairs]
    )
    same = [[x == y for x, y in zip_longest(a, b)] for a, b in pairs]
    places = range(max(map(len, same)))
    by_position = [float(np.mean([row[i] for row in same if i < len(row)])) for i in places]
    after = [equal for row, p in zip(same, parted, strict=True) for equal in row[p + 1 :]]
    return {
        "prompts": len(pairs),
        "tokens": int(sum(len(a) for a, _ in pairs)),
        "first_difference": parted.tolist(),
        "first_difference_median": float(np.median(parted)),
        "never_different": float(whole.mean()),
        "agreement": float(agreement.mean()),
        "agreement_95": interval(agreement, np.mean),
        "agreement_by_position": by_position,
        "agreement_after": float(np.mean(after)) if after else None,
    }


def run(
    model: str,
    prompts: list[list[int]],
    max_tokens: int,
    cache: Cache,
    dtype: str,
    stop: list[str] | None = None,
) -> dict[str, Any]:
    """Greedy answers of one cache: {"ids", "seconds"} of ``max_tokens`` each, or with ``stop``
    {"texts", "seconds"} up to one of these strings or the end of text."""
    from vllm import SamplingParams

    llm = engine_of(
        model,
        cache,
        dtype=dtype,
        max_num_seqs=min(len(prompts), 16),
        max_model_len=max(map(len, prompts)) + max_tokens,
    )
    if stop is not None:
        from kakeya_vllm.evaluation.tasks import run_task

        started = time.monotonic()
        texts = run_task(llm, prompts, max_tokens, stop)
        return {"texts": texts, "seconds": time.monotonic() - started}
    parameters = SamplingParams(
        temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False
    )
    started = time.monotonic()
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = llm.generate(inputs, parameters, use_tqdm=True)
    return {
        "ids": [list(output.outputs[0].token_ids) for output in outputs],
        "seconds": time.monotonic() - started,
    }


def evaluate(
    model: str,
    passages: list[list[int]],
    planned: list[tuple[Cache, dict[str, str]]],
    max_tokens: int,
    dtype: str,
) -> list[dict[str, Any]]:
    """For each cache, under its engine's variables: its comparison with the stock cache."""
    prompts = [passage[:PROMPT_TOKENS] for passage in passages]
    spec = {"model": model, "prompts": prompts, "max_tokens": max_tokens, "dtype": dtype}
    reference = in_child(spec | {"cache": Cache(REFERENCE, "stock", REFERENCE)}, {}, __name__)
    runs = []
    for cache, environment in planned:
        answers = in_child(spec | {"cache": cache}, environment, __name__)
        found = compare(reference["ids"], answers["ids"])
        runs.append({"label": cache.label, "seconds": answers["seconds"], **found})
    return runs


def report(runs: list[dict[str, Any]], max_tokens: int) -> str:
    """A table for people."""
    lines = [
        f"greedy answers of {max_tokens} tokens to prompts of {PROMPT_TOKENS} tokens",
        "",
        f"{'cache':<32}{'prompts':>8}{'first difference':>18}{'never':>8}  agreement",
    ]
    for r in runs:
        low, high = r["agreement_95"]
        lines.append(
            f"{r['label']:<32}{r['prompts']:>8}{r['first_difference_median']:>18.0f}"
            f"{r['never_different']:>8.0%}  {r['agreement']:.1%} [{low:.1%}, {high:.1%}]"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(answer_request(sys.argv[1:], run))
