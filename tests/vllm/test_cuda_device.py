"""The kernels through the plugin's own calls, against the codec: page bytes and attention."""

from __future__ import annotations

import ctypes

import pytest
import torch
from kakeya_vllm import cuda, lib
from steps import Engine

pytestmark = pytest.mark.gpu


def codec(recipe: str, heads: int, group: int, dim: int) -> lib.Codec:
    frequencies = [10000.0 ** (-2 * i / dim) for i in range(dim // 2)]
    model = {
        "num_layers": 1,
        "num_kv_heads": heads,
        "num_q_heads": heads * group,
        "head_dim": dim,
        "max_position": 2048 + 128,
        "rope": {"rotary_dim": dim, "interleaved": False, "inv_freq": frequencies},
    }
    return lib.load().codec(recipe, model)


RECIPES = ["kakeya-free-4.6x", "kakeya-free-4.6x-trellis", "kakeya-free-6.4x-lloyd-max"]
SHAPES = [(2, 2, 64), (3, 3, 64), (2, 4, 128), (1, 16, 128), (1, 1, 256)]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("heads", "group", "dim"), SHAPES)
def test_prompts_chunks_and_decoding(recipe: str, heads: int, group: int, dim: int) -> None:
    made = Engine(codec=codec(recipe, heads, group, dim), heads=heads, group=group, dim=dim)
    made.step({"a": 300, "b": 128})
    made.step({"a": 1, "b": 1, "c": 500, "d": 40})
    made.step({"a": 1, "b": 1, "c": 300, "d": 88})
    made.step({"a": 1, "b": 126, "c": 1, "d": 1, "e": 2}, slack=3, pad_seqs=3, pad_tokens=5)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    ("heads", "group", "dim"), [(2, 3, 64), (2, 2, 96), (2, 4, 128), (1, 1, 256)]
)
@pytest.mark.parametrize(("soft_cap", "with_sinks"), [(1.5, False), (0.0, True), (1.5, True)])
def test_soft_caps_and_sinks(
    recipe: str, heads: int, group: int, dim: int, soft_cap: float, with_sinks: bool
) -> None:
    shape = {"heads": heads, "group": group, "dim": dim}
    options = {"soft_cap": soft_cap, "with_sinks": with_sinks}
    made = Engine(drafts=1, codec=codec(recipe, **shape), **shape, **options)
    made.step({"a": 300, "b": 127})
    made.step({"a": 2, "b": 2, "c": 500})
    made.step({"a": 1, "b": 1, "c": 300, "d": 2}, pad_seqs=2, pad_tokens=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_blocks_fill_while_decoding(dtype: torch.dtype) -> None:
    made = Engine(codec=codec(RECIPES[0], 2, 2, 64), dtype=dtype)
    made.step({"a": 120, "b": 10})
    for _ in range(20):
        made.step({"a": 1, "b": 1}, pad_seqs=2, pad_tokens=2)


@pytest.mark.parametrize("drafts", [1, 3, 7])
@pytest.mark.parametrize(("heads", "group", "dim"), SHAPES)
def test_drafts(drafts: int, heads: int, group: int, dim: int) -> None:
    shape = {"heads": heads, "group": group, "dim": dim}
    made = Engine(drafts, codec=codec(RECIPES[1], **shape), **shape)
    made.step({"a": 125, "b": 255, "c": 3})
    for accepted in (1, 2, 1, 2):
        made.step(dict.fromkeys("abc", 1 + drafts))
        for name in "abc":
            made.computed[name] -= max(0, 1 + drafts - accepted)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    ("heads", "group", "dim"), [(2, 3, 64), (2, 2, 96), (2, 4, 128), (1, 1, 256)]
)
def test_batch_invariance(
    recipe: str, heads: int, group: int, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit the same alone, in a batch, and with up to eight tokens a step, over the ends of
    blocks."""
    monkeypatch.setattr(cuda, "batch_invariant", lambda: True)
    shape = {"heads": heads, "group": group, "dim": dim}
    made = codec(recipe, **shape)

    def tokens(name: str, prompt: int, steps: list[dict[str, int]], drafts: int) -> torch.Tensor:
        """Outputs of a request's tokens after its prompt."""
        run = Engine(drafts, codec=made, repeatable=True, **shape)
        others = {other: 40 for step in steps for other in step if other != name}
        run.step({name: prompt} | others)
        parts = []
        for counts in steps:
            run.step(counts)
            parts.append(run.outputs[name])
        return torch.cat(parts)

    for name, prompt in (("a", 250), ("b", 635)):  # the ends of blocks are among the tokens
        alone = tokens(name, prompt, [{name: 1}] * 16, 0)
        assert torch.equal(tokens(name, prompt, [{name: 1, "c": 1, "d": 1}] * 16, 0), alone)
        assert torch.equal(tokens(name, prompt, [{name: 4}] * 4, 3), alone)
        assert torch.equal(tokens(name, prompt, [{name: 8, "c": 3, "d": 1}] * 2, 7), alone)


def test_history_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "HISTORY_TOKENS", 256)
    made = Engine(codec=codec(RECIPES[0], 2, 4, 128), heads=2, group=4, dim=128)
    made.step({"a": 900})
    made.step({"a": 60})
    made.step({"a": 300, "b": 9})


def test_what_is_not_finite_is_reported_and_not_sealed() -> None:
    made = Engine(codec=codec(RECIPES[0], 2, 2, 64))
    made.step({"a": 1})
    draw = made.draw

    def spoilt(*shape: int) -> torch.Tensor:
        x = draw(*shape)
        if x.ndim == 4 and x.numel():
            x[0, 77] = float("inf")  # one key
        return x

    made.draw = spoilt
    with pytest.raises(AssertionError):  # neither attention nor the page can be right
        made.step({"b": 128})
    assert made.worker.status.item() == 1
    block = made.blocks["b"][0]
    assert not made.pages[block].any(), "a page was written"


@pytest.mark.parametrize(
    ("field", "value", "part"),
    [
        ("num_seqs", 99, "num_seqs is 99; valid: 0..=16"),
        ("plan", 0, "plan is NULL"),
        ("plan", 2, "plan is at"),
        ("block_table_stride", -1, "row stride of block_table is -1"),
    ],
)
def test_plans_refused_by_name(field: str, value: int, part: str) -> None:
    made = Engine(codec=codec(RECIPES[0], 2, 2, 64))
    made.step({"a": 3})
    args = made.planner._args
    setattr(args, field, value)
    with pytest.raises(lib.KakeyaError, match=part):
        made.worker.codec.plan(args)


@pytest.mark.parametrize(
    ("field", "value", "part"),
    [
        ("layer", 1, "layer is 1"),
        ("dtype", 2, "f32"),
        ("num_tokens", 99999, "num_tokens is 99999"),
        ("q", 8, "q is at 0x8; valid on CUDA: a multiple of 16"),
        ("q_head_stride", 1, "a stride of q is 2 bytes"),
        ("scale", float("nan"), "scale is NaN"),
        ("workspace", 0, "workspace is NULL"),
        ("page_block_stride", 1, "pages"),
    ],
)
def test_attention_refused_by_name(field: str, value: float, part: str) -> None:
    made = Engine(codec=codec(RECIPES[0], 2, 2, 64))
    made.step({"a": 3})
    made.step({"a": 1})
    args = made.layer._attend
    setattr(args, field, value)
    with pytest.raises(lib.KakeyaError, match=part):
        made.worker.codec.attend(args)


def test_wrong_devices_are_refused() -> None:
    """A device that is not there, and arrays that are not the device's; pinned ones it reaches."""
    made = codec(RECIPES[0], 1, 1, 64)
    limits = {"max_seqs": 4, "max_tokens": 512, "max_query": 8, "num_kv_heads": 1}
    with pytest.raises(lib.KakeyaError, match="KAKEYA_ERR_WRONG_DEVICE: device is"):
        lib.CudaCodec(made, device=torch.cuda.device_count(), **limits)
    on_device = lib.CudaCodec(made, device=0, **limits)
    plan = torch.zeros(on_device.buffers().plan_len, dtype=torch.int32, device="cuda:0")
    integers = torch.zeros(16, dtype=torch.int32, device="cuda:0")

    def call(seq_lens: torch.Tensor) -> None:
        on_device.plan(
            lib.CudaPlanArgs(
                struct_size=ctypes.sizeof(lib.CudaPlanArgs),
                num_seqs=1,
                max_blocks_per_seq=2,
                num_blocks=2,
                query_start=integers.data_ptr(),
                seq_lens=seq_lens.data_ptr(),
                block_table=integers.data_ptr(),
                block_table_stride=2,
                open_slot=integers.data_ptr(),
                plan=plan.data_ptr(),
                stream=torch.cuda.current_stream(0).cuda_stream,
            )
        )

    call(integers)
    call(torch.zeros(16, dtype=torch.int32, pin_memory=True))
    with pytest.raises(lib.KakeyaError, match=r"KAKEYA_ERR_WRONG_DEVICE: seq_lens is at"):
        call(torch.zeros(16, dtype=torch.int32))
    if torch.cuda.device_count() > 1:
        with pytest.raises(lib.KakeyaError, match="seq_lens is memory of device 1"):
            call(integers.to("cuda:1"))
    torch.cuda.synchronize()
