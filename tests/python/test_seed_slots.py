"""Bytes of the seed's slots; rows are those of docs/seed.md."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from kakeya_vllm.seed import slots
from kakeya_vllm.seed.codec import BlockCodec
from kakeya_vllm.seed.recipe import StreamRecipe, find
from test_seed_codec import decaying, draw

K = StreamRecipe(bits=3, outlier_threshold=2.0, outlier_budget=0.08)
V = StreamRecipe(bits=2)


@pytest.mark.parametrize(
    ("recipe", "rank", "length", "size"),
    [
        (K, 64, 64, 44_840),
        (V, 64, 64, 29_232),
        # snapA and snapF: rank 96 is padded to 128.
        (find("v1.3-snapa").k, 96, 128, 72_368),
        (find("v1.3-snapf").k, 96, 128, 64_944),
    ],
)
def test_row_27_a_slot_has_the_bytes_of_its_layout(recipe, rank, length, size):
    assert slots.slot_bytes(recipe, n=512, d=128, rank=rank, length=length) == size


RECIPES = {
    "keys": K,
    "values": V,
    "counted outliers": dataclasses.replace(K, outlier_budget=None),
    "two levels": StreamRecipe(clusters=4, second_clusters=16, bits=1),
    "no clusters": StreamRecipe(clusters=0, skeleton_dtype="float32"),
    "low rank": StreamRecipe(variance_ratio=0.5),
    "shared": StreamRecipe(share_basis=True),
}


@pytest.mark.parametrize("name", RECIPES)
def test_row_27_packing_is_undone(name):
    recipe = RECIPES[name]
    codec = BlockCodec(recipe)
    x = torch.stack([decaying(2, 512, 64), draw(2, 512, 64)])
    encoded = codec.encode(x)
    decoded = codec.decode(encoded)
    for block in range(4):
        slot = slots.pack(recipe, encoded, block)
        assert slot[:4] == b"KK13"
        basis = None
        if recipe.share_basis:
            parts = (encoded.basis.mean, encoded.basis.rows, encoded.basis.rank)
            basis = type(encoded.basis)(*(p[block : block + 1] for p in parts))
        back = slots.unpack(recipe, slot, 512, 64, basis)
        assert slots.pack(recipe, back, 0) == slot
        torch.testing.assert_close(codec.decode(back)[0], decoded[block], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", RECIPES)
def test_row_55_what_is_counted_is_what_is_packed(name):
    recipe = RECIPES[name]
    codec = BlockCodec(recipe)
    encoded = codec.encode(decaying(2, 3, 512, 64))
    packed = sum(len(slots.pack(recipe, encoded, block)) for block in range(6))
    if recipe.share_basis:
        packed += 2 * slots.basis_bytes(recipe, 32, 64)
    assert codec.stored_bytes(encoded, 64) == packed


def test_row_27_more_outliers_than_the_budget_stop():
    recipe = dataclasses.replace(K, outlier_threshold=0.5)
    codec = BlockCodec(recipe)
    encoded = codec.encode(draw(1, 1, 512, 64))
    with pytest.raises(slots.OutlierBudget, match="budget of 8% is 1311"):
        slots.pack(recipe, encoded, 0)
    with pytest.raises(slots.OutlierBudget):
        codec.stored_bytes(encoded, 64)


def test_row_27_a_slot_of_another_recipe_is_refused():
    codec = BlockCodec(V)
    slot = slots.pack(V, codec.encode(draw(1, 1, 512, 64)), 0)
    with pytest.raises(ValueError, match="not"):
        slots.unpack(dataclasses.replace(V, bits=3), slot, 512, 64)
    with pytest.raises(ValueError, match="its header says"):
        slots.unpack(V, slot[:-1], 512, 64)
    with pytest.raises(ValueError, match="magic"):
        slots.unpack(V, b"XXXX" + slot[4:], 512, 64)
