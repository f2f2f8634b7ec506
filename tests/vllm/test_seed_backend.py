"""The seed's recipe ``v1.3-ppl`` served by vLLM on the CPU: tiny random model, real engines.

Of the model's 8 layers the recipe leaves 0, 1, 2, 4, 6 and 7 uncompressed. Float32, so that the
model's products do not depend on how requests are batched; tolerances are for sums taken in another
order, not for the compression.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import engines
import pytest
import torch
from engines import Engine, Run, assert_same_run, engine, tokens
from kakeya_vllm import config, support
from kakeya_vllm.config import ConfigError
from kakeya_vllm.engine import attention_layers, cache_figures
from kakeya_vllm.rope import find as find_rope
from kakeya_vllm.seed import calibration, scalar, slots, whitening
from kakeya_vllm.seed.coder import SeedCoder
from kakeya_vllm.seed.recipe import SeedRecipe, find
from kakeya_vllm.support import UnsupportedFeature
from test_support import configure

pytestmark = pytest.mark.cpu_only

BLOCK, LAYERS, HEADS, D = 512, 8, 2, 128
COMPRESSED = {3, 5}
PAGE = 44_840 + 29_232  # K and V slot: see tests/python/test_seed_slots.py
EXACT = 1e-3
# Where a block's keys or values differ in their last bits (another batch, a layer above another
# kernel's attention), now and then a code does, and K-means may even end elsewhere: by how much the
# result may then move, as a share of what the recipe itself moves it by. A page that is not the
# right one moves it by more than all of that.
LIKE = 0.5
OPTIONS = {"skip_tokenizer_init": True, "dtype": "float32"}


def write_artefact(path: Path, hf_config: Any, layers: int, heads: int, dim: int) -> Path:
    """A calibration of made-up queries, other ones in every head, with the Gaussian tables."""
    generator = torch.Generator().manual_seed(3)
    queries = torch.randn(layers, heads, 256, dim, generator=generator)
    queries = queries * torch.logspace(0.3, -0.7, dim)
    tensors = {"sigma_q": queries.transpose(-1, -2) @ queries / 256}
    for stream in calibration.STREAMS:
        for bits in scalar.BITS:
            tensors[f"{stream}_table_{bits}"] = torch.tensor(scalar.GAUSSIAN[bits])
    fingerprint = config.model_fingerprint(hf_config)
    return calibration.write(path, tensors, fingerprint, "tiny", {"split": "validation"})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return engines.make_tiny_model(tmp_path_factory.mktemp("tiny"), num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def env(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The variables that a user sets."""
    path = tmp_path_factory.mktemp("artefact") / "tiny.seed.safetensors"
    write_artefact(path, json.loads((model / "config.json").read_text()), LAYERS, HEADS, D)
    return {"KAKEYA_RECIPE": "v1.3-ppl", calibration.VARIABLE: str(path)}


@pytest.fixture(scope="module")
def chunked(model: Path, env: dict[str, str]) -> Iterator[Engine]:
    """Prompts in chunks of a block. No step is scheduled before the one before it has ended, so a
    test may look in between."""
    with engine(
        model, env, max_num_batched_tokens=BLOCK, async_scheduling=False, **OPTIONS
    ) as made:
        yield made


@pytest.fixture(scope="module")
def whole(model: Path, env: dict[str, str]) -> Iterator[Engine]:
    """Prompts in one piece; selected by the variable, as a user does."""
    selected = env | {"VLLM_ATTENTION_BACKEND": "KAKEYA"}
    with engine(
        model, selected, attention_backend=None, max_num_batched_tokens=4096, **OPTIONS
    ) as made:
        yield made


@pytest.fixture(scope="module")
def stock(model: Path) -> Iterator[Engine]:
    """vLLM's own attention, in the same blocks and chunks."""
    with engine(
        model,
        attention_backend=None,
        block_size=BLOCK,
        enable_prefix_caching=False,
        max_num_batched_tokens=BLOCK,
        **OPTIONS,
    ) as made:
        yield made


def alone(made: Engine, prompts: list[list[int]], counts: list[int]) -> list[Run]:
    """Every prompt by itself, without help from the prefix cache."""
    runs = []
    for prompt, count in zip(prompts, counts, strict=True):
        made.reset_prefix_cache()
        runs += made.run([prompt], count)
    made.reset_prefix_cache()
    return runs


def assert_equal(a: Run, b: Run) -> None:
    assert a.tokens == b.tokens
    assert_same_run(a, b, EXACT)


def distances(a: Run | list[float], b: Run | list[float]) -> list[float]:
    """Of log-probabilities, up to where the tokens part."""
    if isinstance(a, Run):
        same = [s == t for s, t in zip(a.tokens, b.tokens, strict=True)]
        count = [*same, False].index(False) + 1
        a, b = a.logprobs[:count], b.logprobs[:count]
    return [abs(x - y) for x, y in zip(a, b, strict=True)]


def rms(values: list[float]) -> float:
    return (sum(x * x for x in values) / len(values)) ** 0.5


def coder_of(made: Engine, env: dict[str, str]) -> SeedCoder:
    """The coder that `kakeya eval` has, of v1.3-ppl in the form that is served: written out here,
    not asked for."""
    switches = {"grouping": "per-head", "share_basis": False, "k_outlier_budget": 0.08}
    recipe = find("v1.3-ppl").changed("by hand", switches)
    hf_config = made.llm.llm_engine.vllm_config.model_config.hf_text_config
    artefact = calibration.load(
        env[calibration.VARIABLE], config.model_fingerprint(hf_config), (LAYERS, HEADS, D)
    )

    def rope(worker: Any) -> Any:
        module = worker.get_model()
        names = [name for name, _ in attention_layers(module)]
        return find_rope(module, names, worker.vllm_config)

    return SeedCoder(recipe, (LAYERS, HEADS, D), made.worker(rope), torch.device("cpu"), artefact)


class Replacing:
    """Hooks on the stock engine: after a step of a layer whose tokens fill a block, that block's K
    and V in vLLM's cache become what slots give back. One request at a time, in chunks of a
    block."""

    def __init__(self, made: Engine, coder: SeedCoder, chosen: set[int]) -> None:
        self.layers = made.worker(lambda worker: attention_layers(worker.get_model()))
        self.coder, self.chosen = coder, chosen
        self.rows: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self.replaced = 0

    def __enter__(self) -> Replacing:
        self.handles = [
            module.register_forward_hook(self.hook(index), with_kwargs=True)
            for index, (_, module) in enumerate(self.layers)
            if index in self.chosen
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def hook(self, index: int) -> Any:
        from vllm.forward_context import get_forward_context

        def after(module: Any, args: Any, kwargs: Any, _output: Any) -> None:
            metadata = get_forward_context().attn_metadata
            if metadata is None:
                return
            key, value = (x.reshape(-1, HEADS, D).clone() for x in args[1:3])
            if len(key) != BLOCK:
                return
            rows = self.rows.setdefault(index, [])
            rows.append((key, value))
            k, v = (torch.cat(parts) for parts in zip(*rows, strict=True))
            k, v = self.coder.round_trip(index, k, v, len(k) // 128)
            places = metadata[module.layer_name].slot_mapping
            module.impl.do_kv_cache_update(
                module, k[-BLOCK:].contiguous(), v[-BLOCK:].contiguous(), module.kv_cache, places
            )
            self.replaced += 1

        return after


def simulated(
    made: Engine, stock: Engine, env: dict[str, str], prompt: list[int], layers: set[int]
):
    """Log-probabilities of the prompt and of what follows: of an engine in chunks of a block, of
    the stock engine with what slots of ``layers`` give back, and of the stock engine."""
    clean = stock.prompt_logprobs(prompt), stock.run([prompt], 24)[0]
    coder = coder_of(made, env)
    with Replacing(stock, coder, layers) as hooks:
        expected = stock.prompt_logprobs(prompt)
    assert hooks.replaced == 2 * len(layers)
    with Replacing(stock, coder, layers):
        expected = expected, stock.run([prompt], 24)[0]
    made.reset_prefix_cache()
    return (made.prompt_logprobs(prompt), made.run([prompt], 24)[0]), expected, clean


PROMPT = tokens(1, 2 * BLOCK + 76)


def test_one_layer_equals_what_slots_give_back(
    model: Path, stock: Engine, env: dict[str, str]
) -> None:
    """Its keys and values are bit for bit those of the stock engine, hence so are its codes."""
    one = env | {"KAKEYA_BOUNDARY_SKIP_LAYERS": "5"}
    with engine(model, one, max_num_batched_tokens=BLOCK, **OPTIONS) as made:
        assert made.runtime.settings.boundary_skip_layers == (0, 1, 2, 4, 5, 6, 7)
        run, expected, clean = simulated(made, stock, env, PROMPT, {3})
    assert max(distances(run[0], expected[0])) <= EXACT
    assert_equal(run[1], expected[1])
    assert max(distances(clean[0], expected[0])) > 20 * EXACT, "the recipe should be seen"


def test_all_layers_are_like_what_slots_give_back(
    chunked: Engine, stock: Engine, env: dict[str, str]
) -> None:
    run, expected, clean = simulated(chunked, stock, env, PROMPT, COMPRESSED)
    # Nothing is read from a page before the second block.
    assert max(distances(run[0], expected[0])[: BLOCK - 1]) <= EXACT
    for i in (0, 1):
        moved = rms(distances(clean[i], expected[i]))
        assert rms(distances(run[i], expected[i])) < LIKE * moved


def pages(made: Engine, layer: int, blocks: list[int]) -> torch.Tensor:
    """Bytes [blocks, heads, P] of a layer's pages."""

    def read(worker: Any) -> torch.Tensor:
        context = worker.vllm_config.compilation_config.static_forward_context
        (found,) = [v for k, v in context.items() if f".{layer}." in k]
        return found.kv_cache[blocks, :, 0].clone()

    return made.worker(read)


def last_request(made: Engine) -> str:
    (name,) = made.open_blocks.request_ids
    return name


def test_300_tokens_stay_open(chunked: Engine) -> None:
    chunked.reset_prefix_cache()
    chunked.run([tokens(2, 300)], 1)
    name = last_request(chunked)
    blocks = chunked.open_blocks.blocks_of(name)
    assert len(blocks) == 1
    assert chunked.open_blocks.slots_of(name).keys() == {0}
    before = pages(chunked, 3, blocks)
    chunked.run([tokens(3, 200)], 40)  # not the block's last token either
    assert torch.equal(pages(chunked, 3, blocks), before)


@pytest.mark.parametrize("first", [0, 1])
def test_512_tokens_are_the_packers_bytes(chunked: Engine, env: dict[str, str], first: int) -> None:
    """The block that decoding fills, in first and second place of its sequence."""
    chunked.reset_prefix_cache()
    chunked.run([tokens(4, (first + 1) * BLOCK - 12)], 13)  # the last token of the block; no more
    name = last_request(chunked)
    block = chunked.open_blocks.blocks_of(name)[first]
    slot = chunked.open_blocks.slots_of(name)[first]
    coder = coder_of(chunked, env)
    for layer in sorted(COMPRESSED):
        (attention,) = [v for k, v in chunked.runtime.layers.items() if f".{layer}." in k]
        k, v = attention.impl.open_pool[slot]  # [heads, 512, D], still there
        page = pages(chunked, layer, [block])[0]
        assert page.shape == (HEADS, PAGE)
        for head in range(HEADS):
            rows = coder.unrotate(k[head][:, None], first * BLOCK).float()
            rows = whitening.whiten(rows, coder.factors[layer][0][head : head + 1])
            parts = []
            for stream, of in (("k", rows.transpose(0, 1)[None]), ("v", v[head][None, None])):
                recipe = getattr(coder.recipe, stream)
                codec = coder.codec(stream, recipe, stream == "k")
                parts.append(slots.pack(recipe, codec.encode(of), 0))
            assert page[head].numpy().tobytes() == b"".join(parts)


def test_a_page_is_written_once(chunked: Engine) -> None:
    """A later token of the sequence, and another sequence that reads the page, leave it alone."""
    chunked.reset_prefix_cache()
    prompt = tokens(5, BLOCK + 8)
    chunked.run([prompt], 1)
    block = chunked.open_blocks.blocks_of(last_request(chunked))[0]
    before = pages(chunked, 5, [block])
    assert before.any()
    (run,) = chunked.run([prompt], 20)
    assert run.cached == BLOCK
    assert chunked.open_blocks.blocks_of(last_request(chunked))[0] == block
    assert torch.equal(pages(chunked, 5, [block]), before)


LENGTHS = [5, 300, 500, 511, 512, 513, 1030]
COUNTS = [20, 12, 20, 4, 8, 10, 16]


def test_interleaved_requests_equal_each_alone(whole: Engine, stock: Engine) -> None:
    prompts = [tokens(10 + seed, length) for seed, length in enumerate(LENGTHS)]
    single = alone(whole, prompts, COUNTS)
    together = whole.run(prompts, COUNTS)
    clean = stock.run(prompts, COUNTS)
    changed, moved = [], []
    for length, a, b, c in zip(LENGTHS, single, together, clean, strict=True):
        before = max(1, BLOCK + 1 - length)  # tokens that were chosen without a look at a page
        assert max(distances(a, b)[:before]) <= EXACT
        changed += distances(a, b)[before:]
        moved += distances(a, c)[before:]
    assert rms(changed) < LIKE * rms(moved)
    assert rms(moved) > 5 * EXACT
    assert whole.open_blocks.peak > 4
    assert len({t for run in single for t in run.tokens}) > 8, "the texts should not be trivial"


def test_prefix_hits_change_nothing(chunked: Engine) -> None:
    prompt = tokens(20, 2 * BLOCK + 30)
    (cold,) = alone(chunked, [prompt], [12])
    first, hit = chunked.run([prompt], 12)[0], chunked.run([prompt], 12)[0]
    assert (first.cached, hit.cached) == (0, 2 * BLOCK)
    assert_equal(cold, first)
    assert_equal(cold, hit)


def test_prefix_hits_within_one_step_equal_chunks(
    whole: Engine, chunked: Engine, stock: Engine
) -> None:
    """A request hits the block that another one fills in the same step."""
    shared = tokens(21, BLOCK + 20)
    prompts = [shared + tokens(seed, 40) for seed in (22, 23)]
    whole.reset_prefix_cache()
    hits = whole.run(prompts, 10)
    assert [run.cached for run in hits] == [0, BLOCK]
    cold, clean = (made.run(prompts[1:], 10)[0] for made in (chunked, stock))
    assert cold.cached == 0
    assert rms(distances(cold, hits[1])) < LIKE * rms(distances(cold, clean))


def test_preemption_loses_nothing(model: Path, env: dict[str, str], whole: Engine) -> None:
    prompts = [tokens(seed, 500) for seed in (30, 31)]
    whole.reset_prefix_cache()
    expected = whole.run(prompts, 24)
    # Three blocks: one of the two gets its second, the other waits with its first as a page.
    with engine(
        model,
        env,
        num_gpu_blocks_override=4,
        max_model_len=1024,
        max_num_seqs=4,
        max_num_batched_tokens=1024,
        async_scheduling=False,
        **OPTIONS,
    ) as small:
        runs = small.run(prompts, 24)
        assert small.counter("vllm:num_preemptions") > 0
        for a, b in zip(expected, runs, strict=True):
            assert_equal(a, b)


def test_capacity_is_that_of_the_slots(whole: Engine, stock: Engine) -> None:
    full = 2 * D * 4 * BLOCK  # bytes of K and V of one KV head over a block in float32
    assert stock.capacity == engines.KV_BYTES // (LAYERS * HEADS * full) * BLOCK
    kept = LAYERS - len(COMPRESSED)
    size = HEADS * (kept * full + len(COMPRESSED) * PAGE)  # of a block in all layers
    assert whole.capacity == engines.KV_BYTES // size * BLOCK
    assert cache_figures(whole.llm)["bytes_per_token"] == size / BLOCK

    def compose(worker: Any) -> str:
        from kakeya_vllm.banner import compose

        return "\n".join(compose(worker._kakeya, worker.model_runner.kv_cache_config))

    lines = whole.worker(compose)
    assert f"v1.3-ppl-served, {2 * D * 2 * BLOCK / PAGE:.2f}x" in lines
    assert f"{PAGE} B a page of 512 tokens and one KV head" in lines
    assert "2 compressed: 3, 5; 6 stock float32: 0-2, 4, 6-7" in lines
    assert f"capacity          {whole.capacity} tokens in {whole.capacity // BLOCK} blocks" in lines


# --- what is refused ----------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """small(**options): the VllmConfig of a model of 2 layers, 2 KV heads of 32 with an artefact,
    under v1.3-ppl."""
    plain = configure(tmp_path / "model", attention_backend=None)
    path = tmp_path / "small.seed.safetensors"
    write_artefact(path, plain.model_config.hf_text_config, 2, 2, 64)
    monkeypatch.setenv("KAKEYA_RECIPE", "v1.3-ppl")
    monkeypatch.setenv(calibration.VARIABLE, str(path))
    return lambda **options: configure(tmp_path / "model", **options)


def test_the_choice_travels_to_workers(small: Any) -> None:
    made = small()
    chosen = made.additional_config["kakeya"]
    assert chosen["recipe"] == "v1.3-ppl-served"
    assert chosen["boundary_skip_layers"] == [0, 1]  # of two layers, all
    assert made.cache_config.block_size == BLOCK
    support.check_config(made)  # what a worker does
    settings = config.resolve(made.additional_config, made.model_config, {})
    assert settings.seed.name == "v1.3-ppl-served"
    assert settings.calibration == chosen["calibration"]
    assert settings.warnings == ()


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"KAKEYA_RECIPE": "turboquant-sim-tq4"}, "codec lloyd-max has no slots; key"),
        ({"KAKEYA_RECIPE": "d4-10"}, "codec d4 has no slots"),
        ({"KAKEYA_RECIPE": "v1.3-ppl-sink"}, "no room for uncompressed first tokens"),
        ({"KAKEYA_RECIPE": "v1.3-ppl-vr0.95"}, "variance_ratio 0.95 gives every block a rank"),
        ({"KAKEYA_RECIPE": "v1.3-ppl-as-run"}, "v1.3-ppl-no-boundary"),  # those that can be
        ({"KAKEYA_RECIPE": "v1.3-pp"}, "kakeya-free-4.6x"),
        ({"KAKEYA_PREFILL": "sealed"}, "KAKEYA_PREFILL='sealed' with recipe v1.3-ppl-served"),
        ({calibration.VARIABLE: "/no/file"}, "none at /no/file. Make one with `kakeya calibrate"),
    ],
)
def test_settings_refused_with_the_reason(
    small: Any, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], reason: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as error:
        small()
    assert reason in str(error.value)


def test_artefacts_of_others_are_refused(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, env: dict[str, str]
) -> None:
    monkeypatch.setenv(calibration.VARIABLE, env[calibration.VARIABLE])
    with pytest.raises(ConfigError, match="calibrated for another model"):
        small()
    plain = configure(tmp_path / "model", attention_backend=None)
    wrong = tmp_path / "wrong.safetensors"
    write_artefact(wrong, plain.model_config.hf_text_config, 3, 2, 64)
    monkeypatch.setenv(calibration.VARIABLE, str(wrong))
    with pytest.raises(ConfigError, match=r"sigma_q has shape \(3, 2, 64, 64\), expected"):
        small()
    # That of KAKEYA's own recipes is another setting.
    monkeypatch.delenv(calibration.VARIABLE)
    monkeypatch.setenv("KAKEYA_CALIBRATION", str(wrong))
    with pytest.raises(ConfigError, match=r"v1\.3-ppl-served needs a calibration"):
        small()


@pytest.mark.parametrize(
    ("options", "feature"),
    [
        ({"block_size": 128}, "block size 128 (valid: 512"),
        ({"prefix_match_unit": 128}, "prefix_match_unit 128 (valid: unset or 512"),
        (
            {
                "speculative_config": {
                    "method": "ngram",
                    "num_speculative_tokens": 2,
                    "prompt_lookup_max": 3,
                }
            },
            "speculative decoding with recipe v1.3-ppl-served",
        ),
    ],
)
def test_options_refused_by_name(small: Any, options: dict[str, Any], feature: str) -> None:
    with pytest.raises(UnsupportedFeature) as error:
        small(**options)
    assert feature in str(error.value)


def test_a_gpu_is_refused(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms import current_platform

    made = small()
    monkeypatch.setattr(current_platform, "is_cpu", lambda: False)
    with pytest.raises(
        UnsupportedFeature, match=r"v1\.3-ppl-served on a GPU \(it is served on the CPU only"
    ):
        support.check_config(made)


def test_a_file_is_served_like_its_base(small: Any, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text('{"base": "v1.3-bare", "v_bits": 3, "name": "mine"}')
    made = small(additional_config={"kakeya": {"recipe": str(path)}})
    settings = config.resolve(made.additional_config, made.model_config, {})
    recipe: SeedRecipe = settings.seed
    assert (recipe.name, recipe.v.bits, recipe.v.share_basis) == ("mine-served", 3, False)
    assert settings.boundary_skip_layers == ()
    path.write_text('{"base": "v1.3-bare", "block_rows": 128}')
    with pytest.raises(ConfigError, match=r"block_rows 128 \(valid: 512\)"):
        small(additional_config={"kakeya": {"recipe": str(path)}})
