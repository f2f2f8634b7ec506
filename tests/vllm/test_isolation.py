"""Nobody reads what another request left: tenants' cache salts, and blocks and slots that are used
again. Engines are those of test_engine.py: results may be compared bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import engines
import pytest
import torch
from engines import BLOCK, Engine, engine, to_run, tokens

OPTIONS = {
    "skip_tokenizer_init": True,
    "dtype": engines.exact_dtype(),
    # A test may look at the state between two steps.
    "async_scheduling": False,
}
MODE = {} if engines.on_gpu() else {"KAKEYA_PREFILL": "sealed"}
SMALL = {"max_model_len": 512, "num_gpu_blocks_override": 10, "max_num_seqs": 4}


@pytest.fixture(scope="module", autouse=True)
def _batch_invariant() -> Iterator[None]:
    with engines.variables(engines.INVARIANT if engines.on_gpu() else {}):
        yield


# --- tenants --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared(tiny: Path) -> Iterator[Engine]:
    """An engine that several tenants use."""
    with engine(tiny, MODE, max_num_batched_tokens=4096, **OPTIONS) as made:
        yield made


def ask(made: Engine, prompts: list[tuple[list[int], str | None]]) -> list[engines.Run]:
    """Answers to prompts with cache salts, in one call."""
    from vllm import SamplingParams

    inputs = [
        {"prompt_token_ids": p} | ({} if salt is None else {"cache_salt": salt})
        for p, salt in prompts
    ]
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=1, ignore_eos=True)
    return [to_run(output) for output in made.llm.generate(inputs, params, use_tqdm=False)]


def test_a_tenants_blocks_are_hit_by_that_tenant_only(shared: Engine) -> None:
    shared.reset_prefix_cache()
    prompt = tokens(200, 600)
    hits, cold = {}, []
    for salt in ("first", "second", None, "first ", "", "first", "second", None):
        (run,) = ask(shared, [(prompt, salt or None)])
        hits.setdefault(salt or None, []).append(run.cached)
        cold += [run] * (run.cached == 0)
    # The empty salt is none, so it hits what was asked without one.
    assert hits == {"first": [0, 512], "second": [0, 512], None: [0, 512, 512], "first ": [0]}
    for run in cold[1:]:
        assert (run.tokens, run.logprobs) == (cold[0].tokens, cold[0].logprobs)


def test_tenants_in_one_step_share_no_block(shared: Engine) -> None:
    """Sealed in the step in which another request with the same prompt and salt hits it."""
    from vllm import SamplingParams

    shared.reset_prefix_cache()
    prompt = tokens(201, 600)
    runs = ask(shared, [(prompt, "a"), (prompt, "b"), (prompt, "a"), (prompt, None)])
    assert [run.cached for run in runs] == [0, 0, 512, 0]

    shared.reset_prefix_cache()
    core = shared.llm.llm_engine
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    for name in ("a", "b", "again"):
        salt = {"a": "a", "b": "b", "again": "a"}[name]
        core.add_request(name, {"prompt_token_ids": prompt, "cache_salt": salt}, params)
    core.step()
    followed = shared.open_blocks
    held = {name.split("-")[0]: followed.blocks_of(name) for name in followed.request_ids}
    assert not set(held["a"]) & set(held["b"])
    assert held["a"][:4] == held["again"][:4]
    assert held["a"][4] != held["again"][4]  # the open block is nobody else's
    core.abort_request(["a", "b", "again"])
    core.step()
    assert followed.in_use == 0


# --- what was freed -------------------------------------------------------------------------


def drive(
    made: Engine, requests: list[tuple[int, list[int], int, int | None]], before: Callable[[], None]
) -> list[tuple[list[int], list[float]]]:
    """Tokens and log-probabilities of requests (arrives at step, prompt, tokens, aborted after so
    many steps); ``before`` is called before each step."""
    from vllm import SamplingParams

    core = made.llm.llm_engine
    answers: dict[str, tuple[list[int], list[float]]] = {}
    step = 0
    while step < 5 or core.has_unfinished_requests():
        for i, (arrives, prompt, count, aborted_after) in enumerate(requests):
            if arrives == step:
                params = SamplingParams(
                    temperature=0, max_tokens=count, logprobs=1, ignore_eos=True, detokenize=False
                )
                core.add_request(f"r{i}", {"prompt_token_ids": prompt}, params)
            if aborted_after is not None and step == arrives + aborted_after:
                core.abort_request([f"r{i}"])
        before()
        for output in core.step():
            run = to_run(output)
            answers[output.request_id] = (run.tokens, run.logprobs)
        step += 1
    for _ in range(2):  # tells the worker who has finished
        core.step()
    return [answers.get(f"r{i}", ([], [])) for i in range(len(requests))]


def poison(worker: Any) -> tuple[int, int]:
    """NaN wherever the next step may read nothing: all pages but the sealed ones of live requests,
    all rows of the pool but those written for them. Gives how many blocks and slots that were."""
    runtime = worker._kakeya
    followed = runtime.open_blocks
    sealed, rows = {0}, {}  # block 0 is vLLM's null block
    for name in followed.request_ids:
        computed = followed._requests[name].computed
        sealed |= set(followed.blocks_of(name)[: computed // BLOCK])
        for index, slot in followed.slots_of(name).items():
            rows[slot] = max(0, min(BLOCK, computed - BLOCK * index))
    blocks = [b for b in range(len(followed.open_slot)) if b not in sealed]
    for layer in runtime.layers.values():
        layer.kv_cache[blocks] = 0xFF
        pool = layer.impl.open_pool[: followed.num_open]
        kept = {slot: pool[slot, :, :, :count].clone() for slot, count in rows.items()}
        pool.fill_(float("nan"))
        for slot, count in rows.items():
            pool[slot, :, :, :count] = kept[slot]
    return len(blocks), followed.num_open - len(rows)


def test_what_was_freed_is_never_read(tiny: Path) -> None:
    """Before every step, everything that no live request has written is overwritten with NaN. The
    cache is small: blocks change hands, requests are preempted and aborted, prompts come in
    chunks. Every answer is bit for bit what it is without the poison."""
    requests = [
        (0, tokens(210, 300), 40, None),
        (0, tokens(211, 128), 60, None),
        (1, tokens(212, 255), 70, None),
        (3, tokens(213, 400), 30, 12),
        (5, tokens(214, 5), 60, None),
        (30, tokens(215, 384), 20, None),
        (60, tokens(216, 127), 30, None),
        (61, tokens(217, 350), 30, 3),
        (62, tokens(218, 257), 30, None),
    ]
    with engine(
        tiny, MODE, enable_prefix_caching=False, max_num_batched_tokens=160, **SMALL, **OPTIONS
    ) as made:
        clean = drive(made, requests, lambda: None)
        before = made.counter("vllm:num_preemptions")
        assert before > 0
        assert made.open_blocks.in_use == 0
        poisoned: list[tuple[int, int]] = []
        again = drive(made, requests, lambda: poisoned.append(made.worker(poison)))
        assert made.counter("vllm:num_preemptions") == 2 * before
        assert made.open_blocks.in_use == 0
    assert min(poisoned)[0] > 0
    assert len(poisoned) > 50
    assert [len(run[0]) for run in again].count(0) <= 2
    for i, (a, b) in enumerate(zip(clean, again, strict=True)):
        assert a == b, f"request {i}"


def pages_of(made: Engine, blocks: list[int]) -> set[bytes]:
    """The pages of blocks, every layer and head."""

    def read(worker: Any) -> set[bytes]:
        found = set()
        for layer in worker._kakeya.layers.values():
            cache = layer.kv_cache[blocks][:, :, 0].cpu()
            found |= {bytes(page.numpy()) for page in cache.flatten(0, 1)}
        return found

    return made.worker(read)


def test_a_secret_leaves_no_trace_in_other_answers(tiny: Path) -> None:
    """A prompt is computed and finished, another one aborted in the middle. Then others use every
    one of their blocks and slots again: their answers are those of an engine that never saw the
    secret, bit for bit, and of its pages none is left."""
    secret, second = tokens(666, 400), tokens(667, 380)
    others = [tokens(220 + i, n) for i, n in enumerate([300, 400, 129, 383, 384, 5, 450])]
    counts = [40, 60, 20, 4, 4, 150, 40]

    def answers(made: Engine) -> tuple[list[Any], set[int]]:
        used, runs = set(), []

        def look() -> None:
            for name in made.open_blocks.request_ids:
                used.update(made.open_blocks.blocks_of(name))

        for prompt, count in zip(others, counts, strict=True):
            runs += drive(made, [(0, prompt, count, None)], look)
        return runs, used

    with engine(tiny, MODE, max_num_batched_tokens=4096, **SMALL, **OPTIONS) as fresh:
        expected, _ = answers(fresh)
    with engine(tiny, MODE, max_num_batched_tokens=4096, **SMALL, **OPTIONS) as made:
        held: set[int] = set()

        def look() -> None:
            for name in made.open_blocks.request_ids:
                held.update(made.open_blocks.blocks_of(name))

        drive(made, [(0, secret, 30, None), (0, second, 30, 6)], look)
        assert len(held) >= 7
        traces = {page for page in pages_of(made, sorted(held)) if any(page)}
        assert len(traces) >= 6 * 4 * 2  # full blocks, layers, KV heads
        found, used = answers(made)
        assert held <= used, "every block of the secret was given to others"
        blocks = range(1, len(made.open_blocks.open_slot))
        assert not traces & pages_of(made, list(blocks))
    assert found == expected


def test_rows_behind_the_last_token_are_not_read(shared: Engine) -> None:
    """A slot of the pool as another request left it gives the answers of one full of zeros."""
    prompt = tokens(230, 70)
    answers = []
    for value in (0.0, float("nan"), 1e30):
        shared.reset_prefix_cache()

        def fill(worker: Any, value: float = value) -> None:
            for layer in worker._kakeya.layers.values():
                layer.impl.open_pool[: worker._kakeya.open_blocks.num_open] = value

        shared.worker(fill)
        answers += shared.run([prompt], 20)
    assert not any(torch.isnan(torch.tensor(run.logprobs)).any() for run in answers)
    assert answers[0] == answers[1] == answers[2]
