"""The seed's block codec, stage by stage; rows are those of docs/seed.md."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from kakeya_vllm.seed import kmeans, pca, scalar, transform
from kakeya_vllm.seed.codec import BlockCodec, FieldOverflow, to_half
from kakeya_vllm.seed.recipe import StreamRecipe

PLAIN = StreamRecipe(clusters=0, rank_factor=1.0, pca="exact")


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def decaying(*shape: int, seed: int = 0) -> torch.Tensor:
    """Rows whose principal components lose a factor 30 of deviation from first to last."""
    d = shape[-1]
    turn = torch.linalg.qr(draw(d, d, seed=99)).Q
    return (draw(*shape, seed=seed) * torch.logspace(0, -1.5, d)) @ turn + 0.5


def error(codec: BlockCodec, x: torch.Tensor) -> float:
    back = codec.decode(codec.encode(x)).reshape(x.shape)
    return float((back - x).square().sum() / x.square().sum())


def test_row_1_exact_pca_finds_the_rank_of_data_and_its_mean():
    x = draw(2, 256, 5) @ draw(2, 5, 32, seed=1) + 1e-3 * draw(2, 256, 32, seed=2) + 3
    basis = pca.fit(x, method="exact", variance_ratio=0.9999, dtype=torch.float32)
    assert basis.rank.tolist() == [5, 5]
    torch.testing.assert_close(basis.mean, x.mean(1), rtol=1e-5, atol=1e-5)
    gram = basis.rows @ basis.rows.transpose(1, 2)
    torch.testing.assert_close(gram, torch.eye(5).expand(2, 5, 5), atol=1e-5, rtol=0)
    lost = basis.unproject(basis.project(x)) - x
    assert lost.std() < 1.1e-3


def test_row_2_randomised_pca_captures_what_the_exact_one_does():
    x = decaying(3, 512, 64)
    centred = x - x.mean(1, keepdim=True)

    def captured(method, **more):
        basis = pca.fit(x, method=method, **more)
        return float(basis.project(x).square().sum() / centred.square().sum()), basis

    exact, _ = captured("exact", rank_cap=32)
    share, basis = captured("randomized")
    _, again = captured("randomized")
    assert basis.rank.tolist() == [32] * 3
    assert share > 0.99 * exact
    assert torch.equal(basis.rows, again.rows)
    assert not torch.equal(basis.rows, captured("randomized", seed=1)[1].rows)


def test_row_3_variance_ratio_is_of_the_sketched_variance():
    values = torch.tensor([[8.0, 1.0, 0.5, 0.5], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    assert pca.rank_of(values, 0.8, 4).tolist() == [1, 4, 1]
    assert pca.rank_of(values, 0.85, 4).tolist() == [2, 4, 1]
    assert pca.rank_of(values, 1.0, 3).tolist() == [3, 3, 1]
    x = draw(1, 512, 64)
    assert int(pca.fit(x, method="randomized", variance_ratio=1.0).rank) == 32
    # Of the whole variance 0.5 would take about half of the directions; of the sketch, of its 40.
    assert int(pca.fit(x, method="randomized", variance_ratio=0.5).rank) < 20
    codec = BlockCodec(StreamRecipe(variance_ratio=0.9))
    ranks = codec.encode(torch.stack([decaying(2, 512, 64), draw(2, 512, 64)])).basis.rank
    assert ranks[0] == ranks[1] < ranks[2]


@pytest.mark.parametrize("cap", [1, 7, 64, 500])
def test_row_4_rank_cap_is_a_limit(cap):
    basis = pca.fit(decaying(2, 256, 64), method="exact", rank_cap=cap)
    assert basis.rank.tolist() == [min(cap, 64)] * 2


def test_row_5_weights_enter_mean_covariance_and_centres():
    x = decaying(1, 256, 16)
    x[0, 7] = 100
    weights = torch.ones(1, 256)
    weights[0, 7] = 0
    mean, covariance = pca.moments(x, weights)
    rest = torch.cat([x[0, :7], x[0, 8:]]).double()
    torch.testing.assert_close(mean[0], rest.mean(0))
    torch.testing.assert_close(covariance[0], torch.cov(rest.T, correction=0))
    with_row, without = (kmeans.fit(x, 4, weights=w) for w in (None, weights))
    assert not torch.equal(with_row, without)
    with pytest.raises(ValueError, match="weights"):
        pca.moments(x, torch.zeros(1, 256))
    # A row of no weight is coded all the same.
    assert BlockCodec(PLAIN).encode(x[None], weights[None]).indices.shape == (1, 256, 16)


def test_row_6_kmeans_takes_a_row_and_its_opposite_together():
    x = draw(2, 128, 16)
    x[:, 64:] = -x[:, :64]
    centres = kmeans.fit(x, 8)
    chosen, t = kmeans.assign(x, centres)
    assert torch.equal(chosen[:, :64], chosen[:, 64:])
    torch.testing.assert_close(t[:, :64], -t[:, 64:])
    left = []
    for k in (1, 4, 16, 64):
        codec = BlockCodec(dataclasses.replace(PLAIN, clusters=k))
        left.append(float(codec.encode(decaying(1, 2, 256, 16)).norm.mean()))
    assert left == sorted(left, reverse=True)
    torch.testing.assert_close(centres.norm(dim=-1), torch.ones(2, 8), atol=1e-3, rtol=0)


def test_row_6_rows_of_no_length_and_few_rows_are_no_trouble():
    x = torch.zeros(2, 32, 8)
    x[1, :3] = draw(3, 8)
    centres = kmeans.fit(x, 8)
    assert torch.isfinite(centres).all()
    chosen, t = kmeans.assign(x, centres)
    assert (chosen[0] == 0).all()
    assert (t[1, 3:] == 0).all()


def test_row_7_coefficient_and_residual_give_the_row():
    codec = BlockCodec(dataclasses.replace(PLAIN, clusters=8))
    c = draw(2, 64, 16)
    (level,), rest = codec._levels(c, None)
    _, t = kmeans.assign(c, level.centres)
    products = torch.einsum("bnr,bkr->bnk", c, level.centres)
    index = level.chosen[..., None]
    torch.testing.assert_close(products.gather(2, index)[..., 0], t)
    centre = level.centres.gather(1, index.expand(-1, -1, 16))
    torch.testing.assert_close(t[..., None] * centre + rest, c)
    assert torch.equal(level.t, t.half().float())


@pytest.mark.parametrize("length", [1, 2, 64, 128])
def test_row_8_signed_hadamard_transform_and_its_inverse(length):
    x = draw(3, 5, length)
    y = transform.rotate(x, 7)
    torch.testing.assert_close(transform.unrotate(y, 7), x, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(y.square().sum(-1), length * x.square().sum(-1))
    assert torch.equal(y, transform.rotate(x, 7))
    if length > 16:
        assert not torch.equal(y, transform.rotate(x, 8))
    matrix = transform.walsh_hadamard(torch.eye(length))
    assert torch.equal(matrix, matrix.T)
    assert matrix.abs().min() == 1


def test_row_8_other_lengths_are_refused():
    with pytest.raises(ValueError, match="length 96 is not a power of two"):
        transform.walsh_hadamard(draw(2, 96))


@pytest.mark.parametrize("rotation", [True, False])
def test_row_9_values_have_mean_square_one(rotation):
    codec = BlockCodec(StreamRecipe(rotation=rotation, pca="exact", rank_cap=24))
    basis, _, norm, length, z = codec._analyse(decaying(1, 2, 512, 64), None)
    assert basis.rank.tolist() == [24, 24]
    assert length.tolist() == [32, 32]
    torch.testing.assert_close(z.square().mean(-1), torch.ones_like(norm), atol=1e-4, rtol=0)
    # Without the transform the padding stays zero: its eight coordinates are wasted.
    assert bool((z[..., 24:] == 0).all()) is not rotation


@pytest.mark.parametrize(("bits", "mse"), [(1, 0.363), (2, 0.1175), (3, 0.0345), (4, 0.0095)])
def test_row_10_lloyd_max_tables_have_their_known_error(bits, mse):
    values = draw(400_000)
    assert scalar.table_error(values, scalar.GAUSSIAN[bits]) == pytest.approx(mse, rel=0.01)
    assert scalar.check_table(scalar.GAUSSIAN[bits], bits, "t") == scalar.GAUSSIAN[bits]
    fitted = scalar.lloyd(values, scalar.GAUSSIAN[bits])
    assert fitted == pytest.approx(scalar.GAUSSIAN[bits], abs=0.05)


def test_row_10_the_nearest_level_is_chosen():
    table = torch.tensor(scalar.GAUSSIAN[3])
    z = draw(1000) * 2
    brute = (z[:, None] - table).abs().argmin(1)
    assert torch.equal(scalar.nearest(z, table).long(), brute)


def test_row_11_a_table_file_is_checked_and_a_fitted_table_is_better(tmp_path):
    path = tmp_path / "k.f32"
    pool = draw(50_000).abs().sqrt() * draw(50_000, seed=1).sign()
    levels = scalar.lloyd(pool, scalar.GAUSSIAN[2])
    scalar.write_table(path, levels)
    assert path.read_bytes() == np.array(levels, "<f4").tobytes()
    assert scalar.read_table(path, 2) == levels
    assert scalar.table_error(pool, levels) < 0.95 * scalar.table_error(pool, scalar.GAUSSIAN[2])
    with pytest.raises(ValueError, match="16 bytes; 3 bits need 32"):
        scalar.read_table(path, 3)
    scalar.write_table(path, levels[::-1])
    with pytest.raises(ValueError, match="not strictly ascending"):
        scalar.read_table(path, 2)
    scalar.write_table(path, [*levels[:3], float("nan")])
    with pytest.raises(ValueError, match="not finite"):
        scalar.read_table(path, 2)
    with pytest.raises(ValueError, match="cannot be read"):
        scalar.read_table(tmp_path / "none.f32", 2)
    scalar.write_table(path, levels)
    codec = BlockCodec(dataclasses.replace(PLAIN, bits=2, table=str(path)))
    assert codec.levels.tolist() == pytest.approx(levels)
    with pytest.raises(ValueError, match="needs that table"):
        BlockCodec(dataclasses.replace(PLAIN, table="calibrated"))


def test_row_12_outliers_are_held_to_f16():
    x = draw(1, 2, 512, 64)
    codec = BlockCodec(dataclasses.replace(PLAIN, outlier_threshold=2.0))
    encoded = codec.encode(x)
    assert float(encoded.outlier.float().mean()) == pytest.approx(0.0455, abs=0.003)
    z = codec._analyse(x, None)[-1]
    at = encoded.outlier
    assert torch.equal(encoded.exact[at], z[at].half().float())
    assert (encoded.exact[~at] == 0).all()
    assert error(codec, x) < 0.9 * error(BlockCodec(PLAIN), x)


def test_row_13_outliers_help_values_too():
    recipe = StreamRecipe(bits=2, share_basis=True)
    with_list = dataclasses.replace(recipe, outlier_threshold=2.0)
    x = draw(1, 4, 512, 64)
    assert error(BlockCodec(with_list), x) < error(BlockCodec(recipe), x)


def test_row_14_metrics_decode_alike_and_bug_b1_does_not():
    x = decaying(1, 2, 512, 64)
    recipe = StreamRecipe()
    of = {m: BlockCodec(recipe, m) for m in ("mse", "inner_product", "linf")}
    decoded = {m: c.decode(c.encode(x)) for m, c in of.items()}
    assert torch.equal(decoded["mse"], decoded["inner_product"])
    assert torch.equal(decoded["mse"], decoded["linf"])
    bug = dataclasses.replace(recipe, residual_norm="unit")
    assert error(BlockCodec(bug, "inner_product"), x) > 2 * error(of["mse"], x)
    # Where keys are whitened the seed's metric was mse, and its residuals had their length.
    assert error(BlockCodec(bug, "mse"), x) == error(of["mse"], x)
    assert BlockCodec(dataclasses.replace(recipe, metric="linf"), "mse").metric == "linf"


def residual_lengths(recipe: StreamRecipe, metric: str = "mse") -> tuple[torch.Tensor, ...]:
    x = decaying(1, 2, 512, 64)
    codec = BlockCodec(recipe, metric)
    encoded = codec.encode(x)
    decoded = encoded.basis.project(codec.decode(encoded))
    true = codec._analyse(x, None)[2]
    return (decoded - encoded.levels[0].value()).norm(dim=-1), true


def test_row_15_decoded_residuals_have_the_length_of_encoded_ones():
    recipe = StreamRecipe(rank_factor=1.0, skeleton_dtype="float32")
    decoded, true = residual_lengths(recipe)
    assert float((decoded / true).mean()) == pytest.approx(1, abs=0.03)
    decoded, _ = residual_lengths(
        dataclasses.replace(recipe, residual_norm="unit"), "inner_product"
    )
    assert float(decoded.mean()) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("rank_factor", [1.0, 0.375])
def test_row_16_norm_correction_makes_the_length_exact(rank_factor):
    recipe = StreamRecipe(
        rank_factor=rank_factor, skeleton_dtype="float32", norm_correction=True, bits=2
    )
    decoded, true = residual_lengths(recipe)
    assert float((decoded / true - 1).abs().max()) < 2**-10
    plain, true = residual_lengths(dataclasses.replace(recipe, norm_correction=False))
    assert float((plain / true - 1).abs().max()) > 0.01


def test_row_17_a_shared_basis_is_counted_once():
    x = decaying(1, 4, 512, 64)
    x[:, 2:] = x[:, 2:].flip(-1)
    own, shared = (BlockCodec(StreamRecipe(share_basis=s)) for s in (False, True))
    encoded = shared.encode(x)
    assert torch.equal(encoded.basis.rows[0], encoded.basis.rows[3])
    saved = own.stored_bytes(own.encode(x), 64) - shared.stored_bytes(encoded, 64)
    assert saved == 3 * 2 * (32 * 64 + 64)
    assert error(own, x) < error(shared, x)


def test_row_18_a_float32_skeleton_is_twice_the_bytes_for_nothing():
    x = decaying(1, 2, 512, 64)
    half, full = (BlockCodec(StreamRecipe(skeleton_dtype=t)) for t in ("float16", "float32"))
    skeleton = 2 * (32 * 64 + 64 + 16 * 32)
    more = full.stored_bytes(full.encode(x), 64) - half.stored_bytes(half.encode(x), 64)
    assert more == 2 * skeleton
    assert error(full, x) == pytest.approx(error(half, x), rel=0.01)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 7, 64, 129])
def test_row_19_packing_is_undone(bits, count):
    codes = np.random.default_rng(0).integers(0, 1 << bits, count).astype(np.uint8)
    packed = scalar.pack_bits(codes, bits)
    assert len(packed) == -(-count * bits // 8)
    assert (scalar.unpack_bits(packed, bits, count) == codes).all()


def test_row_19_bytes_have_the_lowest_bit_first():
    codes = np.array([1, 2, 3, 4, 5], np.uint8)
    # 001 010 011 100 101, from the right: 11010001, 01011000 and 0.
    assert scalar.pack_bits(codes, 3) == bytes([0b11010001, 0b01011000])


def test_row_36_four_bits_cost_and_lose_as_declared():
    x = decaying(1, 2, 512, 64)
    three, four = (BlockCodec(StreamRecipe(bits=b)) for b in (3, 4))
    more = four.stored_bytes(four.encode(x), 64) - three.stored_bytes(three.encode(x), 64)
    assert more == 2 * 512 * 32 // 8
    assert error(four, x) < error(three, x)


@pytest.mark.parametrize(
    ("switch", "small", "large"),
    [
        ("bits", 2, 3),
        ("clusters", 16, 64),
        ("rank_factor", 0.5, 0.75),
        ("second_clusters", 0, 16),
        ("outlier_threshold", None, 2.0),
        ("variance_ratio", 0.7, 1.0),
    ],
)
def test_row_52_every_budget_buys_what_it_costs(switch, small, large):
    x = decaying(1, 2, 512, 64)
    sizes, errors, ranks = [], [], []
    for value in (small, large):
        codec = BlockCodec(StreamRecipe(**{switch: value}))
        encoded = codec.encode(x)
        sizes.append(codec.stored_bytes(encoded, 64))
        errors.append(error(codec, x))
        ranks.append(int(encoded.basis.rank[0]))
    assert sizes[0] < sizes[1]
    assert errors[0] > errors[1]
    grows = switch in ("rank_factor", "variance_ratio")
    assert (ranks[0] < ranks[1]) is grows


def test_row_53_two_levels_against_one_of_as_many_directions():
    """4 x 16 choices leave less than 16 and need fewer bytes than 64 flat ones."""
    x = decaying(1, 4, 512, 64)

    def run(**switches):
        codec = BlockCodec(StreamRecipe(**switches))
        encoded = codec.encode(x)
        left = codec._analyse(x, None)[2].square().mean()
        return float(left), codec.stored_bytes(encoded, 64), error(codec, x)

    two, flat, few = run(clusters=4, second_clusters=16), run(clusters=64), run(clusters=16)
    assert two[0] < few[0]
    assert two[1] < flat[1]
    assert two[2] == pytest.approx(flat[2], rel=0.3)


def test_a_field_that_f16_cannot_hold_is_named():
    with pytest.raises(FieldOverflow, match="the norm of a block reaches 7e\\+04"):
        to_half(torch.tensor([7e4]), "norm")
    with pytest.raises(FieldOverflow, match="mean"):
        BlockCodec(StreamRecipe()).encode(draw(1, 1, 512, 64) + 1e5)
