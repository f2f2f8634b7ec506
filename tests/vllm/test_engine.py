"""What must stay true while vLLM serves: tiny random model, real engine, on the CPU or a GPU.

The model's matrix products do not depend on how requests are batched: float32 on the CPU, vLLM's
batch-invariant mode on a GPU. So two ways of computing the same thing can be compared closely.
Where a test allows a tolerance, it is for sums taken in another order, not for the compression.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import engines
import pytest
import torch
from engines import BLOCK, Engine, assert_same_run, engine, tokens
from kakeya_vllm.engine import cache_figures

# Log-probabilities that should agree: on the CPU except for the order of float32 sums.
EXACT = 0.0 if engines.on_gpu() else 1e-3
OPTIONS = {"skip_tokenizer_init": True, "dtype": engines.exact_dtype()}
SEALED = {"KAKEYA_PREFILL": "sealed"}
# A GPU has no sealed prefill. What does not depend on it runs there with prompts in one piece.
only_sealed = pytest.mark.cpu_only


@pytest.fixture(scope="module", autouse=True)
def _batch_invariant() -> Iterator[None]:
    with engines.variables(engines.INVARIANT if engines.on_gpu() else {}):
        yield


@pytest.fixture(scope="module")
def raw(tiny: Path) -> Iterator[Engine]:
    """Prompts attend to their own tokens raw; chunks of 256 tokens."""
    with engine(tiny, max_num_batched_tokens=256, **OPTIONS) as made:
        yield made


@pytest.fixture(scope="module")
def sealed(tiny: Path) -> Iterator[Engine]:
    """Prompts read pages for every block before their own (not on a GPU); prompts in one piece."""
    mode = {} if engines.on_gpu() else SEALED
    with engine(tiny, mode, max_num_batched_tokens=4096, **OPTIONS) as made:
        yield made


def alone(made: Engine, prompts: list[list[int]], counts: list[int]) -> list[engines.Run]:
    """Every prompt by itself, without help from the prefix cache."""
    runs = []
    for prompt, count in zip(prompts, counts, strict=True):
        made.reset_prefix_cache()
        runs += made.run([prompt], count)
    made.reset_prefix_cache()
    return runs


def pages(made: Engine, layer: int, blocks: list[int]) -> torch.Tensor:
    """Bytes [blocks, heads, P] of a layer's pages."""

    def read(worker: Any) -> torch.Tensor:
        context = worker.vllm_config.compilation_config.static_forward_context
        (found,) = [v for k, v in context.items() if f".{layer}." in k]
        return found.kv_cache[blocks, :, 0].cpu().clone()

    return made.worker(read)


def last_request(made: Engine) -> str:
    """Id of the request that just finished: it is followed until the next step."""
    (name,) = made.open_blocks.request_ids
    return name


LENGTHS = [5, 100, 128, 129, 300, 383, 511, 37]
COUNTS = [30, 29, 3, 12, 8, 5, 20, 16]


@pytest.mark.parametrize("mode", ["raw", "sealed"])
def test_eight_interleaved_requests_equal_each_alone(
    mode: str, request: pytest.FixtureRequest
) -> None:
    made: Engine = request.getfixturevalue(mode)
    prompts = [tokens(seed, length) for seed, length in enumerate(LENGTHS)]
    single = alone(made, prompts, COUNTS)
    together = made.run(prompts, COUNTS)
    if mode == "sealed":  # with raw prefill, the step in which a chunk ends shows; see below
        for a, b in zip(single, together, strict=True):
            assert a.tokens == b.tokens
            assert_same_run(a, b, EXACT)
    else:
        for length, a, b in zip(LENGTHS, single, together, strict=True):
            if length <= 128:  # no page is read while such a prompt is computed
                assert a.tokens[: BLOCK - length % BLOCK] == b.tokens[: BLOCK - length % BLOCK]
    assert made.open_blocks.peak > 4
    assert len({t for run in single for t in run.tokens}) > 8, "the texts should not be trivial"


@only_sealed
def test_prefix_hits_across_steps_change_nothing(sealed: Engine) -> None:
    prompt = tokens(10, 600)
    (cold,) = alone(sealed, [prompt], [20])
    first, second = sealed.run([prompt], 20)[0], sealed.run([prompt], 20)[0]
    assert (cold.cached, first.cached, second.cached) == (0, 0, 512)
    for hit in (first, second):
        assert hit.tokens == cold.tokens
        assert_same_run(cold, hit, EXACT)


@only_sealed
def test_prefix_hits_within_one_step_change_nothing(sealed: Engine) -> None:
    """Three requests with one prefix in one call: later ones hit blocks of the running step."""
    shared = tokens(11, 550)
    prompts = [shared + tokens(seed, 40) for seed in (12, 13, 14)]
    cold = alone(sealed, prompts, [15] * 3)
    hits = sealed.run(prompts, 15)
    assert [run.cached for run in hits] == [0, 512, 512]
    for a, b in zip(cold, hits, strict=True):
        assert a.tokens == b.tokens
        assert_same_run(a, b, EXACT)


def test_raw_prefix_hit_equals_a_chunk_that_ends_there(raw: Engine) -> None:
    """In chunks of 256, the third chunk begins at 512, where a prefix hit begins as well."""
    prompt = tokens(15, 600)
    (cold,) = alone(raw, [prompt], [20])
    first, hit = raw.run([prompt], 20)[0], raw.run([prompt], 20)[0]
    assert (first.cached, hit.cached) == (0, 512)
    assert hit.tokens == cold.tokens
    assert_same_run(cold, hit, EXACT)


def test_raw_prefix_hits_within_one_step_equal_chunks(tiny: Path) -> None:
    """Two requests hit, up to 512, blocks that another one fills in the same step: like prompts
    whose second chunk begins there and reads the pages of an earlier step."""
    shared = tokens(11, 550)
    prompts = [shared + tokens(seed, 40) for seed in (12, 13, 14)]
    with engine(tiny, max_num_batched_tokens=4096, **OPTIONS) as made:
        hits = made.run(prompts, 15)
    assert [run.cached for run in hits] == [0, 512, 512]
    with engine(tiny, max_num_batched_tokens=512, **OPTIONS) as chunked:
        cold = alone(chunked, prompts, [15] * 3)
    for a, b in zip(cold[1:], hits[1:], strict=True):
        assert a.tokens == b.tokens
        assert_same_run(a, b, EXACT)


@only_sealed
def test_sealed_chunks_equal_one_piece(tiny: Path, sealed: Engine) -> None:
    prompts = [tokens(20, 700), tokens(21, 300)]
    whole = alone(sealed, prompts, [20, 20])
    with engine(tiny, SEALED, max_num_batched_tokens=256, **OPTIONS) as chunked:
        for a, b in zip(whole, alone(chunked, prompts, [20, 20]), strict=True):
            assert a.tokens == b.tokens
            assert_same_run(a, b, EXACT)


def test_300_tokens_stay_open_and_seal_when_full(sealed: Engine) -> None:
    """300 tokens: blocks 0 and 1 are pages, 44 tokens are raw. Block 2 becomes a page at 384."""
    sealed.reset_prefix_cache()
    prompt = tokens(30, 300)
    sealed.run([prompt], 1)
    name = last_request(sealed)
    blocks = sealed.open_blocks.blocks_of(name)
    assert len(blocks) == 3
    assert sealed.open_blocks.slots_of(name).keys() == {2}
    written = pages(sealed, 1, blocks).flatten(1).any(dim=1).tolist()
    assert written == [True, True, False]  # new blocks are zero until they are sealed

    (run,) = sealed.run([prompt], 90)  # past 384, the end of block 2
    name = last_request(sealed)
    blocks = sealed.open_blocks.blocks_of(name)
    assert sealed.open_blocks.slots_of(name).keys() == {3}
    grown = [pages(sealed, layer, blocks[:3]) for layer in range(4)]
    assert all(part.flatten(1).any(dim=1).all() for part in grown)

    # The same tokens as one prompt give the same pages in the first layer, byte for byte.
    sealed.reset_prefix_cache()
    sealed.run([prompt + run.tokens[:89]], 1)
    blocks = sealed.open_blocks.blocks_of(last_request(sealed))
    assert torch.equal(pages(sealed, 0, blocks[:3]), grown[0])


@pytest.fixture(scope="module")
def synchronous(tiny: Path) -> Iterator[Engine]:
    """No step is scheduled before the one before it has ended, so a test may look in between."""
    with engine(tiny, async_scheduling=False, **OPTIONS) as made:
        yield made


def test_a_page_holds_what_the_open_block_held(synchronous: Engine) -> None:
    """The sealed page, opened by the library, against the raw tokens that the pool still holds."""
    sealed = synchronous
    sealed.run([tokens(31, 100)], 1)
    slot = sealed.open_blocks.slots_of(last_request(sealed))[0]
    sealed.reset_prefix_cache()
    sealed.run([tokens(31, 100)], 29)  # token 127, the last of the block, is computed; no more
    name = last_request(sealed)
    assert sealed.open_blocks.slots_of(name) == {0: slot}
    (block,) = sealed.open_blocks.blocks_of(name)
    page = pages(sealed, 2, [block])[0]

    def compare(worker: Any) -> tuple[float, float]:
        runtime = worker._kakeya
        (layer,) = [v for k, v in runtime.layers.items() if ".2." in k]
        errors = []
        for head in range(page.shape[0]):
            k, v = torch.empty(BLOCK, 128), torch.empty(BLOCK, 128)
            data = page[head].contiguous()
            runtime.codec.open(
                2, head, data.data_ptr(), data.numel(), k.data_ptr(), v.data_ptr(), k.numel()
            )
            held = layer.impl.open_pool[slot, :, head].cpu().float()
            errors.append(
                [float((x - y).norm() / y.norm()) for x, y in zip((k, v), held, strict=True)]
            )
        worst = torch.tensor(errors).amax(0)
        return float(worst[0]), float(worst[1])

    k_error, v_error = sealed.worker(compare)
    assert 0 < k_error < 0.35
    assert 0 < v_error < 0.35


def test_an_aborted_request_frees_its_open_block(sealed: Engine) -> None:
    from vllm import SamplingParams

    core = sealed.llm.llm_engine
    params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
    for name, seed in (("kept", 40), ("gone", 41)):
        core.add_request(name, {"prompt_token_ids": tokens(seed, 200)}, params)
    for _ in range(3):
        core.step()
    assert sealed.open_blocks.in_use == 2
    core.abort_request(["gone"])
    core.step()
    assert sealed.open_blocks.in_use == 1
    assert (sealed.open_blocks.open_slot >= 0).sum() == 1
    core.abort_request(["kept"])
    assert_same_run(*alone(sealed, [tokens(42, 50)] * 2, [4, 4]), EXACT)
    assert sealed.open_blocks.in_use <= 1


@only_sealed
def test_forced_preemption_loses_nothing(tiny: Path, sealed: Engine) -> None:
    prompts = [tokens(seed, 240) for seed in range(50, 54)]
    expected = alone(sealed, prompts, [32] * 4)
    # 8 blocks hold the four prompts; their third blocks, from token 256 on, do not fit.
    with engine(
        tiny, SEALED, num_gpu_blocks_override=9, max_model_len=512, max_num_seqs=4, **OPTIONS
    ) as small:
        runs = small.run(prompts, 32)
        assert small.counter("vllm:num_preemptions") > 0
        for a, b in zip(expected, runs, strict=True):
            assert a.tokens == b.tokens
            assert_same_run(a, b, EXACT)


def test_capacity_grows_by_the_ratio(tiny: Path) -> None:
    """vLLM's own token count for the same bytes: bf16, compressed, and mixed."""
    options = {"skip_tokenizer_init": True, "dtype": "bfloat16"}
    full = 2 * 128 * 2 * BLOCK  # bytes of K and V of one KV head over a block in bf16
    with engine(tiny, attention_backend=None, **options) as stock:
        before = stock.capacity
    assert before == engines.KV_BYTES // (4 * 2 * full) * BLOCK

    with engine(tiny, **options) as made:
        after = made.capacity
        page = made.runtime.codec.page_bytes(0)
        lines = made.worker(banner)
    assert after == engines.KV_BYTES // (4 * 2 * page) * BLOCK
    assert after / before == pytest.approx(full / page, rel=1e-3)
    assert after / before > 4.59
    assert f"capacity          {after} tokens" in lines
    assert "4 compressed: 0-3; 0 stock bfloat16: none" in lines
    assert f"4096 in bfloat16 -> {4 * 2 * page / BLOCK:.1f}, all layers" in lines
    assert "no (calibration-free recipe)" in lines

    with engine(tiny, {"KAKEYA_BOUNDARY_SKIP_LAYERS": "0, 3"}, **options) as mixed:
        assert mixed.capacity == engines.KV_BYTES // (2 * 2 * (full + page)) * BLOCK
        figures = cache_figures(mixed.llm)
        assert figures["capacity_tokens"] == mixed.capacity
        assert figures["bytes_per_token"] == 2 * 2 * (full + page) / BLOCK
        assert "2 compressed: 1-2; 2 stock bfloat16: 0, 3" in mixed.worker(banner)


def banner(worker: Any) -> str:
    from kakeya_vllm.banner import compose

    return "\n".join(compose(worker._kakeya, worker.model_runner.kv_cache_config))
