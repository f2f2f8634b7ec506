"""The benchmarks' own arithmetic, on a machine without a GPU: what they time is what they say."""

from __future__ import annotations

import sys
from pathlib import Path

import fake_cuda
import pytest
import torch
from kakeya_vllm import config, lib

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import bench_common
import bench_gpu
import bench_kernels

pytestmark = pytest.mark.cpu_only


PAGE = 2 * lib.BLOCK_TOKENS * 64 * fake_cuda.ELEMENT.itemsize


class FakeCodec(dict):
    """As much of a codec as fake_cuda asks of one."""

    def page_bytes(self, _layer: int) -> int:
        return PAGE


@pytest.fixture
def fake() -> tuple[bench_kernels.Model, FakeCodec]:
    model = bench_kernels.Model(64, heads=2, group=4, longest=512, device=torch.device("cpu"))
    return model, FakeCodec(head_dim=64, num_kv_heads=2, num_q_heads=8)


def test_every_sequence_of_a_timed_step_is_attention_over_its_tokens(fake: tuple) -> None:
    cache = bench_kernels.Cache(*fake, 3, 384, 3, fake_cuda.FakeCudaCodec)
    assert cache.layer_bytes == 3 * 3 * 2 * PAGE
    assert not torch.equal(cache.pages[0][1:10], cache.pages[1][1:10]), "layers share data"
    for i in range(cache.copies):
        cache.attend(i)
    for sequence in range(cache.batch):
        assert cache.error(sequence, torch.bfloat16) < bench_kernels.BOUND
    cache.pages[-1][cache.table[1, 0]] = 0
    assert cache.error(1, torch.bfloat16) > bench_kernels.BOUND, "a wrong page is not noticed"


@pytest.mark.parametrize(
    ("counts", "lens", "filled"),
    [([512], [512], [1, 2, 3, 4]), ([1] * 5, [100, 128, 129, 256, 255], [2, 4])],
)
def test_sealing_fills_the_blocks_that_are_counted(
    fake: tuple, counts: list[int], lens: list[int], filled: list[int]
) -> None:
    step = bench_kernels.SealStep(*fake, counts, lens, 2, fake_cuda.FakeCudaCodec)
    step.pages.zero_()
    step.plan(0)
    step.append(1)
    step.seal(1)
    assert step.pages.flatten(1).any(1).nonzero().flatten().tolist() == filled


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_default_recipes_take_the_synthetic_artefact(dim: int) -> None:
    model = bench_kernels.Model(dim, heads=2, group=4, longest=512, device=torch.device("cpu"))
    for recipe in bench_kernels.RECIPES.split(","):
        described = model.codec(recipe).describe()
        widths = {w for layer in described["layers"] for w in _numbers(layer["widths"])}
        assert len(widths) >= 4, f"widths {widths} are not those of a real model"


def _numbers(nested: object) -> list[int]:
    if isinstance(nested, dict):
        nested = list(nested.values())
    return [n for x in nested for n in _numbers(x)] if isinstance(nested, list) else [nested]


def test_engines_accept_the_artefact(tmp_path: Path) -> None:
    from transformers import AutoConfig

    (tmp_path / "config.json").write_text(bench_gpu.json.dumps(bench_gpu.QWEN3_4B))
    path = bench_gpu.artefact(str(tmp_path), config.DEFAULT_RECIPE)
    fingerprint = config.model_fingerprint(AutoConfig.from_pretrained(tmp_path))
    config.check_metadata(path, fingerprint)
    assert bench_gpu.artefact(str(tmp_path), config.FALLBACK_RECIPE) == ""


def test_tables_mark_what_loses() -> None:
    results = {
        "bf16": {"engine": {"capacity": 100}, "1x8192": {"ms_a_token": 10.0}},
        "kakeya-4.6x": {
            "engine": {"capacity": 460},
            "1x8192": {"ms_a_token": 12.5},
            "256x8192": {"ms_a_token": 90.0},
        },
    }
    results["bf16"] |= {"256x8192": {"does_not_fit": True}, "prefill": {"tokens_a_s": 1000}}
    results["kakeya-4.6x"]["prefill"] = {"tokens_a_s": 960}
    text = bench_gpu.report(results)
    assert "| bf16 | 100 | 10.0 | does not fit | 1,000 |" in text
    assert "| kakeya-4.6x | 460 (4.60x) | 12.5 (**0.80x**) | 90.0 | 960 (0.96x) |" in text


def test_cells() -> None:
    assert bench_common.cells("64x8192, 1x128") == [(64, 8192), (1, 128)]
    for wrong in ("64", "x8", "0x8", "8x0", "ax8"):
        with pytest.raises(SystemExit, match="is not a cell"):
            bench_common.cells(wrong)
