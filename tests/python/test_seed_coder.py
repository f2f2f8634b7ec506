"""The seed's recipes as coders of an evaluation; rows are those of docs/seed.md."""

from __future__ import annotations

import pytest
import torch
from kakeya_vllm.evaluation.simulate import StoredBytes
from kakeya_vllm.rope import Rope
from kakeya_vllm.seed.calibration import Artefact
from kakeya_vllm.seed.coder import SeedCoder
from kakeya_vllm.seed.recipe import SeedRecipe, find
from kakeya_vllm.seed.scalar import GAUSSIAN
from test_calibrate import rotate
from test_seed_codec import draw

D, HEADS, LAYERS, TOKENS = 32, 2, 6, 1024
ROPE = Rope(D, False, tuple(10000.0 ** (-2 * i / D) for i in range(D // 2)))


def keys_before(seed: int = 0) -> torch.Tensor:
    """Keys with steady means and few strong directions, another in every head."""
    scale = torch.logspace(0.5, -1.5, D)
    turn = torch.stack([torch.linalg.qr(draw(D, D, seed=s)).Q for s in (1, 2)])
    return torch.einsum("thd,hde->the", draw(TOKENS, HEADS, D, seed=seed) * scale, turn) + 2


KEYS = rotate(keys_before().double(), ROPE).float()
VALUES = draw(TOKENS, HEADS, D, seed=3)


def coder(recipe: SeedRecipe, artefact: Artefact | None = None) -> SeedCoder:
    return SeedCoder(recipe, (LAYERS, HEADS, D), ROPE, torch.device("cpu"), artefact)


def bare(**switches) -> SeedRecipe:
    return find("v1.3-bare").changed("changed", switches)


def losses(recipe: SeedRecipe, artefact: Artefact | None = None) -> list[float]:
    new = coder(recipe, artefact).round_trip(3, KEYS, VALUES, TOKENS // 128)
    return [
        float((a - b).square().sum() / a.square().sum())
        for a, b in zip((KEYS, VALUES), new, strict=True)
    ]


def artefact() -> Artefact:
    # Query directions of unequal weight, none of them along an axis.
    turn = torch.linalg.qr(draw(D, D, seed=9)).Q
    sigma = turn.T @ torch.diag(torch.logspace(1, -1, D)) @ turn
    tables = {(s, b): GAUSSIAN[b] for s in ("k", "k_plain", "v") for b in GAUSSIAN}
    return Artefact("none", {}, sigma.expand(LAYERS, HEADS, D, D), tables)


def test_row_31_layers_that_are_skipped_are_not_whitened():
    made = coder(find("v1.3-sigma"), artefact())
    assert sorted(made.factors) == [1, 2, 3, 4, 5]
    plain = coder(find("v1.3-bare")).round_trip(0, KEYS, VALUES, 8)[0]
    assert torch.equal(made.round_trip(0, KEYS, VALUES, 8)[0], plain)
    assert not torch.equal(made.round_trip(1, KEYS, VALUES, 8)[0], plain)
    assert coder(find("v1.3-sigma-averaged"), artefact()).factors[1][0].shape == (HEADS, D, D)


def test_row_34_boundary_layers_stay_bit_for_bit_and_are_counted():
    made = coder(bare(boundary_depth=1))
    for layer in (0, 5):
        k, v = made.round_trip(layer, KEYS, VALUES, 8)
        assert torch.equal(k, KEYS)
        assert torch.equal(v, VALUES)
        assert made.stored == {"k": 2 * KEYS.numel(), "v": 2 * VALUES.numel()}
    made.round_trip(1, KEYS, VALUES, 8)
    assert sum(made.stored.values()) < KEYS.numel()
    sizes = StoredBytes()
    for layer in range(LAYERS):
        made.round_trip(layer, KEYS, VALUES, 8)
        sizes.add(layer, made.stored, "kv", (KEYS, VALUES))
    made.round_trip(1, KEYS, VALUES, 8)
    coded = sum(made.stored.values())
    raw = 4 * KEYS.numel()
    assert sizes.figures(LAYERS, TOKENS)["ratio"] == pytest.approx(6 * raw / (2 * raw + 4 * coded))


def test_row_36_conservative_boundary_layers_are_coded_with_more_bits():
    made = coder(bare(boundary_depth=1, boundary_mode="conservative"))
    edge = made.round_trip(0, KEYS, VALUES, 8)
    at_edge = dict(made.stored)
    inner = made.round_trip(1, KEYS, VALUES, 8)
    assert made.stored["v"] < at_edge["v"] < 2 * VALUES.numel()
    assert (edge[1] - VALUES).norm() < (inner[1] - VALUES).norm()
    assert (edge[0] - KEYS).norm() < (inner[0] - KEYS).norm()


def test_row_37_blocks_of_single_heads_lose_less_where_heads_differ():
    assert losses(bare(grouping="per-head"))[0] < losses(bare())[0]


@pytest.mark.parametrize("stream", ["k", "v"])
def test_row_38_a_raw_stream_is_the_same_bits(stream):
    made = coder(bare(**{f"{stream}_codec": "raw"}))
    k, v = made.round_trip(2, KEYS, VALUES, 8)
    assert torch.equal(k, KEYS) is (stream == "k")
    assert torch.equal(v, VALUES) is (stream == "v")


@pytest.mark.parametrize("name", ["v1.3-bare", "v1.3-per-head", "turboquant-sim-tq4", "d4-10"])
def test_row_41_what_is_behind_the_coded_prefix_is_untouched(name):
    recipe = find(name).changed("x", {"boundary_depth": 0})
    made = coder(recipe)
    for blocks in (0, 3, 5):
        k, v = made.round_trip(2, KEYS, VALUES, blocks)
        whole = blocks * 128
        if name == "v1.3-bare":
            whole = whole * HEADS // 512 * 512 // HEADS
        elif name == "v1.3-per-head":
            whole = whole // 512 * 512
        for old, new in ((KEYS, k), (VALUES, v)):
            assert torch.equal(old[whole:], new[whole:])
            assert not whole or not (old[:whole] == new[:whole]).all(-1).any()
        if not whole:
            assert made.stored["k"] == 2 * KEYS.numel()


@pytest.mark.parametrize("name", ["v1.3-bare", "v1.3-per-head", "e8-4"])
def test_the_first_tokens_may_be_kept_and_are_counted(name):
    plain, kept = (find(n).changed("x", {"boundary_depth": 0}) for n in (name, name + "-sink"))
    assert kept.sink_tokens == 4
    one, other = coder(plain), coder(kept)
    for x, a, b in zip(
        (KEYS, VALUES),
        one.round_trip(2, KEYS, VALUES, 8),
        other.round_trip(2, KEYS, VALUES, 8),
        strict=True,
    ):
        assert torch.equal(b[:4], x[:4])
        assert torch.equal(b[4:], a[4:])
    for stream in "kv":
        assert other.stored[stream] == one.stored[stream] + 4 * HEADS * D * 2


def test_row_50_noise_has_the_size_that_was_asked_for():
    for size in (0.01, 0.1):
        for loss in losses(find(f"noise-{size}")):
            assert loss**0.5 == pytest.approx(size, rel=0.03)
    made = coder(find("noise-0.1"))
    one, again = (made.round_trip(1, KEYS, VALUES, 8)[0] for _ in range(2))
    assert torch.equal(one, again)
    assert not torch.equal(one, made.round_trip(2, KEYS, VALUES, 8)[0])


def test_row_54_keys_before_rope_lose_less():
    before, after = losses(bare())[0], losses(bare(key_position="post-rope"))[0]
    assert before < 0.5 * after


def test_row_55_the_ratio_is_of_all_layers_and_both_streams():
    sizes = StoredBytes()
    rows = (KEYS, VALUES)
    raw = 2 * KEYS.numel()
    sizes.add(0, {"k": 1000, "v": 500}, "kv", rows)
    assert sizes.figures(2, TOKENS) == {
        "bytes_per_token": (1500 + 2 * raw) / TOKENS,
        "ratio": 4 * raw / (1500 + 2 * raw),
    }
    only_keys = StoredBytes()
    only_keys.add(0, {"k": 1000, "v": 500}, "k", rows)
    assert only_keys.figures(1, TOKENS)["ratio"] == 2 * raw / (1000 + raw)
    joint = StoredBytes()
    joint.add(0, {"kv": 1000}, "k", rows)
    assert joint.figures(1, TOKENS) is None


def test_bf16_keys_in_a_wider_tensor_are_coded_as_they_are():
    """Attention gets K and V as parts of one tensor: rows that do not lie one after the other."""
    wide = torch.cat([KEYS.flatten(1), VALUES.flatten(1)], 1).to(torch.bfloat16)
    k = wide[:, : HEADS * D].reshape(-1, HEADS, D)
    v = wide[:, HEADS * D :].reshape(-1, HEADS, D)
    assert not k.is_contiguous()
    for name in ("v1.3-bare", "v1.3-per-head", "turboquant-sim-tq4"):
        made = coder(find(name))
        new = made.round_trip(3, k, v, 8)
        same = made.round_trip(3, k.contiguous(), v.contiguous(), 8)
        assert new[0].dtype == torch.bfloat16
        assert all(torch.equal(a, b) for a, b in zip(new, same, strict=True))


def test_an_overflow_names_layer_and_stream():
    with pytest.raises(ValueError, match="layer 4, v: the mean of a block"):
        coder(find("v1.3-bare")).round_trip(4, KEYS, VALUES + 1e5, 8)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["v1.3-bare", "v1.3-sigma", "v1.3-snapf", "turboquant-sim-k8v4"])
def test_a_gpu_codes_as_the_cpu_does(name):
    recipe, device = find(name).changed("x", {"boundary_depth": 0}), torch.device("cuda")
    here = coder(recipe, artefact())
    there = SeedCoder(recipe, (LAYERS, HEADS, D), ROPE, device, artefact())
    one = here.round_trip(3, KEYS, VALUES, 8)
    other = there.round_trip(3, KEYS.to(device), VALUES.to(device), 8)
    assert here.stored == there.stored
    for x, a, b in zip((KEYS, VALUES), one, other, strict=True):
        # Sums in another order choose another centre here and there.
        assert b.device.type == "cuda"
        assert (b.cpu() - x).norm() == pytest.approx((a - x).norm(), rel=0.02)
