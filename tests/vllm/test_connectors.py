"""Pages that leave the engine and come back: KV connectors, with real engines."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engines
import numpy as np
import pytest
import torch
from engines import BLOCK, Engine, Run, assert_same_run, engine, run_elsewhere, tokens
from kakeya_vllm import connector, transfer
from kakeya_vllm.config import ConfigError
from kakeya_vllm.page_folder import PageFolder, UnusablePage
from kakeya_vllm.support import UnsupportedFeature

OPTIONS = {
    "skip_tokenizer_init": True,
    "dtype": engines.exact_dtype(),
    # A block may be of two steps. On a GPU prompts are whole: where they are cut shows there.
    "max_num_batched_tokens": 2048 if engines.on_gpu() else 160,
}
MODE = {} if engines.on_gpu() else {"KAKEYA_PREFILL": "sealed"}
SPAWNED = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
# Two blocks and a half; exactly two blocks, of which one is loaded; no full block.
PROMPTS = [tokens(300, 320), tokens(301, 256), tokens(302, 60)]
HITS = [256, 128, 0]
# Enough to take every block of a cache of 9, whichever vLLM gives out first.
OTHERS = [tokens(seed, 480) for seed in range(330, 334)]
SMALL = {"num_gpu_blocks_override": 9, "max_model_len": 512, "max_num_batched_tokens": 4096}
COUNT = 12
LAYERS, HEADS, DIM = 4, 2, 128


def connected(folder: Path, role: str = "kv_both", **more: Any) -> dict[str, Any]:
    """Options of an engine whose pages go to a folder."""
    extra = {"folder": str(folder), "model": "tiny"}
    config = {
        "kv_connector": "KakeyaConnector",
        "kv_role": role,
        "kv_connector_extra_config": extra,
    }
    return OPTIONS | {"kv_transfer_config": config | more}


def assert_same_answers(runs: list[Run], others: list[Run], *, other_hits: bool = False) -> None:
    """Bit for bit. On a GPU an answer depends on what its prompt hit: with ``other_hits`` only
    lengths are compared there."""
    for a, b in zip(runs, others, strict=True):
        if other_hits and engines.on_gpu():
            assert len(a.tokens) == len(b.tokens)
        else:
            assert (a.tokens, a.logprobs) == (b.tokens, b.logprobs)


def assert_same_pages(blocks: list[list[str]], others: list[list[str]], layer: str) -> None:
    """Byte for byte, in any order. On a GPU but for one block: the last of a prompt that ends with
    it is computed again, from pages where the first engine had what they were made of."""
    if not engines.on_gpu():
        assert sorted(blocks) == sorted(others), f"layer {layer}"
    first, second = ({str(block) for block in found} for found in (blocks, others))
    assert len(blocks) == len(others), f"layer {layer}"
    assert len(first - second) <= 1, f"layer {layer}"


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def wait_for_files(folder: Path, count: int) -> None:
    """Until an engine that does not wait for its files has written them."""
    deadline = time.monotonic() + 120
    while len(files(folder)) < count:
        assert time.monotonic() < deadline, f"{len(files(folder))} files of {count}"
        time.sleep(0.05)


@pytest.fixture(scope="module", autouse=True)
def _batch_invariant() -> Iterator[None]:
    with engines.variables(engines.INVARIANT if engines.on_gpu() else {}):
        yield


@pytest.fixture(scope="module")
def alone(tiny: Path) -> list[Run]:
    """Answers of an engine that computes everything itself, and then hits its own blocks: on a GPU
    it shows where a hit ends."""
    with engine(tiny, MODE, **OPTIONS) as made:
        made.run(PROMPTS, 1)
        runs = made.run(PROMPTS, COUNT)
    assert [run.cached for run in runs] == HITS
    return runs


@pytest.fixture(scope="module")
def prefilled(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a prefill engine in a process of its own left: {"folder", "pages"}."""
    folder = tmp_path_factory.mktemp("pages")
    done = run_elsewhere(tiny, PROMPTS, 1, env=MODE, pages=True, **connected(folder, "kv_producer"))
    return {"folder": folder, "pages": done["pages"][0]}


def test_a_decode_engine_goes_on_from_a_prefill_engines_pages(
    tiny: Path, alone: list[Run], prefilled: dict[str, Any]
) -> None:
    with engine(tiny, MODE, **connected(prefilled["folder"], "kv_consumer")) as decode:
        runs = decode.run(PROMPTS, COUNT)
        pages = decode.worker(engines.read_pages)
    assert [run.cached for run in runs] == HITS
    assert_same_answers(alone, runs)
    for layer, blocks in prefilled["pages"].items():
        assert_same_pages(blocks, pages[layer], layer)


def test_files_take_a_fraction_of_bf16(prefilled: dict[str, Any]) -> None:
    found = files(prefilled["folder"])
    blocks = sum(len(prompt) // BLOCK for prompt in PROMPTS)
    assert len(found) == blocks * HEADS
    size = sum(path.stat().st_size for path in found)
    bf16 = blocks * BLOCK * LAYERS * HEADS * DIM * 2 * 2
    assert 4.5 < bf16 / size < 4.6, "4.6x, less a header for each file"
    # Nothing but the pages of the cache: every layer's part of a file is one of them.
    parts = {page for layer in prefilled["pages"].values() for block in layer for page in block}
    for path in found:
        pages = torch.from_numpy(np.frombuffer(path.read_bytes()[-LAYERS * 14240 :], np.uint8))
        assert {bytes(page.numpy()).hex() for page in pages.split(14240)} <= parts


def test_ranks_of_another_number_share_a_folder(
    tiny: Path, alone: list[Run], tmp_path: Path
) -> None:
    """Two ranks prefill, one engine decodes: files are of KV heads, not of ranks."""
    engines.need_gpus(2)
    two = run_elsewhere(
        tiny,
        PROMPTS,
        1,
        env=MODE | SPAWNED,
        pages=True,
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
        **connected(tmp_path, "kv_producer"),
    )
    with engine(tiny, MODE, **connected(tmp_path, "kv_consumer")) as decode:
        runs = decode.run(PROMPTS, COUNT)
        pages = decode.worker(engines.read_pages)
    assert [run.cached for run in runs] == HITS
    for layer, blocks in pages.items():
        left, right = (rank[layer] for rank in two["pages"])
        both = [a + b for a, b in zip(left, right, strict=True)]
        assert_same_pages(both, blocks, layer)
    for a, b in zip(alone, runs, strict=True):
        # Sums over ranks are taken in another order, and a code may fall on the other side.
        assert_same_run(a, b, 0.25 if engines.on_gpu() else 0.05)


def test_blocks_come_back_after_they_were_evicted(tiny: Path, tmp_path: Path) -> None:
    """One engine with a cache of 9 blocks, pages in memory (a folder in /dev/shm would be), and a
    boundary layer, whose K and V travel with the pages."""
    env = MODE | {"KAKEYA_BOUNDARY_SKIP_LAYERS": "3"}
    options = connected(tmp_path) | SMALL
    first = tokens(310, 300)
    with engine(tiny, env, **options) as made:
        (before,) = made.run([first], 90)  # 390 tokens: a block is filled while decoding
        sealed = made.worker(engines.read_pages)
        wait_for_files(tmp_path, 3 * HEADS)
        made.run(OTHERS, 4)
        again = made.worker(engines.read_pages)
        assert not {str(b) for b in sealed["0"]} & {str(b) for b in again["0"]}, "not evicted"
        (after,) = made.run([first + before.tokens[:85]], 5)
        back = made.worker(engines.read_pages)
    assert after.cached == 384
    for layer, blocks in sealed.items():
        assert {str(b) for b in blocks} <= {str(b) for b in back[layer]}, f"layer {layer}"
    assert after.tokens == before.tokens[85:]
    for a, b in zip(before.logprobs[85:], after.logprobs, strict=True):
        assert abs(a - b) < 1e-5  # vLLM's own attention in the boundary layer


def test_drafts_are_never_kept(tiny: Path, tmp_path: Path) -> None:
    """Blocks that drafts filled are sealed before it is known whether the drafts are true. What is
    in the folder is what the cache holds in the end."""
    once = tokens(60, 45)
    names = engines.DRAFT_COUNTERS
    done = run_elsewhere(
        tiny,
        [once * 2 + tokens(61, 30), tokens(62, 200) + once],
        60,
        env=MODE,
        pages=True,
        counters=names,
        speculative_config=engines.NGRAM,
        **connected(tmp_path, "kv_producer"),
    )
    drafted, accepted = (done["counters"][name] for name in names)
    assert 0 < accepted < drafted
    found = files(tmp_path)
    assert len(found) == 3 * HEADS  # 1 block of 180 tokens, 2 of 305; none in the prompts of 1
    kept = {path.read_bytes()[-LAYERS * 14240 :][:14240].hex() for path in found}
    assert kept == {page for block in done["pages"][0]["0"] for page in block}


@pytest.mark.cpu_only
def test_answers_stay_the_same_under_load(tiny: Path, tmp_path: Path) -> None:
    """Shared prefixes, chunks, evictions and preemption in a cache of 12 blocks, and, from the
    second round on, files that were damaged between: every answer is bit for bit the one alone."""
    rng = random.Random(7)
    bases = [tokens(400 + i, 400) for i in range(4)]
    requests = [
        (rng.choice(bases)[: rng.choice([0, 100, 128, 256, 384])] + tokens(500 + i, size), count)
        for i in range(40)
        for size, count in [(rng.randrange(1, 120), rng.randrange(1, 60))]
    ]
    prompts, counts = [p for p, _ in requests], [n for _, n in requests]
    with engine(tiny, MODE, enable_prefix_caching=False, **OPTIONS) as made:
        expected = made.run(prompts, counts)
    small = {"num_gpu_blocks_override": 12, "max_num_seqs": 6, "max_model_len": 640}
    options = connected(tmp_path, kv_load_failure_policy="recompute") | small
    hits = []
    with engine(tiny, MODE, **options) as made:
        for _ in range(2):
            runs = made.run(prompts, counts)
            assert [(a.tokens, a.logprobs) for a in runs] == [
                (b.tokens, b.logprobs) for b in expected
            ]
            hits.append(made.counter("vllm:external_prefix_cache_hits"))
            damaged = files(tmp_path)[::7]
            for path in damaged:
                path.write_bytes(path.read_bytes()[:-3000])
        assert made.counter("vllm:num_preemptions") > 0
    assert hits[0] < hits[1]


# --- what is not used ---------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["recompute", "fail"])
def test_a_damaged_file_is_not_used(
    tiny: Path, alone: list[Run], prefilled: dict[str, Any], tmp_path: Path, policy: str
) -> None:
    """vLLM's policy decides what becomes of the request; the file goes, and the engine goes on."""
    folder = tmp_path / "pages"
    shutil.copytree(prefilled["folder"], folder)
    for path in files(folder)[::HEADS]:  # one head of each block
        data = bytearray(path.read_bytes())
        data[-5000] ^= 1
        path.write_bytes(data)
    options = connected(folder, "kv_consumer", kv_load_failure_policy=policy)
    with engine(tiny, MODE, **options) as made:
        if policy == "fail":
            from vllm import SamplingParams

            prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
            outputs = made.llm.generate(prompts, SamplingParams(max_tokens=1), use_tqdm=False)
            found = [output.outputs[0].finish_reason for output in outputs]
            assert found == ["error", "error", "length"]
        runs = made.run(PROMPTS, COUNT)
    assert_same_answers(alone, runs, other_hits=True)
    # Of four blocks one is not loaded; the other head's files stay, and are of no use.
    assert len(files(folder)) == 4 * HEADS - 3


def test_another_recipe_finds_nothing(tiny: Path, prefilled: dict[str, Any]) -> None:
    """Pages of the same size that mean something else."""
    env = MODE | {"KAKEYA_RECIPE": "kakeya-free-4.6x-lloyd-max"}
    with engine(tiny, env, **connected(prefilled["folder"], "kv_consumer")) as made:
        runs = made.run(PROMPTS, 1)
    assert [run.cached for run in runs] == [0, 0, 0]
    assert [len(run.tokens) for run in runs] == [1, 1, 1], "nothing failed either"


def a_page(folder: Path) -> tuple[PageFolder, bytes, torch.Tensor]:
    pages = torch.arange(5000).to(torch.uint8)
    made = PageFolder(folder, {"model": "m"}, 2)
    made.prepare(write=True)
    block = bytes(range(32))
    made.write(block, 0, pages, "tables")
    return made, block, pages


def test_a_file_comes_back_as_it_was(tmp_path: Path) -> None:
    folder, block, pages = a_page(tmp_path)
    assert not folder.has(block)  # one head of two
    folder.write(block, 1, pages.flip(0), "tables")
    assert folder.has(block)
    assert torch.equal(folder.read(block, 0, 5000, "tables"), pages)
    assert torch.equal(folder.read(block, 1, 5000, "tables"), pages.flip(0))


def test_what_is_wrong_with_a_file_is_said(tmp_path: Path) -> None:
    folder, block, _ = a_page(tmp_path)
    path = folder.path(block, 0)
    good = path.read_bytes()
    other = PageFolder(tmp_path, {"model": "other"}, 2)
    cases = {
        "expected uint8 [4999]": (folder, good, block, 0, 4999, "tables"),
        "its tables is tables, expected others": (folder, good, block, 0, 5000, "others"),
        "its head is 0, expected 1": (folder, good, block, 1, 5000, "tables"),
        "its block is 0001": (folder, good, bytes(32), 0, 5000, "tables"),
        "its identity is": (other, good, block, 0, 5000, "tables"),
        "do not have the digest": (folder, good[:-1] + b"\xff", block, 0, 5000, "tables"),
        "not a whole safetensors file of pages": (folder, good[:-1], block, 0, 5000, "tables"),
        "(Error while deserializing": (folder, b"\xff" * 5100, block, 0, 5000, "tables"),
        "No such file": (folder, None, block, 0, 5000, "tables"),
    }
    for reason, (reader, data, name, head, size, tables) in cases.items():
        place = reader.path(name, head)
        place.unlink(missing_ok=True)
        if data is not None:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(data)
        with pytest.raises(UnusablePage) as error:
            reader.read(name, head, size, tables)
        assert reason in str(error.value)
        assert str(place) in str(error.value)
        assert not place.exists()


def test_pages_that_cannot_be_kept(
    tiny: Path, alone: list[Run], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The engine goes on, and says so once."""
    with (
        caplog.at_level("WARNING", "vllm.kakeya"),
        engine(tiny, MODE, **connected(tmp_path, "kv_producer")) as made,
    ):
        (directory,) = tmp_path.iterdir()
        shutil.rmtree(directory)
        directory.write_text("in the way")
        runs = made.run(PROMPTS, COUNT)
    assert_same_answers(alone, runs, other_hits=True)
    assert caplog.text.count("KAKEYA pages cannot be kept") == 1


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name, write, reason in [
        ("file", True, "is not a directory"),
        ("file/below", True, "cannot be written to"),
        ("none", False, "does not exist"),
    ]:
        with pytest.raises(ConfigError, match=reason):
            PageFolder(tmp_path / name, {}, 1).prepare(write=write)


def unsupported(
    name: str,
    extra: dict[str, Any],
    *,
    stages: int = 1,
    algorithm: str = "sha256",
    seed: bool = False,
    mixed: str = "",
    drafts: str = "",
) -> str:
    """What transfer.features says of a configuration, as one text."""
    config = SimpleNamespace(
        kv_transfer_config=SimpleNamespace(kv_connector=name, kv_connector_extra_config=extra),
        parallel_config=SimpleNamespace(pipeline_parallel_size=stages),
        speculative_config=SimpleNamespace(method=drafts) if drafts else None,
        cache_config=SimpleNamespace(prefix_caching_hash_algo=algorithm),
    )
    return "; ".join(transfer.features(config, seed=seed, mixed=mixed))


def test_connectors_refused_by_name() -> None:
    good = {"folder": "/pages"}
    assert unsupported("KakeyaConnector", good | {"model": "m"}) == ""
    for name in ("NixlConnector", "LMCacheConnectorV1", "MooncakeStoreConnector", "MultiConnector"):
        assert f"the KV connector {name} (valid: KakeyaConnector" in unsupported(name, {})
    for reason, arguments in {
        "folder None in kv_connector_extra_config (valid: an absolute": ({},),
        "folder 'pages'": ({"folder": "pages"},),
        "model 7": (good | {"model": 7},),
        "KakeyaConnector with path in": (good | {"path": "/"},),
    }.items():
        assert reason in unsupported("KakeyaConnector", *arguments)
    assert "pipeline parallelism" in unsupported("KakeyaConnector", good, stages=2)
    assert unsupported("KakeyaConnector", good, drafts="ngram") == ""
    assert "KV connectors with drafts by eagle" in unsupported(
        "KakeyaConnector", good, drafts="eagle"
    )
    assert "KV connectors with a hybrid" in unsupported("KakeyaConnector", good, mixed="a hybrid")
    assert "recipe of the seed" in unsupported("KakeyaConnector", good, seed=True)
    assert "hash_algo xxhash" in unsupported("KakeyaConnector", good, algorithm="xxhash")
    tiers = {"spec_name": "TieringOffloadingSpec", "canonical_layout": True}
    found = unsupported("OffloadingConnector", tiers)
    assert "KV offloading with TieringOffloadingSpec" in found
    assert "canonical_layout" in found
    assert ("KV offloading without a GPU" in found) == (not engines.on_gpu())


@pytest.mark.parametrize("shapes", [[(9, 2), (9, 1)], [(9, 2), (8, 2)]])
def test_layers_that_differ_are_refused(shapes: list[tuple[int, int]]) -> None:
    mover = object.__new__(connector._Mover)
    mover._config = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context={}),
    )
    mover._num_blocks = 9
    caches = {f"layers.{i}.attn": torch.zeros(*shape, 1, 4) for i, shape in enumerate(shapes)}
    with pytest.raises(UnsupportedFeature, match="whose blocks or heads differ in number"):
        mover.register(caches)


# --- vLLM's own offloading ----------------------------------------------------------------------

OFFLOADED = OPTIONS | SMALL | {"kv_offloading_size": 0.125}


def offload_and_return(made: Engine) -> None:
    """Blocks go to CPU memory, are evicted, and come back; a whole prompt never does."""
    first = tokens(320, 256)
    made.run([first], 8)
    once = made.worker(engines.read_pages)
    (before,) = made.run([first], 8)  # with a hit, which shows in the second block on a GPU
    sealed = made.worker(engines.read_pages)
    made.run(OTHERS, 4)
    gone = made.worker(engines.read_pages)
    (after,) = made.run([first], 8)
    back = made.worker(engines.read_pages)
    assert after.cached == 128
    assert (before.tokens, before.logprobs) == (after.tokens, after.logprobs)
    for layer, blocks in sealed.items():
        pages = {str(block) for block in blocks}
        assert not pages & {str(block) for block in gone[layer]}
        lost = pages - {str(block) for block in back[layer]}
        assert len(lost) <= engines.on_gpu(), f"layer {layer}"
        assert lost <= {str(block) for block in once[layer]}, f"layer {layer}"


@pytest.mark.gpu
def test_pages_are_offloaded_to_cpu_memory(tiny: Path) -> None:
    with engine(tiny, **OFFLOADED) as made:
        offload_and_return(made)


@pytest.mark.cpu_only
def test_vllms_offloading_with_another_copy(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of vLLM's OffloadingConnector but the copies on a GPU: its scheduler, its idea of a page,
    its transfers, in the place of the last a copy between two tensors."""
    from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec

    monkeypatch.setattr(transfer, "features", lambda *_, **__: [])  # refused without a GPU
    monkeypatch.setattr(CPUOffloadingSpec, "get_worker", lambda _, caches: Copies(caches))
    with engine(tiny, MODE, **OFFLOADED) as made:
        config = made.llm.llm_engine.vllm_config.kv_transfer_config
        assert config.kv_connector == "KakeyaOffloadingConnector"
        offload_and_return(made)


class Copies:
    """vLLM's OffloadingWorker between tensors of this machine."""

    def __init__(self, caches: Any) -> None:
        shapes = [(400, tensor.page_size_bytes) for tensor in caches.tensors]
        self.here = [tensor.tensor for tensor in caches.tensors]
        self.there = [torch.zeros(shape, dtype=torch.int8) for shape in shapes]
        self.over: list[int] = []

    def submit_store(self, job_id: int, source: Any, target: Any) -> bool:
        self._copy(self.here, source, self.there, target)
        self.over.append(job_id)
        return True

    def submit_load(self, job_id: int, source: Any, target: Any) -> bool:
        self._copy(self.there, source, self.here, target)
        self.over.append(job_id)
        return True

    @staticmethod
    def _copy(have: list[torch.Tensor], source: Any, want: list[torch.Tensor], target: Any) -> None:
        rows, places = (torch.from_numpy(spec.block_ids).long() for spec in (source, target))
        for a, b in zip(have, want, strict=True):
            b[places] = a[rows]

    def get_finished(self) -> list[Any]:
        from vllm.v1.kv_offload.base import TransferResult

        over, self.over = self.over, []
        return [TransferResult(job_id, True) for job_id in over]

    def wait(self, job_ids: set[int]) -> None:
        """Nothing: a copy is over when it returns."""

    def shutdown(self) -> None:
        """Nothing to stop."""
