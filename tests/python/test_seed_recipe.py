"""Recipes of the seed: names, switches, what is refused; rows are those of docs/seed.md."""

from __future__ import annotations

import json

import pytest
from kakeya_vllm.evaluation import command
from kakeya_vllm.seed import recipe as recipes
from kakeya_vllm.seed.recipe import RecipeError, find


def test_names_are_found_and_others_are_not():
    for name in recipes.PRESETS:
        assert find(name).name == name
    assert find("d4-10").k.codec == "d4"
    assert (find("e8-38").v.q, find("absmax-3").k.bits) == (38, 3)
    assert find("noise-0.05").k.noise == 0.05
    for name in (None, "kakeya-4.6x", "fp8", "d4-", "v1.3", "no/such/file.json"):
        assert find(name) is None


def test_production_recipe_has_every_guard():
    ppl = find("v1.3-ppl")
    assert (ppl.k.bits, ppl.v.bits, ppl.k.outlier_threshold) == (3, 2, 2.0)
    assert ppl.sigma_q
    assert ppl.sigma_skip_layers == (0,)
    assert ppl.k.table == ppl.v.table == "calibrated"
    assert (ppl.k.share_basis, ppl.v.share_basis) == (False, True)
    assert ppl.k.variance_ratio == 1.0
    assert ppl.needs_calibration
    assert not find("v1.3-bare").needs_calibration
    as_run = find("v1.3-ppl-as-run")
    assert (as_run.k.variance_ratio, as_run.k.residual_norm) == (0.95, "unit")


@pytest.mark.parametrize(
    ("changes", "layers", "expected"),
    [
        ({}, 28, {0, 1, 7, 14, 26, 27}),
        ({"boundary_interior": False}, 28, {0, 1, 26, 27}),
        ({"boundary_interior": False, "boundary_depth": 0}, 28, set()),
        ({"boundary_interior": False, "boundary_layers": [2, 33]}, 36, {0, 1, 2, 33, 34, 35}),
        ({"boundary_depth": 14, "boundary_interior": False}, 28, set(range(28))),
    ],
)
def test_rows_34_and_35_boundary_layers(changes, layers, expected):
    assert find("v1.3-ppl").changed("x", changes).boundary(layers) == expected
    with pytest.raises(RecipeError, match="valid: 0 to 27"):
        find("v1.3-ppl").changed("x", {"boundary_layers": [40]}).boundary(28)


def test_row_35_depths_are_swept_and_lists_parsed():
    for depth in range(15):
        found = find("v1.3-bare").changed("x", {"boundary_depth": depth}).boundary(36)
        assert len(found) == 2 * depth
    for wrong in ([-1], "0,1", [True], [0.5]):
        with pytest.raises(RecipeError, match=r"boundary_layers .*valid"):
            find("v1.3-bare").changed("x", {"boundary_layers": wrong})


def test_a_file_changes_single_switches(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(
        json.dumps({"base": "v1.3-ppl", "v_bits": 3, "bits": 4, "sigma_q": False, "k_clusters": 64})
    )
    made = find(str(path))
    assert made.name == "mine"
    # A stream's own switch wins, wherever it stands.
    assert (made.k.bits, made.v.bits, made.k.clusters, made.v.clusters) == (4, 3, 64, 16)
    assert not made.sigma_q
    # A recipe file of the plugin is none of ours.
    path.write_text('{"name": "other", "ratio": 4.6}')
    assert find(str(path)) is None


@pytest.mark.parametrize(
    ("switches", "words"),
    [
        ({"base": "v1.4"}, "no such base; valid: v1.3-bare"),
        ({"bit": 3}, "unknown switch 'bit'; valid: base, sigma_q"),
        ({"bits": 5}, "bits 5 with codec pca; valid: 1 to 4"),
        ({"bits": "3"}, "bits '3'; valid: whole numbers"),
        ({"pca": "lanczos"}, "pca 'lanczos'; valid: randomized, exact"),
        ({"clusters": 12}, "clusters 12; valid: powers of two"),
        ({"variance_ratio": 1.5}, "numbers from 0.0 to 1.0"),
        ({"rotation": 1}, "rotation 1; valid: true or false"),
        ({"metric": "l1"}, "valid: auto, mse, inner_product, linf"),
        ({"table": "table.bin"}, "valid: gaussian, calibrated or a .f32 file"),
        ({"rank_cap": 8}, "rank_cap is of pca exact"),
        ({"v_outlier_budget": 0.1}, "outlier_budget without outlier_threshold"),
        ({"residual_norm": "unit", "metric": "mse"}, "residual_norm unit with metric mse"),
        ({"clusters": 0, "second_clusters": 4}, "second_clusters without clusters"),
        ({"key_position": "post-rope"}, "valid key_position: pre-rope"),
        ({"boundary_mode": "fp8"}, "valid: bf16, conservative"),
        ({"boundary_mode": "conservative", "k_codec": "e8"}, "conservative with codec e8; valid"),
        ({"condition_cap": 0.5}, "numbers from 1.0"),
        ({"codec": "d4", "q": 0}, "q 0; valid"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(switches, words, tmp_path):
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps({"base": "v1.3-ppl"} | switches))
    with pytest.raises(RecipeError, match=words) as caught:
        find(str(path))
    assert str(path) in str(caught.value)
    with pytest.raises(SystemExit, match="kakeya: "):
        command.plan_caches([str(path)], "snapshot", "kv", None, [0], 2048, 28)


def plan(name, mode="snapshot", streams="kv", layers=None, boundaries=(0,)):
    return command.plan_caches([name], mode, streams, layers, list(boundaries), 2048, 28)


def test_row_38_and_39_seed_recipes_are_simulated_in_every_mode():
    assert [c.kind for c in plan("v1.3-ppl")] == ["simulated"]
    (cache,) = plan("v1.3-ppl", "in-forward", "k")
    assert (cache.kind, cache.mode, cache.streams) == ("simulated", "in-forward", "k")
    assert [c.layers for c in plan("d4-10", boundaries=[0, 13])] == [None, (13, 14)]
    with pytest.raises(SystemExit, match=r"v1\.3-ppl is simulated"):
        plan("v1.3-ppl", "generate")


def test_a_recipe_in_the_environment_is_named_to_be_simulated(monkeypatch):
    assert [c.kind for c in plan("v1.3-ppl-served")] == ["simulated"]
    monkeypatch.setenv("KAKEYA_RECIPE", "v1.3-ppl")
    with pytest.raises(SystemExit, match=r"KAKEYA_RECIPE=v1\.3-ppl is one of the seed's.*--caches"):
        plan(None)
    assert plan("kakeya-4.6x")[0].kind == "kakeya"


def test_row_48_simulated_caches_share_the_engine_of_their_reference():
    from kakeya_vllm.evaluation.protocol import REFERENCE, Cache, engine_groups

    names = ["kakeya-4.6x", "v1.3-ppl", "fp8", "d4-10"]
    caches = [
        Cache(REFERENCE, "stock", REFERENCE),
        *command.plan_caches(names, "snapshot", "kv", None, [0], 2048, 28),
    ]
    assert engine_groups(caches) == [[0, 2, 4], [1], [3]]
    assert engine_groups(caches[1:2]) == [[0]]
