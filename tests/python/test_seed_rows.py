"""Codecs of single rows: TurboQuant's presets and lattices; rows are those of docs/seed.md."""

from __future__ import annotations

import itertools

import pytest
import torch
from kakeya_vllm.seed import lattice, turboquant
from kakeya_vllm.seed.recipe import StreamRecipe, find
from test_seed_codec import draw

ROWS = [
    StreamRecipe(codec="lloyd-max", bits=3),
    StreamRecipe(codec="lloyd-max", bits=4, norm_correction=True),
    StreamRecipe(codec="uniform", bits=4),
    StreamRecipe(codec="fp8"),
    StreamRecipe(codec="absmax", bits=3),
    StreamRecipe(codec="d4", q=10),
    StreamRecipe(codec="e8", q=4),
]


def relative(recipe: StreamRecipe, x: torch.Tensor) -> float:
    back = turboquant.round_trip(x, recipe)
    return float((back - x).square().sum() / x.square().sum())


def test_row_67_k8v4_is_fp8_and_four_even_bits():
    recipe = find("turboquant-sim-k8v4")
    assert turboquant.row_bits(recipe.k, 128) + turboquant.row_bits(recipe.v, 128) == 8 * 196
    assert round(2 * 128 * 2 / 196, 2) == 2.61
    x = draw(64, 128) * 3
    assert relative(recipe.k, x) < 1e-3
    assert relative(recipe.v, x) == pytest.approx(0.011, abs=0.002)


@pytest.mark.parametrize(
    ("name", "mse"), [("tq3", 0.0345), ("tq3-nc", 0.0345), ("tq4", 0.0095), ("tq4-nc", 0.0095)]
)
def test_row_68_lloyd_max_of_rotated_rows(name, mse):
    recipe = find(f"turboquant-sim-{name}").k
    x = draw(512, 4, 128) * 10
    assert relative(recipe, x) == pytest.approx(mse, rel=0.04)
    back = turboquant.round_trip(x, recipe)
    lengths = (back.norm(dim=-1) / x.norm(dim=-1) - 1).abs().max()
    assert (float(lengths) < 2**-10) is recipe.norm_correction


@pytest.mark.parametrize(
    ("name", "bits"),
    [("k8v4", (8, 4)), ("4bit-nc", (4, 4)), ("k3v4-nc", (3, 4)), ("3bit-nc", (3, 3))],
)
def test_row_68_presets_have_the_bits_of_their_names(name, bits):
    recipe = find(f"turboquant-sim-{name}")
    assert (recipe.k.bits, recipe.v.bits) == bits
    assert recipe.k.norm_correction is name.endswith("nc")
    assert recipe.v.codec == "uniform"
    assert recipe.key_position == "post-rope"


@pytest.mark.parametrize("recipe", ROWS, ids=lambda r: f"{r.codec}-{r.bits}")
def test_rows_69_and_73_a_row_alone_is_coded_as_in_a_batch(recipe):
    x = draw(40, 3, 128) * 5
    whole = turboquant.round_trip(x, recipe)
    for t in (0, 1, 39):
        assert torch.equal(turboquant.round_trip(x[t : t + 1], recipe)[0], whole[t])
    one = turboquant.round_trip(x[7, 1].clone(), recipe)
    assert torch.equal(one, whole[7, 1])
    assert torch.isfinite(turboquant.round_trip(torch.zeros(2, 128), recipe)).all()


def brute(points: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.cdist(x.double(), points.double()).amin(1)


def test_row_72_closest_points_are_closest():
    x = draw(300, 4) * 1.2
    whole = torch.tensor(list(itertools.product(range(-6, 7), repeat=4)))
    d4 = whole[whole.sum(1) % 2 == 0]
    got = lattice.closest_dn(x)
    assert (got.sum(-1) % 2 == 0).all()
    torch.testing.assert_close((got - x).norm(dim=1).double(), brute(d4, x))
    boxed = lattice.closest_dn(x, -1, 1)
    assert boxed.abs().max() == 1
    torch.testing.assert_close(
        (boxed - x).norm(dim=1).double(), brute(d4[(d4.abs() < 2).all(1)], x)
    )

    x = draw(100, 8) * 0.5
    whole = torch.tensor(list(itertools.product((-1, 0, 1), repeat=8)))
    halves = torch.tensor(list(itertools.product((-1.5, -0.5, 0.5, 1.5), repeat=8)))
    e8 = torch.cat([whole[whole.sum(1) % 2 == 0].float(), halves[halves.sum(1) % 2 == 0]])
    near = x[(x.abs() < 0.9).all(1)]
    got = lattice.closest_e8(near)
    torch.testing.assert_close((got - near).norm(dim=1).double(), brute(e8, near))


def test_row_72_bits_and_the_gain_at_equal_rate():
    assert lattice.bits_per_row("d4", 10, 128) == 32 * 17 + 32
    assert lattice.bits_per_row("e8", 10, 128) == 16 * 36 + 32
    assert lattice.bits_per_row("d4", 4, 128) == 32 * 12 + 32
    assert lattice.bits_per_row("e8", 4, 128) == 16 * 26 + 32
    x = draw(2000, 128)
    absmax = relative(StreamRecipe(codec="absmax", bits=4), x)
    d4 = relative(StreamRecipe(codec="d4", q=10), x)
    e8 = relative(StreamRecipe(codec="e8", q=10), x)
    assert e8 < d4 < absmax
    # At Lloyd-Max's rate or above: three bits and a norm, 400 bits, against E8's 448.
    three = relative(StreamRecipe(codec="lloyd-max", bits=3), x)
    assert turboquant.row_bits(StreamRecipe(codec="lloyd-max", bits=3), 128) == 400
    assert relative(StreamRecipe(codec="e8", q=4), x) == pytest.approx(three, rel=0.1)
    # Granular gain of a lattice's cell over a cube's at equal density: 2^(2/4) of volume for D4.
    fine = draw(20000, 4, seed=3) * 50
    cell = float((lattice.closest_dn(fine) - fine).square().mean()) / 2**0.5
    assert cell == pytest.approx(0.076603, rel=0.02)
    assert cell < 1 / 12
    fine = draw(20000, 8, seed=4) * 50
    cell = float((lattice.closest_e8(fine) - fine).square().mean())
    assert cell == pytest.approx(0.071682, rel=0.02)
