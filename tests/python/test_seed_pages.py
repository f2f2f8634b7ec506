"""Pages of the seed's recipes as they are served, without an engine."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from kakeya_vllm.rope import Rope
from kakeya_vllm.seed import slots
from kakeya_vllm.seed.codec import BlockCodec
from kakeya_vllm.seed.coder import SeedCoder
from kakeya_vllm.seed.pages import PageCodec, page_bytes
from kakeya_vllm.seed.recipe import PRESETS, RecipeError, StreamRecipe, find, served, served_names
from test_seed_codec import decaying, draw
from test_seed_coder import ROPE, D, artefact

LAYERS, HEADS, N = 6, 2, 512


def codec(recipe=None, rope: Rope | None = ROPE) -> PageCodec:
    return PageCodec(recipe or served(find("v1.3-ppl")), (LAYERS, HEADS, D), rope, artefact())


RECIPES = {
    "values": StreamRecipe(bits=2),
    "outliers": StreamRecipe(outlier_threshold=2.0),
    "two levels": StreamRecipe(clusters=4, second_clusters=16),
    "no clusters": StreamRecipe(clusters=0),
    "no rotation": StreamRecipe(rotation=False),
    "padded": StreamRecipe(rank_factor=0.75),
    "unit": StreamRecipe(metric="inner_product", residual_norm="unit"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_folded_sums_are_those_of_decoded_rows(name):
    made = BlockCodec(RECIPES[name])
    encoded = made.encode(decaying(1, 1, N, 64) + 3)
    weights = draw(7, N, seed=5).exp()
    expected = weights @ made.decode(encoded)[0]
    torch.testing.assert_close(
        made.weighted_sums(encoded, weights), expected, rtol=1e-5, atol=1e-5 * float(weights.sum())
    )


def test_sums_of_rows_that_are_looked_at_one_by_one_are_refused():
    made = BlockCodec(StreamRecipe(norm_correction=True))
    with pytest.raises(ValueError, match="norm_correction is of single rows"):
        made.weighted_sums(made.encode(draw(1, 1, N, 64)), torch.ones(1, N))


@pytest.mark.parametrize("layer", [0, 3])  # not whitened, whitened
@pytest.mark.parametrize("block", [0, 2])
def test_a_page_gives_back_what_the_coder_of_evaluations_does(layer, block):
    made = codec()
    k, v = draw(3 * N, HEADS, D, seed=1) + 2, draw(3 * N, HEADS, D, seed=2)
    recipe = dataclasses.replace(made.recipe, boundary_depth=0, boundary_interior=False)
    coder = SeedCoder(recipe, (LAYERS, HEADS, D), ROPE, torch.device("cpu"), artefact())
    expected = coder.round_trip(layer, k, v, 3 * N // 128)
    rows = slice(block * N, (block + 1) * N)
    for head in range(HEADS):
        page = made.seal(layer, head, rows.start, k[rows, head], v[rows, head])
        assert page.shape == (made.page_bytes(),)
        keys, values = made.open(page)
        back = made.keys(layer, head, rows.start, keys)
        assert float((back - expected[0][rows, head]).norm() / back.norm()) < 0.01
        back = made.weighted_values(layer, values, torch.eye(N))
        assert float((back - expected[1][rows, head]).norm() / back.norm()) < 0.01


def test_a_page_is_two_slots():
    made = codec()
    recipe = made.recipe
    k, v = draw(N, D, seed=1), draw(N, D, seed=2)
    page = made.seal(3, 1, 0, k, v).numpy().tobytes()
    size = slots.slot_bytes(recipe.k, n=N, d=D, rank=D // 2, length=D // 2)
    assert page[:4] == page[size : size + 4] == slots.MAGIC
    rest = slots.slot_bytes(recipe.v, n=N, d=D, rank=D // 2, length=D // 2)
    assert len(page) == size + rest == page_bytes(recipe, D)
    assert made.describe()["ratio"] == pytest.approx(4 * N * D / len(page))


def test_rows_that_are_all_alike_have_smaller_slots():
    made = codec()
    v = torch.full((N, D), 0.5)
    page = made.seal(0, 0, 0, draw(N, D), v)
    assert page.shape == (made.page_bytes(),)
    values = made.open(page)[1]
    assert values.basis.rank.tolist() == [1]
    torch.testing.assert_close(made.weighted_values(0, values, torch.eye(N)), v)


def test_what_cannot_be_sealed_names_its_place():
    many = find("v1.3-bare").changed("many", {"v_outlier_threshold": 0.5})
    made = codec(served(many))
    where = r"layer 3, KV head 1, block 2 \(tokens 1024 to 1535\), values: \d+ outliers in a block"
    with pytest.raises(slots.OutlierBudget, match=where + ".* budget of 8% is"):
        made.seal(3, 1, 2 * N, draw(N, D), draw(N, D))
    k = draw(N, D)
    k[5, 5] = torch.nan
    with pytest.raises(ValueError, match=r"layer 0, KV head 0, block 0 .*, keys: a value is not"):
        made.seal(0, 0, 0, k, draw(N, D))


def test_what_is_no_page_is_refused():
    made = codec()
    with pytest.raises(ValueError, match="no slot"):
        made.open(torch.zeros(made.page_bytes(), dtype=torch.uint8))


def test_served_forms():
    recipe = find("v1.3-ppl-served")
    assert recipe == served(find("v1.3-ppl")) == served(recipe)
    for stream in (recipe.k, recipe.v):
        assert (stream.grouping, stream.share_basis) == ("per-head", False)
    assert (recipe.k.outlier_budget, recipe.v.outlier_budget) == (0.08, None)
    assert recipe.boundary(28) == find("v1.3-ppl").boundary(28)
    names = served_names()
    assert {"v1.3-bare", "v1.3-sigma", "v1.3-ppl", "v1.3-ppl-v-outliers", "v1.3-snapf"} <= set(
        names
    )
    for name in PRESETS:
        if name in names:
            assert find(f"{name}-served").name == f"{name}-served"
        else:
            with pytest.raises(RecipeError, match="cannot be served"):
                find(f"{name}-served")
    for switches, reason in (
        ({"norm_correction": True}, "norm_correction"),
        ({"boundary_mode": "conservative"}, "boundary_mode conservative"),
        ({"k_block_rows": 256}, "block_rows 256"),
    ):
        with pytest.raises(RecipeError, match=reason):
            served(find("v1.3-bare").changed("x", switches))
