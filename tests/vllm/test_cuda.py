"""The CUDA side of the plugin without a GPU: torch tensors on the CPU and a device library whose
pages are exact (fake_cuda.py). Engines on a GPU run the tests of test_engine.py."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import fake_cuda
import pytest
import torch
from kakeya_vllm import cuda, lib, support, version
from steps import DIM, GROUP, HEADS, Engine, settings

BLOCK = lib.BLOCK_TOKENS


@pytest.fixture(autouse=True)
def torch_instead_of_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "flash_attention", fake_cuda.flash_attention)
    monkeypatch.setattr(cuda, "merge_attention", fake_cuda.merge_attention)
    monkeypatch.setattr(cuda, "HISTORY_TOKENS", 2 * BLOCK)  # several pieces of history


def test_prompts_chunks_and_decoding_in_one_batch() -> None:
    engine = Engine()
    engine.step({"a": 300, "b": 128})
    engine.step({"a": 1, "b": 1, "c": 500, "d": 40})  # two fresh prompts share a launch
    engine.step({"a": 1, "b": 1, "c": 300, "d": 88})  # both go on; d's block fills
    engine.step({"a": 1, "b": 126, "c": 1, "d": 1, "e": 2}, slack=3)
    assert engine.computed == {"a": 303, "b": 256, "c": 801, "d": 129, "e": 2}


@pytest.mark.parametrize(("soft_cap", "with_sinks"), [(1.5, False), (0.0, True), (1.5, True)])
def test_soft_caps_and_sinks(soft_cap: float, with_sinks: bool) -> None:
    """Fresh prompts, a history in pieces, decoding: a sink counts once in each."""
    engine = Engine(soft_cap=soft_cap, with_sinks=with_sinks)
    engine.step({"a": 700, "b": 128})
    engine.step({"a": 90, "b": 1, "c": 40})
    engine.step({"a": 1, "b": 1, "c": 1}, pad_seqs=1, pad_tokens=1)


def test_a_soft_cap_that_is_refused_is_refused_before_the_first_step() -> None:
    with pytest.raises(ValueError, match="soft_cap is -1"):
        Engine(soft_cap=-1.0)


def test_history_is_read_in_pieces() -> None:
    engine = Engine()
    engine.step({"a": 900})
    engine.worker.codec.calls.clear()
    # 900 tokens of history, 256 at a time; the last piece is a page and 4 rows of an open block.
    engine.step({"a": 60})
    assert engine.worker.codec.calls == ["plan", "append", "seal"] + ["open"] * 4


def test_every_length_around_a_block() -> None:
    engine = Engine(num_blocks=256)
    for index, first in enumerate((1, 7, 127, 128, 129, 255, 256, 257)):
        for second in (1, 2, 127, 128, 129):
            name = f"{index}-{second}"
            engine.step({name: first})
            engine.step({name: second})
            engine.step({name: 1})
            end = SimpleNamespace(
                finished_req_ids={name},
                preempted_req_ids=set(),
                scheduled_new_reqs=[],
                scheduled_cached_reqs=SimpleNamespace(
                    req_ids=[], new_block_ids=[], num_computed_tokens=[], resumed_req_ids=set()
                ),
                num_scheduled_tokens={},
            )
            engine.open_blocks.update(end)
            engine.free += engine.blocks.pop(name)


def test_long_decoding_seals_blocks_and_pads() -> None:
    engine = Engine()
    engine.step({"a": 120, "b": 10})
    for _ in range(140):
        engine.step({"a": 1, "b": 1}, pad_seqs=2, pad_tokens=2)
    assert engine.open_blocks.in_use == 2


def test_drafts_are_verified_by_the_attention_kernel_and_rewritten() -> None:
    engine = Engine(drafts=3)
    engine.step({"a": 125, "b": 255})
    for accepted in (1, 4, 2, 3, 1, 1, 4, 4):
        engine.worker.codec.calls.clear()
        engine.step({"a": 4, "b": 4})
        assert engine.worker.codec.calls == ["plan", "append", "seal", "attend"]
        for name in "ab":  # the rest was rejected; the next step writes those places again
            engine.computed[name] -= 4 - accepted


def test_a_dummy_run_seals_only_the_null_block() -> None:
    engine = Engine()
    engine.step({"a": 250})
    before = engine.pages.clone()
    table = torch.tensor([engine.blocks["a"] + [0] * 14], dtype=torch.int32)  # left from the step
    metadata = engine.planner.build(
        SimpleNamespace(
            query_start_loc=torch.tensor([0, 1], dtype=torch.int32),
            query_start_loc_cpu=torch.tensor([0, 1], dtype=torch.int32),
            seq_lens=torch.tensor([256], dtype=torch.int32),
            seq_lens_cpu_upper_bound=torch.tensor([256], dtype=torch.int32),
            num_reqs=1,
            num_actual_tokens=1,
            max_query_len=1,
            block_table_tensor=table,
            slot_mapping=torch.tensor([-1], dtype=torch.int64),
            causal=True,
        )
    )
    assert metadata.plan[:8].tolist() == [1, -7, -7, -7, 0, 1, -1, engine.worker.scratch]
    row = engine.draw(1, HEADS, DIM)
    out = engine.draw(1, HEADS * GROUP, DIM)
    engine.layer.write(metadata, row, row, engine.pages)
    engine.layer.read(metadata, out.clone(), row, row, engine.pages, out)
    assert torch.equal(engine.pages[1:], before[1:])


def test_what_is_not_finite_stops_the_engine() -> None:
    engine = Engine()
    engine.step({"a": 1})
    engine.worker.status.fill_(1)
    seen = 0
    with pytest.raises(RuntimeError, match="not finite"):  # noqa: PT012
        while seen < 40:
            engine.step({"a": 1})
            seen += 1


def test_a_copied_tensor_is_refused() -> None:
    engine = Engine()
    with pytest.raises(ValueError, match="seq_lens must be contiguous"):
        engine.planner.build(
            SimpleNamespace(
                query_start_loc=torch.zeros(2, dtype=torch.int32),
                seq_lens=torch.zeros(1, dtype=torch.int64),
                block_table_tensor=torch.zeros(1, 4, dtype=torch.int32),
                slot_mapping=torch.zeros(1, dtype=torch.int64),
            )
        )


def test_queries_of_a_decoding_sequence() -> None:
    assert [cuda.max_query(settings(drafts)) for drafts in (0, 1, 7)] == [1, 2, 8]


@pytest.mark.parametrize(
    ("function", "structure"),
    [
        ("kakeya_cuda_sizes", lib.CudaBuffers),
        ("kakeya_cuda_plan", lib.CudaPlanArgs),
        ("kakeya_cuda_append", lib.CudaWriteArgs),
        ("kakeya_cuda_seal", lib.CudaWriteArgs),
        ("kakeya_cuda_attend", lib.CudaAttendArgs),
        ("kakeya_cuda_open", lib.CudaOpenArgs),
    ],
)
def test_structures_are_as_large_as_the_library_says(function: str, structure: Any) -> None:
    arguments = structure(struct_size=ctypes.sizeof(structure))
    with pytest.raises(lib.KakeyaError, match="cuda is NULL"):  # the size is checked before
        lib.load().call(function, None, ctypes.byref(arguments))


@pytest.mark.parametrize(
    ("change", "feature"),
    [
        ({}, None),
        ({"archs": ""}, "GPUs with this libkakeya, which was built without kernels"),
        ({"capability": (7, 5)}, "GPUs before compute capability 8.0"),
        ({"dtype": torch.float32}, "torch.float32 on a GPU (valid: bfloat16, float16)"),
        ({"tried": False}, "vLLM "),
        ({"drafts": 8}, "8 speculative tokens on a GPU (valid: up to 7)"),
    ],
)
def test_what_is_refused_on_a_gpu(change: dict[str, Any], feature: str | None) -> None:
    config = settings(change.get("drafts", 0))
    config.model_config.dtype = change.get("dtype", torch.bfloat16)
    capability = change.get("capability", (9, 0))
    platform = SimpleNamespace(has_device_capability=lambda least: capability >= least)
    tried = change.get("tried", True)
    found = support._cuda_features(config, platform, change.get("archs", "sm_90"), tried)
    assert [text[: len(feature)] for text in found] == [feature] if feature else not found


@pytest.mark.parametrize(
    ("number", "on_gpu"), [("0.33.0", True), ("0.32.0+cpu", False), ("0.34.0", False)]
)
def test_vllm_releases_on_a_gpu(number: str, on_gpu: bool) -> None:
    assert version.allowed_on_gpu(number) == on_gpu
